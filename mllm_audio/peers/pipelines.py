"""Peers from folders of this machine, safetensors only; the one import of diffusers here.

    audioldm2          arXiv:2308.05734; a copy of cvssp/audioldm2 or cvssp/audioldm2-large
    tango2             arXiv:2404.09956; what `mllm-audio peer convert-tango2` writes
    stable-audio-open  arXiv:2407.14358; a copy of stabilityai/stable-audio-open-1.0
    audiogen           arXiv:2209.15352; what `mllm-audio peer convert-audiogen` writes

Steps and guidance default to those that the authors publish with the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import (
    AudioLDM2Pipeline,
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    StableAudioPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GPT2LMHeadModel,
    MusicgenForConditionalGeneration,
    PreTrainedModel,
    SpeechT5HifiGan,
    T5EncoderModel,
)

from mllm_audio.config import read_json
from mllm_audio.peers.tango2 import Tango2

LOCAL: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
TANGO2_FOLDERS = ("scheduler", "text_encoder", "tokenizer", "unet", "vae", "vocoder")


class PeerPipeline(Protocol):
    """A loaded peer."""

    sample_rate: int  # Hz
    max_seconds: float  # longest clip

    def generate(
        self,
        captions: Sequence[str],
        *,
        seconds: float,
        num_inference_steps: int,
        guidance_scale: float,
        seeds: Sequence[int],
    ) -> Tensor:
        """Generate (B, S) float32 waveforms, on the CPU, for B captions and seeds."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """What to know of a peer before it is loaded."""

    load: Callable[[Path, torch.device, torch.dtype], PeerPipeline]
    num_inference_steps: int | None  # by default; None: it has none
    guidance_scale: float  # by default; 1 is none


class AudioLDM2:
    """AudioLDM 2; the captions of a batch are padded together, so they touch one another a bit."""

    max_seconds = math.inf

    def __init__(self, pipeline: AudioLDM2Pipeline) -> None:
        """Wrap a pipeline."""
        self._pipeline = pipeline
        self.sample_rate: int = pipeline.vocoder.config.sampling_rate

    def generate(
        self, captions: Sequence[str], *, seconds: float, seeds: Sequence[int], **options: Any
    ) -> Tensor:
        """Generate (B, S) waveforms; the first candidate is taken, none is ranked by CLAP."""
        waveforms = self._pipeline(
            list(captions), audio_length_in_s=seconds, generator=_generators(seeds),
            output_type="pt", **options,
        ).audios  # fmt: skip
        return waveforms.float().cpu()


class StableAudio:
    """Stable Audio Open; it always makes its longest clip, of which the beginning is kept."""

    def __init__(self, pipeline: StableAudioPipeline) -> None:
        """Wrap a pipeline."""
        self._pipeline = pipeline
        self.sample_rate: int = pipeline.vae.config.sampling_rate
        num_samples = pipeline.transformer.config.sample_size * pipeline.vae.hop_length
        self.max_seconds = num_samples / self.sample_rate

    def generate(
        self, captions: Sequence[str], *, seconds: float, seeds: Sequence[int], **options: Any
    ) -> Tensor:
        """Generate (B, S) waveforms, the mean of its two channels."""
        waveforms = self._pipeline(
            list(captions), audio_end_in_s=seconds, generator=_generators(seeds),
            output_type="pt", **options,
        ).audios  # fmt: skip
        return waveforms.float().mean(dim=1).cpu()  # (B, 2, S) to (B, S)


class AudioGen:
    """AudioGen in MusicGen's form; a batch draws from one stream, seeded by its first clip."""

    max_seconds = math.inf
    TOP_K = 250  # audiocraft's default, at temperature 1

    def __init__(self, model: MusicgenForConditionalGeneration, tokenizer: Any) -> None:
        """Wrap a model and the tokenizer of its T5."""
        self._model, self._tokenizer = model, tokenizer
        self.sample_rate: int = model.config.audio_encoder.sampling_rate

    def generate(
        self,
        captions: Sequence[str],
        *,
        seconds: float,
        num_inference_steps: int | None,
        guidance_scale: float,
        seeds: Sequence[int],
    ) -> Tensor:
        """Generate (B, S) waveforms."""
        model = self._model
        tokens = self._tokenizer(list(captions), padding=True, return_tensors="pt")
        num_frames = math.ceil(seconds * model.config.audio_encoder.frame_rate)
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seeds[0])
            waveforms = model.generate(
                **tokens.to(model.device),
                do_sample=True,
                top_k=self.TOP_K,
                guidance_scale=guidance_scale,
                # Codebook k lags k frames behind the first one.
                max_new_tokens=num_frames + model.decoder.num_codebooks - 1,
            )  # (B, 1, S)
        return waveforms[:, 0, : round(seconds * self.sample_rate)].float().cpu()


def load_audioldm2(folder: Path, device: torch.device, dtype: torch.dtype) -> AudioLDM2:
    """Load a copy of cvssp/audioldm2."""
    _check_pipeline(folder, "AudioLDM2Pipeline")
    # The releases name GPT2Model, which has lost the methods that the pipeline calls
    # (huggingface/diffusers issue 12630).
    model = _load(GPT2LMHeadModel, folder / "language_model", dtype)
    pipeline = AudioLDM2Pipeline.from_pretrained(
        folder, language_model=model, torch_dtype=dtype, **LOCAL
    )
    return AudioLDM2(_ready(pipeline, device))


def load_stable_audio(folder: Path, device: torch.device, dtype: torch.dtype) -> StableAudio:
    """Load a copy of stabilityai/stable-audio-open-1.0."""
    _check_pipeline(folder, "StableAudioPipeline")
    pipeline = StableAudioPipeline.from_pretrained(folder, torch_dtype=dtype, **LOCAL)
    return StableAudio(_ready(pipeline, device))


def load_audiogen(folder: Path, device: torch.device, dtype: torch.dtype) -> AudioGen:
    """Load a converted AudioGen.

    Raises:
        ValueError: if the folder is no MusicGen.
    """
    remedy = "make it with `mllm-audio peer convert-audiogen`"
    kind = read_json(folder / "config.json", remedy).get("model_type")
    if kind != "musicgen":
        raise ValueError(f"{folder} holds {kind!r}, expected 'musicgen'; {remedy}")
    model = _load(MusicgenForConditionalGeneration, folder, dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return AudioGen(model.to(device).eval(), tokenizer)


def load_tango2(folder: Path, device: torch.device, dtype: torch.dtype) -> Tango2:
    """Load a converted Tango 2.

    Raises:
        ValueError: if a part is missing.
    """
    absent = [name for name in TANGO2_FOLDERS if not (folder / name).is_dir()]
    if absent:
        raise ValueError(
            f"{folder} has no folder {absent[0]}, expected {', '.join(TANGO2_FOLDERS)}; make them "
            "with `mllm-audio peer convert-tango2`"
        )
    kinds = {
        "text_encoder": T5EncoderModel,
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "vocoder": SpeechT5HifiGan,
    }
    parts = {name: _load(kind, folder / name, dtype) for name, kind in kinds.items()}
    return Tango2(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
        scheduler=DDPMScheduler.from_pretrained(folder / "scheduler", local_files_only=True),
        **{name: part.to(device).eval() for name, part in parts.items()},
    )


PEERS = {
    "audioldm2": Peer(load=load_audioldm2, num_inference_steps=200, guidance_scale=3.5),
    "tango2": Peer(load=load_tango2, num_inference_steps=200, guidance_scale=3.0),
    "stable-audio-open": Peer(load=load_stable_audio, num_inference_steps=100, guidance_scale=7.0),
    "audiogen": Peer(load=load_audiogen, num_inference_steps=None, guidance_scale=3.0),
}


def _load(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """Load a network of either library, and refuse one whose weights are not all there."""
    key = "dtype" if issubclass(kind, PreTrainedModel) else "torch_dtype"  # diffusers' word
    model, report = kind.from_pretrained(folder, output_loading_info=True, **{key: dtype}, **LOCAL)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{folder} lacks {len(missing)} weights of a {kind.__name__}, e.g. {missing[:3]}; copy "
            "or convert it again"
        )
    return model


def _check_pipeline(folder: Path, name: str) -> None:
    """Refuse a folder that is not of this pipeline."""
    index = read_json(folder / "model_index.json", f"expected a folder of diffusers' {name}")
    if index.get("_class_name") != name:
        raise ValueError(f"{folder} holds {index.get('_class_name')!r}, expected a {name}")


def _ready(pipeline: DiffusionPipeline, device: torch.device) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Make a source of noise per clip, on the CPU: the same noise on every device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]
