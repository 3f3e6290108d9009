"""Where DeepSpeed keeps the float32 masters of a model's parameters: fragments of flat tensors.

Its own checkpoints name the same places; read in its version 0.19.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mllm_audio.training.checkpoint import Shard
from mllm_audio.training.engine import adam_state


@dataclass(frozen=True)
class Fragment:
    """The part of one parameter whose master, and moments, this process keeps."""

    start: int  # first element of the flattened parameter
    flat: Tensor  # that the optimizer updates
    offset: int  # of the fragment in it
    length: int

    @property
    def master(self) -> Shard:
        """The fragment of the float32 weight."""
        return self.of(self.flat.detach())

    def of(self, flat: Tensor) -> Shard:
        """Cut the fragment out of a tensor laid out as `flat`."""
        return Shard(self.start, flat.view(-1).narrow(0, self.offset, self.length))

    def moments(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Cut Adam's moments out."""
        state = adam_state(optimizer, self.flat)
        return {kind: self.of(state[kind]).values for kind in ("exp_avg", "exp_avg_sq")}


def find_fragments(model: nn.Module, zero: Any, stage: int, rank: int) -> dict[str, Fragment]:
    """Find by name the fragments that process `rank` keeps under DeepSpeed's optimizer `zero`."""
    trained = [(k, p) for k, p in model.named_parameters() if p.requires_grad]
    if stage == 0:
        return {k: Fragment(0, p, 0, p.numel()) for k, p in trained}
    find = _of_stage_three if stage == 3 else _of_stages_one_and_two
    return {k: f for k, p in trained for f in find(p, zero, rank) if f.length > 0}


def _of_stages_one_and_two(parameter: Any, zero: Any, rank: int) -> Iterator[Fragment]:
    """A partition holds parameters one after another, cut where the next process's begins."""
    mapping = parameter._hp_mapping
    if mapping is not None:
        flat = (
            zero.fp32_groups_flat_partition  # stage 1 in bf16 has an optimizer of its own
            if hasattr(zero, "fp32_groups_flat_partition")
            else zero.single_partition_of_fp32_groups
        )
        address = mapping.get_hp_fragment_address()
        start = mapping.lp_fragment_address.start
        yield Fragment(start, flat[mapping.param_group_index], address.start, address.numel)


def _of_stage_three(parameter: Any, zero: Any, rank: int) -> Iterator[Fragment]:
    """Every parameter is cut into equal parts, the last one padded."""
    group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
    length = min(size, parameter.ds_numel - rank * size)
    yield Fragment(rank * size, zero.fp32_partitioned_groups_flat[group], offset, length)


@torch.no_grad()
def publish(zero: Any, stage: int) -> None:
    """Bring changed masters into the weights that the model computes with."""
    if stage in (1, 2):
        zero.update_lp_params()
    elif stage == 3:
        # A forward pass leaves whole copies behind; small parameters always have one.
        persistent = zero.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
        zero.empty_partition_cache()
        for group, master in enumerate(zero.fp32_partitioned_groups_flat):
            zero.fp16_partitioned_groups_flat[group].data.copy_(master.data)
            zero._unflatten_partitioned_parameters(group)
        if persistent:
            persistent[0].all_gather(persistent)
