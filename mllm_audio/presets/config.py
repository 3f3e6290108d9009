"""What a training run is made from."""

from __future__ import annotations

from dataclasses import dataclass, field

from mllm_audio.adapter import AdaptConfig
from mllm_audio.backbone import BackboneConfig
from mllm_audio.config import nearest
from mllm_audio.data.config import DataConfig
from mllm_audio.generation.decode import GenerationConfig
from mllm_audio.masking import MaskingConfig
from mllm_audio.modality import AudioConfig
from mllm_audio.training.config import TrainConfig

ARCHITECTURES = ("decoder", "audiomar")
INITS = ("random", "image_mar", "audiomar")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a training run is made from; saved as RUN/run.json."""

    preset: str  # name it started from
    architecture: str = "decoder"  # in ARCHITECTURES: causal, or AudioMAR's encoder and decoder
    init: str = "random"  # in INITS: what the blocks start from
    init_from: str | None = None  # MAR checkpoint file, or folder of an AudioMAR run, for `init`
    text_vocab_size: int = 2048  # at most; of the BPE trained on the captions
    backbone: BackboneConfig | None = field(default_factory=BackboneConfig)  # None: `base` is used
    base: str | None = None  # folder or hub id of a trained language model, in place of `backbone`
    adapt: AdaptConfig = field(default_factory=AdaptConfig)  # what of `base` training may change
    audio: AudioConfig = field(default_factory=AudioConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)

    def __post_init__(self) -> None:
        """Check names, and that architecture and masking belong together."""
        for name, known in (("architecture", ARCHITECTURES), ("init", INITS)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; {nearest(value, known)}")
        if (self.architecture == "audiomar") != (self.masking.hidden == "own"):
            raise ValueError(
                f"architecture={self.architecture} with masking.hidden={self.masking.hidden}; "
                "AudioMAR, and it alone, predicts masked latents at their own places"
            )
        if self.init_from is not None and self.init == "random":
            raise ValueError(f"init_from={self.init_from} needs init={' or '.join(INITS[1:])}")
