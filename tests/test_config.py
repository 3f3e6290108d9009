"""Strict overrides, presets and the text tokenizer."""

from __future__ import annotations

import json

import pytest

from mllm_audio.config import from_dict, override, to_dict
from mllm_audio.presets import PRESETS, RunConfig, get_preset
from mllm_audio.text import SpecialIds, train_text_tokenizer


@pytest.mark.parametrize(
    ("assignment", "read", "value"),
    [
        ("train.optim.lr=3e-4", lambda c: c.train.optim.lr, 3e-4),
        ("train.num_steps=7", lambda c: c.train.num_steps, 7),
        ("train.max_minutes=none", lambda c: c.train.max_minutes, None),
        ("train.optim.betas=[0.8, 0.9]", lambda c: c.train.optim.betas, (0.8, 0.9)),
        ("audio.end_of_audio=false", lambda c: c.audio.end_of_audio, False),
        ("audio.head.name=ddpm", lambda c: c.audio.head.name, "ddpm"),
        ("masking.schedule=ntp", lambda c: c.masking.schedule, "ntp"),
    ],
)
def test_override_sets_one_value(assignment, read, value):
    assert read(override(get_preset("tiny"), [assignment])) == value


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.optim.lrr=1", "unknown key 'lrr' in train.optim; did you mean 'lr'"),
        ("trian.optim.lr=1", "unknown key 'trian' in the configuration; did you mean 'train'"),
        ("train.num_steps", "found 'train.num_steps', expected section.key=value"),
        ("train.num_steps=many", "train.num_steps=many: .*integer"),
        ("train.num_steps=0", "train.num_steps=0 must be at least 1"),
        ("train=3", "train is a section, set one of its keys"),
        ("train.num_steps.x=3", "'num_steps' is a value, not a section; type train.num_steps="),
        ("train.precision=fp8", "unknown precision 'fp8'"),
        (
            "train.optim.schedule=step",
            "unknown lr schedule 'step', expected one of constant, cosine",
        ),
        ("train.optim.lr=-1", r"train.optim.lr=-1.0, expected \(0, 100\]"),
        ("train.optim.lr=nan", r"train.optim.lr=nan, expected"),
        ("train.max_minutes=0", r"train.max_minutes=0.0, expected \(0, inf\]"),
        ("train.validation_batches=0", "train.validation_batches=0 must be at least 1"),
        (
            "audio.max_tokens=10",
            "audio.max_tokens=10 is not a multiple of audio.tokens_per",
        ),
        ("audio.tokens_per_column=0", r"audio.tokens_per_column=0, expected \[1"),
        ("data.unconditional_share=5", r"data.unconditional_share=5.0, expected \[0, 1\]"),
        ("backbone.num_heads=0", r"backbone.num_heads=0, expected \[1"),
        ("backbone.family=gpt3", "unknown backbone family 'gpt3'; did you mean 'gpt2'"),
        ("backbone.num_heads=5", "is not a multiple of backbone.num_heads=5"),
        ("generation.guidance_schedule=x", "unknown guidance schedule 'x'"),
        ("generation.num_inference_steps=0", r"generation.num_inference_steps=0, expected \[1"),
        ("generation.temperature=-1", r"generation.temperature=-1.0, expected \[0, 10\]"),
        ("generation.temperature=nan", "generation.temperature=nan, expected"),
        ("generation.seconds=0", r"generation.seconds=0.0, expected \(0, 86400\]"),
        ("generation.seconds=inf", "generation.seconds=inf, expected"),
    ],
)
def test_mistakes_name_what_was_found(assignment, message):
    with pytest.raises(ValueError, match=message):
        override(get_preset("tiny"), [assignment])


def test_the_example_in_the_message_is_accepted():
    assert override(get_preset("tiny"), ["train.optim.lr=3e-4"]).train.optim.lr == 3e-4


def test_overrides_hold_together_in_any_order():
    pair = ["backbone.hidden_size=30", "backbone.num_heads=3"]
    assert override(get_preset("tiny"), pair) == override(get_preset("tiny"), pair[::-1])
    assert override(get_preset("tiny"), ["train.seed=1", "train.seed=2"]).train.seed == 2


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    config = get_preset(name)
    assert config.preset == name
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config))), "here") == config


def test_unknown_preset_and_unknown_saved_key_are_refused():
    with pytest.raises(ValueError, match="unknown preset 'digit'; did you mean 'digits'"):
        get_preset("digit")
    with pytest.raises(ValueError, match="here: unknown key 'presett' in RunConfig"):
        from_dict(RunConfig, {"presett": "x"}, "here")


def test_known_words_are_one_token_and_unknown_words_are_spelled():
    tokenizer = train_text_tokenizer(["george says zero", "lucas says one"])
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    assert len(encode("George says one")) == 3
    assert len(encode("jackson")) > 1
    assert tokenizer.decode(encode("lucas says ß")).strip() == "lucas says ß"


def test_text_tokenizer_depends_on_the_corpus_not_its_order():
    first = train_text_tokenizer(["a b c", "d e f", "a d"])
    second = train_text_tokenizer(["a d", "d e f", "a b c"])
    assert first.get_vocab() == second.get_vocab()


def test_special_tokens_written_in_a_caption_are_plain_text(text_tokenizer):
    from mllm_audio.data.dataset import prompt_ids

    special = SpecialIds.of(text_tokenizer)
    ids = prompt_ids(text_tokenizer, "a <|audio|> beep").tolist()
    assert special.audio not in ids
    with pytest.raises(ValueError, match="empty caption"):
        prompt_ids(text_tokenizer, "  ")


def test_a_text_tokenizer_without_the_special_tokens_is_refused():
    from transformers import ByT5Tokenizer

    with pytest.raises(ValueError, match=r"lacks <\|audio_start\|>"):
        SpecialIds.of(ByT5Tokenizer())
