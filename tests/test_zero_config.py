"""DeepSpeed files: the shipped ones hold what they may, and what has another home is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import test_run_config

from mllm_audio.training.cluster import joined_cluster
from mllm_audio.training.config import TrainConfig
from mllm_audio.training.guards import memory_advice
from mllm_audio.training.zero_config import ALLOWED, HOMES, read_zero_config

SHIPPED = Path(__file__).parents[1] / "configs" / "deepspeed"


def write(folder: Path, **values) -> Path:
    path = folder / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}} | values))
    return path


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_shipped_files_are_read_and_hold_their_stage(name):
    values = read_zero_config(SHIPPED / f"{name}.json")
    assert values["zero_optimization"]["stage"] == int(name[4])
    assert set(values) <= set(ALLOWED)
    assert "auto" not in json.dumps(values)


@pytest.mark.parametrize("key", list(HOMES))
def test_what_has_another_home_is_refused_by_its_name(tmp_path, key):
    with pytest.raises(ValueError, match=rf"found {key}, which is set by .*; remove it"):
        read_zero_config(write(tmp_path, **{key: 1}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "auto"}}},
            r'zero_optimization.offload_param.device is "auto", expected a value',
        ),
        ({"bf16": {"enabled": "auto"}}, r'bf16.enabled is "auto"'),
        ({"fp16": {"enabled": True}}, r"found fp16, expected bf16"),
        ({"zero_optimisation": {}}, r"unknown key 'zero_optimisation'; did you mean 'zero_opt"),
        ({"zero_optimization": {"stage": 4}}, r"stage is 4, expected 0, 1, 2 or 3"),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            r"offload_param needs a higher zero_optimization.stage than 2",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            r"offload_optimizer.device is 'nvme', expected cpu or none",
        ),
        (
            {"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}},
            r"bf16 at stage 0 keeps no float32 weights; set zero_optimization.stage to 1",
        ),
        (
            {"zero_optimization": {"stage": 3, "mics_shard_size": 8}},
            r"zero_optimization.mics_shard_size is not supported; .*remove it",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"ratio": 0.5}}},
            r"zero_optimization.offload_optimizer.ratio is not supported",
        ),
        (
            {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
            r"bf16.bf16_master_weights_and_grads is not supported; known: enabled; remove it",
        ),
        ({"bf16": True}, r"bf16 is True, expected an object"),
        ({"zero_optimization": 2}, r"zero_optimization is 2, expected an object"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": None}},
            r"zero_optimization.offload_param is None, expected an object",
        ),
        ({"zero_optimization": {"stage": True}}, r"stage is True, expected 0, 1, 2 or 3"),
    ],
)
def test_values_that_cannot_work_are_refused_in_one_line(tmp_path, values, message):
    with pytest.raises(ValueError, match=message) as refused:
        read_zero_config(write(tmp_path, **values))
    assert "\n" not in str(refused.value)


def test_a_missing_or_damaged_file_says_what_to_type(tmp_path):
    with pytest.raises(ValueError, match=r"found no DeepSpeed file .*; type --deepspeed configs/"):
        read_zero_config(tmp_path / "none.json")
    (tmp_path / "zero.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        read_zero_config(tmp_path / "zero.json")


def test_precision_has_one_home(tmp_path):
    path = write(tmp_path, bf16={"enabled": True})
    config = TrainConfig(precision="float32")
    with (
        pytest.raises(ValueError, match=r"train.precision=float32 and .* has bf16 enabled"),
        joined_cluster(path, config),
    ):
        pass


def test_several_processes_need_a_deepspeed_file(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(ValueError, match=r"found 2 processes .* and no --deepspeed; type"),
        joined_cluster(None, TrainConfig()),
    ):
        pass


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "found"),
    [(64, None, 1, 64), (64, None, 4, 16), (64, 8, 2, 8), (64, 64, 1, 64)],
)
def test_rows_at_once_share_a_batch_out_evenly(batch, micro, processes, found):
    config = TrainConfig(batch_size=batch, micro_batch_size=micro)
    assert config.rows_at_once(processes) == found


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "remedy"),
    [
        (64, 24, 2, r"set train.micro_batch_size=16"),
        (10, None, 4, r"set train.batch_size=8"),
        (3, 4, 1, r"set train.micro_batch_size=3"),
    ],
)
def test_batches_that_do_not_divide_say_what_would(batch, micro, processes, remedy):
    config = TrainConfig(batch_size=batch, micro_batch_size=micro)
    with pytest.raises(ValueError, match=rf"batch_size={batch} is not a multiple of.*{remedy}"):
        config.rows_at_once(processes)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_a_lack_of_memory_names_three_settings_to_lower(error):
    config = TrainConfig(micro_batch_size=32)
    with pytest.raises(RuntimeError) as told, memory_advice(config, 32, 4):
        raise error
    for setting in (
        "train.micro_batch_size (now 32)",
        "audio.head.batch_multiplier (now 4)",
        "audio.max_tokens",
        "train.gradient_checkpointing=true",
        "resumes from its last checkpoint",
    ):
        assert setting in str(told.value)
    with pytest.raises(RuntimeError, match="shapes do not match"), memory_advice(config, 32, 4):
        raise RuntimeError("shapes do not match")


def test_a_real_lack_of_memory_is_told_so(prepared, tmp_path):
    """An allocation that no machine can serve, from inside a step."""
    from mllm_audio.config import override
    from mllm_audio.run import train_run

    config = override(test_run_config(num_steps=1), ["audio.head.batch_multiplier=1000000000"])
    with pytest.raises(RuntimeError, match=r"out of memory in a micro-batch of 4 rows; lower"):
        train_run(config, prepared, tmp_path)
