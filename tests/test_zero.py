"""DeepSpeed ZeRO against the plain engine: equal losses, exact resume, any number of processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CAPTIONS, test_run_config, write_base
from safetensors.torch import load_file

from mllm_audio.config import override
from mllm_audio.run import train_run
from mllm_audio.training.checkpoint import KINDS, list_checkpoints, read_weights
from mllm_audio.training.log import read_log

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
PRECISIONS = [("float32", s) for s in (0, 1, 2, 3)] + [("bf16", s) for s in (1, 2, 3)]


def short_run(job):
    """Configure twenty steps in micro-batches of two rows, dropout included."""
    config = test_run_config(
        num_steps=20,
        log_every=1,
        validate_every=10,
        save_every=10,
        batch_size=4,
        micro_batch_size=2,
        precision=job.get("precision", "float32"),
    )
    return override(
        config,
        [
            "train.optim.schedule=constant",
            "train.optim.warmup_steps=1",
            "train.optim.lr=3e-3",
            *job.get("overrides", []),
        ],
    )


def start(job, cluster=None):
    """Train what a job describes, alone or in a cluster."""
    if "base" in job:
        from mllm_audio.add_voice import train_added_voice, voice_config
        from mllm_audio.presets import get_preset

        mode = {job["mode"]: True} if job["mode"] != "frozen" else {}
        config = override(
            voice_config(get_preset("voice_digits"), job["base"], **mode), job["overrides"]
        )
        replay = Path(job["replay"])
        train_added_voice(
            config, Path(job["data"]), Path(job["out"]), replay=replay, cluster=cluster
        )
    else:
        train_run(short_run(job), Path(job["data"]), Path(job["out"]), cluster)


def run_jobs(folder, jobs, num_processes):
    """Run jobs one after another in one launch of torchrun; return outcomes by name."""
    path = folder / f"jobs{num_processes}.jsonl"
    path.write_text("".join(json.dumps(job) + "\n" for job in jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [
        "--nproc_per_node",
        str(num_processes),
        str(Path(__file__).parent / "zero_worker.py"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, str(path)], capture_output=True, text=True, env=environment, timeout=550
    )
    lines = [x for x in result.stdout.splitlines() if x.startswith("JOB ")]
    outcomes = [json.loads(line.removeprefix("JOB ")) for line in lines]
    assert len(outcomes) == len(jobs), result.stdout + result.stderr[-4000:]
    return {outcome["name"]: outcome["outcome"] for outcome in outcomes}


def losses(run, name="train/audio_loss"):
    return [record[name] for record in read_log(run) if name in record]


def largest_difference(first, second):
    assert len(first) == len(second) > 0
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


class Lab:
    """Runs of one folder, made when first asked for."""

    def __init__(self, folder, data):
        self.folder, self.data = folder, data

    def zero(self, precision, stage, **more):
        path = self.folder / f"{precision}{stage}.json"
        zero = {"stage": stage}
        if stage == 3:  # the default leaves parameters this small whole everywhere
            zero["stage3_param_persistence_threshold"] = 100
        settings = (BF16 if precision == "bf16" else {}) | {"zero_optimization": zero}
        path.write_text(json.dumps(settings | more))
        return str(path)

    def job(self, name, precision, stage, *overrides):
        return {
            "name": name,
            "data": str(self.data),
            "out": str(self.folder / name),
            "precision": precision,
            "zero": self.zero(precision, stage),
            "overrides": list(overrides),
        }

    def copy(self, source, name):
        shutil.copytree(self.folder / source, self.folder / name)


@pytest.fixture(scope="module")
def lab(tmp_path_factory, prepared):
    """Run the plain engine, then every stage and precision on two processes and on one."""
    lab = Lab(tmp_path_factory.mktemp("zero"), prepared)
    start({"data": str(prepared), "out": str(lab.folder / "plain")})
    two, one = [], []
    for precision, stage in PRECISIONS:
        name = f"{precision}-{stage}"
        two.append(lab.job(f"{name}-two", precision, stage))
        halves = f"{name}-halves"
        two.append(lab.job(halves, precision, stage, "train.num_steps=10"))
        two.append({**lab.job(halves, precision, stage), "name": f"{halves} again"})
    two.append(lab.job("checkpointed", "float32", 3, "train.gradient_checkpointing=true"))
    lab.two = run_jobs(lab.folder, two, 2)
    for precision, stage in PRECISIONS:
        one.append(lab.job(f"{precision}-{stage}-one", precision, stage))
    for stage, other in ((1, 3), (2, 2), (3, 1)):
        name = f"moved-{stage}-{other}"
        lab.copy(f"float32-{stage}-two", name)
        shutil.rmtree(lab.folder / name / "checkpoints" / "step-00000020")
        one.append(lab.job(name, "float32", other))
    lab.one = run_jobs(lab.folder, one, 1)
    return lab


@pytest.mark.parametrize("processes", ["one", "two"])
@pytest.mark.parametrize(("precision", "stage"), PRECISIONS)
def test_losses_equal_those_of_the_plain_engine(lab, precision, stage, processes):
    name = f"{precision}-{stage}-{processes}"
    assert getattr(lab, processes)[name] == "done"
    limit = 1e-5 if precision == "float32" else 1e-2
    found, expected = lab.folder / name, lab.folder / "plain"
    assert largest_difference(losses(found), losses(expected)) <= limit
    validation = "validation/audio_loss"  # of the averages
    assert len(losses(found, validation)) == 2
    assert largest_difference(losses(found, validation), losses(expected, validation)) <= limit


def test_gradient_checkpointing_leaves_the_losses_of_stage_three(lab):
    assert lab.two["checkpointed"] == "done"
    found, expected = losses(lab.folder / "checkpointed"), losses(lab.folder / "plain")
    assert largest_difference(found, expected) <= 1e-5


@pytest.mark.parametrize(("precision", "stage"), PRECISIONS)
def test_resume_is_bitwise(lab, precision, stage):
    name = f"{precision}-{stage}"
    assert lab.two[f"{name}-halves again"] == "done"
    whole, halves = lab.folder / f"{name}-two", lab.folder / f"{name}-halves"
    assert losses(halves) == losses(whole)
    first, second = list_checkpoints(whole)[-1], list_checkpoints(halves)[-1]
    assert first.name == second.name == "step-00000020"
    for part in first.glob("rank-*.safetensors"):
        a, b = load_file(part), load_file(second / part.name)
        assert a.keys() == b.keys()
        assert {k.partition("/")[0] for k in a} <= {*KINDS, "buffer"}
        assert all(torch.equal(a[key], b[key]) for key in a), part
    for path in ("model.safetensors",):
        a, b = load_file(whole / path), load_file(halves / path)
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(("stage", "other"), [(1, 3), (2, 2), (3, 1)])
def test_two_processes_resume_as_one_at_another_stage(lab, stage, other):
    name = f"moved-{stage}-{other}"
    assert lab.one[name] == "done"
    assert largest_difference(losses(lab.folder / name), losses(lab.folder / "plain")) <= 1e-5


def test_a_run_moves_from_two_processes_to_the_plain_engine_and_back(lab):
    lab.copy("float32-2-two", "home")
    shutil.rmtree(lab.folder / "home/checkpoints/step-00000020")
    start({"data": str(lab.data), "out": str(lab.folder / "home")})
    expected = losses(lab.folder / "plain")
    assert largest_difference(losses(lab.folder / "home"), expected) <= 1e-5
    lab.copy("plain", "abroad")
    shutil.rmtree(lab.folder / "abroad/checkpoints/step-00000020")
    assert run_jobs(lab.folder, [lab.job("abroad", "float32", 3)], 2) == {"abroad": "done"}
    assert largest_difference(losses(lab.folder / "abroad"), expected) <= 1e-5


@pytest.mark.parametrize(("precision", "stage"), PRECISIONS)
def test_checkpoints_of_every_stage_export_the_same_averages(lab, precision, stage):
    plain = read_weights(list_checkpoints(lab.folder / "plain")[-1])
    found = read_weights(list_checkpoints(lab.folder / f"{precision}-{stage}-two")[-1])
    assert found.keys() == plain.keys()
    tolerance = 1e-5 if precision == "float32" else 2e-2
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance)


def test_each_process_keeps_its_share_under_zero(lab):
    def sizes(name):
        parts = sorted(list_checkpoints(lab.folder / name)[-1].glob("rank-*.safetensors"))
        return [part.stat().st_size for part in parts]

    for stage in (1, 2, 3):
        first, second = sizes(f"float32-{stage}-two")
        assert abs(first - second) < 0.2 * first
    first, second = sizes("float32-0-two")
    assert second < 0.01 * first  # replicated: written once


@pytest.fixture(scope="module")
def talkative(tmp_path_factory, prepared):
    """Voices on a base: one process has replayed text only, the other often no text to learn."""
    folder = tmp_path_factory.mktemp("talk")
    write_base(folder / "base")
    rows = [{"text": f"{caption} and {other}"} for caption in CAPTIONS for other in CAPTIONS]
    (folder / "replay.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lab = Lab(folder, prepared)
    common = {
        "base": str(folder / "base"),
        "replay": str(folder / "replay.jsonl"),
        "data": str(prepared),
        "overrides": [
            "train.num_steps=8", "train.batch_size=2", "train.micro_batch_size=1",
            "train.precision=float32", "train.log_every=1", "train.max_minutes=none",
            "train.optim.schedule=constant", "data.replay_share=0.5", "data.pack_tokens=none",
            "audio.max_tokens=16", "audio.head.width=32", "audio.head.num_blocks=1",
            "data.unconditional_share=0.5",
        ],
    }  # fmt: skip
    jobs = []
    for mode in ("frozen", "lora", "full"):
        start({**common, "mode": mode, "out": str(folder / f"{mode}-plain")})
        for stage in (2, 3):
            name = f"{mode}-{stage}"
            job = {**common, "mode": mode, "name": name, "out": str(folder / name)}
            jobs.append({**job, "zero": lab.zero("float32", stage)})
            short = [*common["overrides"], "train.num_steps=4"]
            halves = {**jobs[-1], "name": f"{name} half", "out": str(folder / f"{name}-halves")}
            jobs += [{**halves, "overrides": short}, {**halves, "name": f"{name} again"}]
    lab.outcomes = run_jobs(folder, jobs, 2)
    return lab


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
def test_voices_train_and_resume_where_one_process_has_text_alone(talkative, mode, stage):
    assert talkative.outcomes[f"{mode}-{stage} again"] == "done", talkative.outcomes
    plain = talkative.folder / f"{mode}-plain"
    for name in ("train/audio_loss", "train/text_loss"):
        found = losses(talkative.folder / f"{mode}-{stage}", name)
        assert len(found) == 8
        assert largest_difference(found, losses(plain, name)) <= 1e-5
        assert losses(talkative.folder / f"{mode}-{stage}-halves", name) == found
    file = "model.safetensors" if mode == "full" else "audio.safetensors"
    a, b = load_file(plain / file), load_file(talkative.folder / f"{mode}-{stage}" / file)
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory, prepared):
    """Three steps with each file that is shipped, on two processes."""
    lab = Lab(tmp_path_factory.mktemp("shipped"), prepared)
    short = ["train.num_steps=3", "train.validate_every=3", "train.save_every=3"]
    start({"data": str(prepared), "out": str(lab.folder / "plain"), "overrides": short})
    jobs = []
    for path in sorted((ROOT / "configs/deepspeed").glob("*.json")):
        job = lab.job(path.stem, "bf16", 1, *short)
        jobs.append({**job, "zero": str(path)})
        longer = ["train.num_steps=5", "train.validate_every=3"]
        again = {**job, "name": f"{path.stem} again", "zero": str(path), "overrides": longer}
        jobs.append(again)
    lab.outcomes = run_jobs(lab.folder, jobs, 2)
    return lab


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_shipped_files_train_and_resume(shipped, name):
    assert shipped.outcomes[name] == shipped.outcomes[f"{name} again"] == "done"
    found = losses(shipped.folder / name)
    assert len(found) == 5
    assert largest_difference(found[:3], losses(shipped.folder / "plain")) <= 1e-2


@pytest.mark.parametrize("name", ["plain", "float32-2-two", "float32-3-two", "bf16-1-two"])
def test_export_writes_averages_and_raw_weights_that_load(lab, tmp_path, name):
    from transformers import AutoModelForCausalLM

    from mllm_audio.export import export
    from mllm_audio.generation.voice import Voice

    run = lab.folder / name
    step = list_checkpoints(run)[-1]
    assert export(run, tmp_path / "ema") == step
    export(run, tmp_path / "raw", "raw")
    for kind, weights in (("average", "ema"), ("weight", "raw")):
        model = Voice.load(tmp_path / weights).model
        for key, value in read_weights(step, kind).items():
            assert torch.equal(model.state_dict()[key], value), key
        AutoModelForCausalLM.from_pretrained(tmp_path / weights)
    a = load_file(run / "model.safetensors")
    b = load_file(tmp_path / "ema/model.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    with pytest.raises(ValueError, match=r"exists, expected a new or empty folder"):
        export(run, tmp_path / "ema")
    with pytest.raises(ValueError, match=r"no checkpoint of step 7; found 10, 20"):
        export(run, tmp_path / "more", step=7)
    with pytest.raises(ValueError, match=r"holds no checkpoint; expected a folder that train"):
        export(tmp_path, tmp_path / "more")


@pytest.mark.parametrize("mode", ["frozen", "lora"])
def test_an_adapter_is_exported_as_an_adapter(talkative, tmp_path, mode):
    from mllm_audio.export import export

    export(talkative.folder / f"{mode}-3", tmp_path / "out")
    a = load_file(talkative.folder / f"{mode}-3/audio.safetensors")
    b = load_file(tmp_path / "out/audio.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert (tmp_path / "out/adapter_model.safetensors").is_file() == (mode == "lora")


@pytest.mark.parametrize("stage", [0, 2])
def test_a_gradient_that_is_not_finite_stops_before_the_weights(tmp_path, prepared, stage):
    """In a process of its own, where `Losses.total` has a finite value and an infinite gradient."""
    script = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_zero import short_run
from mllm_audio.run import train_run
from mllm_audio.modality import AudioModality
from mllm_audio.training.cluster import Cluster
from mllm_audio.training import trainer
from mllm_audio.training.zero import join_world
from mllm_audio.training.zero_config import read_zero_config

class Infinite(torch.autograd.Function):
    @staticmethod
    def forward(context, values): return values.clone()
    @staticmethod
    def backward(context, gradient): return gradient * float("inf")

original, calls, engines = AudioModality.loss, [], []
def loss(self, *arguments):
    calls.append(1)
    value = original(self, *arguments)
    return Infinite.apply(value) if len(calls) == 5 else value
AudioModality.loss = loss
do_step = trainer.do_step
def watched(engine, *arguments):
    engines.append(engine)
    return do_step(engine, *arguments)
trainer.do_step = watched
cluster = Cluster(join_world(60), read_zero_config(Path(sys.argv[2])))
try:
    train_run(short_run({}), Path(sys.argv[3]), Path(sys.argv[4]), cluster)
except trainer.TrainingStoppedError as error:
    print(error)
shards = engines[0].shards()
assert all(bool(torch.isfinite(shard.values).all()) for shard in shards.values())
"""
    config = tmp_path / "zero.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    arguments = [str(Path(__file__).parent), str(config), str(prepared), str(tmp_path / "run")]
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=200,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert "step 3: loss" in result.stdout
    assert "gradient norm inf" in result.stdout or "gradient norm nan" in result.stdout
