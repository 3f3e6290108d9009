"""The files of a prepared folder, here or behind a URL, each checked before it is used.

A folder of this machine is read in place. From a URL (anything fsspec opens: s3, gs, http, ...) a
file is fetched whole, at its first use, into a cache folder that all processes and runs of a
machine share: files are named by their checksums, a lock lets one process fetch what several ask
for, and those used longest ago make room for others.

Each process hashes a file once, when it first uses it: 34 MB, 512 clips of 10.24 s, in 0.02 to
0.1 s, and in the background where `stream.py` reads ahead. Hashing all of a large corpus before the
first step would take minutes; trusting sizes and dates would let damage through.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import math
import os
import tempfile
import time
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Protocol

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.registry import known_implementations

from mllm_audio.data.config import DataConfig
from mllm_audio.data.conversations import CONVERSATIONS
from mllm_audio.data.shards import LATENTS, PROMPTS, ROWS, ShardIndex, ShardInfo, read_index
from mllm_audio.files import file_sha256

ATTEMPTS = 4  # to fetch a file, 1, 2 and 4 seconds apart
BLOCKS_CACHED = 3  # what is read, what was left over from before, and what comes next


class PreparedFolder(Protocol):
    """A complete prepared folder."""

    @property
    def index(self) -> ShardIndex:
        """What it holds."""

    def has_conversations(self) -> bool:
        """Tell whether it holds conversations, not captions."""

    def file(self, shard: ShardInfo, suffix: str) -> Path:
        """Return a file of a shard on this machine, equal to its checksum in the index.

        Raises:
            ValueError: if it is missing or damaged, naming it and how to repair it.
            OSError: if it cannot be fetched or kept.
        """


def open_folder(location: Path | str, config: DataConfig) -> PreparedFolder:
    """Open a prepared folder by its path or URL.

    Raises:
        FileNotFoundError: if it holds no index.
        ValueError: if the index is damaged or not complete, the URL is of an unknown kind, or the
            cache is too small.
        ImportError: if a package for this kind of URL is missing, naming it.
    """
    if not is_url(location):
        return LocalFolder(Path(location))
    folder = RemoteFolder(str(location).rstrip("/"), cache_folder(config), config.cache_gib)
    folder.check_cache(config.shuffle_shards)
    return folder


def is_url(location: Path | str) -> bool:
    """Tell a URL from a path."""
    return "://" in str(location)


def cache_folder(config: DataConfig) -> Path:
    """Say where shards that are read from URLs are kept."""
    if config.cache_dir is not None:
        return Path(config.cache_dir).expanduser()
    return Path(tempfile.gettempdir()) / f"mllm-audio-{os.getuid()}"


class LocalFolder:
    """A prepared folder of this machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index = read_index(path)
        self._checked: set[Path] = set()

    def has_conversations(self) -> bool:
        """Tell whether it holds conversations, not captions."""
        return (self.path / CONVERSATIONS).is_file()

    def file(self, shard: ShardInfo, suffix: str) -> Path:
        """Check a file of a shard at its first use."""
        path = (self.path / shard.file).with_suffix(suffix)
        if path not in self._checked:
            if not _is_whole(path, shard, suffix):
                raise ValueError(
                    f"{path} is missing or differs from its checksum in index.json; repair it with "
                    f"`{self.index.command(self.path)}`"
                )
            self._checked.add(path)
        return path


class RemoteFolder:
    """A prepared folder behind a URL, and the cache on this machine."""

    def __init__(self, url: str, cache: Path, cache_gib: float) -> None:
        self.url, self.cache, self.cache_gib = url, cache, cache_gib
        self._files, self._root = _file_system(url)
        self._checked: set[Path] = set()

    @cached_property
    def index(self) -> ShardIndex:
        """Read the index."""
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "index.json"
            try:
                copy.write_bytes(self._files.cat_file(f"{self._root}/index.json"))
                return read_index(folder)
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"{self.url} holds no index.json, expected a prepared folder; upload all that "
                    "`mllm-audio prepare MANIFEST --out FOLDER` wrote"
                ) from error
            except ValueError as error:
                text = str(error).replace(folder, "FOLDER")
                raise ValueError(f"{self.url}: {text}, and upload FOLDER again") from error
            except Exception as error:  # each kind of file system raises its own
                raise OSError(
                    f"{self.url}/index.json cannot be read ({error!r}); check the network and the "
                    "access rights"
                ) from error

    def has_conversations(self) -> bool:
        """Tell whether it holds conversations, not captions."""
        return bool(self._files.exists(f"{self._root}/{CONVERSATIONS}"))

    def check_cache(self, shuffle_shards: int) -> None:
        """Refuse a cache that drops shards before they are used."""
        per_token = 2 * self.index.latent_dim
        sizes = [per_token * shard.num_tokens + shard.prompts_size for shard in self.index.shards]
        needed = min(sum(sizes), BLOCKS_CACHED * shuffle_shards * max(sizes)) / 2**30
        if needed > self.cache_gib:
            raise ValueError(
                f"data.cache_gib={self.cache_gib:g} is too small for {BLOCKS_CACHED} x "
                f"data.shuffle_shards={shuffle_shards} shards of {self.url}; set "
                f"data.cache_gib={math.ceil(needed)}, or lower data.shuffle_shards"
            )

    def file(self, shard: ShardInfo, suffix: str) -> Path:
        """Fetch a file of a shard, unless the cache has it."""
        name = hashlib.sha256((shard.sha256 + shard.rows_sha256).encode()).hexdigest()
        path = self.cache / (name + suffix)
        while True:
            if path not in self._checked or not path.is_file():
                self.cache.mkdir(mode=0o700, parents=True, exist_ok=True)
                with (self.cache / f"{name}.lock").open("w") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    if not _is_whole(path, shard, suffix):
                        self._fetch(shard, suffix, path)
                        self._make_room()
                self._checked.add(path)
            with suppress(FileNotFoundError):  # another process made room in between
                os.utime(path)  # used last
                return path

    def _fetch(self, shard: ShardInfo, suffix: str, path: Path) -> None:
        """Copy a file to `path`, which appears whole or not at all."""
        file = Path(shard.file).with_suffix(suffix).as_posix()
        temporary = path.with_name(path.name + ".tmp")
        for attempt in range(ATTEMPTS):
            try:
                self._files.get_file(f"{self._root}/{file}", str(temporary))
            except FileNotFoundError as error:
                raise ValueError(
                    f"{self.url}/{file} is missing; upload the folder again"
                ) from error
            except Exception as error:  # each kind of file system raises its own
                if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                    raise OSError(
                        error.errno,
                        f"no space left in {self.cache}; set data.cache_dir, or lower "
                        f"data.cache_gib={self.cache_gib:g}",
                    ) from error
                failure = f"cannot be read ({error!r}); check the network and the access rights"
            else:
                if _is_whole(temporary, shard, suffix):
                    temporary.replace(path)
                    return
                failure = "differs from its checksum in index.json; upload the folder again"
            if attempt + 1 < ATTEMPTS:
                time.sleep(2**attempt)
        raise OSError(f"{self.url}/{file} {failure}")

    def _make_room(self) -> None:
        """Remove the files used longest ago; a process that has one open keeps it."""
        stats = []
        for path in self.cache.iterdir():
            with suppress(FileNotFoundError):  # another process makes room too
                if path.suffix != ".lock":
                    stats.append((path.stat(), path))
        excess = sum(stat.st_size for stat, _ in stats) - self.cache_gib * 2**30
        for stat, path in sorted(stats, key=lambda pair: pair[0].st_mtime):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= stat.st_size


def _is_whole(path: Path, shard: ShardInfo, suffix: str) -> bool:
    checksums = {LATENTS: shard.sha256, ROWS: shard.rows_sha256, PROMPTS: shard.prompts_sha256}
    expected = checksums[suffix]
    return path.is_file() and file_sha256(path) == expected


def _file_system(url: str) -> tuple[AbstractFileSystem, str]:
    """Open the file system of a URL, and name the place in it.

    Raises:
        ImportError: naming the package to install.
        ValueError: for an unknown kind of URL.
    """
    try:
        return url_to_fs(url)
    except ImportError as error:
        protocol = url.split("://")[0]
        package = known_implementations[protocol]["class"].split(".")[0]
        if package == "fsspec":
            package = f"'fsspec[{protocol.replace('https', 'http')}]'"
        raise ImportError(
            f"{url} needs a package ({error}); type  pip install {package}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{url}: {error}; expected s3://, gs://, http:// or a path") from error
