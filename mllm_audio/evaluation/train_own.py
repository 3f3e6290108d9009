"""Train a `MelClassifier` on labelled recordings, on one CPU core in minutes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from mllm_audio.evaluation.clips import few, read_clip, read_rows, to_rate
from mllm_audio.evaluation.own import ClassifierConfig, MelClassifier, save_classifier

BATCH_SIZE = 64
LEARNING_RATE = 2e-3
LABEL_SMOOTHING = 0.05
HELD_OUT_SHARE = 0.1  # of recordings that name no split but train
SHORT_SECONDS = 2.5  # up to which clips get 100 spectrogram frames a second, above it 50
LONGEST_SECONDS = 10.24  # heard of a clip unless asked otherwise
MIN_STEPS = 400  # of the optimiser: few recordings are seen more often


@dataclass(frozen=True)
class TrainingReport:
    """How well a classifier names recordings that it was not trained on."""

    num_trained: int  # clips
    num_held_out: int  # clips
    accuracy: float  # on the latter, in [0, 1]
    by_label: dict[str, float]  # the same for each class, in [0, 1]

    def __str__(self) -> str:
        """Say it in two lines."""
        classes = ", ".join(f"{label} {share:.0%}" for label, share in self.by_label.items())
        return (
            f"held-out accuracy {self.accuracy:.2%} of {self.num_held_out} clips, trained on "
            f"{self.num_trained}\n{classes}"
        )


def train_classifier(
    manifest: Path,
    out: Path,
    *,
    label: str = "label",
    seconds: float | None = None,
    sample_rate: int = 16_000,
    num_bands: int = 64,
    num_epochs: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> TrainingReport:
    """Train a classifier of the recordings in `manifest` and write its folder.

    Args:
        manifest: JSON lines of {audio, `label`, split?}; rows whose split is not train are held
            out, or a tenth, chosen by the hash of the path, if there are none.
        out: receives config.json and model.safetensors.
        label: column that names the class.
        seconds: heard of each clip; by default what 95 % of the recordings fit in, 10.24 at most.
        sample_rate: Hz that recordings are resampled to.
        num_bands: mel bands.
        num_epochs: passes over the recordings, more if they are few.
        seed: of weights, order and augmentation.
        progress: show a bar.

    Raises:
        ValueError: if the manifest has fewer than two classes, or none is left to train on or to
            hold out, or a recording cannot be used.
    """
    rows = read_rows(manifest, "audio", label)
    names = [row["audio"] for row in rows]
    labels = sorted({str(row[label]) for row in rows})
    held_out = _hold_out(names, [row.get("split") or "train" for row in rows])
    targets = torch.tensor([labels.index(str(row[label])) for row in rows])
    if missing := set(range(len(labels))) - set(targets[~held_out].tolist()):
        raise ValueError(
            f"{manifest} has no training row of {few([labels[i] for i in missing])}; give each "
            f"{label} rows whose split is train"
        )
    bar = tqdm(names, "reading", disable=not progress, unit="clip")
    clips = [read_clip(manifest.parent / name) for name in bar]
    if seconds is None:
        lengths = torch.tensor([len(clip.waveform) / clip.sample_rate for clip in clips])
        seconds = round(min(float(lengths.quantile(0.95)), LONGEST_SECONDS), 2)
    config = ClassifierConfig(
        labels=tuple(labels),
        seconds=seconds,
        label_column=label,
        sample_rate=sample_rate,
        frame_rate=100 if seconds <= SHORT_SECONDS else 50,
        num_bands=num_bands,
    )
    with torch.random.fork_rng(devices=[]):  # weights and dropout draw from the global generator
        torch.manual_seed(seed)
        classifier = MelClassifier(config)
        waveforms = (to_rate(clip, sample_rate) for clip in clips)
        powers = torch.stack([classifier.mel_powers(waveform) for waveform in waveforms])
        _fit(classifier, powers[~held_out], targets[~held_out], num_epochs, seed, progress)
    report = _judge(classifier, powers[held_out], targets[held_out], int((~held_out).sum()))
    config = replace(config, held_out_accuracy=report.accuracy, num_held_out=report.num_held_out)
    save_classifier(classifier, config, out)
    return report


def augment(powers: Tensor, generator: torch.Generator) -> Tensor:
    """Vary (B, F, M) mel powers as recordings of one thing vary.

    +-10 % duration, +-10 % of the clip in time, +-3 dB of tilt, noise 25 to 70 dB below the loudest
    cell. The classifier is blind to gain, so gain needs no variation.
    """
    num_rows, num_frames, num_bands = powers.shape

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(num_rows, 1, 1, generator=generator)

    frames = torch.linspace(-1, 1, num_frames)[None, :, None]
    bands = torch.linspace(-1, 1, num_bands)[None, None, :]
    # The clip starts at -1: stretching about it keeps the onset, the shift moves it.
    source = (frames + 1) * uniform(0.9, 1.1) - 1 + uniform(-0.2, 0.2)  # (B, F, 1)
    source = source.expand(-1, -1, num_bands)
    grid = torch.stack([bands.expand_as(source), source], -1)  # (B, F, M, 2)
    powers = functional.grid_sample(powers[:, None], grid, align_corners=True)[:, 0]
    powers = powers * 10 ** (uniform(-0.3, 0.3) * bands)
    level = powers.amax((1, 2), keepdim=True) * 10 ** uniform(-7.0, -2.5)
    return powers + level * torch.empty_like(powers).exponential_(generator=generator)


def _hold_out(names: Sequence[str], splits: Sequence[str]) -> Tensor:
    """Return the (N,) bool of the rows to keep from training."""
    held_out = torch.tensor([split != "train" for split in splits])
    if not held_out.any():
        hashes = [int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) for name in names]
        held_out = torch.tensor([value < HELD_OUT_SHARE * 2**32 for value in hashes])
    if held_out.all() or not held_out.any():
        raise ValueError(
            f"{int(held_out.sum())} of {len(names)} recordings are held out, expected some to "
            "train on and some to judge by; name splits train and test, or give more recordings"
        )
    return held_out


def _fit(
    classifier: MelClassifier,
    powers: Tensor,
    targets: Tensor,
    num_epochs: int,
    seed: int,
    progress: bool,
) -> None:
    """Train on (N, F, M) powers and (N,) class numbers."""
    generator = torch.Generator().manual_seed(seed)
    num_steps = max(num_epochs * len(powers) // BATCH_SIZE, MIN_STEPS)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, num_steps)
    classifier.train()
    for _ in tqdm(range(num_steps), "training", disable=not progress, unit="step"):
        rows = torch.randperm(len(powers), generator=generator)[:BATCH_SIZE]
        _, logits = classifier(augment(powers[rows], generator))
        loss = functional.cross_entropy(logits, targets[rows], label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    classifier.eval()


@torch.no_grad()
def _judge(
    classifier: MelClassifier, powers: Tensor, targets: Tensor, num_trained: int
) -> TrainingReport:
    """Measure the accuracy on clips that were held out."""
    heard = torch.cat([classifier(part)[1].argmax(1) for part in powers.split(BATCH_SIZE)])
    right = (heard == targets).double()
    by_label = {
        label: right[targets == i].mean().item()
        for i, label in enumerate(classifier.config.labels)
        if (targets == i).any()
    }
    return TrainingReport(num_trained, len(targets), right.mean().item(), by_label)
