"""FLOPs of an optimizer step, from the weights of the model that is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from mllm_audio.model import AudioLanguageModel
from mllm_audio.types import StepCounts


@dataclass(frozen=True, kw_only=True)
class ModelFlops:
    """FLOPs of forward and backward passes, by what they are proportional to.

    A product of (n, k) by a (k, m) weight takes 2 n k m FLOPs, its input's gradient as many again,
    and so does the weight's, if the weight is trained: 6 per weight and row, 4 if it is frozen.
    Attention multiplies queries by keys and probabilities by values: 4 A FLOPs per layer and pair
    of elements of a row, A the width of all heads, and twice that backward. With

        elements   that enter the backbone        latents  that are predicted
        pairs      elements**2 / rows             targets  latents and ends that are predicted
        words      of text that are learned       repeats  noise draws per latent in the head

    a step takes

        elements x 6 (weights of the blocks) + pairs x 12 A (layers)
        + latents x 6 (weights of the latents' projection and of the head's condition
                       + repeats x the head's other weights)
        + targets x 6 H [end of audio] + words x 6 H V [text].

    Left out: norms, activations and the optimizer, which are no matrix products; padding; the one
    word that the text head scores where there is none; and what gradient checkpointing computes
    twice, unless asked for. Counted though not computed: pairs that
    a causal kernel skips (as PaLM's appendix B counts, arXiv:2204.02311), rows being of one length,
    and gradients of the inputs of the three layers that see data first.
    """

    per_element: float
    per_pair: float
    per_latent: float
    per_target: float
    per_word: float
    recomputed_per_element: float  # more, if blocks are computed a second time in the backward pass
    recomputed_per_pair: float

    def step(self, counts: StepCounts, recompute: bool = False) -> float:
        """Count the FLOPs of a step, or of a part of it, that holds `counts`.

        `recompute` adds the second forward pass of the blocks under gradient checkpointing: 8 per
        weight in place of 6.
        """
        pairs = counts.elements**2 / max(1, counts.rows)
        total = (
            self.per_element * counts.elements
            + self.per_pair * pairs
            + self.per_latent * counts.latents
            + self.per_target * counts.targets
            + self.per_word * counts.words
        )
        if recompute:
            total += self.recomputed_per_element * counts.elements
            total += self.recomputed_per_pair * pairs
        return total


def model_flops(model: AudioLanguageModel) -> ModelFlops:
    """Derive the FLOPs from a model's weights; it may stand on the meta device."""
    backbone, audio = model.backbone, model.audio
    config = backbone.config
    embeddings = {id(m.weight) for m in backbone.modules() if isinstance(m, nn.Embedding)}
    blocks = [p for p in backbone.base_model.parameters() if id(p) not in embeddings]
    # A token passes through some of a mixture's experts, whose weights are stacked.
    active = {id(p): getattr(config, "num_experts_per_tok", 1) for p in blocks if _ndim(p) == 3}
    head_width = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    pair = 4.0 * config.num_hidden_layers * config.num_attention_heads * head_width
    repeats = audio.config.head.batch_multiplier
    return ModelFlops(
        per_element=sum(_flops(p, active.get(id(p))) for p in blocks),
        per_pair=3 * pair,
        per_latent=_flops(audio.latent_proj.weight)
        + sum(
            _flops(p) * (1 if "condition_projection" in name else repeats)
            for name, p in audio.named_parameters()
            if name.startswith("head.")
        ),
        per_target=0.0 if audio.end_of_audio is None else _flops(audio.end_of_audio.weight),
        per_word=_flops(backbone.get_output_embeddings().weight),
        recomputed_per_element=sum(_forward(p, active.get(id(p))) for p in blocks),
        recomputed_per_pair=pair,
    )


def _flops(weight: Tensor, active_experts: int | None = None) -> float:
    """Count forward and backward for one row."""
    return _forward(weight, active_experts) * (3 if weight.requires_grad else 2)


def _forward(weight: Tensor, active_experts: int | None = None) -> float:
    """Count the forward product with one row; a vector is no matrix."""
    if _ndim(weight) < 2:
        return 0.0
    shape = _shape(weight)
    share = 1.0 if active_experts is None else active_experts / shape[0]
    return 2.0 * math.prod(shape) * share


def _ndim(weight: Tensor) -> int:
    return len(_shape(weight))


def _shape(weight: Tensor) -> tuple[int, ...]:
    """Give the shape of a weight; ZeRO 3 leaves an empty one behind, and the whole one's shape."""
    return tuple(getattr(weight, "ds_shape", weight.shape))
