"""Files of captions to sounds: one per row, named after its recording, continued if interrupted."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mllm_audio import wav
from mllm_audio.config import read_json, to_dict
from mllm_audio.data.requests import Request
from mllm_audio.data.timing import add_timing, timed
from mllm_audio.files import encode_lines, file_sha256, write_atomic
from mllm_audio.generation.decode import GenerationConfig
from mllm_audio.generation.voice import Voice

SETTINGS_FILE = "generation.json"  # what a folder was generated with


def generate_requests(
    voice: Voice,
    run: Path,
    requests: Sequence[Request],
    out: Path,
    config: GenerationConfig,
    batch_size: int = 32,
) -> list[Path]:
    """Write the sound of each request to `out/NAME.wav`, and `captions.jsonl` beside them.

    `timing.json` keeps how long each took: its share of its batch, loading and writing left out.
    Sounds that are there are kept, if they were made with the same model, captions and settings.

    Args:
        voice: the model.
        run: folder that it is from.
        requests: with names of their own.
        out: folder, made if absent.
        config: of generation.
        batch_size: sounds made at once; no sound depends on it.

    Raises:
        ValueError: if `out` holds sounds made otherwise.
        OSError: if it cannot be written; the same call continues.
    """
    out.mkdir(parents=True, exist_ok=True)
    _check_settings(out, _settings(run, requests, config))
    paths = [out / f"{request.name}.wav" for request in requests]
    todo = [pair for pair in zip(requests, paths, strict=True) if not pair[1].is_file()]
    with tqdm(total=len(requests), initial=len(requests) - len(todo), unit="clip") as bar:
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            captions = [request.caption for request, _ in batch]
            seeds = [request.seed for request, _ in batch]
            began = time.perf_counter()
            latents = voice.generate_latents(captions, config, seeds)
            clips = [voice.to_clip(row, config) for row in latents]
            seconds = time.perf_counter() - began
            for (_, path), clip in zip(batch, clips, strict=True):
                partial = path.with_name(f".{path.name}")
                wav.write(partial, clip.waveform, clip.sample_rate)
                partial.replace(path)
            made = [path for _, path in batch]
            add_timing(
                out, [timed(p, c, seconds, len(batch)) for p, c in zip(made, clips, strict=True)]
            )
            bar.update(len(batch))
    rows = [
        {**request.row, "audio": path.name, "caption": request.caption, "seed": request.seed}
        for request, path in zip(requests, paths, strict=True)
    ]
    write_atomic(out / "captions.jsonl", encode_lines(rows))
    return paths


def _settings(run: Path, requests: Sequence[Request], config: GenerationConfig) -> dict[str, Any]:
    """Say what decides the sounds."""
    weights = sorted([*run.glob("*.safetensors"), *run.glob("config.json")])
    return {
        "weights": {path.name: file_sha256(path) for path in weights},
        "requests": [[request.name, request.caption, request.seed] for request in requests],
        "generation": to_dict(config),
    }


def _check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Keep the settings of a new folder, or refuse one that was begun with others."""
    path = out / SETTINGS_FILE
    settings = json.loads(json.dumps(settings))
    if path.is_file():
        found = read_json(path, f"delete {out}")
        changed = [key for key, value in settings.items() if found.get(key) != value]
        if changed:
            raise ValueError(
                f"{out} was generated with other {' and '.join(changed)}; type another --out, or "
                "delete that folder"
            )
        return
    if any(out.glob("*.wav")):
        raise ValueError(f"{out} holds sounds but no {SETTINGS_FILE}; type another --out")
    write_atomic(path, (json.dumps(settings, indent=1) + "\n").encode())
