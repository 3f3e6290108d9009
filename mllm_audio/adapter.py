"""What of a trained backbone may change: nothing, LoRA layers beside its weights, or everything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mllm_audio.backbone import embedding_scale, is_tied
from mllm_audio.config import check_range, nearest, read_json
from mllm_audio.weights import LORA_FILE

MODES = ("frozen", "lora", "full")


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """How a trained backbone takes part in training."""

    mode: str = "frozen"  # frozen, lora, or full
    lora_rank: int = 16
    lora_alpha: float = 32.0  # the update is scaled by alpha / rank
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] | None = None  # names of layers; None: every linear one

    def __post_init__(self) -> None:
        """Check the mode's name and ranges."""
        if self.mode not in MODES:
            raise ValueError(f"unknown adapt.mode {self.mode!r}; {nearest(self.mode, MODES)}")
        check_range("adapt", self, 1, 65_536, "lora_rank")
        check_range("adapt", self, 0, 1, "lora_dropout")
        check_range("adapt", self, 0, 1e6, "lora_alpha", open_low=True)


class SpecialRows(nn.Module):
    """The embedding rows of the special tokens, trained while all other rows stand still.

    They take the place of the backbone's own rows for these ids, going in and coming out, and are
    written into its tables when a checkpoint is saved.
    """

    ids: Tensor
    output: nn.Parameter | None

    def __init__(self, backbone: PreTrainedModel, ids: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("ids", torch.tensor(ids, device=backbone.device), persistent=False)
        self.scale = embedding_scale(backbone)
        table = backbone.get_input_embeddings().weight.data
        self.input = nn.Parameter(table[self.ids].float())  # (4, H)
        self.output = None
        if not is_tied(backbone):
            head = backbone.get_output_embeddings().weight.data
            self.output = nn.Parameter(head[self.ids].float())  # (4, H)

    def embed(self, input_ids: Tensor, embeds: Tensor) -> Tensor:
        """Put the rows over (B, T, H) `embeds` where (B, T) `input_ids` are special."""
        match = input_ids[..., None] == self.ids  # (B, T, 4)
        rows = (self.input * self.scale)[match.long().argmax(dim=-1)]  # (B, T, H)
        return torch.where(match.any(dim=-1, keepdim=True), rows.to(embeds.dtype), embeds)

    def logits(self, hidden_states: Tensor, logits: Tensor) -> Tensor:
        """Replace the special ids' columns of (..., V) `logits` of (..., H) hidden states."""
        rows = self.input if self.output is None else self.output
        columns = hidden_states @ rows.T.to(hidden_states.dtype)  # (..., 4)
        return logits.index_copy(-1, self.ids, columns.to(logits.dtype))

    def fold(self, tensors: dict[str, Tensor], backbone: PreTrainedModel) -> None:
        """Move `special_rows.*` of a state dict into the backbone's tables in it."""
        # Reversed: of a tied table the first name stays, the one that is saved.
        entries = reversed(backbone.state_dict(keep_vars=True).items())
        names = {id(v): f"backbone.{k}" for k, v in entries}
        tables = {"input": backbone.get_input_embeddings().weight}
        if self.output is not None:
            tables["output"] = backbone.get_output_embeddings().weight
        for key, table in tables.items():
            rows = tensors.pop(f"special_rows.{key}")
            folded = tensors[names[id(table)]].detach().clone()
            folded[self.ids] = rows.to(folded)
            tensors[names[id(table)]] = folded

    @torch.no_grad()
    def fold_into(self, backbone: PreTrainedModel) -> None:
        """Write the rows into the backbone's own tables."""
        backbone.get_input_embeddings().weight.data[self.ids] = self.input.to(backbone.dtype)
        if self.output is not None:
            backbone.get_output_embeddings().weight.data[self.ids] = self.output.to(backbone.dtype)


def add_lora(backbone: PreTrainedModel, lora: Any) -> None:
    """Put LoRA layers, float32, beside the linear layers that a PEFT `LoraConfig` names.

    Raises:
        ValueError: if peft is not installed, or the backbone has no layer of those names.
    """
    peft = _peft()
    try:
        peft.inject_adapter_in_model(lora, backbone)
    except ValueError as error:
        layers = {n.rpartition(".")[2] for n, m in backbone.named_modules() if hasattr(m, "weight")}
        raise ValueError(
            f"adapt.lora_targets={lora.target_modules} names no linear layer; found "
            f"{', '.join(sorted(layers))}"
        ) from error
    for name, parameter in backbone.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()


def lora_config(config: AdaptConfig, base: str, backbone: PreTrainedModel) -> Any:
    """Build PEFT's configuration of the LoRA layers, to be saved beside them."""
    transposed = any(isinstance(module, Conv1D) for module in backbone.modules())  # GPT-2
    targets = "all-linear" if config.lora_targets is None else list(config.lora_targets)
    return _peft().LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        fan_in_fan_out=transposed,
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
    )


def read_lora_config(folder: Path) -> Any:
    """Read what `lora_config` writes from `adapter_config.json`; its other fields are ignored."""
    path = folder / LORA_FILE
    values = read_json(path, "train again, or restore the folder")
    known = ("r", "lora_alpha", "lora_dropout", "target_modules", "fan_in_fan_out")
    missing = [key for key in known if key not in values]
    if missing:
        raise ValueError(f"{path} has no {missing[0]}; restore it")
    return _peft().LoraConfig(**{key: values[key] for key in known}, task_type="CAUSAL_LM")


def merge_lora(backbone: PreTrainedModel) -> None:
    """Add every LoRA update to the weight it stands beside, and take the LoRA layers away."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(backbone.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(backbone.get_submodule(parent), child, module.get_base_layer())


def lora_names(state: dict[str, Tensor]) -> dict[str, str]:
    """Map names of LoRA tensors in our state dict to those of PEFT's files."""
    return {
        name: "base_model.model." + name.removeprefix("backbone.").replace(".default.", ".")
        for name in state
        if ".lora_" in name
    }


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError("LoRA needs peft; type: pip install 'mllm-audio[lora]'") from error
    return peft
