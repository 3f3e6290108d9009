"""A backbone with its audio modules as one thing that is made, adapted, saved and loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from mllm_audio import backbone as backbones
from mllm_audio import folder as folders
from mllm_audio import hub
from mllm_audio.adapter import (
    AdaptConfig,
    SpecialRows,
    add_lora,
    lora_config,
    lora_names,
    merge_lora,
    read_lora_config,
)
from mllm_audio.modality import AudioConfig, AudioModality
from mllm_audio.pretrained import load_backbone, load_text_tokenizer, resize_vocabulary
from mllm_audio.text import SpecialIds, add_special_tokens
from mllm_audio.weights import check_fit, fingerprint, read_tensors, tied_names


class Checkpointed(nn.Module):
    """The parts of an `AudioLanguageModel`, and the folders they come from and go to.

    Attributes:
        backbone: the language model.
        audio: every audio parameter.
        special_rows: the special tokens' embeddings while the backbone's own tables stand still.
        text_tokenizer: of the backbone, with the special tokens; None if it is kept elsewhere.
        origin: the checkpoint that a voice was added to, if any.
        silent: tables of the backbone held at zero, by name, with their shapes: in models that are
            prompted by embeddings, all it has for text ids and positions.
        lora: PEFT's configuration while LoRA layers are in place.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        audio_config: AudioConfig,
        text_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.audio = AudioModality(audio_config, backbone.config.hidden_size)
        self.silent = backbones.silence(backbone) if audio_config.prompt_streams else {}
        self.special_rows: SpecialRows | None = None
        self.text_tokenizer = text_tokenizer
        self.origin: folders.Origin | None = None
        self.lora: Any = None

    @classmethod
    def from_backbone(
        cls,
        path: Path | str,
        audio: AudioConfig | None = None,
        adapt: AdaptConfig | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Give a trained language model untrained audio modules and the special tokens.

        Args:
            path: folder or hub id of any Hugging Face decoder, with its text tokenizer.
            audio: what the audio modules are built from.
            adapt: what of the backbone training may change; by default nothing.
            dtype: of the backbone's weights; the audio modules are float32.

        Raises:
            ValueError: if there is no such decoder, or `audio` does not fit it.
        """
        backbone = load_backbone(str(path), dtype)
        text_tokenizer = load_text_tokenizer(path)
        adapt = adapt or AdaptConfig()
        place = str(Path(path).resolve()) if Path(path).is_dir() else str(path)
        origin = folders.Origin(place, fingerprint(backbone), adapt.mode)
        model = cls._grown(backbone, text_tokenizer, audio or AudioConfig())
        model.origin = origin
        with torch.no_grad():
            words = backbone.get_input_embeddings()(torch.arange(1000) % backbone.config.vocab_size)
        model.audio.match_scale(float(words.std()))
        model._adapt(adapt)
        return model.eval()

    @classmethod
    def _grown(
        cls,
        backbone: PreTrainedModel,
        text_tokenizer: PreTrainedTokenizerBase,
        audio: AudioConfig,
    ) -> Self:
        """Add the special tokens to both, and the audio modules."""
        limit = backbone.config.max_position_embeddings
        if audio.max_tokens + 2 > limit:
            raise ValueError(
                f"audio.max_tokens={audio.max_tokens} and two markers exceed the backbone's "
                f"max_position_embeddings={limit}; set audio.max_tokens={limit // 2} or less"
            )
        resize_vocabulary(backbone, add_special_tokens(text_tokenizer))
        return cls(backbone, audio, text_tokenizer)

    def _adapt(self, config: AdaptConfig) -> None:
        """Decide which of the backbone's parameters are trained."""
        if config.mode == "full":
            return
        assert self.text_tokenizer is not None and self.origin is not None
        self.backbone.requires_grad_(False)
        if config.mode == "lora":
            self.attach_lora(lora_config(config, self.origin.base, self.backbone))
        self.attach_special_rows()

    def attach_lora(self, lora: Any) -> None:
        """Put the LoRA layers of a PEFT configuration into the backbone."""
        add_lora(self.backbone, lora)
        self.lora = lora

    def attach_special_rows(self) -> None:
        """Train the special tokens' embeddings beside tables that stand still."""
        assert self.text_tokenizer is not None
        self.special_rows = SpecialRows(self.backbone, SpecialIds.of(self.text_tokenizer).all)

    def merge(self) -> Self:
        """Fold LoRA layers and special rows into the backbone, in place; return the model."""
        if self.lora is not None:
            merge_lora(self.backbone)
            self.lora = None
        if self.special_rows is not None:
            self.special_rows.fold_into(self.backbone)
            self.special_rows = None
        self.backbone.requires_grad_(True)
        if self.origin is not None:
            self.origin = replace(self.origin, mode="full")
        return self

    def train(self, mode: bool = True) -> Self:
        """Switch dropout and context noise; a frozen backbone never has dropout."""
        super().train(mode)
        if self.origin is not None and self.origin.mode == "frozen":
            self.backbone.eval()
        return self

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.audio.latent_mean.device

    def save_pretrained(
        self, folder: Path | str, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Write a standalone checkpoint: the backbone's own plus `audio.*`, and the tokenizer.

        Args:
            folder: made if absent.
            state_dict: weights to write instead of this model's, e.g. an average.

        Raises:
            ValueError: while LoRA layers stand beside the backbone's weights.
        """
        if self.lora is not None:
            raise ValueError("found LoRA layers; call merge() first, or save_adapter(folder)")
        values = dict(state_dict if state_dict is not None else self.state_dict())
        if self.special_rows is not None:
            self.special_rows.fold(values, self.backbone)
        # Averages leave out what is not trained.
        values |= {f"backbone.{k}": torch.zeros(shape) for k, shape in self.silent.items()}
        tied = {f"backbone.{name}" for name in tied_names(self.backbone)}
        tensors = {k.removeprefix("backbone."): v for k, v in values.items() if k not in tied}
        folders.write_checkpoint(Path(folder), self.backbone, self.audio.config, tensors)
        if self.text_tokenizer is not None:
            self.text_tokenizer.save_pretrained(folder)

    def save_adapter(self, folder: Path | str, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write what training changed beside a backbone that stands still.

        Raises:
            ValueError: if the whole backbone is trained.
        """
        if self.special_rows is None or self.origin is None or self.text_tokenizer is None:
            raise ValueError("the whole backbone is trained; use save_pretrained(folder)")
        values = dict(state_dict if state_dict is not None else self.state_dict())
        own = {k: v for k, v in values.items() if not k.startswith("backbone.")}
        lora = {peft_name: values[name] for name, peft_name in lora_names(values).items()}
        folders.write_adapter(Path(folder), self.origin, self.audio.config, own, self.lora, lora)
        self.text_tokenizer.save_pretrained(folder)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the checkpoint, or the adapter, with a model card; return its address.

        A run folder knows more for its card: `mllm-audio push RUN REPO` or `hub.push_to_hub`.

        Args:
            repo_id: OWNER/NAME, or NAME among your own.
            options: as `hub.push_to_hub` takes them.
        """
        with TemporaryDirectory() as folder:
            save = self.save_pretrained if self.special_rows is None else self.save_adapter
            save(folder)
            return hub.push_to_hub(folder, repo_id, **options)

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        base: str | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        merge: bool = True,
    ) -> Self:
        """Load a checkpoint strictly, or an adapter merged into its base.

        Args:
            folder: what `save_pretrained`, `save_adapter` or `mllm-audio train` wrote.
            base: where an adapter's base model is now, if it moved.
            dtype: of the backbone's weights.
            merge: false leaves an adapter beside its base.

        Raises:
            ValueError: if the folder is no such checkpoint, the base is another one, or tensors
                are missing, unknown or of another shape.
        """
        folder = Path(folder)
        if folders.is_adapter(folder):
            model = cls._from_adapter(folder, base, dtype)
            return model.merge() if merge else model
        if base is not None:
            raise ValueError(f"{folder} stands alone, it has no base model; leave --base out")
        audio = folders.read_audio_config(folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        has_tokenizer = (folder / "tokenizer_config.json").is_file()
        text_tokenizer = load_text_tokenizer(folder) if has_tokenizer else None
        model = cls(backbones.from_hf_config(config, dtype), audio, text_tokenizer)
        folders.read_generation_config(folder, model.backbone)
        tensors = {
            k if k.startswith(folders.PREFIX) else f"backbone.{k}": v
            for k, v in read_tensors(folder).items()
        }
        tied = {f"backbone.{name}" for name in tied_names(model.backbone)}
        model._load(tensors, {k for k in model.state_dict() if k not in tied}, str(folder))
        return model.eval()

    @classmethod
    def _from_adapter(cls, folder: Path, base: str | None, dtype: torch.dtype) -> Self:
        """Load a base model and put the adapter's layers and rows beside it."""
        origin, audio, tensors = folders.read_adapter(folder)
        base = base or origin.base
        try:
            backbone = load_backbone(base, dtype)
        except ValueError as error:
            raise ValueError(
                f"{folder} needs its base model, --base if it moved: {error}"
            ) from error
        folders.check_base(folder, origin, base, fingerprint(backbone))
        text_tokenizer = load_text_tokenizer(folder)
        resize_vocabulary(backbone, SpecialIds.of(text_tokenizer).all)
        model = cls(backbone, audio, text_tokenizer)
        model.origin = origin
        if origin.mode == "lora":
            model.attach_lora(read_lora_config(folder))
        model.attach_special_rows()
        peft_names = lora_names(model.state_dict())
        ours = {peft_name: name for name, peft_name in peft_names.items()}
        own = {k for k in model.state_dict() if not k.startswith("backbone.")}
        renamed = {ours.get(k, k): v for k, v in tensors.items()}
        model._load(renamed, own | peft_names.keys(), str(folder))
        return model.eval()

    def _load(self, tensors: dict[str, Tensor], names: set[str], where: str) -> None:
        """Load exactly the tensors called `names`."""
        state = self.state_dict()
        check_fit(tensors, {name: state[name] for name in names}, where)
        self.load_state_dict(tensors, strict=False)
