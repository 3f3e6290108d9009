"""Generated clips to files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

from tqdm import tqdm

from mllm_audio import wav
from mllm_audio.generation.decode import GenerationConfig, token_limits
from mllm_audio.generation.voice import Voice

SUFFIXES = (".wav", ".flac")
OTHER_AUDIO = (".aac", ".aif", ".aiff", ".m4a", ".mp3", ".ogg", ".opus", ".wma")


def output_paths(out: Path, count: int) -> list[Path]:
    """Name one file per clip, `out` itself or numbered WAVs in it, and make the folder.

    Raises:
        ValueError: if `out` is one file for several clips, or of a format we do not write.
        OSError: if the folder cannot be made or written to.
    """
    is_file = out.suffix.lower() in (*SUFFIXES, *OTHER_AUDIO) and not out.is_dir()
    if is_file and out.suffix.lower() in OTHER_AUDIO:
        known = " or ".join(SUFFIXES)
        raise ValueError(f"--out {out}: unknown suffix {out.suffix!r}, expected {known}")
    if is_file and count > 1:
        raise ValueError(f"--out {out} is one file, found {count} captions; type a folder")
    if not is_file and out.is_file():
        raise ValueError(f"--out {out} is a file, expected a folder or a name ending in .wav")
    width = max(3, len(str(count - 1)))
    paths = [out] if is_file else [out / f"{index:0{width}}.wav" for index in range(count)]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=paths[0].parent):  # before the work, not after it
        return paths


def generate_to_files(
    voice: Voice,
    captions: Sequence[str],
    paths: Sequence[Path],
    config: GenerationConfig,
    seed: int = 0,
    batch_size: int = 32,
) -> None:
    """Generate a clip per caption and write each to its path."""
    _, longest = token_limits(voice.model.audio.config, config)
    total = len(captions) * longest
    with tqdm(total=total, desc="generating", unit="latent", dynamic_ncols=True) as bar:
        clips = voice.generate(
            captions, config, seed=seed, batch_size=batch_size, on_step=bar.update
        )
        bar.update(bar.total - bar.n)  # clips that ended early
    for path, clip in zip(paths, clips, strict=True):
        wav.write(path, clip.waveform, clip.sample_rate)


def write_captions(captions: Sequence[str], paths: Sequence[Path], seed: int) -> None:
    """List what was generated in `captions.jsonl` beside the files, as a manifest."""
    rows = [
        {"audio": path.name, "caption": caption, "seed": seed + index}
        for index, (path, caption) in enumerate(zip(paths, captions, strict=True))
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (paths[0].parent / "captions.jsonl").write_text(text)
