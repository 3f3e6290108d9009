"""Generate a peer's clips, and time them.

`timing.json` holds what one figure of quality against speed needs: for each clip the seconds of
wall-clock, its share of its batch, and of audio; and the real-time factor, the first over the
second. Text encoding, sampling, decoding and the copy to the CPU count; loading, writing and a
first batch, generated once more than needed, do not.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mllm_audio import wav
from mllm_audio.config import read_json
from mllm_audio.data.requests import Request, read_requests
from mllm_audio.data.timing import TIMING_FILE, rtf, timed
from mllm_audio.files import encode_lines, file_sha256, locked, write_atomic
from mllm_audio.hardware import machine_name
from mllm_audio.peers.pipelines import PEERS, PeerPipeline
from mllm_audio.types import Clip

CAPTIONS, LOCK = "captions.jsonl", ".lock"
HASHED = (".json", ".safetensors", ".model", ".txt")  # files of a model that decide what it does
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class PeerConfig:
    """How to generate."""

    seconds: float = 10.0  # of each clip
    num_inference_steps: int | None = None  # of the diffusion; None: the authors'
    guidance_scale: float | None = None  # 1 is no guidance; None: the authors'
    seed: int = 0  # of the first clip; the next has seed + 1
    batch_size: int = 1  # clips at once
    device: str | None = None  # e.g. cuda or cpu; None: cuda where there is one
    dtype: str = "float32"  # of the weights, one of DTYPES

    def __post_init__(self) -> None:
        """Check what does not depend on the peer."""
        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"found {self.seconds:g} seconds, expected a positive number")
        if self.batch_size < 1 or (self.num_inference_steps or 1) < 1:
            raise ValueError("found a batch or a number of steps below 1, expected 1 or more")
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}; known: {', '.join(DTYPES)}")


@dataclass(frozen=True, kw_only=True)
class PeerReport:
    """What `run_peer` left in the folder."""

    out: Path
    num_clips: int
    rtf: float  # seconds of wall-clock per second of audio, over all clips

    def __str__(self) -> str:
        """Summarise for the terminal."""
        return (
            f"{self.num_clips:,} clips in {self.out}, RTF {self.rtf:.3g}, see {TIMING_FILE} there"
        )


def run_peer(
    name: str, captions: Path, out: Path, model: Path, config: PeerConfig | None = None
) -> PeerReport:
    """Generate a WAV file for each caption into the folder `out`, or continue doing so.

    Clips that are finished, in whole batches, are kept with their timing.

    Args:
        name: a key of PEERS.
        captions: see `read_requests`.
        out: of the files, `captions.jsonl` (a manifest of them) and `timing.json`.
        model: folder of the peer's weights.
        config: see `PeerConfig`.

    Raises:
        ValueError: if the captions or the model are of another form, the peer cannot do what
            `config` says, or `out` holds clips of another model, setting or machine.
        OSError: if a file cannot be read or written.
    """
    config = config or PeerConfig()
    prompts = read_requests(captions, seed=config.seed)
    if not model.is_dir():
        raise ValueError(f"--model {model} is not a folder; type the one that holds the weights")
    options = _options(name, config)
    device = _device(config.device)
    facts = _facts(name, prompts, model, config, options, device)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / LOCK, f"another process writes to {out}; wait, or type another --out"):
        clips = _resume(out, facts)
        size = config.batch_size
        batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        todo = [
            (number, batch)
            for number, batch in enumerate(batches)
            if not all(p.name in clips and (out / _file(p)).is_file() for p in batch)
        ]
        if todo:
            pipeline = PEERS[name].load(model, device, DTYPES[config.dtype])
            if config.seconds > pipeline.max_seconds:
                raise ValueError(
                    f"asked for {config.seconds:g} s, {name} makes {pipeline.max_seconds:g} s at "
                    "most; lower --seconds"
                )
            _generate(pipeline, todo, clips, out, facts, config, options)
        rows = [
            {"audio": _file(prompt), "caption": prompt.caption, "seed": prompt.seed}
            for prompt in prompts
        ]
        write_atomic(out / CAPTIONS, encode_lines(rows))
    return PeerReport(out=out, num_clips=len(prompts), rtf=rtf(list(clips.values())))


def _generate(
    pipeline: PeerPipeline,
    todo: Sequence[tuple[int, Sequence[Request]]],
    clips: dict[str, dict[str, Any]],
    out: Path,
    facts: dict[str, Any],
    config: PeerConfig,
    options: dict[str, Any],
) -> None:
    """Generate batches, write their files and then their timing, which makes them finished."""

    def generate(number: int, batch: Sequence[Request]) -> torch.Tensor:
        first = config.seed + number * config.batch_size
        return pipeline.generate(
            [prompt.caption for prompt in batch],
            seconds=config.seconds,
            seeds=range(first, first + len(batch)),
            **options,
        )

    generate(*todo[0])  # kernels are chosen and caches filled
    for number, batch in tqdm(todo, desc=facts["peer"], unit="batch", dynamic_ncols=True):
        start = time.perf_counter()
        waveforms = generate(number, batch)  # on the CPU: the device is done
        seconds = time.perf_counter() - start
        for prompt, waveform in zip(batch, waveforms, strict=True):
            wav.write(out / _file(prompt), waveform, pipeline.sample_rate)
            clip = Clip(waveform, pipeline.sample_rate)
            clips[prompt.name] = timed(out / _file(prompt), clip, seconds, len(batch))
        _write_timing(out, facts, clips)


def _device(name: str | None) -> torch.device:
    """Choose a device that is there."""
    is_there = torch.cuda.is_available()
    device = torch.device(name or ("cuda" if is_there else "cpu"))
    if device.type == "cuda" and not is_there:
        raise ValueError(f"--device {name}: this machine has no CUDA device; type cpu, or leave it")
    return device


def _options(name: str, config: PeerConfig) -> dict[str, Any]:
    """Fill in the authors' steps and guidance."""
    peer = PEERS[name]
    if peer.num_inference_steps is None and config.num_inference_steps is not None:
        raise ValueError(f"{name} has no diffusion steps; leave out --steps")
    guidance = config.guidance_scale
    return {
        "num_inference_steps": config.num_inference_steps or peer.num_inference_steps,
        "guidance_scale": peer.guidance_scale if guidance is None else guidance,
    }


def _facts(
    name: str,
    prompts: Sequence[Request],
    model: Path,
    config: PeerConfig,
    options: dict[str, Any],
    device: torch.device,
) -> dict[str, Any]:
    """Say what the times depend on; clips of one folder share all of it but the model's place."""
    is_cuda = device.type == "cuda"
    texts = json.dumps([[prompt.name, prompt.caption] for prompt in prompts])
    return {
        "peer": name,
        "model": str(model),
        "fingerprint": _fingerprint(model),
        "captions_sha256": hashlib.sha256(texts.encode()).hexdigest(),
        "seconds": config.seconds,
        **options,
        "seed": config.seed,
        "batch_size": config.batch_size,
        "dtype": config.dtype,
        "device": torch.cuda.get_device_name(device) if is_cuda else device.type,
        "machine": machine_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _fingerprint(model: Path) -> str:
    """Hash the names and contents of a model's files."""
    digest = hashlib.sha256()
    for path in sorted(model.rglob("*")):
        if path.suffix in HASHED and path.is_file():
            digest.update(f"{path.relative_to(model)} {file_sha256(path)}\n".encode())
    return digest.hexdigest()[:16]


def _resume(out: Path, facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Read the timing of finished clips by stem, if they are of the same run."""
    path = out / TIMING_FILE
    if not path.is_file():
        return {}
    before = read_json(path, "type another --out")
    differ = [key for key in facts if key != "model" and before.get(key) != facts[key]]
    if differ:
        key = differ[0]
        raise ValueError(
            f"{out} holds clips with {key} {before.get(key)!r}, found {facts[key]!r}; type another "
            "--out, or delete that folder"
        )
    return {Path(clip["audio"]).stem: clip for clip in before["clips"]}


def _write_timing(out: Path, facts: dict[str, Any], clips: dict[str, dict[str, Any]]) -> None:
    rows = list(clips.values())
    values = {**facts, "rtf": rtf(rows), "clips": rows}
    write_atomic(out / TIMING_FILE, (json.dumps(values, indent=1) + "\n").encode())


def _file(prompt: Request) -> str:
    return f"{prompt.name}.wav"
