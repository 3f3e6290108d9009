"""Measure what a tokenizer's decode makes of recordings, whole and as a stream.

    python scripts/roundtrip.py MANIFEST --out DIR [--tokenizer dct] [--limit 270] [--adherence]

Each recording is encoded and decoded, and written to DIR with a `captions.jsonl` of its row, which
`digits_judge.py` can judge; seed 20 draws the clips that it holds out of 2,700. Prints
`mel_error`, the mean distance of the decoded sound's log-mel to the one that was decoded;
`mel_error_recording`, to that of the recording; `spectral_error`, the root mean square of the
difference of mel magnitudes over that of the magnitudes; processor seconds per second of sound; and
the seam error of the stream in dB, over all samples. `--adherence` is for soundscapes.

    python -c "from pathlib import Path; from mllm_audio.data.soundscapes import write_soundscapes;
    write_soundscapes(Path('soundscapes'), num_train=100, num_held_out=100)"
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllm_audio import wav
from mllm_audio.evaluation.adherence import adherence
from mllm_audio.generation.stream import StreamingDecoder
from mllm_audio.tokenizers import AudioTokenizer, load_tokenizer, mel
from mllm_audio.types import Clip


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one recording gave."""

    mel_error: float
    mel_error_recording: float
    spectral_error: float
    decode_seconds: float  # of a processor
    stream_seconds: float
    seam_power: float  # sum of squares of stream - decode
    power: float  # of decode


def stream(tokenizer: AudioTokenizer, latents: Tensor) -> Tensor:
    """Decode (N, D) latents one at a time."""
    decoder = StreamingDecoder(tokenizer)
    parts = [decoder.push(latent[None]) for latent in latents]
    return torch.cat([*parts, decoder.finish()])  # (S,)


def roundtrip(tokenizer: AudioTokenizer, waveform: Tensor) -> tuple[Tensor, Measured]:
    """Encode and decode (S,) samples; return (S,) decoded ones and what was measured."""
    latents = tokenizer.encode(waveform[None])  # (1, N, D)
    start = time.process_time()
    decoded = tokenizer.decode(latents)[0]
    middle = time.process_time()
    streamed = stream(tokenizer, latents[0])
    end = time.process_time()

    padded = torch.nn.functional.pad(waveform, (0, len(decoded) - len(waveform)))
    found, real = mel.log_mel(decoded[None]), mel.log_mel(padded[None])  # (1, F, 64)
    wanted = tokenizer.decode_log_mel(latents) if hasattr(tokenizer, "decode_log_mel") else real
    difference = (found.exp() - wanted.exp()).square().sum() / wanted.exp().square().sum()
    return decoded[: len(waveform)], Measured(
        mel_error=(found - wanted).abs().mean().item(),
        mel_error_recording=(found - real).abs().mean().item(),
        spectral_error=difference.sqrt().item(),
        decode_seconds=middle - start,
        stream_seconds=end - middle,
        seam_power=(streamed - decoded).double().square().sum().item(),
        power=decoded.double().square().sum().item(),
    )


def summarise(measured: list[Measured], num_samples: int, sample_rate: int) -> dict[str, Any]:
    """Average over clips; times are over all sound."""

    def total(name: str) -> float:
        return math.fsum(getattr(m, name) for m in measured)

    seconds = num_samples / sample_rate
    errors = ("mel_error", "mel_error_recording", "spectral_error")
    seam = total("seam_power") / total("power")
    return {
        "num_clips": len(measured),
        "seconds": round(seconds, 1),
        **{name: round(total(name) / len(measured), 5) for name in errors},
        "decode_cpu_per_second": round(total("decode_seconds") / seconds, 4),
        "stream_cpu_per_second": round(total("stream_seconds") / seconds, 4),
        "seam_db": round(10 * math.log10(seam), 1) if seam else "exact",
    }


def main() -> None:
    """Measure the rows of a manifest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("manifest", type=Path, help="JSONL; audio is relative to it")
    parser.add_argument("--out", type=Path, required=True, help="folder for the decoded sounds")
    parser.add_argument("--tokenizer", default="dct")
    parser.add_argument("--limit", type=int, help="as many rows, drawn at random")
    parser.add_argument("--seed", type=int, default=20, help="of the draw")
    parser.add_argument("--adherence", action="store_true", help="recognise built-in soundscapes")
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.tokenizer)
    rows = [json.loads(line) for line in args.manifest.read_text().splitlines() if line.strip()]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed)).tolist()
    rows = [rows[i] for i in order[: args.limit]]
    args.out.mkdir(parents=True, exist_ok=True)
    measured, clips, num_samples = [], [], 0
    for number, row in enumerate(rows):
        clip = wav.read(args.manifest.parent / row["audio"], tokenizer.sample_rate)
        with torch.inference_mode():
            decoded, found = roundtrip(tokenizer, wav.normalize_level(clip.waveform))
        measured.append(found)
        num_samples += len(decoded)
        clips.append(Clip(decoded, tokenizer.sample_rate))
        row["audio"] = f"{number:05d}.wav"
        wav.write(args.out / row["audio"], decoded, tokenizer.sample_rate)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (args.out / "captions.jsonl").write_text(text)

    report = summarise(measured, num_samples, tokenizer.sample_rate)
    if args.adherence:
        labels = [row["label"] for row in rows]
        report["adherence"] = asdict(adherence(zip(clips, labels, strict=True)))
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
