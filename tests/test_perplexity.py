"""Perplexity: closed forms, transformers' own loss, and the files around it."""

import json
import math

import pytest
import torch
from conftest import test_run_config
from transformers import GPT2Config, GPT2LMHeadModel

from mllm_audio.backbone import run
from mllm_audio.evaluation.perplexity import Perplexity, TextDrift, perplexity, read_texts
from mllm_audio.model import AudioLanguageModel
from mllm_audio.pretrained import load_backbone, load_text_tokenizer

TEXTS = ["a low beep then two high beeps", "noise", "a rising sweep then noise then noise"]


def ids_of(text_tokenizer, text):
    return text_tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(text_tokenizer):
    found = perplexity(
        lambda ids: torch.zeros(1, ids.shape[1], 321), text_tokenizer, TEXTS, max_length=4
    )
    assert found.value == pytest.approx(321, rel=1e-6)


def test_a_bigram_model_has_its_closed_form(text_tokenizer):
    vocab_size = len(text_tokenizer)
    table = torch.randn(vocab_size, vocab_size, generator=torch.Generator().manual_seed(0))
    found = perplexity(lambda ids: table[ids], text_tokenizer, TEXTS, max_length=100)

    probabilities = table.double().softmax(dim=1)
    chosen = [
        probabilities[a, b].item()
        for text in TEXTS
        for a, b in zip(
            ids_of(text_tokenizer, text), ids_of(text_tokenizer, text)[1:], strict=False
        )
    ]
    expected = math.prod(chosen) ** (-1 / len(chosen))
    assert found.value == pytest.approx(expected, rel=1e-6)
    assert found.num_tokens == len(chosen)


@pytest.fixture
def language_model(text_tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(text_tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2
    )
    return GPT2LMHeadModel(config).eval()


def test_one_window_equals_the_loss_of_transformers(language_model, text_tokenizer):
    text = " ".join(TEXTS)
    ids = torch.tensor(ids_of(text_tokenizer, text))[None]
    found = perplexity(
        lambda ids: language_model(ids).logits, text_tokenizer, [text], max_length=64
    )
    loss = language_model(input_ids=ids, labels=ids).loss.item()
    assert math.log(found.value) == pytest.approx(loss, rel=1e-5)
    assert found.num_tokens == ids.shape[1] - 1


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma2"])
def test_an_untrained_voice_knows_the_text_that_its_base_knows(base, family):
    backbone, text_tokenizer = load_backbone(str(base(family))), load_text_tokenizer(base(family))
    vocab_size = len(text_tokenizer)
    voice = AudioLanguageModel.from_backbone(base(family), test_run_config().audio)

    def logits_of(ids):
        positions = torch.arange(ids.shape[1])[None]
        hidden_states = run(voice.backbone, voice.embed_text(ids), positions)
        return voice.text_logits(hidden_states)[..., :vocab_size]  # without the special tokens

    found = perplexity(logits_of, voice.text_tokenizer, TEXTS, max_length=64)
    expected = perplexity(
        lambda ids: backbone(ids).logits[..., :vocab_size], text_tokenizer, TEXTS, max_length=64
    )
    assert found.num_tokens == expected.num_tokens
    assert found.value == pytest.approx(expected.value, rel=1e-5)


def test_windows_do_not_overlap_and_their_first_token_is_context(language_model, text_tokenizer):
    text = " ".join(TEXTS)
    ids = ids_of(text_tokenizer, text)
    assert len(ids) % 7 == 1  # the last window of one token is left out
    seen = []

    def logits_of(window):
        seen.append(window[0].tolist())
        return language_model(window).logits

    found = perplexity(logits_of, text_tokenizer, [text], max_length=7)
    assert seen == [ids[:7], ids[7:14]]
    assert found.num_tokens == 12
    windows = torch.tensor(seen)
    loss = language_model(input_ids=windows, labels=windows).loss.item()
    assert math.log(found.value) == pytest.approx(loss, rel=1e-5)


def test_special_tokens_written_in_a_text_are_plain_text(text_tokenizer):
    special = set(text_tokenizer.all_special_ids)

    def logits_of(ids):
        assert not special & set(ids[0].tolist())
        return torch.zeros(1, ids.shape[1], len(text_tokenizer))

    perplexity(logits_of, text_tokenizer, ["a <|audio|> beep <|audio_end|>"], max_length=64)


def test_texts_too_short_to_measure_are_refused(text_tokenizer):
    def logits_of(ids):
        raise AssertionError("nothing to predict")

    with pytest.raises(ValueError, match="got no text;"):
        perplexity(logits_of, text_tokenizer, [], max_length=8)
    with pytest.raises(ValueError, match="got 2 texts, each shorter than 2 tokens"):
        perplexity(logits_of, text_tokenizer, ["noise", ""], max_length=8)
    with pytest.raises(ValueError, match="max_length is 1, expected at least 2"):
        perplexity(logits_of, text_tokenizer, TEXTS, max_length=1)


def drift(base=23.38, voice=23.41, num_tokens=12_345):
    return TextDrift(
        base=Perplexity(value=base, num_tokens=num_tokens),
        voice=Perplexity(value=voice, num_tokens=num_tokens),
    )


def test_drift_says_itself_in_one_line():
    assert str(drift()) == (
        "held-out text perplexity 23.41, base model 23.38 (+0.1 %) over 12,345 tokens"
    )
    assert "(+0.0 %)" in str(drift(voice=23.3799))  # and not -0.0
    assert drift(base=10, voice=12).change == pytest.approx(0.2)


def test_drift_survives_its_file(tmp_path):
    drift().write(tmp_path)
    assert TextDrift.read(tmp_path) == drift()
    (tmp_path / "text_drift.json").write_text('{"base": {"value": 1.0, "num_tokens": 3}}')
    with pytest.raises(ValueError, match=r"text_drift.json is damaged .*'voice'"):
        TextDrift.read(tmp_path)


def test_drift_of_different_token_counts_is_refused():
    with pytest.raises(ValueError, match="predicted 5 text tokens and the voice 6"):
        TextDrift(
            base=Perplexity(value=2.0, num_tokens=5), voice=Perplexity(value=2.0, num_tokens=6)
        )


def test_texts_are_read_from_rows_and_from_plain_files(tmp_path):
    rows, plain = tmp_path / "texts.jsonl", tmp_path / "text.txt"
    texts = ["one\u2028line", "zwei Zeilen\nmit Umlaut ä"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    rows.write_text("\n\n".join(lines), encoding="utf-8")
    assert read_texts(rows) == texts
    plain.write_text("two\nlines\n")
    assert read_texts(plain) == ["two\nlines\n"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"words": 1}', r"line 2 holds '{\"words\": 1}'; expected"),
        ("a.jsonl", "[1", "line 1 is not JSON"),
        ("a.csv", "x", r"a.csv is neither .jsonl nor .txt"),
        ("a.txt", b"\xff", "a.txt cannot be read .*UTF-8"),
        ("gone.txt", None, "gone.txt cannot be read"),
    ],
)
def test_files_without_texts_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_texts(tmp_path / name)
