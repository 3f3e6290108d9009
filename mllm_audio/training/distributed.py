"""The processes of a run, and what they tell each other beside gradients."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among those of a run; alone by default.

    Messages go through host memory, so that they never wait for an accelerator.
    """

    rank: int = 0  # from 0, over all nodes
    size: int = 1  # processes
    group: Any = None  # gloo process group of all of them; None when alone

    @property
    def is_first(self) -> bool:
        """Tell whether this process writes what there is one of: logs, exports, the run file."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Add up numbers over all processes, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        with lost_contact():
            dist.all_reduce(total, group=self.group)
        return total.tolist()

    def first(self, compute: Callable[[], T]) -> T:
        """Compute a value in the first process and hand it to all of them.

        Raises:
            Exception: what `compute` raised, in every process: none is left waiting.
        """
        if self.size == 1:
            return compute()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = compute()
            except Exception as error:
                outcome[1] = _sendable(error)
        with lost_contact():
            dist.broadcast_object_list(outcome, src=0, group=self.group)
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    def each(self, compute: Callable[[], None]) -> None:
        """Do something in every process, and wait until all have done it.

        Raises:
            Exception: its own, or the first that another process met.
        """
        if self.size == 1:
            compute()
            return
        mine: Exception | None = None
        try:
            compute()
        except Exception as error:
            mine = error
        errors: list[Any] = [None] * self.size
        with lost_contact():
            dist.all_gather_object(errors, mine and _sendable(mine), group=self.group)
        for met in [mine, *errors]:
            if met is not None:
                raise met


@contextmanager
def lost_contact() -> Iterator[None]:
    """Say in one line that another process ended, or takes too long.

    Raises:
        RuntimeError: in place of what gloo or NCCL say of it.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in ("peer", "timed out", "gloo", "nccl")):
            raise
        raise RuntimeError(
            f"lost contact with another process ({str(error).splitlines()[0][:120]}); see what it "
            "said, or raise train.timeout_seconds if it was slow; the run resumes from its last "
            "checkpoint"
        ) from error


def _sendable(error: Exception) -> Exception:
    """Keep an error that survives pickling, and the words of another."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
