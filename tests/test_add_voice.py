"""A voice added to a trained model, end to end: train in every mode, resume, merge, refuse."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import sine_manifest, write_base
from test_backbone import assert_same_text, base_logits, some_ids, voice_logits
from transformers import AutoModelForCausalLM

from mllm_audio.adapter import MODES
from mllm_audio.add_voice import add_voice, merge, train_added_voice, voice_config
from mllm_audio.data.captioned import CaptionedClips
from mllm_audio.data.clips import load_split
from mllm_audio.data.dataset import DataConfig, TrainingData
from mllm_audio.data.prepare import prepare
from mllm_audio.data.sources import TextSource
from mllm_audio.evaluation.perplexity import TextDrift
from mllm_audio.generation.voice import Voice
from mllm_audio.masking import MaskingConfig
from mllm_audio.model import AudioLanguageModel
from mllm_audio.presets import voice_digits
from mllm_audio.text import SpecialIds
from mllm_audio.training.log import read_log


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    """Prepare requests answered with text, a tone, and text; one row in three has no audio."""
    folder = tmp_path_factory.mktemp("conversations")
    sine_manifest(folder)
    rows = []
    for index in range(12):
        said = [
            {"type": "text", "text": "a"},
            {"type": "audio", "audio": f"{index}.wav"},
            {"type": "text", "text": " low beep"},
        ]
        if index % 3 == 2:
            said = [{"type": "text", "text": "two beeps"}]
        messages = [
            {"role": "user", "content": "a beep"},
            {"role": "assistant", "content": said},
        ]
        split = "validation" if index in (3, 5) else "train"
        rows.append({"messages": messages, "split": split})
    path = folder / "conversations.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(path, folder / "data", "dct", progress=False)
    return folder / "data"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    lines = [f"a low beep and {n} high beeps then a rising sweep" for n in range(8)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def config(base, mode="frozen", **train):
    small = voice_digits()
    made = voice_config(small, str(base), lora=mode == "lora", full=mode == "full")
    options = {"max_minutes": None, "num_steps": 6, "batch_size": 4, "log_every": 1}
    options |= {"save_every": 4, "validate_every": 3, "precision": "float32"}
    return replace(
        made,
        audio=replace(
            made.audio, max_tokens=16, head=replace(made.audio.head, width=32, num_blocks=1)
        ),
        data=replace(made.data, replay_share=0.25),
        train=replace(made.train, **options | train),
    )


def losses(run):
    return [r["train/audio_loss"] for r in read_log(run) if "train/audio_loss" in r]


@pytest.mark.parametrize("mode", MODES)
def test_a_voice_trains_and_its_text_is_as_the_mode_promises(
    base, conversations, texts, mode, tmp_path
):
    drift = train_added_voice(
        config(base("llama"), mode), conversations, tmp_path, replay=texts, held_out=texts
    )
    voice = Voice.load(tmp_path)
    ids = some_ids()
    now, before = voice_logits(voice.model, ids), base_logits(base("llama"), ids)
    if mode == "frozen":
        assert_same_text(now, before, voice.model)
    else:
        assert not torch.allclose(now[..., :250], before[..., :250], atol=1e-3)
    assert TextDrift.read(tmp_path) == drift
    assert abs(drift.change) < (0.02 if mode == "frozen" else 0.5)
    records = read_log(tmp_path)
    assert all("train/text_loss" in r for r in records if "train/audio_loss" in r)
    assert "validation/text_loss" in records[-1] or "validation/text_loss" in records[-2]
    assert (tmp_path / "config.json").is_file() == (mode == "full")
    assert (tmp_path / "audio_adapter.json").is_file() == (mode != "full")
    if mode == "full":
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_training_moves_the_sound_that_is_loaded(base, conversations, tmp_path):
    """The same seed before and after: what is loaded from the run is what was trained."""
    untrained = add_voice(config(base("gpt2")), tmp_path / "untrained")
    made = config(base("gpt2"), num_steps=30)
    train_added_voice(made, conversations, tmp_path / "run")
    trained = Voice.load(tmp_path / "run")
    options = replace(untrained.defaults, seconds=0.32)
    first = untrained.generate(["a beep"], options)[0].waveform
    second = trained.generate(["a beep"], options)[0].waveform
    again = Voice.load(tmp_path / "run").generate(["a beep"], options)[0].waveform
    assert not torch.allclose(first, second, atol=1e-3)
    assert torch.equal(second, again)


@pytest.mark.parametrize("mode", ["frozen", "lora"])
def test_a_resumed_run_is_the_uninterrupted_one_and_saves_no_base_weights(
    base, conversations, texts, mode, tmp_path
):
    constant = config(base("gpt2"), mode, save_every=1000)
    optim = replace(constant.train.optim, schedule="constant")
    constant = replace(constant, train=replace(constant.train, optim=optim))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_added_voice(constant, conversations, whole, replay=texts)
    shorter = replace(constant, train=replace(constant.train, num_steps=3))
    train_added_voice(shorter, conversations, parts, replay=texts)
    train_added_voice(constant, conversations, parts, replay=texts)
    assert losses(parts) == losses(whole)
    assert len(losses(whole)) == 6
    from mllm_audio.training.checkpoint import list_checkpoints, read_weights

    state = read_weights(list_checkpoints(whole)[-1], "weight")
    backbone = [name for name in state if name.startswith("backbone.")]
    assert bool(backbone) == (mode == "lora")
    assert all(".lora_" in name for name in backbone)


def test_captions_become_requests_that_are_answered_with_sound(base, prepared, tmp_path):
    assert train_added_voice(config(base("gpt2")), prepared, tmp_path) is None
    voice = Voice.load(tmp_path)
    assert len(losses(tmp_path)) == 6
    assert json.loads((tmp_path / "run.json").read_text())["data_manifest"] == "manifest.jsonl"
    assert voice.generate(["a low beep"])[0].waveform.numel()


def test_captions_are_generated_from_the_prompt_they_were_trained_behind(base, prepared, tmp_path):
    """`generate` puts a caption through the chat template, as `ClipConversations` does."""
    from mllm_audio.data.sources import ClipConversations

    train_added_voice(config(base("gpt2"), num_steps=1), prepared, tmp_path)
    voice = Voice.load(tmp_path)
    voice.text_tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    clips = load_split(prepared, "train")
    row = ClipConversations(clips[:1], voice.text_tokenizer, 128).row(0, torch.Generator())
    trained = torch.cat([part.input_ids for part in row[:-1] if hasattr(part, "input_ids")])
    assert torch.equal(voice.prompts(clips[0].captions[:1], voice.defaults)[0], trained)
    bare = replace(voice.defaults, as_request=False)
    assert not torch.equal(voice.prompts(clips[0].captions[:1], bare)[0], trained)


def test_a_prompt_holds_what_a_template_writes_before_the_reply(base, prepared, tmp_path):
    """Qwen3's template puts an empty thought before the last answer, in training and so here."""
    from mllm_audio.data.sources import ClipConversations
    from mllm_audio.generation.interleaved import end_ids

    train_added_voice(config(base("gpt2"), num_steps=1), prepared, tmp_path)
    voice = Voice.load(tmp_path)
    voice.text_tokenizer.add_tokens(["<|stop|>"], special_tokens=True)
    voice.text_tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] "
        "{% if m.role == 'assistant' and loop.last %}thought: none {% endif %}"
        "{{ m.content }}{% if m.role == 'assistant' %}<|stop|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    clips = load_split(prepared, "train")
    row = ClipConversations(clips[:1], voice.text_tokenizer, 128).row(0, torch.Generator())
    trained = torch.cat([part.input_ids for part in row[:-2]])
    prompt = voice.prompts(clips[0].captions[:1], voice.defaults)[0]
    assert torch.equal(prompt, trained)
    assert "thought: none" in voice.text_tokenizer.decode(prompt)
    stop = voice.text_tokenizer.convert_tokens_to_ids("<|stop|>")
    assert stop in end_ids(None, voice.text_tokenizer)  # what training taught it to end by


def test_another_base_in_the_same_place_is_another_run(base, conversations, tmp_path):
    folder = shutil.copytree(base("gpt2"), tmp_path / "base")
    made = config(folder, num_steps=1)
    train_added_voice(made, conversations, tmp_path / "run")
    shutil.rmtree(folder)
    write_base(folder, "gpt2", seed=3)
    with pytest.raises(ValueError, match=r"holds another run \(base_fingerprint"):
        train_added_voice(made, conversations, tmp_path / "run")
    moved = shutil.copytree(base("gpt2"), tmp_path / "moved")
    longer = config(moved, num_steps=2)
    train_added_voice(longer, conversations, tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 2


def test_merge_writes_a_standalone_checkpoint_with_the_same_sound(
    base, conversations, tmp_path, monkeypatch
):
    moved = shutil.copytree(base("qwen2"), tmp_path / "base")
    run, out = tmp_path / "run", tmp_path / "merged"
    train_added_voice(config(moved, "lora"), conversations, run)
    voice = Voice.load(run)
    shutil.move(moved, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="needs its base model, --base if it moved"):
        Voice.load(run)
    merged = merge(run, out, str(tmp_path / "elsewhere"))
    alone = Voice.load(out)
    options = replace(voice.defaults, seconds=0.32)
    clips = [v.generate(["a beep"], options)[0].waveform for v in (voice, merged, alone)]
    assert torch.equal(clips[0], clips[1])
    assert torch.equal(clips[1], clips[2])
    assert not (out / "audio_adapter.json").exists()
    with pytest.raises(ValueError, match="holds a voice and no training to resume"):
        train_added_voice(config(base("qwen2"), "lora"), conversations, out)
    with pytest.raises(ValueError, match=r"--out .*merged exists, expected a new or empty folder"):
        merge(run, out)


def test_replayed_text_takes_its_share_of_every_batch(prepared, base, texts):
    model = AudioLanguageModel.from_backbone(base("gpt2"), config(base("gpt2")).audio)
    tokenizer = model.text_tokenizer
    data = TrainingData(
        source=CaptionedClips(load_split(prepared, "train"), tokenizer),
        special=SpecialIds.of(tokenizer),
        masking=MaskingConfig(schedule="uniform"),
        config=DataConfig(replay_share=0.5, unconditional_share=1.0),
        batch_size=6,
        seed=0,
        replay=TextSource.read(texts, tokenizer, 128),
    )
    steps = data.steps(0)
    for _ in range(3):
        (batch,) = next(steps)
        assert [name.startswith("texts.jsonl") for name in batch.names] == [False] * 3 + [True] * 3
        learned = (batch.text_labels >= 0).any(dim=1)
        assert learned.tolist() == [False] * 3 + [True] * 3
        assert not bool(batch.is_null[3:].any())  # replayed text is never hidden
    assert data.batches_per_epoch == len(data.source) // 3
    assert torch.equal(next(data.steps(3))[0].input_ids, next(steps)[0].input_ids)


def test_mistakes_are_one_line_each(base, conversations, prepared, texts, tmp_path):
    frozen = config(base("gpt2"))
    full = replace(frozen, data=replace(frozen.data, replay_share=0.0))
    with pytest.raises(ValueError, match=r"data.replay_share=0; set it above 0"):
        train_added_voice(full, conversations, tmp_path / "a", replay=texts)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/file").touch()
    with pytest.raises(ValueError, match="exists, expected a new or empty folder"):
        add_voice(frozen, tmp_path / "b")
    from mllm_audio.presets import get_preset
    from mllm_audio.run import train_run

    with pytest.raises(ValueError, match="found both --lora and --full"):
        voice_config(frozen, "x", lora=True, full=True)
    with pytest.raises(ValueError, match="'tiny' builds its own language model"):
        voice_config(get_preset("tiny"), "x")
    with pytest.raises(ValueError, match="holds conversations, which need a trained"):
        train_run(get_preset("tiny"), conversations, tmp_path / "c")
    with pytest.raises(ValueError, match="preset 'voice' is for a trained language model"):
        train_run(get_preset("voice"), prepared, tmp_path / "c")
    short = replace(frozen, audio=replace(frozen.audio, max_tokens=4))
    with pytest.raises(ValueError, match=r"latents, the model takes audio.max_tokens=4"):
        train_added_voice(short, conversations, tmp_path / "d")
    train_added_voice(config(base("gpt2"), num_steps=1), conversations, tmp_path / "e")
    with pytest.raises(ValueError, match=r"holds another run \(adapt.mode frozen -> lora"):
        train_added_voice(config(base("gpt2"), "lora"), conversations, tmp_path / "e")


def test_the_same_from_the_command_line(base, conversations, texts, tmp_path, monkeypatch, capsys):
    from mllm_audio.cli import main

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["mllm-audio", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        return stopped.value.code, printed.out, printed.err.splitlines()[-1:]

    small = ["audio.max_tokens=16", "audio.head.width=32", "train.num_steps=2"]
    add = ["add-voice", base("gpt2"), "--preset", "voice_digits", "--out"]
    code, out, _ = run(*add, tmp_path / "untrained", *small)
    assert code == 0
    assert "untrained voice in" in out
    data = ["--data", conversations, "--replay", texts, "--held-out-text", texts]
    code, out, _ = run(*add, tmp_path / "run", "--lora", *data, *small)
    assert code == 0
    assert "held-out text perplexity" in out
    code, out, _ = run("info", tmp_path / "run")
    assert code == 0
    assert "gpt2 backbone" in out
    code, out, _ = run("merge", tmp_path / "run", "--out", tmp_path / "merged")
    assert code == 0
    assert Path(out.strip()) == tmp_path / "merged"
    code, _, error = run(*add, tmp_path / "x", "--replay", texts)
    assert code == 2
    assert error == ["error: found --replay or --held-out-text without --data; type --data DIR"]
    code, _, error = run("add-voice", tmp_path / "nothing", "--out", tmp_path / "x")
    assert code == 2
    assert error[0].startswith("error: found no folder")
    code, _, error = run(*add, tmp_path / "x", "base=other")
    assert code == 2
    assert error == ["error: found base= or backbone= among the settings; the model is BASE alone"]
    (tmp_path / "empty.txt").touch()
    empty = ["--data", conversations, "--held-out-text", tmp_path / "empty.txt"]
    code, _, error = run(*add, tmp_path / "x", *empty, *small)
    assert code == 2
    assert not (tmp_path / "x").exists()
    code, _, error = run("info", "voice_digits")
    assert code == 2
    assert error[0].startswith("error: preset 'voice_digits' is for a trained language model")
    code, _, error = run("push", tmp_path / "nothing", "me/voice")
    assert code == 2
