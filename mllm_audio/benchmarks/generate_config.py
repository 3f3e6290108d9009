"""What `mllm-audio bench generate` is asked for, and what --fast stands for."""

from __future__ import annotations

from dataclasses import Field, dataclass, fields, replace
from typing import Any

from mllm_audio.audiomar import AudioMAR
from mllm_audio.benchmarks.subject import Subject
from mllm_audio.config import check_range, nearest
from mllm_audio.diffusion.samplers import SAMPLERS
from mllm_audio.generation.decode import GenerationConfig
from mllm_audio.generation.precision import check_dtype
from mllm_audio.models import Model

CLIP_SECONDS = 10.24  # the paper's clips


@dataclass(frozen=True, kw_only=True)
class FastSettings:
    """What --fast decodes with."""

    num_inference_steps: int  # head calls per latent
    sampler: str | None = None  # key in SAMPLERS; None: the head's own


# By head; causal models decode a column a step beside this. What that costs in quality is not
# measured here.
FAST = {
    "ddpm": FastSettings(num_inference_steps=16, sampler="dpmpp_2m"),
    "flow": FastSettings(num_inference_steps=8),
}
# Of a GenerationConfig: always listed among the settings, and never, as clips have one duration.
# Others are listed where they are not the default, so that new ones do not spoil old baselines.
LISTED = ("num_inference_steps", "guidance_scale", "guidance_weight", "guidance_schedule")
UNLISTED = ("seconds", "min_seconds", "max_seconds", "end_threshold", "sampler")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """What is generated, and how; None leaves a setting to --fast, then to the model's defaults."""

    seconds: float = CLIP_SECONDS  # of each clip
    batch_size: int = 1  # clips at once
    dtype: str = "float32"  # of the weights of backbone and head, in precision.DTYPES
    fast: bool = False  # decode with FAST, a column a step
    num_inference_steps: int | None = None
    tokens_per_step: int | None = None  # latents drawn at once
    sampler: str | None = None  # key in SAMPLERS
    guidance_scale: float | None = None  # MAR's s: 1 is no guidance
    lengths: tuple[float, ...] = ()  # seconds at which a latent's time is measured
    repetitions: int = 3  # of the whole clip

    def __post_init__(self) -> None:
        """Check ranges and names."""
        check_range("bench", self, 1, 10_000, "batch_size", "repetitions")
        check_range("bench", self, 0, 86_400, "seconds", open_low=True)
        check_dtype(self.dtype)
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {self.sampler!r}; {nearest(self.sampler, SAMPLERS)}")
        if any(not 1 <= length <= 86_400 for length in self.lengths):
            raise ValueError(f"found lengths {self.lengths}, expected 1 to 86400 s, as in 10,30,60")

    @property
    def longest(self) -> float:
        """Seconds of the longest clip that is needed."""
        return max(self.seconds, *self.lengths) if self.lengths else self.seconds

    def resolve(self, defaults: GenerationConfig, model: Model) -> GenerationConfig:
        """Settle what the model decodes with.

        Raises:
            ValueError: if the head has no fast settings.
        """
        given: dict[str, Any] = {"seconds": self.seconds}
        audio, is_causal = model.audio.config, not isinstance(model, AudioMAR)
        head = audio.head.name
        if self.fast:
            if head not in FAST:
                raise ValueError(f"head {head!r} has no fast settings; leave --fast out")
            fast = FAST[head]
            given |= {"num_inference_steps": fast.num_inference_steps, "sampler": fast.sampler}
            if is_causal and audio.target_positions:
                given["tokens_per_step"] = audio.tokens_per_column
        if self.num_inference_steps is not None:
            given["num_inference_steps"] = self.num_inference_steps
        if self.tokens_per_step is not None:
            given["tokens_per_step"] = self.tokens_per_step
        if self.sampler is not None:
            given["sampler"] = self.sampler
        if self.guidance_scale is not None:
            given |= {"guidance_scale": self.guidance_scale, "guidance_weight": None}
        return replace(defaults, **given)


def listed_settings(
    subject: Subject, config: GenerateConfig, resolved: GenerationConfig, threads: int
) -> dict[str, Any]:
    """List what the figures depend on."""
    voice, listed = subject.voice, set(LISTED)
    if isinstance(voice.model, AudioMAR):
        listed |= {"decoding_order", "decoding_steps"}
    listed |= {field.name for field in fields(resolved) if _value(resolved, field) != field.default}
    return {
        "model": subject.name,
        "random_weights": subject.is_random,
        "dtype": config.dtype,
        "threads": threads,
        "batch_size": config.batch_size,
        "seconds": config.seconds,
        "head": voice.model.audio.config.head.name,
        "sampler": resolved.sampler or "default",
        **{
            field.name: _value(resolved, field)
            for field in fields(resolved)
            if field.name in listed and field.name not in UNLISTED
        },
        "tokenizer": f"{voice.audio_tokenizer.name} {voice.audio_tokenizer.fingerprint}",
        "lengths": list(config.lengths),
    }


def _value(resolved: GenerationConfig, field: Field[Any]) -> Any:
    """Read a field of a configuration."""
    return getattr(resolved, field.name)
