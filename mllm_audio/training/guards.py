"""What ends a run early, in one line: a signal, numbers out of range, a lack of memory."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from mllm_audio.modality import AudioModality
from mllm_audio.training.config import TrainConfig
from mllm_audio.training.engine import StepResult
from mllm_audio.types import Batch


class TrainingStoppedError(RuntimeError):
    """Training met numbers it must not continue from."""


class StopSignal:
    """Turn SIGINT, SIGTERM and SIGHUP into a request that the loop honours between two steps.

    An interrupt inside a step would leave weights, moments and averages of different steps.
    """

    def __enter__(self) -> StopSignal:
        self.requested = False
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
            numbers.append(signal.SIGHUP)
        self._before = {n: signal.signal(n, self._request) for n in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, *_: object) -> None:
        self.requested = True


def check_range(audio: AudioModality, batch: Batch, limit: float) -> None:
    """Stop before a latent far outside the training statistics reaches the weights."""
    if not len(batch.latents):
        return
    largest = audio.normalise(batch.latents).abs().max()
    if not float(largest) <= limit:
        raise TrainingStoppedError(
            f"a latent {float(largest):.3g} stds from the mean (limit {limit:g}) in one of: "
            f"{name_list([batch])}; check these files, or raise train.max_abs_latent"
        )


def check_finite(result: StepResult, batches: Sequence[Batch], step: int) -> None:
    """Stop at the first loss or gradient that is not a number, before it reached a checkpoint."""
    if not result.is_finite:
        raise TrainingStoppedError(
            f"step {step + 1}: loss {result.total:.4g}, gradient norm {result.grad_norm:.4g}, on: "
            f"{name_list(batches)}; check these files, or lower train.optim.lr; the run resumes "
            "from its last checkpoint"
        )


def name_list(batches: Sequence[Batch], most: int = 8) -> str:
    """Name the clips of a process's micro-batches, the first `most` of them."""
    names = [name for batch in batches for name in batch.names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@contextmanager
def memory_advice(config: TrainConfig, rows: int, repeats: int) -> Iterator[None]:
    """Say on a lack of memory which settings to lower.

    Args:
        config: of the run.
        rows: of a micro-batch.
        repeats: noise draws per latent in the head.

    Raises:
        RuntimeError: in place of the allocator's own.
    """
    try:
        yield
    except RuntimeError as error:
        known = ("out of memory", "can't allocate memory", "cannot allocate memory")
        text = str(error).lower()
        if not (isinstance(error, torch.OutOfMemoryError) or any(k in text for k in known)):
            raise
        also = "" if config.gradient_checkpointing else ", set train.gradient_checkpointing=true"
        raise RuntimeError(
            f"out of memory in a micro-batch of {rows} rows; lower train.micro_batch_size (now "
            f"{rows}), audio.head.batch_multiplier (now {repeats}) or the longest row "
            f"(audio.max_tokens, data.pack_tokens){also}, or take a higher ZeRO stage; the run "
            "resumes from its last checkpoint"
        ) from error
