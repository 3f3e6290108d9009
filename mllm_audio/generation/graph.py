"""A step of a span as one CUDA graph: all calls of the head and the backbone, in one launch.

Drawing a latent is thousands of small kernels, which a GPU runs faster than a host can launch
them. All that a step reads or writes therefore stays where it is (`Rows.fix`), also what it counts
by; the first step is run, the second captured, and the others replay it. Whether a span may end is
read between steps. A capture waits for the device, once a span, and from then on attention reads
all the slots that the span may come to need. Spans whose latents take different numbers of steps,
and backbones whose cache is not written in place, are decoded without.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from mllm_audio.generation.cache import holds_all
from mllm_audio.generation.rows import Rows
from mllm_audio.heads.base import SamplingConfig

SWITCH = "MLLM_AUDIO_CUDA_GRAPH"  # environment variable: 0 decodes without graphs
LEAST_STEPS = 3  # of a span that is worth it: one is run, one captured, one replayed

Capture = Callable[[Callable[[], None]], Callable[[], None]]

_allowed: ContextVar[bool] = ContextVar("allowed", default=True)
_failed: set[torch.device] = set()  # where a step could not be captured


@contextmanager
def without_graphs() -> Iterator[None]:
    """Decode without graphs for as long as the context lasts, for who watches parts of a step."""
    token = _allowed.set(False)
    try:
        yield
    finally:
        _allowed.reset(token)


def capture_on(device: torch.device) -> Capture | None:
    """Find what captures a function on this device, so that calling the result repeats it."""
    if device.type != "cuda" or os.environ.get(SWITCH) == "0" or device in _failed:
        return None
    return partial(_cuda_graph, device) if _allowed.get() else None


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Make the stream to capture on: one, as cuBLAS keeps memory for every stream it has seen."""
    return torch.cuda.Stream(device)


def _cuda_graph(device: torch.device, step: Callable[[], None]) -> Callable[[], None]:
    """Capture the kernels of `step`, which do not run yet."""
    graph, stream = torch.cuda.CUDAGraph(), _side_stream(device)
    # The outer context chooses the device, and leaves the stream even where capturing fails; other
    # threads, which decode sound, may use the device meanwhile.
    with (
        torch.cuda.stream(stream),
        torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
    ):
        step()
    return graph.replay


def is_uniform(samplings: Sequence[SamplingConfig], count: int) -> bool:
    """Tell whether these latents, `count` a step, are enough for a graph and drawn alike."""
    kinds = {replace(sampling, guidance_scale=1.0) for sampling in samplings}
    return len(kinds) == 1 and len(samplings) >= (LEAST_STEPS + 1) * count


@dataclass
class GraphedStep:
    """The step of a span that draws k latents of every row and asks for the next k."""

    rows: Rows
    capture: Capture
    seeds: Tensor  # (R,) int64
    sampling: SamplingConfig
    scales: Tensor | None  # (N, 1) of all latents; None where they are alike
    first: Tensor  # () int64, content position of the next latent to be drawn
    latents: Tensor  # (R, k, D), those drawn last
    length: int  # elements of a row before the first step
    taken: int = 0
    replay: Callable[[], None] | None = None

    @classmethod
    def begin(
        cls,
        rows: Rows,
        seeds: Tensor,
        samplings: Sequence[SamplingConfig],
        scales: Tensor,
        asked: range,
    ) -> GraphedStep | None:
        """Prepare for the steps from `asked` on.

        Args:
            rows: that were asked so.
            seeds: (R,) int64.
            samplings: of all latents from the first asked for to the last of the span.
            scales: (N, 1), the guidance scales of all latents of the span.
            asked: target positions of the first step.

        Returns:
            None where no graph is made: not on CUDA, a cache that cannot be fixed, too few steps,
            or latents that are drawn differently.
        """
        capture, count = capture_on(rows.hidden.device), len(asked)
        if capture is None or not is_uniform(samplings, count) or not holds_all(rows.cache):
            return None
        is_constant = len({sampling.guidance_scale for sampling in samplings}) == 1
        length = rows.positions.shape[1]
        rows.fix(len(samplings))
        shape = (len(seeds), count, rows.model.audio.config.latent_dim)
        return cls(
            rows=rows,
            capture=capture,
            seeds=seeds,
            sampling=samplings[0],
            scales=None if is_constant else scales,
            first=torch.full((), asked.start, device=seeds.device),
            latents=torch.zeros(shape, device=seeds.device),
            length=length,
        )

    def take(self) -> Tensor:
        """Draw k latents of every row and feed them; (R, k, D)."""
        if self.taken == 1:
            self.replay = self._captured()
        (self.replay or self._step)()
        self.taken += 1
        return self.latents.clone()

    def end(self) -> None:
        """Leave the rows as steps without a graph would have left them."""
        self.rows.unfix(self.length + self.taken * self.latents.shape[1])

    def _step(self) -> None:
        """Draw and feed; nothing here depends on the number of the step but by tensors."""
        count = self.latents.shape[1]
        asked = self.first + torch.arange(count, device=self.first.device)
        sampling = self.sampling
        if self.scales is not None:
            sampling = replace(sampling, guidance_scale=self.scales[asked])
        latents = self.rows.draw(self.seeds, sampling, asked)
        self.rows.feed_latents(latents, self.first, asked + count)
        self.latents.copy_(latents)
        self.first += count

    def _captured(self) -> Callable[[], None] | None:
        """Capture a step; where that fails, say so and never try again on this device."""
        try:
            return self.capture(self._step)
        except RuntimeError as error:
            # What failed comes first; torch then fails to end the capture, and keeps its memory.
            reason = str(error.__context__ or error).strip().partition("\n")[0]
            _failed.add(self.first.device)
            warnings.warn(
                f"a step of this model cannot be captured as a CUDA graph ({reason}), so decoding "
                f"is slower and memory of the device may stay taken; {SWITCH}=0 in the "
                "environment spares this attempt",
                stacklevel=2,
            )
            return None
