"""VGGish without PCA and without its last ReLU, the embedder behind `fad_vggish`.

Hershey et al. 2017 (arXiv:1609.09430); Kilgour et al. 2019 (arXiv:1812.08466) for the distance.
Names are those of the published state dict of harritaylor/torchvggish.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from mllm_audio.conditioners.torch_file import read_torch_file
from mllm_audio.evaluation.base import ClipFeatures, Source
from mllm_audio.evaluation.checkpoints import device_of, fill
from mllm_audio.files import file_sha256

EXPECTED = "torchvggish's vggish-10086976.pth"
SAMPLE_RATE = 16_000  # Hz
WINDOW_LENGTH = 400  # samples, 25 ms, Hann
FFT_LENGTH = 512
HOP_LENGTH = 160  # samples, 10 ms
NUM_BANDS = 64
BAND_EDGES = (125.0, 7500.0)  # Hz
LOG_OFFSET = 0.01  # added to a mel magnitude, before the logarithm
EXAMPLE_FRAMES = 96  # spectrogram frames of one embedding, 0.96 s, without overlap


class Vggish(nn.Module):
    """Six convolutions and three linear layers on 0.96 s of log-mel.

    Args:
        width: channels of the first convolution; 64 is the published size.
        hidden: width of the linear layers; 4096 is the published size.
    """

    def __init__(self, width: int = 64, hidden: int = 4096) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 1
        for channels in (1, 0, 2, 0, 4, 4, 0, 8, 8, 0):  # multiples of width; 0 is a pool
            if channels:
                layers += [nn.Conv2d(before, width * channels, 3, padding=1), nn.ReLU()]
                before = width * channels
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        cells = (EXAMPLE_FRAMES // 16) * (NUM_BANDS // 16)
        self.embeddings = nn.Sequential(
            nn.Linear(before * cells, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 128),
        )

    def forward(self, examples: Tensor) -> Tensor:
        """Map (n, 96, M) log-mels to (n, 128) features."""
        hidden = self.features(examples[:, None])  # (n, 512, 6, 4)
        return self.embeddings(hidden.permute(0, 2, 3, 1).flatten(1))  # channels last, as published


class VggishEmbedder:
    """VGGish as an embedder: one row of features for each 0.96 s."""

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        self.name = "vggish"
        self.sample_rate = SAMPLE_RATE
        self.model = load_vggish(path).to(device)
        self.source = Source(path=path, sha256=file_sha256(path))
        self.fingerprint = f"vggish-{self.source.sha256}"

    @torch.inference_mode()
    def embed(self, waveforms: Sequence[Tensor]) -> list[ClipFeatures]:
        """Hear (S,) waveforms: (n, 128) features each."""
        examples = [to_examples(waveform) for waveform in waveforms]
        batch = torch.cat(examples).to(device_of(self.model))  # (sum of n, 96, M)
        features = self.model(batch).cpu().split([len(example) for example in examples])
        return [ClipFeatures(rows.clone()) for rows in features]


def to_examples(waveform: Tensor) -> Tensor:
    """Cut the log-mel of (S,) samples into (n, 96, M) pieces; what is left over is dropped."""
    frames = waveform.double().unfold(0, WINDOW_LENGTH, HOP_LENGTH)  # (F, 400)
    window = torch.hann_window(WINDOW_LENGTH, dtype=torch.float64)
    magnitude = torch.fft.rfft(frames * window, FFT_LENGTH).abs()  # (F, 257)
    mel = (magnitude @ _mel_filters() + LOG_OFFSET).log().float()  # (F, M)
    whole = len(mel) // EXAMPLE_FRAMES * EXAMPLE_FRAMES
    return mel[:whole].unflatten(0, (-1, EXAMPLE_FRAMES))


def load_vggish(path: Path) -> Vggish:
    """Load the published checkpoint.

    Raises:
        ValueError: if the file is not VGGish's.
    """
    weights = read_torch_file(path, EXPECTED)
    needed = ("features.0.weight", "embeddings.0.weight")
    if not isinstance(weights, Mapping) or any(name not in weights for name in needed):
        found = sorted(map(str, weights))[:3] if isinstance(weights, Mapping) else weights
        raise ValueError(f"{path} holds {found}, expected {EXPECTED}")
    model = Vggish(len(weights[needed[0]]), len(weights[needed[1]]))
    fill(model, weights, path, EXPECTED)
    return model


@lru_cache(maxsize=1)
def _mel_filters() -> Tensor:
    """Return the (257, M) triangles that are even on the HTK scale, 0 Hz left out."""
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(
        num_frequency_bins=FFT_LENGTH // 2 + 1,
        num_mel_filters=NUM_BANDS,
        min_frequency=BAND_EDGES[0],
        max_frequency=BAND_EDGES[1],
        sampling_rate=SAMPLE_RATE,
        norm=None,
        mel_scale="htk",
        triangularize_in_mel_space=True,
    )
    filters[0] = 0.0
    return torch.from_numpy(filters)
