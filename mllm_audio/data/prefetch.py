"""Prepare what comes next while the step runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
_END: Any = object()


def prefetched(items: Generator[T], depth: int) -> Generator[T]:
    """Yield `items`, the next `depth` of them made in a background thread.

    Order and content do not depend on `depth`; 0 makes each item when it is asked for. What making
    an item raises is raised where the item is asked for. Closing this closes `items`, and no thread
    is left behind.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as worker:
        ahead = deque(worker.submit(next, items, _END) for _ in range(depth))
        try:
            while True:
                ahead.append(worker.submit(next, items, _END))
                item = ahead.popleft().result()
                if item is _END:
                    return
                yield item
        finally:
            for future in ahead:
                future.cancel()
            worker.shutdown()  # waits for an item that is half made
            items.close()
