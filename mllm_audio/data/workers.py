"""Encode shards in processes of their own, which end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from mllm_audio.data.encode import Job, Part, encode_parts
from mllm_audio.tokenizers import load_tokenizer


def encode_in_workers(
    job: Job, todo: Sequence[Part], num_workers: int, advance: Callable[[int], Any]
) -> None:
    """Encode shards in up to `num_workers` processes, calling `advance` with counts of rows.

    Raises:
        RuntimeError: if a process dies.
        Exception: what a process raised, e.g. OSError.
    """
    # Spawned, not forked: a fork copies the locks of torch's threads, which no longer run.
    context = multiprocessing.get_context("spawn")
    num_workers = min(num_workers, len(todo))
    counts = context.RawArray("q", num_workers)  # one slot per writer, so no lock is needed
    failures = context.SimpleQueue()
    workers: list[BaseProcess] = [
        context.Process(
            target=_work, args=(job, todo[i::num_workers], counts, i, failures), daemon=True
        )
        for i in range(num_workers)
    ]
    seen = 0
    try:
        for worker in workers:
            _start(worker)
        while True:
            running = [worker.sentinel for worker in workers if worker.is_alive()]
            advance(sum(counts) - seen)
            seen = sum(counts)
            if not failures.empty():
                raise failures.get()
            for worker in workers:
                if worker.exitcode:
                    raise RuntimeError(
                        f"a worker process ended with exit code {worker.exitcode}, expected 0 "
                        "(-9 is often a lack of memory); run the same command with fewer workers, "
                        "finished shards are kept"
                    )
            if not running:
                return
            wait(running, timeout=0.2)
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
                worker.join()


def _start(worker: BaseProcess) -> None:
    """Start a process that never sees Ctrl-C, which reaches the whole process group.

    The parent alone answers it and ends the workers. The child inherits the mask, so it holds even
    while Python starts there and imports torch; here it only delays Ctrl-C. Python 3.11's resource
    tracker would undo the mask, but the queue has started it before.
    """
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        worker.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def _work(job: Job, todo: Sequence[Part], counts: Any, slot: int, failures: Any) -> None:
    """Encode shards in a process of its own."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()

    def advance() -> None:
        counts[slot] += 1

    try:
        encode_parts(job, todo, load_tokenizer(job.tokenizer_spec), advance)
    except Exception as error:
        failures.put(error)


def _exit_with_parent() -> None:
    """End this process when the parent was killed, which ends no worker by itself."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
