"""What a request asks of the workers, on its way through `SamplingParams.extra_args`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from mllm_audio.config import from_dict, to_dict
from mllm_audio.generation.decode import GenerationConfig
from mllm_audio_vllm import KEY


@dataclass(frozen=True, kw_only=True)
class AudioOptions:
    """How the audio of one request is made, and the audio that its prompt holds.

    A request without them is one of text: it never opens a span.
    """

    key: str = ""  # names the request where its latents are received; "" sends none
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    seed: int = 0  # of the noise
    # One span for a caption, as `generate` makes it: its noise has the seed itself, and nothing
    # follows it. Otherwise span i has span_seed(seed, i).
    single: bool = False
    max_audio_spans: int | None = None  # that the reply may open
    # Of each span in the prompt, in order: whether the model said it, so that its latents predict.
    learned: tuple[bool, ...] = ()
    latents: bytes = b""  # (K, D) float32, of the `<|audio|>` ids in the prompt
    # Of each of the conditioner's streams (L_s, D_s) float32, for the `<|cond|>` ids in the prompt.
    prompts: tuple[bytes, ...] = ()

    def to_extra_args(self) -> dict[str, Any]:
        """Write them as vLLM carries them between its processes."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {KEY: {**values, "generation": to_dict(self.generation)}}

    @classmethod
    def from_extra_args(cls, extra_args: dict[str, Any] | None) -> AudioOptions | None:
        """Read them; None for a request of text.

        Raises:
            ValueError: for unknown or impossible settings.
        """
        values = (extra_args or {}).get(KEY)
        if values is None:
            return None
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"found unknown options {', '.join(sorted(unknown))}")
        values = dict(values)
        generation = from_dict(GenerationConfig, values.pop("generation", {}), "generation")
        learned, prompts = tuple(values.pop("learned", ())), tuple(values.pop("prompts", ()))
        return cls(**values, generation=generation, learned=learned, prompts=prompts)
