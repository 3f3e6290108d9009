"""DeepSpeed files: memory, communication and precision; whatever else they set is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mllm_audio.config import nearest, read_json

# What has its home in the run's own configuration, and where.
HOMES = {
    "optimizer": "train.optim",
    "scheduler": "train.optim.schedule",
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.batch_size and train.micro_batch_size",
    "gradient_clipping": "train.optim.max_grad_norm",
    "activation_checkpointing": "train.gradient_checkpointing",
    "torch_autocast": "train.precision",
    "tensorboard": "RUN/tensorboard, which is always written",
    "wandb": "train.wandb_project",
    "data_efficiency": "the data section",
    "curriculum_learning": "the data section",
}
ALLOWED = (
    "zero_optimization",
    "bf16",
    "data_types",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "sparse_gradients",
    "comms_logger",
    "flops_profiler",
    "wall_clock_breakdown",
    "memory_breakdown",
    "steps_per_print",
)

# What may stand in a section. Other keys move masters or moments, or change what a step is.
SECTIONS = {
    "bf16": ("enabled",),
    "data_types": ("grad_accum_dtype",),
    "zero_optimization": (
        "stage",
        "contiguous_gradients",
        "reduce_scatter",
        "reduce_bucket_size",
        "use_multi_rank_bucket_allreduce",
        "allgather_partitions",
        "allgather_bucket_size",
        "overlap_comm",
        "round_robin_gradients",
        "sub_group_size",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_model_persistence_threshold",
        "offload_optimizer",
        "offload_param",
    ),
    "zero_optimization.offload_optimizer": ("device", "pin_memory", "buffer_count", "fast_init"),
    "zero_optimization.offload_param": ("device", "pin_memory", "buffer_count", "buffer_size"),
}


def read_zero_config(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed file.

    Raises:
        ValueError: naming the key that does not belong there, or has no value yet.
    """
    if not path.is_file():
        raise ValueError(
            f"found no DeepSpeed file {path}; type --deepspeed configs/deepspeed/zero2.json"
        )
    values = read_json(path, "restore it")
    for key in values:
        if key in HOMES:
            raise ValueError(f"{path}: found {key}, which is set by {HOMES[key]}; remove it")
        if key == "fp16":
            raise ValueError(f'{path}: found fp16, expected bf16; type "bf16": {{"enabled": true}}')
        if key not in ALLOWED:
            raise ValueError(f"{path}: unknown key {key!r}; {nearest(key, ALLOWED)}")
    if auto := _find_auto(values):
        raise ValueError(f'{path}: {auto} is "auto", expected a value; type one')
    _check_zero(path, values)
    return values


def _find_auto(values: dict[str, Any], prefix: str = "") -> str | None:
    """Name the first key that is left for a launcher to fill in."""
    for key, value in values.items():
        if value == "auto":
            return prefix + key
        if isinstance(value, dict) and (found := _find_auto(value, f"{prefix}{key}.")):
            return found
    return None


def _check_zero(path: Path, values: dict[str, Any]) -> None:
    """Refuse what checkpoints, averages or the learning rate would not reach."""
    for section, known in SECTIONS.items():
        found: Any = values
        for key in section.split("."):
            found = found.get(key, {})
        if not isinstance(found, dict):
            raise ValueError(f"{path}: {section} is {found!r}, expected an object; type {{...}}")
        for key in found:
            if key not in known:
                raise ValueError(
                    f"{path}: {section}.{key} is not supported; {nearest(key, known)}; remove it"
                )
    zero = values.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ValueError(f"{path}: zero_optimization.stage is {stage!r}, expected 0, 1, 2 or 3")
    for part in ("offload_optimizer", "offload_param"):
        device = zero.get(part, {}).get("device", "none")
        if device not in ("none", "cpu"):
            raise ValueError(f"{path}: {part}.device is {device!r}, expected cpu or none")
        if device == "cpu" and stage < (3 if part == "offload_param" else 1):
            raise ValueError(f"{path}: {part} needs a higher zero_optimization.stage than {stage}")
    if uses_bf16(values) and stage == 0:
        raise ValueError(
            f"{path}: bf16 at stage 0 keeps no float32 weights; set zero_optimization.stage to 1, "
            "or remove bf16 to train in autocast"
        )


def uses_bf16(values: dict[str, Any]) -> bool:
    """Tell whether weights are bf16 beside float32 masters."""
    return bool(values.get("bf16", {}).get("enabled", False))


def offloads_optimizer(values: dict[str, Any]) -> bool:
    """Tell whether masters and moments live in host memory."""
    zero = values.get("zero_optimization", {})
    return zero.get("offload_optimizer", {}).get("device", "none") == "cpu"
