"""Hash files and write them so that a crash cannot leave half of one."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


def file_sha256(path: Path) -> str:
    """Hash a file of any size, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def encode_lines(values: Sequence[dict[str, Any]]) -> bytes:
    """Turn dicts into JSON lines, UTF-8."""
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()


@contextmanager
def locked(path: Path, busy: str) -> Iterator[TextIO]:
    """Hold a lock file for this process; give it opened to read and write.

    Args:
        path: of the file, made if it is not there.
        busy: what to say if another process holds it.

    Raises:
        ValueError: `busy`.
        OSError: if it cannot be made, or the file system has no locks.
    """
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(busy) from error
        except OSError as error:
            raise OSError(
                error.errno,
                f"{path} cannot be locked ({error.strerror}), expected a file system with flock; "
                "type an --out on another one",
            ) from error
        yield lock


def share(path: Path) -> None:
    """Give a file the permissions of any new one: safetensors writes for its user alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves the old one, the new one or none, never a part of it.

    Raises:
        OSError: if the disk is full or refuses; nothing is left behind.
    """
    # A fixed name: what a killed run leaves is overwritten by the run that continues it.
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        # The rename itself is durable only when the folder has reached the disk.
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"cannot write {path} ({error.strerror}); free space or fix permissions and run the "
            "same command again, what is finished is kept",
        ) from error
