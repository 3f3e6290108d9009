"""How fast a run is, what it takes, and how its loss depends on the masking ratio."""

from __future__ import annotations

import math
import resource
import sys
from statistics import mean

import torch

from mllm_audio.hardware import find_gpu
from mllm_audio.model import AudioLanguageModel
from mllm_audio.models import Model
from mllm_audio.training.flops import model_flops
from mllm_audio.types import StepCounts


class Telemetry:
    """Add steps up between two lines of the log.

    Model FLOPs utilisation, over the seconds since the last line (Chowdhery et al. 2022,
    arXiv:2204.02311, appendix B):

        MFU = FLOPs of the steps / (seconds x processes x peak FLOPs a second of a device)

    FLOPs are those of `flops.ModelFlops`, without what gradient checkpointing computes twice. The
    peak is the device's dense bf16 peak whatever the precision: `peak_tflops`, else what the data
    sheet says (`hardware.GPUS`); where neither is known there is no MFU.
    """

    def __init__(
        self,
        model: Model,
        *,
        num_processes: int = 1,
        peak_tflops: float | None = None,
        seconds: float = 0.0,
    ) -> None:
        """Begin at `seconds` of the clock that `read` is given.

        Args:
            model: that is trained, on its device.
            num_processes: which share the steps, one device each.
            peak_tflops: of one device; None looks it up.
            seconds: now.
        """
        # Of AudioMAR, whose blocks do not all see the same elements, they are not counted.
        self.flops = model_flops(model) if isinstance(model, AudioLanguageModel) else None
        self.device = model.device
        self.peak = num_processes * 1e12 * (peak_tflops or _data_sheet_tflops(self.device))
        self._begin(seconds)

    def _begin(self, seconds: float) -> None:
        self._since = seconds
        self._rows, self._elements, self._flops = 0, 0, 0.0
        self._buckets: dict[int, list[float]] = {}  # losses by tenths of the ratio

    def add(self, ratio: float, audio_loss: float, counts: StepCounts) -> None:
        """Add an optimizer step.

        Args:
            ratio: share of latents that the step dropped.
            audio_loss: mean over the step.
            counts: what the step held over all processes.
        """
        self._rows += counts.rows
        self._elements += counts.elements
        if self.flops is not None:
            self._flops += self.flops.step(counts)
        if counts.latents:
            self._buckets.setdefault(math.floor(10 * ratio), []).append(audio_loss)

    def leave_out(self, seconds: float) -> None:
        """Take time that was not training, such as validation, out of the next reading."""
        self._since += seconds

    def read(self, seconds: float) -> dict[str, float]:
        """Sum up since the last reading, and begin the next.

        Args:
            seconds: now, on a clock that does not stand still between steps.

        Returns:
            `speed/samples_per_second` of rows, `speed/tokens_per_second` of text ids and audio
            tokens in the backbone, `speed/mfu` where the peak is known, `memory/gpu_gib` (the most
            that tensors of this process took on its device since it began) or `memory/host_gib`
            (the most this process took), and `train/audio_loss_by_ratio/0.7` of steps that dropped
            0.7 to 0.8 of their latents.
        """
        elapsed = max(1e-9, seconds - self._since)
        values = {
            "speed/tokens_per_second": self._elements / elapsed,
            "speed/samples_per_second": self._rows / elapsed,
        }
        if self.peak and self.flops is not None:
            values["speed/mfu"] = self._flops / (elapsed * self.peak)
        values |= _memory(self.device)
        for tenth, losses in sorted(self._buckets.items()):
            values[f"train/audio_loss_by_ratio/{tenth / 10:.1f}"] = mean(losses)
        self._begin(seconds)
        return values


def _data_sheet_tflops(device: torch.device) -> float:
    """Give the device's peak, 0 if it is not known."""
    gpu = find_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return gpu.bf16_tflops if gpu else 0.0


def _memory(device: torch.device) -> dict[str, float]:
    """Read the peak of this process."""
    if device.type == "cuda":
        return {"memory/gpu_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"memory/host_gib": peak * unit / 2**30}
