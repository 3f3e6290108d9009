"""Files of captions to sounds: one per row, named after its recording, continued if interrupted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mllm_audio import wav
from mllm_audio.config import read_json, to_dict
from mllm_audio.data.manifest import SPLITS, check_split, read_rows
from mllm_audio.files import encode_lines, file_sha256, write_atomic
from mllm_audio.generation.decode import GenerationConfig
from mllm_audio.generation.voice import Voice

SETTINGS_FILE = "generation.json"  # what a folder was generated with


@dataclass(frozen=True, kw_only=True)
class Request:
    """A sound to make."""

    caption: str
    name: str  # of the file, without suffix: that of the recording it is compared with
    seed: int
    row: dict[str, Any]  # of the file of captions


def read_requests(
    path: Path, *, seed: int = 0, split: str | None = None, limit: int | None = None
) -> list[Request]:
    """Read the rows of a manifest, or the lines of a .txt file, as requests.

    A row's sound is named after its `audio`, or after its number where it names none; row i has
    seed `seed + i`.

    Args:
        path: .jsonl or .csv with `caption` and perhaps `audio` and `split`, or .txt.
        seed: of the first row.
        split: take the rows of this split only.
        limit: take at most so many.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a row has no caption, two have one name, or no row is left.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    requests: dict[str, Request] = {}
    for number, (where, row) in enumerate(_rows(path)):
        if split is not None and check_split(where, row) != split:
            continue
        caption = row.get("caption")
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"{where}: caption is {caption!r}, expected text")
        name = Path(str(row["audio"])).stem if row.get("audio") else f"{number:05d}"
        if name in requests:
            raise ValueError(f"{where}: a second row named {name!r}, expected one per recording")
        requests[name] = Request(caption=caption, name=name, seed=seed + len(requests), row=row)
        if len(requests) == limit:
            break
    if not requests:
        raise ValueError(f"{path} has no rows{f' of split {split}' if split else ''}")
    return list(requests.values())


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each row stands, and its columns."""
    if path.suffix == ".txt":
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file; check the path")
        for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if text.strip():
                yield f"{path}:{line}", {"caption": text.strip()}
        return
    for line, row in read_rows(path):
        yield f"{path}:{line}", row


def generate_requests(
    voice: Voice,
    run: Path,
    requests: Sequence[Request],
    out: Path,
    config: GenerationConfig,
    batch_size: int = 32,
) -> list[Path]:
    """Write the sound of each request to `out/NAME.wav`, and `captions.jsonl` beside them.

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
            latents = voice.generate_latents(captions, config, seeds)
            for (_, path), row in zip(batch, latents, strict=True):
                clip = voice.to_clip(row, config)
                partial = path.with_name(f".{path.name}")
                wav.write(partial, clip.waveform, clip.sample_rate)
                partial.replace(path)
                bar.update()
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
