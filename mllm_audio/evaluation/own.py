"""`own:FOLDER`: a small classifier of log-mel spectrograms, trained on a domain's recordings.

The published embedders were trained on AudioSet; they say little about spoken digits or other
narrow domains. This one is trained in minutes by `mllm-audio train-classifier` and gives a domain
its own `fd_NAME`, `kl_NAME`, `is_NAME` and `accuracy_NAME`. It sees magnitudes relative to a clip's
loudest cell, so neither the gain nor the phase of a vocoder matters to it. A folder holds

    config.json         the fields of `ClassifierConfig`
    model.safetensors   the weights of `MelClassifier`

and no code. Legend beyond types.py: M mel bands, E channels of an embedding, K classes.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional

from mllm_audio.evaluation.base import ClipFeatures, Source
from mllm_audio.evaluation.checkpoints import device_of, files_sha256
from mllm_audio.files import write_atomic

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
WIDTHS = (1, 32, 48, 96, 128)  # channels before and after each convolution
STRIDE = 2 ** (len(WIDTHS) - 1)  # frames and bands that one output cell spans
DYNAMIC_RANGE = 60.0  # dB below a clip's loudest cell at which everything is silence


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """What a classifier hears and answers."""

    labels: tuple[str, ...]  # of the K classes, in the order of the logits
    seconds: float  # heard of a clip from its start; shorter ones are padded with silence
    label_column: str = "label"  # of manifests
    sample_rate: int = 16_000  # Hz
    frame_rate: int = 100  # spectrogram frames per second
    num_bands: int = 64  # mel bands from 0 Hz to half the sample rate, a multiple of STRIDE
    feature_dim: int = 128  # E
    held_out_accuracy: float | None = None  # share of recordings kept from training, in [0, 1]
    num_held_out: int = 0  # clips that the share is of

    def __post_init__(self) -> None:
        """Check the values."""
        if len(self.labels) < 2 or len(set(self.labels)) < len(self.labels):
            raise ValueError(
                f"labels are {list(self.labels)}, expected two different ones at least"
            )
        if not 0.1 <= self.seconds <= 60:
            raise ValueError(f"seconds is {self.seconds}, expected 0.1 to 60")
        if self.num_bands < STRIDE or self.num_bands % STRIDE:
            raise ValueError(f"num_bands is {self.num_bands}, expected a multiple of {STRIDE}")

    @property
    def num_frames(self) -> int:
        """Spectrogram frames of a clip."""
        return round(self.seconds * self.frame_rate)


class MelClassifier(nn.Module):
    """Four strided convolutions, a pool over time, an embedding and its logits."""

    window: Tensor
    filters: Tensor

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.hop_length = config.sample_rate // config.frame_rate
        self.fft_length = 1 << (int(0.032 * config.sample_rate) - 1).bit_length()
        self.register_buffer("window", torch.hann_window(self.fft_length), persistent=False)
        self.register_buffer("filters", _mel_filters(config, self.fft_length), persistent=False)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(WIDTHS):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(after), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers)
        self.dropout = nn.Dropout(0.2)
        self.embed = nn.Linear(WIDTHS[-1] * config.num_bands // STRIDE, config.feature_dim)
        self.classify = nn.Linear(config.feature_dim, len(config.labels))

    def mel_powers(self, waveform: Tensor) -> Tensor:
        """Analyse a (S,) waveform into (F, M) powers of its first `config.seconds`."""
        length = self.config.num_frames * self.hop_length
        waveform = functional.pad(waveform[:length], (0, max(0, length - len(waveform))))
        spectrum = torch.stft(
            waveform, self.fft_length, self.hop_length, window=self.window, return_complex=True
        )
        return (spectrum.abs().square().T @ self.filters)[: self.config.num_frames]

    def forward(self, powers: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, F, M) mel powers to (B, E) features and (B, K) logits."""
        decibels = 10 * torch.log10(powers.clamp_min(1e-12))
        loudest = decibels.amax((1, 2), keepdim=True)
        levels = ((decibels - loudest) / DYNAMIC_RANGE + 1).clamp_min(0)  # (B, F, M) in [0, 1]
        hidden = self.convolutions(levels[:, None])  # (B, 128, F / 16, M / 16)
        pooled = (hidden.mean(2) + hidden.amax(2)).flatten(1)  # (B, 128 * M / 16)
        features = functional.relu(self.embed(self.dropout(pooled)))
        return features, self.classify(features)


class OwnEmbedder:
    """A trained `MelClassifier` as an embedder."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        self.classifier = load_classifier(folder).to(device)
        config = self.classifier.config
        self.labels, self.label_column = config.labels, config.label_column
        self.name = folder.resolve().name
        self.sample_rate = config.sample_rate
        digest = files_sha256([folder / CONFIG_FILE, folder / WEIGHTS_FILE])
        self.source = Source(path=folder, sha256=digest)
        self.fingerprint = f"own-{digest}"

    @torch.no_grad()
    def embed(self, waveforms: Sequence[Tensor]) -> list[ClipFeatures]:
        """Hear (S,) waveforms."""
        device = device_of(self.classifier)
        powers = [self.classifier.mel_powers(waveform.to(device)) for waveform in waveforms]
        features, logits = (output.cpu() for output in self.classifier(torch.stack(powers)))
        return [
            ClipFeatures(row[None], scores) for row, scores in zip(features, logits, strict=True)
        ]


def save_classifier(classifier: MelClassifier, config: ClassifierConfig, folder: Path) -> None:
    """Write a classifier's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / WEIGHTS_FILE, save(classifier.state_dict()))
    text = json.dumps(dataclasses.asdict(config), indent=2, ensure_ascii=False) + "\n"
    write_atomic(folder / CONFIG_FILE, text.encode())


def load_classifier(folder: Path) -> MelClassifier:
    """Load a classifier from its folder, ready to hear.

    Raises:
        ValueError: if the folder is no classifier's, or its files do not fit each other.
    """
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise ValueError(
                f"{folder} holds no {file}; expected a folder of mllm-audio train-classifier"
            )
    try:
        values = json.loads((folder / CONFIG_FILE).read_text())
        config = ClassifierConfig(**{**values, "labels": tuple(values["labels"])})
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / CONFIG_FILE} is not a classifier's ({error}); expected the file that "
            "mllm-audio train-classifier wrote"
        ) from error
    classifier = MelClassifier(config)
    try:
        classifier.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{folder / WEIGHTS_FILE} does not fit {CONFIG_FILE} beside it "
            f"({str(error).splitlines()[0]}); train the classifier again"
        ) from error
    return classifier.eval()


def _mel_filters(config: ClassifierConfig, fft_length: int) -> Tensor:
    """Return the (fft_length // 2 + 1, M) triangles on the HTK scale, of height 1."""
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(
        num_frequency_bins=fft_length // 2 + 1,
        num_mel_filters=config.num_bands,
        min_frequency=0.0,
        max_frequency=config.sample_rate / 2,
        sampling_rate=config.sample_rate,
        norm=None,
        mel_scale="htk",
        triangularize_in_mel_space=True,
    )
    return torch.from_numpy(filters).float()
