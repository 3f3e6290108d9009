"""Guidance distillation: one branch that predicts what two gave, in a run like any other."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import CAPTIONS, sine_manifest, test_run_config

from mllm_audio.add_voice import merge, train_added_voice
from mllm_audio.cli import cli
from mllm_audio.config import override
from mllm_audio.data.captioned import CaptionedClips
from mllm_audio.data.clips import load_split
from mllm_audio.data.layout import Audio, Text, collate
from mllm_audio.data.prepare import prepare
from mllm_audio.distill import distill, load_student, teacher_guidance
from mllm_audio.generation.rows import Rows
from mllm_audio.generation.voice import Voice
from mllm_audio.heads.adaln_mlp import AdaLNMLP
from mllm_audio.run import train_run
from mllm_audio.text import SpecialIds
from mllm_audio.training.checkpoint import list_checkpoints, read_weights
from mllm_audio.training.log import read_log

GUIDED = {"guidance_scale": 3.0, "guidance_schedule": "annealed", "num_inference_steps": 4}
QUICK = (
    "train.num_steps=300",
    "train.optim.lr=3e-3",
    "train.optim.warmup_steps=10",
    "train.validate_every=100",
    "train.save_every=100",
    "train.log_every=1",
)


def teacher_config(head="flow", **generation):
    config = test_run_config(num_steps=20, precision="float32", save_every=1000, log_every=10)
    made = replace(
        config,
        audio=replace(config.audio, head=replace(config.audio.head, name=head)),
        generation=replace(config.generation, **{**GUIDED, **generation}),
    )
    return override(made, ["data.unconditional_share=0.3", "train.optim.lr=3e-3"])


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    """Prepare tones of which a quarter is held out, each caption among them."""
    folder = tmp_path_factory.mktemp("held_out")
    manifest = sine_manifest(folder, count=32)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for index, row in enumerate(rows):
        row["split"] = "validation" if index >= 24 else "train"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(manifest, folder / "data", "dct", progress=False)
    return folder / "data"


@pytest.fixture(scope="module", params=["flow", "ddpm"])
def runs(request, tones, tmp_path_factory):
    """Train a teacher, make it depend more on its prompts, and distill it."""
    folder = tmp_path_factory.mktemp(request.param)
    train_run(teacher_config(request.param), tones, folder / "teacher")
    voice = Voice.load(folder / "teacher")
    with torch.no_grad():
        torch.manual_seed(1)
        for parameter in voice.model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    voice.save(folder / "teacher")
    distill(folder / "teacher", tones, folder / "student", overrides=QUICK)
    return folder / "teacher", folder / "student"


@pytest.fixture(scope="module")
def flow_runs(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("short")
    train_run(override(teacher_config(), ["train.num_steps=20"]), prepared, folder / "teacher")
    distill(folder / "teacher", prepared, folder / "student", overrides=[*QUICK, SHORT])
    return folder / "teacher", folder / "student"


SHORT = "train.num_steps=12"


def losses(run):
    return [r["train/audio_loss"] for r in read_log(run) if "train/audio_loss" in r]


def voice_of(model, generation):
    """Make a voice of a tiny model."""
    from mllm_audio.generation.decode import GenerationConfig
    from mllm_audio.text import train_text_tokenizer
    from mllm_audio.tokenizers import load_tokenizer

    tokenizer = train_text_tokenizer(CAPTIONS)
    return Voice(model, tokenizer, load_tokenizer("dct"), GenerationConfig(**generation))


def held_out(voice, data):
    """Lay the validation clips out as they are, and without their text."""
    clips = load_split(data, "validation")
    source = CaptionedClips(clips, voice.text_tokenizer)
    rows = [source.row(i, torch.Generator()) for i in range(len(clips))]
    special, names = SpecialIds.of(voice.text_tokenizer), [clip.name for clip in clips]
    return [
        collate(rows, names, special, unconditional=[null] * len(rows)) for null in (False, True)
    ]


def test_one_branch_predicts_what_two_gave_on_held_out_clips(runs, tones):
    """Written out from the networks of both models, apart from the code that trained."""
    teacher, student = (Voice.load(run) for run in runs)
    guidance = teacher.defaults
    hidden = load_student(runs[0], guidance, guidance).model  # gives states, of teacher and student
    batches = held_out(teacher, tones)
    cond, uncond = (hidden.states(b)[~batches[0].target_is_end] for b in batches)
    latents = batches[0].target_latents[~batches[0].target_is_end]
    positions = batches[0].target_positions[~batches[0].target_is_end].tolist()
    longest = teacher.model.audio.config.max_tokens
    scale = torch.tensor([guidance.scale_at(p, longest) for p in positions])[:, None]
    assert float(scale.min()) < 2 < float(scale.max()) == 3
    clean = hidden.audio.normalise(latents)
    noisy, timesteps = teacher.model.audio.head.noised(clean, torch.Generator().manual_seed(5))

    def predict(voice, states):
        network = voice.model.audio.head.network
        return network(noisy, timesteps, network.embed_condition(states))

    with torch.no_grad():
        first, second = predict(teacher, cond), predict(teacher, uncond)
        found = predict(student, cond)
    guided = second[:, :128] + scale * (first - second)[:, :128]
    before = (first[:, :128] - guided).square().mean()
    after = (found[:, :128] - guided).square().mean()
    assert before > 0.01
    assert after < 0.4 * before  # what is left, the state with text does not tell
    if first.shape[1] > 128:  # the learned variance is the conditional branch's
        gap = (first[:, 128:] - second[:, 128:]).square().mean()
        assert (found[:, 128:] - first[:, 128:]).square().mean() < gap


def test_the_loss_is_the_distance_from_the_guided_teacher(runs, tones):
    teacher, student = runs
    guidance = teacher_guidance(teacher, None)
    batch = held_out(Voice.load(teacher), tones)[0]
    own = load_student(teacher, guidance, guidance).model
    first = own(batch, torch.Generator().manual_seed(3))
    assert first.text == first.end == 0
    torch.testing.assert_close(first.total, first.per_latent.mean(), rtol=1e-5, atol=0)
    at_one = replace(guidance, guidance_scale=1.0)
    assert load_student(teacher, at_one, guidance).model(batch).total < 1e-10
    logged = [r["validation/audio_loss"] for r in read_log(student) if "validation/audio_loss" in r]
    assert len(logged) == 3
    assert logged[0] > logged[1] > logged[2] < 0.5 * first.total.item()


@pytest.mark.parametrize("head", ["flow", "ddpm"])
@pytest.mark.parametrize("exponent", [0.0, 0.7])
def test_the_distance_from_a_teacher_linear_in_its_condition_is_the_closed_form(
    make_model, tmp_path, head, exponent
):
    """With output = A (t + W c + b) + f(noisy), scale s is W' = s W, b' = b + (1 - s) W u."""
    shorter = {**GUIDED, "max_seconds": 0.32}  # eight latents; behind them the scale stays
    voice_of(make_model(head=head, channel_weight_exponent=exponent), shorter).save(tmp_path)
    guidance = teacher_guidance(tmp_path, None)
    own = load_student(tmp_path, guidance, guidance).model
    network = own.audio.head.network
    with torch.no_grad():
        network.condition_projection.bias.fill_(40.0)  # where SiLU is the identity
        for block in network.blocks:
            block.modulation.weight.zero_()
        network.output.modulation.weight[-32:].zero_()  # the norm's scale
        own.begin(own._teacher[1])  # of this head
        condition, latents = torch.randn(16, 32), torch.randn(16, 128)
        apart = torch.randn(32)
        weight, output = network.condition_projection.weight.clone(), network.output
        shift = output.projection.weight @ output.modulation.weight[:32] @ weight  # A W, (out, H)
        network.condition_projection.weight.mul_(3)
        network.condition_projection.bias.sub_(2 * weight @ apart)
        positions = torch.arange(16)
        found = own.distance(condition, apart.expand(16, -1), latents, positions)
    guided = (condition - apart) @ shift.T  # (16, out), what one unit of s adds
    scale = torch.cat([torch.linspace(3, 1, 8), torch.ones(8)])[:, None]  # annealed
    channels = own.audio.channel_weight() if exponent else torch.ones(128)
    expected = (((3 - scale) * guided[:, :128]) ** 2 * channels).mean(1)
    if head == "ddpm":
        expected += ((3 - 1) * guided[:, 128:]).square().mean(1)  # the variance is not guided
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert expected[-1] > 10 * expected[0] or head == "ddpm"


def test_only_the_head_is_trained(runs):
    teacher, student = (Voice.load(run).model.state_dict() for run in runs)
    assert teacher.keys() == student.keys()
    for name, value in teacher.items():
        assert torch.equal(value, student[name]) != name.startswith("audio.head."), name
    weights = read_weights(list_checkpoints(runs[1])[-1])
    assert {k.split("network")[0] for k in weights if k.startswith("audio.head")} == {"audio.head."}
    assert not any(k.startswith("backbone.") for k in weights)


def test_a_distilled_folder_generates_one_row_for_each_caption(runs, monkeypatch):
    teacher, student = (Voice.load(run) for run in runs)
    rows = []
    forward = AdaLNMLP.forward
    step = type(teacher.model).step

    def counted(self, noisy, *rest, **options):
        rows.append(("head", len(noisy)))
        return forward(self, noisy, *rest, **options)

    def counted_step(self, embeds, *rest):
        rows.append(("backbone", len(embeds)))
        return step(self, embeds, *rest)

    monkeypatch.setattr(AdaLNMLP, "forward", counted)
    monkeypatch.setattr(type(teacher.model), "step", counted_step)
    student.generate(["a low beep", "two high beeps", "a low beep"])
    assert {row for row in rows if row[0] == "backbone"} == {("backbone", 3)}
    assert max(count for kind, count in rows if kind == "head") == 3
    rows.clear()
    teacher.generate(["a low beep", "two high beeps", "a low beep"])
    assert {row for row in rows if row[0] == "backbone"} == {("backbone", 6)}
    assert max(count for kind, count in rows if kind == "head") == 6


def test_the_folder_differs_from_its_teacher_in_the_guidance_alone(runs):
    teacher, student = (asdict(Voice.load(run).defaults) for run in runs)
    assert student == {**teacher, "guidance_scale": 1.0, "guidance_weight": None}
    configs = [json.loads((run / "config.json").read_text()) for run in runs]
    assert configs[1]["audio"].pop("guidance_distilled")
    assert not configs[0]["audio"].pop("guidance_distilled")
    assert configs[0] == configs[1]
    values = json.loads((runs[1] / "run.json").read_text())
    assert values["distilled_guidance"] == {
        "guidance_scale": 3.0,
        "guidance_weight": None,
        "guidance_schedule": "annealed",
    }
    assert values["train"]["batch_size"] == 4


def test_a_distilled_folder_refuses_guidance(runs):
    student = Voice.load(runs[1])
    for changes in ({"guidance_scale": 3.0}, {"guidance_weight": 1.0}):
        with pytest.raises(ValueError, match=r"scale of .* distilled into .* use guidance"):
            student.generate(["a low beep"], replace(student.defaults, **changes))
    assert len(student.generate(["a low beep"])) == 1


def test_without_text_a_batch_is_the_unconditional_one(flow_runs, prepared):
    voice = Voice.load(flow_runs[0])
    model = load_student(flow_runs[0], voice.defaults, voice.defaults).model
    special = SpecialIds.of(voice.text_tokenizer)
    latents = torch.randn(5, 128)
    heard = Audio(latents[:3], torch.arange(3), learned=False)
    said = Audio(latents, torch.arange(5))
    words = Text(torch.tensor([7, 8, 9]))
    rows = [[words, said], [words, heard, words, said, words]]
    plain, null = (
        collate(rows, ["a", "b"], special, unconditional=[hidden] * 2) for hidden in (False, True)
    )
    torch.testing.assert_close(model.states(model.without_text(plain)), model.states(null))
    assert not torch.allclose(model.states(plain), model.states(null), atol=1e-3)
    packed = collate(rows, ["a", "b"], special, pack_tokens=64)
    torch.testing.assert_close(model.states(model.without_text(packed)), model.states(null))


def test_both_states_are_those_that_generation_reads(flow_runs, prepared):
    voice = Voice.load(flow_runs[0])
    model = load_student(flow_runs[0], voice.defaults, voice.defaults).model
    special = SpecialIds.of(voice.text_tokenizer)
    seen = []
    feed = Rows.feed_latents

    def record(rows, latents, index, predicts):
        seen.append((rows.states, latents))
        feed(rows, latents, index, predicts)

    config = replace(voice.defaults, seconds=0.32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rows, "feed_latents", record)
        (clip,) = voice.generate_latents(["a low beep"], config, [0])
    (ids,) = voice.prompts(["a low beep"], config)
    row = [Text(ids), Audio(clip, torch.arange(len(clip)))]
    batch = collate([row], ["clip"], special)
    has_latent = ~batch.target_is_end
    model.train()  # as the loop does: no dropout all the same
    for number, states in enumerate((model.states(batch), model.states(model.without_text(batch)))):
        decoded = torch.cat([both[number].reshape(1, -1) for both, _ in seen])
        assert len(decoded) == 7  # the last of the eight latents is not fed
        torch.testing.assert_close(states[has_latent][:7], decoded, rtol=1e-4, atol=1e-4)


def test_kill_nine_resumes_onto_the_same_losses(flow_runs, prepared, tmp_path):
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_distill import QUICK, SHORT; "
        "from pathlib import Path; from mllm_audio.distill import distill; "
        "distill(Path(sys.argv[3]), sys.argv[2], Path(sys.argv[4]), "
        "overrides=[*QUICK, SHORT, 'train.save_every=5'])"
    )
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", script, here, str(prepared), str(flow_runs[0]), str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list_checkpoints(tmp_path) and time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list_checkpoints(tmp_path)
    distill(flow_runs[0], prepared, tmp_path, overrides=[*QUICK, SHORT, "train.save_every=5"])
    assert losses(tmp_path) == losses(flow_runs[1])
    weights = [Voice.load(run).model.state_dict() for run in (tmp_path, flow_runs[1])]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_the_command_distills_at_a_scale_of_its_own(flow_runs, prepared, tmp_path):
    typed = ["distill", str(flow_runs[0]), "--data", str(prepared), "--out", str(tmp_path / "out")]
    settings = ["--guidance-scale", "5", "train.num_steps=2"]
    result = CliRunner().invoke(cli, [*typed, *settings], catch_exceptions=False)
    assert result.exit_code == 0
    assert "mllm-audio generate" in result.output
    assert json.loads((tmp_path / "out" / "run.json").read_text())["distilled_guidance"] == {
        "guidance_scale": 5.0,
        "guidance_weight": None,
        "guidance_schedule": "annealed",
    }
    with pytest.raises(ValueError, match=r"another run \(distilled_guidance.guidance_scale 5.0 ->"):
        distill(flow_runs[0], prepared, tmp_path / "out", overrides=["train.num_steps=2"])


def test_a_voice_of_a_language_model_is_distilled_once_merged(base, prepared, tmp_path):
    from test_add_voice import config

    made = config(base("gpt2"))
    made = replace(made, generation=replace(made.generation, as_request=True))
    train_added_voice(made, prepared, tmp_path / "voice")
    with pytest.raises(ValueError, match=r"is an adapter.*mllm-audio merge"):
        distill(tmp_path / "voice", prepared, tmp_path / "out")
    merge(tmp_path / "voice", tmp_path / "merged")
    distill(tmp_path / "merged", prepared, tmp_path / "out", overrides=["train.num_steps=3"])
    voice = Voice.load(tmp_path / "out")
    assert voice.defaults.as_request and not voice.defaults.is_guided(16)
    assert len(voice.generate(["a low beep"], replace(voice.defaults, seconds=0.16))) == 1


def test_another_run_than_a_guided_voice_is_refused(flow_runs, prepared, tmp_path):
    teacher, student = flow_runs
    with pytest.raises(ValueError, match="is distilled already"):
        distill(student, prepared, tmp_path)
    with pytest.raises(ValueError, match=r"found no config.json in"):
        distill(tmp_path, prepared, tmp_path)
    unguided = tmp_path / "unguided"
    shutil.copytree(teacher, unguided)
    values = json.loads((unguided / "audio_generation.json").read_text())
    (unguided / "audio_generation.json").write_text(json.dumps({**values, "guidance_scale": 1.0}))
    with pytest.raises(ValueError, match=r"no guidance in .*type a --guidance-scale other than 1"):
        distill(unguided, prepared, tmp_path / "out")
    with pytest.raises(ValueError, match="found --guidance-scale 1: there is nothing to distill"):
        distill(teacher, prepared, tmp_path / "out", guidance_scale=1.0)
    (unguided / "run.json").unlink()
    with pytest.raises(ValueError, match=r"run.json cannot be read .*restore it"):
        distill(unguided, prepared, tmp_path / "out", guidance_scale=3.0)
    (unguided / "config.json").write_text(json.dumps({"architectures": ["AudioMAR"]}))
    with pytest.raises(ValueError, match="is an AudioMAR, which guidance distillation does not"):
        distill(unguided, prepared, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("backbone.hidden_size=64", "found settings of backbone, which are the teacher's"),
        ("generation.guidance_scale=2", "type --guidance-scale, which the teacher is guided with"),
        ("data.unconditional_share=0.1", "found data.unconditional_share or data.replay_share"),
        ("train.gradient_checkpointing=true", "has no effect on a frozen backbone"),
        ("train.num_stps=2", "did you mean 'num_steps'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(flow_runs, prepared, tmp_path, setting, message):
    with pytest.raises(ValueError, match=message):
        distill(flow_runs[0], prepared, tmp_path, overrides=[setting])


def test_data_of_another_tokenizer_is_refused(flow_runs, prepared, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(prepared, data)
    index = json.loads((data / "index.json").read_text())
    index["tokenizer"]["fingerprint"] = "feedbeef"
    (data / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"fingerprint feedbeef, .* prepare with --tokenizer dct"):
        distill(flow_runs[0], data, tmp_path / "out")


def test_conversations_are_refused_for_a_voice_of_captions(flow_runs, tmp_path):
    sine_manifest(tmp_path)
    said = [{"type": "audio", "audio": "0.wav"}]
    row = {
        "messages": [
            {"role": "user", "content": "a beep"},
            {"role": "assistant", "content": said},
        ]
    }
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 4)
    prepare(tmp_path / "rows.jsonl", tmp_path / "data", "dct", progress=False)
    with pytest.raises(ValueError, match=r"holds conversations, which .* was not trained on"):
        distill(flow_runs[0], tmp_path / "data", tmp_path / "out")
