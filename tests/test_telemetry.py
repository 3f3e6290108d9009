"""Telemetry between two lines of the log, and the log's way to Weights & Biases."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from mllm_audio.training.flops import model_flops
from mllm_audio.training.log import TrainLog, read_log
from mllm_audio.training.telemetry import Telemetry
from mllm_audio.types import StepCounts

STEP = StepCounts(rows=4, elements=100, latents=60, targets=64, words=7)


def test_a_reading_is_rates_and_mfu_since_the_one_before(make_model):
    model = make_model()
    telemetry = Telemetry(model, num_processes=2, peak_tflops=0.5, seconds=10.0)
    for _ in range(3):
        telemetry.add(0.5, 1.0, STEP)
    first = telemetry.read(12.0)
    assert first["speed/samples_per_second"] == 3 * 4 / 2
    assert first["speed/tokens_per_second"] == 3 * 100 / 2
    flops = model_flops(model).step(STEP)
    assert first["speed/mfu"] == pytest.approx(3 * flops / (2 * 2 * 0.5e12))
    telemetry.add(0.5, 1.0, STEP)
    assert telemetry.read(22.0)["speed/samples_per_second"] == 4 / 10


def test_time_that_was_not_training_is_left_out(make_model):
    telemetry = Telemetry(make_model(), seconds=0.0)
    telemetry.add(0.0, 1.0, STEP)
    telemetry.leave_out(6.0)
    assert telemetry.read(8.0)["speed/samples_per_second"] == 4 / 2
    telemetry.add(0.0, 1.0, STEP)
    assert telemetry.read(9.0)["speed/samples_per_second"] == 4 / 1


def test_without_a_known_peak_there_is_no_mfu(make_model):
    telemetry = Telemetry(make_model(), seconds=0.0)
    telemetry.add(0.0, 1.0, STEP)
    assert "speed/mfu" not in telemetry.read(1.0)


def test_a_gpu_gives_its_data_sheets_peak_and_its_own_memory(make_model, monkeypatch):
    model = make_model()
    monkeypatch.setattr(type(model), "device", torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    telemetry = Telemetry(model, seconds=0.0)
    telemetry.add(0.0, 1.0, STEP)
    values = telemetry.read(1.0)
    assert values["speed/mfu"] == pytest.approx(model_flops(model).step(STEP) / 989e12)
    assert values["memory/gpu_gib"] == 3
    assert "memory/host_gib" not in values
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA of next year")
    assert "speed/mfu" not in Telemetry(model, seconds=0.0).read(1.0)


def test_host_memory_is_what_the_kernel_counts(make_model):
    gib = Telemetry(make_model(), seconds=0.0).read(1.0)["memory/host_gib"]
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    assert gib == pytest.approx(int(status["VmHWM"].split()[0]) / 2**20, rel=0.02)


def test_losses_are_averaged_by_tenths_of_the_masking_ratio(make_model):
    telemetry = Telemetry(make_model(), seconds=0.0)
    for ratio, loss in ((0.0, 1.0), (0.7, 2.0), (0.79, 4.0), (0.8, 8.0)):
        telemetry.add(ratio, loss, STEP)
    telemetry.add(0.3, 0.0, StepCounts(rows=4, elements=40, words=30))  # text alone
    prefix = "train/audio_loss_by_ratio/"
    values = {k.removeprefix(prefix): v for k, v in telemetry.read(1.0).items() if prefix in k}
    assert values == {"0.0": 1.0, "0.7": 3.0, "0.8": 8.0}
    assert not any(prefix in key for key in telemetry.read(2.0))


FAKE = """
calls = []
class Error(Exception): pass
class Run:
    def __init__(self, id): self.id = id
    def define_metric(self, *names, **options): calls.append(("define_metric", names, options))
    def log(self, values): calls.append(("log", values))
    def finish(self): calls.append(("finish",))
def init(**options):
    calls.append(("init", options))
    if options["project"] == "forbidden":
        raise Error("no API key")
    return Run(options["id"] or "abc123")
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    import wandb

    yield wandb
    del sys.modules["wandb"]


def test_wandb_gets_the_records_and_a_resumed_run_goes_on_under_its_id(wandb, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    log = TrainLog(run, 1, "sounds")
    log.write(1, {"train/audio_loss": 2.0})
    log.close()
    assert json.loads((run / "wandb.json").read_text()) == {"id": "abc123"}
    wandb.calls[0][1].pop("dir")
    options = {"project": "sounds", "name": "run", "id": None, "resume": "allow"}
    assert wandb.calls[0] == ("init", options)
    assert ("log", {"step": 1, "train/audio_loss": 2.0}) in wandb.calls
    assert ("define_metric", ("*",), {"step_metric": "step"}) in wandb.calls
    assert wandb.calls[-1] == ("finish",)
    wandb.calls.clear()
    TrainLog(run, 2, "sounds").close()
    assert wandb.calls[0][1]["id"] == "abc123"
    assert [record["step"] for record in read_log(run)] == [1]


def test_without_a_project_wandb_is_not_touched(wandb, tmp_path):
    log = TrainLog(tmp_path, 1)
    log.write(1, {"train/audio_loss": 2.0})
    log.close()
    assert wandb.calls == []
    assert not (tmp_path / "wandb.json").exists()


def test_a_wandb_that_refuses_or_is_missing_is_one_line(wandb, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"W&B did not start \(no API key\); type: wandb login"):
        TrainLog(tmp_path, 1, "forbidden")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ValueError, match=r"wandb_project=sounds needs wandb; .*'mllm-audio\[wandb\]'"
    ):
        TrainLog(tmp_path, 1, "sounds")
    assert not (tmp_path / "wandb.json").exists()
