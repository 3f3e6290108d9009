"""Decode columns that arrive in time in overlapping windows, for decoders that see a whole clip."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FADE_SECONDS = 0.02  # over which one window's sound gives way to the next one's


class WindowedDecoder:
    """Columns of latents to samples, a window at a time; see `ColumnDecoder`.

    Each window decodes `chunk_columns` columns that are handed out, `context` columns before them
    and `look_ahead` behind. A clip that fits in one window comes out as `decode` has it; a longer
    one differs by what `decode` makes of columns outside the window.
    """

    def __init__(
        self,
        decode: Callable[[Tensor], Tensor],
        *,
        tokens_per_column: int,
        samples_per_column: int,
        sample_rate: int,
        chunk_columns: int,
        context: int,
        look_ahead: int,
    ) -> None:
        """Begin a clip, or a batch of them.

        Args:
            decode: maps (B, N, D) latents of whole columns to (B, S) samples.
            tokens_per_column: latents of one column.
            samples_per_column: samples of one column.
            sample_rate: Hz.
            chunk_columns: handed out of each window; each costs a window's work / chunk_columns.
            context: columns before them.
            look_ahead: columns behind them; without any, chunks meet without a fade.

        Raises:
            ValueError: if there is no chunk, or a negative number of columns.
        """
        if chunk_columns < 1 or context < 0 or look_ahead < 0:
            raise ValueError(
                f"windows have chunk_columns={chunk_columns}, context={context} and "
                f"look_ahead={look_ahead}; use at least 1, 0 and 0"
            )
        self._decode = decode
        self._tokens_per_column, self._samples_per_column = tokens_per_column, samples_per_column
        self._chunk, self._context, self._look_ahead = chunk_columns, context, look_ahead
        self._fade = round(FADE_SECONDS * sample_rate) if look_ahead else 0
        self._columns: list[Tensor] = []  # (B, tokens_per_column, D) each: context, then open ones
        self._num_settled = 0  # of them
        self._before: Tensor | None = None  # (B, fade) what the last window made of the next chunk

    def push(self, latents: Tensor) -> Tensor:
        """Take (B, N, D) latents of whole columns; return the (B, S) samples they settle."""
        self._columns += latents.split(self._tokens_per_column, dim=1)
        self._nothing = latents.new_zeros(len(latents), 0, dtype=torch.float32)
        parts = [self._nothing]
        while len(self._columns) - self._num_settled >= self._chunk + self._look_ahead:
            parts.append(self._window(self._chunk))
        return torch.cat(parts, dim=1)

    def finish(self) -> Tensor:
        """Return the (B, S) samples that are left."""
        num_open = len(self._columns) - self._num_settled
        return self._window(num_open) if num_open else self._nothing

    def _window(self, num_columns: int) -> Tensor:
        """Settle the next columns, with those before and behind as context."""
        end = self._num_settled + num_columns
        window = self._columns[: end + self._look_ahead]
        waveforms = self._decode(torch.cat(window, dim=1))
        start, stop = (n * self._samples_per_column for n in (self._num_settled, end))
        settled, behind = waveforms[:, start:stop], waveforms[:, stop : stop + self._fade]
        if self._before is not None and self._fade:
            rising = torch.linspace(0, 1, self._fade + 2, device=settled.device)[1:-1]
            faded = torch.lerp(self._before, settled[:, : self._fade], rising)
            settled = torch.cat([faded, settled[:, self._fade :]], dim=1)
        self._before = behind.clone()
        self._columns = self._columns[max(0, end - self._context) :]
        self._num_settled = min(end, self._context)
        return settled.clone()
