"""A tokenizer without weights: low-frequency DCT coefficients of log-mel patches.

Encoding is linear in the log-mel. Decoding inverts the DCT, column by column, then looks for a
waveform whose mel is the decoded one with Griffin-Lim that looks a few columns ahead.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mllm_audio.tokenizers import mel
from mllm_audio.tokenizers.base import AS_RECOMMENDED, StreamConfig, num_columns
from mllm_audio.tokenizers.griffin_lim import GriffinLim


@dataclass(frozen=True, kw_only=True)
class DCTConfig:
    """What is kept of each patch, and how hard the decoder works."""

    patch_size: int = 16  # frames, and mel bands, of one square patch
    num_coefficients: int = 128  # kept per patch in zigzag order; D
    num_iterations: int = 48  # Griffin-Lim steps of `decode`, for each column
    look_ahead: int = 1  # later columns that a column of sound depends on
    momentum: float = 0.99  # of those steps; 0 is plain Griffin-Lim
    seed: int = 0  # of the phase of each frequency that every decode starts from

    def __post_init__(self) -> None:
        if self.patch_size < 1 or mel.NUM_BANDS % self.patch_size:
            raise ValueError(
                f"patch_size is {self.patch_size} but must divide {mel.NUM_BANDS} mel bands; "
                "use 8, 16 or 32"
            )
        if not 1 <= self.num_coefficients <= self.patch_size**2:
            raise ValueError(
                f"num_coefficients is {self.num_coefficients} but a patch has 1 to "
                f"{self.patch_size**2} of them"
            )
        if self.num_iterations < 1 or self.momentum < 0:
            raise ValueError(
                f"num_iterations is {self.num_iterations} and momentum {self.momentum}; "
                "the first must be at least 1, the second not negative"
            )
        if self.look_ahead < 0:
            raise ValueError(f"look_ahead is {self.look_ahead} columns; use 0 or more")


class DCTTokenizer:
    """Log-mel patches of 16 frames x 16 bands <-> their lowest DCT coefficients."""

    name = "dct"
    weights_license = ""  # it has no weights
    sample_rate = mel.SAMPLE_RATE
    hop_length = mel.HOP_LENGTH

    def __init__(self, config: DCTConfig | None = None) -> None:
        self.config = config or DCTConfig()
        self.latent_dim = self.config.num_coefficients
        self.tokens_per_column = mel.NUM_BANDS // self.config.patch_size
        self.samples_per_column = self.config.patch_size * mel.HOP_LENGTH

    @property
    def fingerprint(self) -> str:
        """Short hash of the settings that change latents; those of `decode` do not."""
        settings = {
            "name": self.name,
            "patch_size": self.config.patch_size,
            "num_coefficients": self.config.num_coefficients,
            "order": "zigzag",
            "mel": mel.settings(),
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    def encode(self, waveforms: Tensor) -> Tensor:
        """Encode (B, S) float32 waveforms to (B, N, D) latents, S zero-padded to whole columns."""
        num_samples = waveforms.shape[-1]
        columns = num_columns(self, num_samples)
        missing = columns * self.samples_per_column - num_samples
        log_mel = mel.log_mel(functional.pad(waveforms, (0, missing)))  # (B, F, 64)

        size = self.config.patch_size
        patches = log_mel.unflatten(1, (-1, size)).unflatten(3, (-1, size)).transpose(2, 3)
        basis = dct_matrix(size).to(log_mel)  # (size, size)
        coefficients = basis @ patches @ basis.T  # (B, C, 4, size, size)
        kept = coefficients.flatten(3)[..., self._kept()]  # (B, C, 4, D)
        return kept.flatten(1, 2)  # (B, N, D), a column's bands together, low first

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode (B, N, D) latents to (B, C * samples_per_column) samples.

        Raises:
            ValueError: if N is not a whole number of columns, or D is not `latent_dim`.
        """
        decoder = self.stream()
        return torch.cat([decoder.push(latents), decoder.finish()], dim=1)

    def decode_in(self, dtype: torch.dtype) -> None:
        """Change nothing: there are no weights, and Griffin-Lim needs float32."""

    def stream(self, config: StreamConfig = AS_RECOMMENDED) -> DCTDecoder:
        """Begin to decode latents that arrive in time.

        The samples are those of `decode` of as many rows, bit for bit, unless `look_ahead` is
        another than the tokenizer's own. A chunk is what is waited for: its samples lag behind by
        the look-ahead.
        """
        return DCTDecoder(self, config)

    def decode_log_mel(self, latents: Tensor) -> Tensor:
        """Decode (B, N, D) latents to the (B, F, 64) log-mel they stand for.

        Raises:
            ValueError: if N is not a whole number of columns, or D is not `latent_dim`.
        """
        self.check(latents)
        size = self.config.patch_size
        coefficients = latents.new_zeros((*latents.shape[:2], size * size), dtype=torch.float32)
        coefficients[..., self._kept()] = latents.float()
        coefficients = coefficients.unflatten(1, (-1, self.tokens_per_column))
        basis = dct_matrix(size).to(coefficients)
        patches = basis.T @ coefficients.unflatten(-1, (size, size)) @ basis
        return patches.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (B, F, 64)

    def check(self, latents: Tensor) -> None:
        """Refuse what is not (B, N, D) latents of whole columns."""
        _, num_tokens, dim = latents.shape
        if num_tokens == 0 or num_tokens % self.tokens_per_column or dim != self.latent_dim:
            raise ValueError(
                f"the dct tokenizer decodes (B, N, {self.latent_dim}) latents with N a positive "
                f"multiple of {self.tokens_per_column}, not {tuple(latents.shape)}; "
                "pass whole columns"
            )

    def _kept(self) -> list[int]:
        """Index the kept coefficients in a flattened patch."""
        return zigzag(self.config.patch_size)[: self.config.num_coefficients]


class DCTDecoder:
    """Columns of latents to samples; see `ColumnDecoder`."""

    def __init__(self, tokenizer: DCTTokenizer, streaming: StreamConfig) -> None:
        """Begin a clip, or a batch of them."""
        config, look_ahead = tokenizer.config, streaming.look_ahead
        self._tokenizer = tokenizer
        self._chunk = streaming.chunk_columns or 1
        self._waiting: list[Tensor] = []  # columns of an incomplete chunk
        self._griffin_lim = GriffinLim(
            num_iterations=config.num_iterations,
            look_ahead=config.look_ahead if look_ahead is None else look_ahead,
            momentum=config.momentum,
            seed=config.seed,
        )

    def push(self, latents: Tensor) -> Tensor:
        """Take (B, N, D) latents of whole columns; return the (B, S) samples they settle."""
        self._tokenizer.check(latents)
        # One column at a time however many there are: rounding depends on shapes.
        columns = [*self._waiting, *latents.split(self._tokenizer.tokens_per_column, dim=1)]
        whole = len(columns) - len(columns) % self._chunk
        self._waiting = [column.clone() for column in columns[whole:]]
        nothing = latents.new_zeros(len(latents), 0, dtype=torch.float32)
        return torch.cat([nothing, *map(self._settled, columns[:whole])], dim=1)

    def finish(self) -> Tensor:
        """Return the (B, S) samples that are left."""
        rest = [self._settled(column) for column in self._waiting]
        return torch.cat([*rest, self._griffin_lim.finish()], dim=1)

    def _settled(self, column: Tensor) -> Tensor:
        """Go on by one column, (B, N, D); return the samples that it settles."""
        return self._griffin_lim.push(self._tokenizer.decode_log_mel(column))


def dct_matrix(size: int) -> Tensor:
    """Return the (size, size) float64 orthonormal DCT-II, one basis vector a row."""
    frequency = torch.arange(size, dtype=torch.float64)[:, None]
    position = torch.arange(size, dtype=torch.float64) + 0.5
    basis = torch.cos(math.pi * frequency * position / size) * math.sqrt(2 / size)
    basis[0] *= math.sqrt(0.5)
    return basis


def zigzag(size: int) -> list[int]:
    """List the flat indices of a (time, frequency) patch by rising DCT frequency.

    Diagonals of equal row + column, walked back and forth as JPEG does: (0, 0), (0, 1), (1, 0),
    (2, 0), (1, 1), ...
    """

    def order(index: int) -> tuple[int, int]:
        row, column = divmod(index, size)
        diagonal = row + column
        return diagonal, row if diagonal % 2 else column

    return sorted(range(size * size), key=order)
