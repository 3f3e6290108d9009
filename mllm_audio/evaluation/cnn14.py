"""PANNs' Cnn14, the embedder behind `fd_panns`, `kl_panns` and `is_panns`.

Kong et al. 2020 (arXiv:1912.10211). Names of modules are those of the published state dicts, shapes
follow them; the analysis filters come from the checkpoint too, so they are the published ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm_audio.conditioners.torch_file import read_torch_file
from mllm_audio.evaluation.base import ClipFeatures, Source
from mllm_audio.evaluation.checkpoints import device_of, fill
from mllm_audio.files import file_sha256

EXPECTED = "PANNs' Cnn14_16k_mAP=0.438.pth or Cnn14_mAP=0.431.pth"
NUM_BANDS = 64
NUM_BLOCKS = 6
FLOOR = 1e-10  # of a mel power, before the logarithm
_FILTERS = "spectrogram_extractor.stft.conv_real.weight"


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """The spectrogram of a published variant."""

    sample_rate: int  # Hz
    window_length: int  # samples, Hann, also the FFT length
    hop_length: int  # samples


ANALYSES = {  # by the window length that the checkpoint's filters show
    512: Analysis(sample_rate=16_000, window_length=512, hop_length=160),
    1024: Analysis(sample_rate=32_000, window_length=1024, hop_length=320),
}


class ConvBlock(nn.Module):
    """Two 3x3 convolutions, each with batch norm and ReLU."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.bn2 = nn.BatchNorm2d(after)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, before, F, M) to (B, after, F, M)."""
        hidden = functional.relu(self.bn1(self.conv1(hidden)))
        return functional.relu(self.bn2(self.conv2(hidden)))


class _Stft(nn.Module):
    """Windowed cosines and sines as convolutions, as the checkpoints store them."""

    def __init__(self, analysis: Analysis) -> None:
        super().__init__()
        length, hop = analysis.window_length, analysis.hop_length
        self.conv_real = nn.Conv1d(1, length // 2 + 1, length, stride=hop, bias=False)
        self.conv_imag = nn.Conv1d(1, length // 2 + 1, length, stride=hop, bias=False)

    def forward(self, waveforms: Tensor) -> Tensor:
        """Analyse (B, S) waveforms into (B, bins, F) powers of centred frames."""
        half = self.conv_real.kernel_size[0] // 2
        padded = functional.pad(waveforms[:, None], (half, half), mode="reflect")
        return self.conv_real(padded).square() + self.conv_imag(padded).square()


class _Spectrogram(nn.Module):
    """A level of the published names."""

    def __init__(self, analysis: Analysis) -> None:
        super().__init__()
        self.stft = _Stft(analysis)

    def forward(self, waveforms: Tensor) -> Tensor:
        """Do as `_Stft`."""
        return self.stft(waveforms)


class _LogMel(nn.Module):
    """Mel bands in decibels."""

    def __init__(self, analysis: Analysis) -> None:
        super().__init__()
        self.melW = nn.Parameter(torch.zeros(analysis.window_length // 2 + 1, NUM_BANDS))

    def forward(self, power: Tensor) -> Tensor:
        """Map (B, bins, F) powers to (B, F, M) decibels."""
        return 10 * torch.log10((power.transpose(1, 2) @ self.melW).clamp_min(FLOOR))


class Cnn14(nn.Module):
    """Log-mel spectrogram, six convolution blocks, a pool, an embedding and its tags.

    Args:
        analysis: of the variant.
        width: channels of the first block; 64 is the published size, each block doubles it.
        num_classes: K; 527 are AudioSet's.
    """

    def __init__(self, analysis: Analysis, width: int = 64, num_classes: int = 527) -> None:
        super().__init__()
        self.analysis = analysis
        self.spectrogram_extractor = _Spectrogram(analysis)
        self.logmel_extractor = _LogMel(analysis)
        self.bn0 = nn.BatchNorm2d(NUM_BANDS)
        widths = [1, *(width * 2**block for block in range(NUM_BLOCKS))]
        for block in range(NUM_BLOCKS):
            setattr(self, f"conv_block{block + 1}", ConvBlock(widths[block], widths[block + 1]))
        self.fc1 = nn.Linear(widths[-1], widths[-1])
        self.fc_audioset = nn.Linear(widths[-1], num_classes)

    def forward(self, waveforms: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, S) waveforms to (B, E) features behind the ReLU and (B, K) logits."""
        log_mel = self.logmel_extractor(self.spectrogram_extractor(waveforms))
        hidden = log_mel[:, None]  # (B, 1, F, M)
        hidden = self.bn0(hidden.transpose(1, 3)).transpose(1, 3)  # each mel band is a channel
        for block in range(1, NUM_BLOCKS + 1):
            hidden = getattr(self, f"conv_block{block}")(hidden)
            if block < NUM_BLOCKS:
                hidden = functional.avg_pool2d(hidden, 2)
        over_bands = hidden.mean(3)  # (B, E, F / 32)
        features = functional.relu(self.fc1(over_bands.amax(2) + over_bands.mean(2)))
        return features, self.fc_audioset(features)


class PannsEmbedder:
    """Cnn14 as an embedder; clips of one length are heard together."""

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        self.name = "panns"
        self.model = load_cnn14(path).to(device)
        self.sample_rate = self.model.analysis.sample_rate
        self.source = Source(path=path, sha256=file_sha256(path))
        self.fingerprint = f"cnn14-{self.source.sha256}"

    @torch.inference_mode()
    def embed(self, waveforms: Sequence[Tensor]) -> list[ClipFeatures]:
        """Hear (S,) waveforms: (1, 2048) features and (527,) logits each."""
        result: dict[int, ClipFeatures] = {}
        for length in sorted({len(waveform) for waveform in waveforms}):
            rows = [i for i, waveform in enumerate(waveforms) if len(waveform) == length]
            batch = torch.stack([waveforms[i] for i in rows]).to(device_of(self.model))
            features, logits = (output.cpu() for output in self.model(batch))
            for i, row, scores in zip(rows, features, logits, strict=True):
                result[i] = ClipFeatures(row[None], scores)
        return [result[i] for i in range(len(waveforms))]


def load_cnn14(path: Path) -> Cnn14:
    """Load a published checkpoint; its analysis filters say which variant it is.

    Raises:
        ValueError: if the file is not a Cnn14's.
    """
    content = read_torch_file(path, EXPECTED)
    weights = content.get("model") if isinstance(content, Mapping) else None
    needed = (_FILTERS, "conv_block1.conv1.weight", "fc_audioset.bias")
    if not isinstance(weights, Mapping) or any(name not in weights for name in needed):
        found = sorted(map(str, content))[:3] if isinstance(content, Mapping) else content
        raise ValueError(f"{path} holds {found}, expected {EXPECTED}: weights under 'model'")
    analysis = ANALYSES.get(weights[_FILTERS].shape[-1])
    if analysis is None:
        raise ValueError(
            f"{path} analyses windows of {weights[_FILTERS].shape[-1]} samples, expected "
            f"{sorted(ANALYSES)}: {EXPECTED}"
        )
    model = Cnn14(analysis, len(weights[needed[1]]), len(weights[needed[2]]))
    fill(model, weights, path, EXPECTED)
    return model
