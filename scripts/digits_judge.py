"""Judge generated spoken digits with a classifier trained on recordings only.

    python scripts/digits_judge.py --recordings DIR --generated DIR [--out report.json]

Both folders hold a `captions.jsonl` whose rows name `audio`, `label` (the digit) and `speaker`;
generated rows may leave the speaker out, and are judged by the digit alone. The judge shares no
code with mllm_audio: its own mel bands at 8 kHz see magnitudes only, so the phase of a vocoder
neither helps nor harms. Its Frechet distance is between Gaussians fitted to its own embeddings, so
it compares runs judged on the same recordings and nothing else.

Legend: N clips, B batch, F frames (10 ms), M mel bands, E embedding width.
"""

import argparse
import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import soundfile
import soxr
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

SAMPLE_RATE = 8000  # Hz, that of the recordings
FFT_LENGTH = 256  # samples, 32 ms
HOP_LENGTH = 80  # samples, 10 ms
NUM_BANDS = 48
NUM_FRAMES = 112  # 1.12 s, longer clips are cut
DYNAMIC_RANGE = 60.0  # dB below a clip's loudest cell at which everything is silence
NUM_EPOCHS = 20
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
SEED = 20
TRUSTED = 98.0  # per cent of held-out recordings a judge must get right to be believed


@dataclass(frozen=True)
class Clips:
    """A folder's clips as features and class numbers."""

    powers: Tensor  # (N, F, M) mel powers
    digits: Tensor  # (N,) int64
    speakers: Tensor  # (N,) int64, -1 where the row asks for no speaker
    held_out: Tensor  # (N,) bool


def read_rows(folder: Path, *fields: str) -> list[dict[str, str]]:
    """Read the rows of a folder's `captions.jsonl`.

    Raises:
        ValueError: if there is no such file, or a row lacks one of the fields.
    """
    path = folder / "captions.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a folder that holds captions.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    for number, row in enumerate(rows, start=1):
        if missing := set(fields) - row.keys():
            raise ValueError(f"{path}, line {number}: no {sorted(missing)} among {sorted(row)}")
    return rows


def mel_filters() -> Tensor:
    """Return (FFT_LENGTH // 2 + 1, M) triangles, even on the scale 2595 log10(1 + f/700)."""
    top = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, top, NUM_BANDS + 2) / 2595) - 1)  # Hz
    bins = np.linspace(0, SAMPLE_RATE / 2, FFT_LENGTH // 2 + 1)[:, None]
    rising = (bins - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - bins) / (corners[2:] - corners[1:-1])
    return torch.tensor(np.maximum(0, np.minimum(rising, falling)), dtype=torch.float32)


def mel_powers(path: Path, filters: Tensor) -> Tensor:
    """Return the (F, M) mel powers of a sound file, zero-padded or cut to NUM_FRAMES."""
    waveform, sample_rate = soundfile.read(path, dtype="float32", always_2d=True)
    waveform = soxr.resample(waveform[:, 0], sample_rate, SAMPLE_RATE)
    waveform = torch.from_numpy(waveform - waveform.mean())[: NUM_FRAMES * HOP_LENGTH]
    waveform = functional.pad(waveform, (0, NUM_FRAMES * HOP_LENGTH - len(waveform)))
    window = torch.hann_window(FFT_LENGTH)
    spectrum = torch.stft(waveform, FFT_LENGTH, HOP_LENGTH, window=window, return_complex=True)
    return (spectrum.abs().square().T @ filters)[:NUM_FRAMES]


def load_clips(folder: Path, digits: list[str], speakers: list[str]) -> Clips:
    """Read a folder's clips, numbering classes by their place in `digits` and `speakers`.

    A tenth of the recordings that name no split but `train` is held out.
    """
    rows, filters = read_rows(folder, "audio", "label"), mel_filters()
    unknown = {row["label"] for row in rows} - set(digits)
    unknown |= {row["speaker"] for row in rows if "speaker" in row} - set(speakers)
    if unknown:
        raise ValueError(f"{folder} names {sorted(unknown)}; recordings: {digits}, {speakers}")
    held_out = torch.tensor([row.get("split", "train") != "train" for row in rows])
    if not held_out.any():
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED))
        held_out[order[: len(rows) // 10]] = True
    return Clips(
        powers=torch.stack([mel_powers(folder / row["audio"], filters) for row in rows]),
        digits=torch.tensor([digits.index(row["label"]) for row in rows]),
        speakers=torch.tensor(
            [speakers.index(row["speaker"]) if "speaker" in row else -1 for row in rows]
        ),
        held_out=held_out,
    )


def to_features(powers: Tensor) -> Tensor:
    """Turn (B, F, M) mel powers into (B, 1, F, M) levels, 0 for silence and 1 for the loudest."""
    decibels = 10 * torch.log10(powers.clamp_min(1e-12))
    loudest = decibels.amax((1, 2), keepdim=True)
    return ((decibels - loudest) / DYNAMIC_RANGE + 1).clamp_min(0)[:, None]


def augment(powers: Tensor, generator: torch.Generator) -> Tensor:
    """Stretch, shift, tilt and add noise to (B, F, M) mel powers.

    Ranges: +-15 % duration, +-150 ms, +-3 dB of tilt, noise 25 to 70 dB below the loudest cell.
    """
    rows = len(powers)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(rows, 1, 1, generator=generator)

    stretch, shift = uniform(0.85, 1.15), uniform(-15, 15) / NUM_FRAMES
    frames = torch.linspace(-1, 1, NUM_FRAMES)[None, :, None]
    bands = torch.linspace(-1, 1, NUM_BANDS)[None, None, :]
    # The clip starts at -1: stretching about it keeps the onset, the shift moves it.
    source = ((frames + 1) * stretch - 1 + 2 * shift).expand(-1, -1, NUM_BANDS)
    grid = torch.stack([bands.expand_as(source), source], -1)  # (B, F, M, 2)
    powers = functional.grid_sample(powers[:, None], grid, align_corners=True)[:, 0]
    powers = powers * 10 ** (uniform(-0.3, 0.3) * bands)
    level = powers.amax((1, 2), keepdim=True) * 10 ** uniform(-7.0, -2.5)
    noise = torch.empty_like(powers).exponential_(generator=generator)
    return powers + level * noise


class Judge(nn.Module):
    """Four convolutions, a pool over time, and one linear output per question."""

    def __init__(self, num_digits: int, num_speakers: int) -> None:
        super().__init__()
        widths = [1, 32, 48, 96, 128]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(after), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers)
        self.embed = nn.Sequential(
            nn.Dropout(0.2), nn.Linear(128 * (NUM_BANDS // 16), 128), nn.ReLU()
        )
        self.digits = nn.Linear(128, num_digits)
        self.speakers = nn.Linear(128, num_speakers)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map (B, 1, F, M) features to a (B, E) embedding and logits of digit and of speaker."""
        hidden = self.convolutions(features)  # (B, 128, F / 16, M / 16)
        embedding = self.embed((hidden.mean(2) + hidden.amax(2)).flatten(1))
        return embedding, self.digits(embedding), self.speakers(embedding)


def train(judge: Judge, clips: Clips) -> None:
    """Train on the clips that are not held out."""
    generator = torch.Generator().manual_seed(SEED)
    kept = torch.nonzero(~clips.held_out)[:, 0]
    num_steps = NUM_EPOCHS * (len(kept) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, num_steps)
    judge.train()
    for step in range(num_steps):
        rows = kept[torch.randperm(len(kept), generator=generator)[:BATCH_SIZE]]
        _, digits, speakers = judge(to_features(augment(clips.powers[rows], generator)))
        loss = functional.cross_entropy(digits, clips.digits[rows], label_smoothing=0.05)
        loss = loss + functional.cross_entropy(speakers, clips.speakers[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"judge: step {step} of {num_steps}, loss {loss:.3f}", flush=True)


def load_or_train(folder: Path, clips: Clips, judge: Judge, cache: Path) -> None:
    """Fill `judge` with weights trained on `clips`, kept in `cache` by hash of data and script."""
    digest = hashlib.sha256(Path(__file__).read_bytes() + clips.powers.numpy().tobytes())
    digest.update((folder / "captions.jsonl").read_bytes())
    path = cache / f"digits_judge_{digest.hexdigest()[:16]}.safetensors"
    if path.is_file():
        judge.load_state_dict(load_file(path))
    else:
        train(judge, clips)
        cache.mkdir(parents=True, exist_ok=True)
        save_file(judge.state_dict(), path)
    judge.eval()


@torch.no_grad()
def answers(judge: Judge, clips: Clips) -> tuple[Tensor, Tensor, Tensor]:
    """Return (N, E) embeddings and the (N,) digits and speakers the judge hears."""
    outputs = [judge(to_features(powers)) for powers in clips.powers.split(256)]
    embeddings, digits, speakers = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    return embeddings, digits.argmax(1), speakers.argmax(1)


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return the Frechet distance of Gaussians fitted to two (N, E) sets."""
    a, b = first.double().numpy(), second.double().numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # The trace of sqrtm(A B) is the sum of the roots of its eigenvalues, real and non-negative.
    roots = np.sqrt(np.clip(scipy.linalg.eigvals(cov_a @ cov_b).real, 0, None)).sum()
    mean_gap = np.square(a.mean(0) - b.mean(0)).sum()
    return float(mean_gap + np.trace(cov_a) + np.trace(cov_b) - 2 * roots)


def percent(correct: Tensor) -> float:
    """Return the share of true values in per cent."""
    return round(100 * correct.double().mean().item(), 2)


def accuracy_by_class(heard: Tensor, true: Tensor, names: list[str]) -> dict[str, float]:
    """Return the accuracy on each class that occurs."""
    present = [(i, name) for i, name in enumerate(names) if (true == i).any()]
    return {name: percent(heard[true == i] == i) for i, name in present}


def main() -> None:
    """Train or load the judge, then report on the held-out recordings and the generated clips."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recordings", type=Path, required=True, help="folder of real clips")
    parser.add_argument("--generated", type=Path, required=True, help="folder to judge")
    parser.add_argument("--out", type=Path, help="JSON report; the cache defaults to its folder")
    parser.add_argument("--cache", type=Path, help="folder that keeps the judge's weights")
    args = parser.parse_args()
    cache = args.cache or (args.out.parent if args.out else Path())

    torch.manual_seed(SEED)
    rows = read_rows(args.recordings, "audio", "label", "speaker")
    digits, speakers = (sorted({row[key] for row in rows}) for key in ("label", "speaker"))
    real = load_clips(args.recordings, digits, speakers)
    judge = Judge(len(digits), len(speakers))
    load_or_train(args.recordings, real, judge, cache)
    real_embeddings, real_digits, real_speakers = answers(judge, real)
    generated = load_clips(args.generated, digits, speakers)
    embeddings, heard_digits, heard_speakers = answers(judge, generated)
    right_digits, right_speakers = (
        heard_digits == generated.digits,
        heard_speakers == generated.speakers,
    )
    report: dict[str, Any] = {
        "held_out_digits": percent((real_digits == real.digits)[real.held_out]),
        "held_out_speakers": percent((real_speakers == real.speakers)[real.held_out]),
        "num_held_out": int(real.held_out.sum()),
        "digits": percent(right_digits),
        "num_generated": len(generated.digits),
        "fd_digits_judge": round(frechet_distance(real_embeddings, embeddings), 3),
        "by_digit": accuracy_by_class(heard_digits, generated.digits, digits),
    }
    if bool((generated.speakers >= 0).all()):
        report["speakers"] = percent(right_speakers)
        report["both"] = percent(right_digits & right_speakers)
        report["by_speaker"] = accuracy_by_class(heard_speakers, generated.speakers, speakers)
    text = json.dumps(report, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    if min(report["held_out_digits"], report["held_out_speakers"]) < TRUSTED:
        raise SystemExit(f"the judge itself is below {TRUSTED} % on held-out recordings")


if __name__ == "__main__":
    main()
