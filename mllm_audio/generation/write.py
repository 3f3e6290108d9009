"""Generated clips to files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from mllm_audio import wav
from mllm_audio.generation.decode import GenerationConfig, token_limits
from mllm_audio.generation.voice import Voice

SUFFIXES = (".wav", ".flac")


def output_paths(out: Path, count: int) -> list[Path]:
    """Name one file per clip: `out` itself, or numbered WAVs in the folder `out`.

    Raises:
        ValueError: if `out` is one file for several clips, or of an unknown format.
    """
    if out.suffix and not out.is_dir():
        if out.suffix.lower() not in SUFFIXES:
            raise ValueError(
                f"--out {out}: unknown suffix {out.suffix!r}, expected {' or '.join(SUFFIXES)}"
            )
        if count > 1:
            raise ValueError(f"--out {out} is one file, found {count} captions; type a folder")
        return [out]
    if out.is_file():
        raise ValueError(f"--out {out} is a file, expected a folder or a name ending in .wav")
    width = max(3, len(str(count - 1)))
    return [out / f"{index:0{width}}.wav" for index in range(count)]


def generate_to_files(
    voice: Voice,
    captions: Sequence[str],
    paths: Sequence[Path],
    config: GenerationConfig,
    seed: int = 0,
    batch_size: int = 32,
) -> None:
    """Generate a clip per caption and write each to its path."""
    _, longest = token_limits(voice.model, config)
    batches = -(-len(captions) // batch_size)
    with tqdm(total=batches * longest, desc="generating", unit="latent", dynamic_ncols=True) as bar:
        clips = voice.generate(
            captions, config, seed=seed, batch_size=batch_size, on_step=lambda _: bar.update()
        )
        bar.update(bar.total - bar.n)  # clips that ended early
    for path, clip in zip(paths, clips, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        wav.write(path, clip.waveform, clip.sample_rate)


def write_captions(captions: Sequence[str], paths: Sequence[Path], seed: int) -> None:
    """List what was generated in `captions.jsonl` beside the files, as a manifest."""
    rows = [
        {"audio": path.name, "caption": caption, "seed": seed + index}
        for index, (path, caption) in enumerate(zip(paths, captions, strict=True))
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (paths[0].parent / "captions.jsonl").write_text(text)
