"""Features of clips, kept on the disk by content: what was heard once is not heard again."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tqdm import tqdm

from mllm_audio.evaluation.base import ClipFeatures, Embedder
from mllm_audio.evaluation.clips import MIN_SECONDS, few, is_silent, read_clip, to_rate
from mllm_audio.files import file_sha256, write_atomic

FORMAT = 1  # raise it when clips are read or embedded in another way


def resampler() -> str:
    """Name what changes sample rates, for reports and cache keys."""
    return f"soxr {version('soxr')}, high quality"


def extract(
    embedder: Embedder,
    clips: dict[str, Path],
    cache: Path,
    batch_size: int = 16,
    progress: bool = True,
    allow_silent: bool = False,
) -> list[ClipFeatures]:
    """Give the features of clips in order, from the cache where it has them.

    Each batch is on the disk before the next is read: interrupted, the same call continues.

    Args:
        embedder: hears them.
        clips: path of each name.
        cache: folder of features, may be shared by any embedders and folders of clips.
        batch_size: clips heard at once.
        progress: show a bar.
        allow_silent: hear silent clips too.

    Raises:
        ValueError: if clips are silent and must not be, broken or not finite, naming the first.
    """
    folder = cache / _key(embedder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{file_sha256(path)}.safetensors" for name, path in clips.items()}
    missing = [name for name, file in files.items() if not file.is_file()]
    problems: list[str] = []
    silent: dict[str, ClipFeatures] = {}
    with tqdm(
        desc=f"{embedder.name} hears {next(iter(clips.values())).parent.name}",
        total=len(clips),
        initial=len(clips) - len(missing),
        unit="clip",
        disable=not progress,
    ) as bar:
        for start in range(0, len(missing), batch_size):
            names = missing[start : start + batch_size]
            waveforms = {}
            for name in names:
                try:
                    clip = read_clip(clips[name], allow_silent=allow_silent)
                    waveforms[name] = to_rate(clip, embedder.sample_rate)
                except ValueError as error:
                    problems.append(str(error))
                else:
                    if is_silent(clip):  # not kept: elsewhere it may be an error
                        silent[name] = embedder.embed([waveforms.pop(name)])[0]
            for name, heard in zip(waveforms, _embed(embedder, waveforms), strict=True):
                if heard.features.isfinite().all():
                    write_atomic(files[name], _encode(heard))
                else:
                    problems.append(
                        f"{embedder.name} gives NaN for {clips[name]}; generate it again"
                    )
            bar.update(len(names))
    if problems:
        raise ValueError(
            f"{len(problems)} of {len(clips)} clips cannot be measured: {few(problems, '; ')}; "
            "or name the others with --ids"
        )
    return [silent[name] if name in silent else _load(files[name]) for name in clips]


def _embed(embedder: Embedder, waveforms: dict[str, torch.Tensor]) -> list[ClipFeatures]:
    return embedder.embed(list(waveforms.values())) if waveforms else []


def _key(embedder: Embedder) -> str:
    """Name the folder of an embedder's features by all that they depend on but the clip."""
    text = f"{FORMAT} {embedder.fingerprint} {embedder.sample_rate} {resampler()} {MIN_SECONDS}"
    return f"{embedder.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _encode(heard: ClipFeatures) -> bytes:
    tensors = {"features": heard.features.contiguous()}
    if heard.logits is not None:
        tensors["logits"] = heard.logits.contiguous()
    return save(tensors)


def _load(file: Path) -> ClipFeatures:
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); delete it") from error
    return ClipFeatures(tensors["features"], tensors.get("logits"))
