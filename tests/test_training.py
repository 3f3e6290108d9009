"""The loop: exact resume, guards, averages, golden losses."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import test_run_config
from safetensors.torch import save_file

from mllm_audio.config import override
from mllm_audio.data.clips import load_split
from mllm_audio.generation.voice import Voice
from mllm_audio.run import train_run
from mllm_audio.training import engine as training_engine
from mllm_audio.training.checkpoint import (
    KINDS,
    Shard,
    fill_shards,
    list_checkpoints,
    read_state,
    read_weights,
    save_checkpoint,
)
from mllm_audio.training.ema import EMA
from mllm_audio.training.log import read_log
from mllm_audio.training.optim import OptimConfig, build_optimizer, learning_rate
from mllm_audio.training.trainer import TrainingStoppedError

GOLDEN = Path(__file__).parent / "golden" / "tiny_losses.json"
CONFIG = replace(
    test_run_config(
        num_steps=20, log_every=1, validate_every=10, save_every=5, precision="float32"
    ),
    generation=replace(test_run_config().generation, num_inference_steps=2),
)


def losses(run: Path) -> list[float]:
    return [r["train/audio_loss"] for r in read_log(run) if "train/audio_loss" in r]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Read all that the newest checkpoint holds: weights, averages, moments, buffers."""
    checkpoint = list_checkpoints(run)[-1]
    return {f"{k}/{n}": v for k in KINDS for n, v in read_weights(checkpoint, k).items()}


@pytest.fixture(scope="module")
def uninterrupted(prepared, tmp_path_factory):
    run = tmp_path_factory.mktemp("run") / "whole"
    train_run(CONFIG, prepared, run)
    return run


def test_twenty_steps_give_the_golden_losses(uninterrupted):
    """Written by `python tests/golden/write.py`; a change of 1 % anywhere shows here."""
    golden = json.loads(GOLDEN.read_text())
    found = losses(uninterrupted)
    assert len(found) == 20
    torch.testing.assert_close(torch.tensor(found), torch.tensor(golden), rtol=1e-3, atol=1e-4)


def test_a_lengthened_run_has_the_losses_and_weights_of_an_uninterrupted_one(prepared, tmp_path):
    # At a constant learning rate: a cosine follows the length of the run.
    constant = override(CONFIG, ["train.optim.schedule=constant"])
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_run(constant, prepared, whole)
    train_run(override(constant, ["train.num_steps=7"]), prepared, parts)
    assert len(losses(parts)) == 7
    train_run(constant, prepared, parts)
    assert losses(parts) == losses(whole)
    first, second = tensors(whole), tensors(parts)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_kill_nine_resumes_from_the_last_checkpoint_onto_the_same_losses(
    prepared, uninterrupted, tmp_path
):
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_training import CONFIG; "
        "from pathlib import Path; from mllm_audio.run import train_run; "
        "train_run(CONFIG, Path(sys.argv[2]), Path(sys.argv[3]))"
    )
    command = [
        sys.executable,
        "-c",
        script,
        str(Path(__file__).parent),
        str(prepared),
        str(tmp_path),
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list_checkpoints(tmp_path) and time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list_checkpoints(tmp_path)
    train_run(CONFIG, prepared, tmp_path)
    assert losses(tmp_path) == losses(uninterrupted)


def test_interrupt_saves_the_step_it_stopped_after(prepared, uninterrupted, tmp_path, monkeypatch):
    from mllm_audio.training import trainer

    original = trainer.check_finite

    def interrupt_at_three(result, batches, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        original(result, batches, step)

    monkeypatch.setattr(trainer, "check_finite", interrupt_at_three)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 4"):
        train_run(CONFIG, prepared, tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000004"]
    monkeypatch.setattr(trainer, "check_finite", original)
    train_run(CONFIG, prepared, tmp_path)
    assert losses(tmp_path) == losses(uninterrupted)
    first, second = tensors(uninterrupted), tensors(tmp_path)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_run_folder_refuses_another_configuration(prepared, uninterrupted):
    with pytest.raises(ValueError, match=r"holds another run \(train.batch_size 4 -> 3\)"):
        train_run(override(CONFIG, ["train.batch_size=3"]), prepared, uninterrupted)


def test_a_nan_stops_with_the_file_names_and_leaves_the_weights(prepared, tmp_path, monkeypatch):
    from mllm_audio.modality import AudioModality

    original, calls = AudioModality.loss, []

    def poisoned(self, hidden_states, latents, generator=None):
        calls.append(1)
        value = original(self, hidden_states, latents, generator)
        return value * float("nan") if len(calls) == 3 else value

    monkeypatch.setattr(AudioModality, "loss", poisoned)
    with pytest.raises(
        TrainingStoppedError, match=r"step 3: loss nan.* on: \d+.wav, .*lower train"
    ):
        train_run(override(CONFIG, ["train.save_every=1"]), prepared, tmp_path)
    assert read_state(list_checkpoints(tmp_path)[-1])["step"] == 2
    assert all(bool(torch.isfinite(value).all()) for value in tensors(tmp_path).values())
    monkeypatch.setattr(AudioModality, "loss", original)
    advised = ["train.save_every=1", "train.optim.lr=1e-4"]  # what the message says to try
    train_run(override(CONFIG, advised), prepared, tmp_path)
    assert len(losses(tmp_path)) == 20


def test_a_latent_out_of_range_stops_with_the_file_names(prepared, tmp_path):
    with pytest.raises(TrainingStoppedError, match=r"a latent .* stds from the mean .* \d+.wav"):
        train_run(override(CONFIG, ["train.max_abs_latent=0.5"]), prepared, tmp_path)
    train_run(override(CONFIG, ["train.max_abs_latent=200"]), prepared, tmp_path)
    assert len(losses(tmp_path)) == 20


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("audio.max_tokens=12", r"has 16 latents, the model takes audio.max_tokens=12; set audio"),
        ("audio.latent_dim=64", r"latents with latent_dim 128, audio.latent_dim is 64"),
        ("backbone.max_positions=20", r"caption .* text tokens, room is for 2; set backbone"),
    ],
)
def test_data_that_does_not_fit_is_refused_before_training(prepared, tmp_path, assignment, message):
    with pytest.raises(ValueError, match=message):
        train_run(override(CONFIG, [assignment]), prepared, tmp_path / "run")


def test_following_the_advice_of_a_refusal_is_not_refused(prepared, tmp_path):
    with pytest.raises(ValueError, match=r"set backbone.max_positions=\d+") as refused:
        train_run(override(CONFIG, ["backbone.max_positions=20"]), prepared, tmp_path / "run")
    advice = str(refused.value).split("set ")[1]
    train_run(override(CONFIG, [advice, "train.num_steps=1"]), prepared, tmp_path / "run")


def test_a_second_process_in_the_same_run_is_refused(prepared, tmp_path):
    import fcntl

    train_run(override(CONFIG, ["train.num_steps=1"]), prepared, tmp_path)
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is training in"):
            train_run(CONFIG, prepared, tmp_path)


def test_a_run_killed_between_checkpoint_and_export_is_exported_when_typed_again(
    prepared, tmp_path
):
    config = override(CONFIG, ["train.num_steps=5"])
    train_run(config, prepared, tmp_path)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).unlink()
    assert Voice.load(train_and_return(config, prepared, tmp_path))
    assert (tmp_path / "model.safetensors").is_file()


def train_and_return(config, data, run):
    train_run(config, data, run)
    return run


def save_ones(run: Path, step: int, keep: int = 2) -> None:
    shards = {"weight/a": Shard(0, torch.ones(6))}
    state = {"step": step, "shapes": {"a": [3, 2]}}
    save_checkpoint(run, step, shards, {"b": torch.zeros(1)}, state, keep)


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    latest = tmp_path / "checkpoints" / "latest"
    save_ones(tmp_path, 1)
    monkeypatch.setattr(
        "mllm_audio.training.checkpoint.save_file",
        lambda *_: (_ for _ in ()).throw(OSError("No space left on device")),
    )
    with pytest.raises(OSError, match="No space left on device; the previous one is intact"):
        save_ones(tmp_path, 2)
    monkeypatch.undo()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]
    assert sorted(path.name for path in latest.parent.iterdir()) == ["latest", "step-00000001"]
    assert latest.read_text() == "step-00000001\n"
    (latest.parent / "step-00000002.partial").mkdir()  # a kill may leave this behind
    for step in (2, 3):
        save_ones(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    assert not list(latest.parent.glob("*.partial"))
    assert latest.read_text() == "step-00000003\n"
    (list_checkpoints(tmp_path)[-1] / "state.json").write_text("{")
    with pytest.raises(ValueError, match=re.escape("delete it to resume the one before")):
        read_state(list_checkpoints(tmp_path)[-1])


def test_parts_of_any_cut_are_put_together_again(tmp_path):
    values = torch.arange(10.0)
    for cuts in ([0, 10], [0, 3, 10], [0, 1, 2, 9, 10]):
        run = tmp_path / str(len(cuts))
        save_checkpoint(
            run, 1, {}, {"b": torch.ones(2)}, {"shapes": {"a": [5, 2], "c": [1]}}, keep=1
        )
        folder = list_checkpoints(run)[0]
        for rank, (start, stop) in enumerate(itertools.pairwise(cuts)):
            part = {f"average/a@{start}": values[start:stop].clone()}
            if rank == 0:
                part |= {"average/c@0": torch.tensor([7.0]), "buffer/b": torch.ones(2)}
            save_file(part, folder / f"rank-{rank:05d}.safetensors")
        whole = read_weights(folder)
        assert torch.equal(whole["a"], values.view(5, 2))
        assert torch.equal(whole["c"], torch.tensor([7.0]))
        assert torch.equal(whole["b"], torch.ones(2))
        middle = Shard(2, torch.zeros(5))
        fill_shards(folder, {"average/a": middle})
        assert torch.equal(middle.values, values[2:7])
    (folder / "rank-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds 3 of 10 elements of average/a, expected all"):
        read_weights(folder)
    (folder / "rank-00001.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"step-00000001 cannot be read .*; delete it to resume"):
        read_weights(folder)


def test_averages_follow_their_closed_form():
    model = torch.nn.Linear(2, 1)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    ema = EMA({name: p.detach() for name, p in model.named_parameters()}, decay=0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    expected = 0.0  # distance moved, of 1
    for step in range(40):
        decay = min(0.9, (1 + step) / (10 + step))
        expected += (1 - decay) * (1 - expected)
        ema.update(step)
    for name, value in ema.averages.items():
        torch.testing.assert_close(value - start[name], torch.full_like(value, expected))
    with ema.applied():
        torch.testing.assert_close(model.weight.data, ema.averages["weight"])
    torch.testing.assert_close(model.weight.data, start["weight"] + 1)


def test_learning_rate_warms_up_and_follows_the_cosine():
    config = OptimConfig(lr=1.0, schedule="cosine", final_lr_share=0.1, warmup_steps=10)
    assert learning_rate(config, 0, 0.0) == pytest.approx(0.1)
    assert learning_rate(config, 9, 0.0) == pytest.approx(1.0)
    assert learning_rate(config, 99, 0.5) == pytest.approx(0.55)
    assert learning_rate(config, 99, 1.0) == pytest.approx(0.1)
    assert learning_rate(OptimConfig(lr=2.0, warmup_steps=0), 0, 0.9) == 2.0


def test_weight_decay_spares_vectors_positions_and_the_head(make_model):
    model = make_model()
    config = OptimConfig(backbone_lr_share=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    seen = 0
    for group in build_optimizer(model, config).param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            spared = parameter.dim() < 2 or name.startswith("audio.head.") or "position" in name
            assert group["weight_decay"] == (0.0 if spared else 0.02), name
            assert group["lr_share"] == (0.5 if name.startswith("backbone.") else 1.0), name
            seen += 1
    assert seen == len(names)


def test_an_epoch_holds_every_clip_once_and_masks_change_with_it(prepared, text_tokenizer, special):
    from mllm_audio.data.captioned import CaptionedClips
    from mllm_audio.data.dataset import DataConfig, TrainingData
    from mllm_audio.masking import MaskingConfig

    clips = load_split(prepared, "train")
    data = TrainingData(
        source=CaptionedClips(clips, text_tokenizer),
        special=special,
        masking=MaskingConfig(schedule="fixed", scale=0.5),
        config=DataConfig(length_group=1),
        batch_size=3,
        seed=0,
    )
    first_epoch = list(data.epoch(0))
    assert sorted(i for batch in first_epoch for i in batch) == list(range(len(clips)))
    assert first_epoch == list(data.epoch(0))
    assert first_epoch != list(data.epoch(1))
    steps = data.steps(0)
    first = [batch for _ in range(5) for batch in next(steps)]
    (again,) = next(data.steps(4))
    assert torch.equal(first[4].latents, again.latents)
    assert first[4].names == again.names
    assert {batch.masking_ratio for batch in first} == {0.5}


def test_the_exported_voice_is_the_averaged_model(uninterrupted):
    found = tensors(uninterrupted)
    voice = Voice.load(uninterrupted)
    average = found["average/audio.latent_proj.weight"]
    assert torch.equal(voice.model.audio.latent_proj.weight, average)
    assert not torch.equal(average, found["weight/audio.latent_proj.weight"])


def test_what_a_run_writes_is_for_all_who_may_read_a_new_file(uninterrupted):
    expected = (uninterrupted / "run.json").stat().st_mode
    for path in (uninterrupted / "model.safetensors", *uninterrupted.glob("checkpoints/*/*")):
        assert path.stat().st_mode == expected, path


def test_log_goes_to_jsonl_and_tensorboard(uninterrupted):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(uninterrupted / "tensorboard")).Reload()
    logged = [event.value for event in events.Scalars("train/audio_loss")]
    torch.testing.assert_close(torch.tensor(logged), torch.tensor(losses(uninterrupted)))
    validation = [r for r in read_log(uninterrupted) if "validation/audio_loss" in r]
    assert [r["step"] for r in validation] == [10, 20]


@pytest.mark.parametrize("supported", [True, False])
def test_a_cpu_without_bf16_computes_in_float32_and_says_so_once(supported, monkeypatch, capsys):
    monkeypatch.setattr(training_engine, "has_bf16", lambda device_type: supported)
    training_engine._say_no_bf16.cache_clear()
    weight, device, model = torch.ones(2, 2), torch.device("cpu"), torch.nn.Linear(2, 2)
    for _ in range(2):
        with training_engine.autocast(model, device, "bf16"):
            product = weight @ weight
        assert product.dtype == (torch.bfloat16 if supported else torch.float32)
    said = "this CPU has no bf16 instructions: it computes in float32\n"
    assert capsys.readouterr().err == ("" if supported else said)
    with training_engine.autocast(model, device, "float32"):
        assert (weight @ weight).dtype == torch.float32
    with training_engine.autocast(model.bfloat16(), device, "bf16"):  # as DeepSpeed holds them
        assert (weight @ weight).dtype == torch.bfloat16
    assert not capsys.readouterr().err
