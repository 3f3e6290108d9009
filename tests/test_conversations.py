"""Conversations: read, prepared, made into rows, packed; and replayed text."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace

import pytest
import torch
from conftest import sine_manifest
from test_messages import chat_tokenizer

from mllm_audio.data.clips import load_split
from mllm_audio.data.conversations import (
    has_conversations,
    load_clips,
    load_conversations,
    read_conversations,
)
from mllm_audio.data.dataset import DataConfig, TrainingData
from mllm_audio.data.layout import collate
from mllm_audio.data.prepare import prepare
from mllm_audio.data.shards import read_index
from mllm_audio.data.sources import ClipConversations, ConversationSource, TextSource
from mllm_audio.masking import MaskingConfig
from mllm_audio.text import SPECIAL_TOKENS, SpecialIds


def say(text):
    return {"type": "text", "text": text}


def hear(path):
    return {"type": "audio", "audio": str(path)}


def row(request, answer, **columns):
    turns = [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **columns}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(values) + "\n" for values in rows))
    return path


def run(path, out, **options):
    return prepare(path, out, "dct", progress=False, **options)


TALKS = [
    row("say seven", [say("Sure:"), hear("0.wav"), say(" that was seven.")]),
    row([hear("1.wav"), say("how are you?"), hear("2.wav")], "fine thanks"),
    row("hello", "hello there"),
    row([say("say quack"), hear("0.wav")], [hear("4.wav"), hear("5.wav")]),
    row([hear("1.wav")], [say("quack"), hear("3.wav")], split="validation", label="x"),
]


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    """A folder of tones 0.wav to 11.wav."""
    folder = tmp_path_factory.mktemp("tones")
    sine_manifest(folder)
    return folder


@pytest.fixture(scope="module")
def talks(tones):
    """A prepared folder of `TALKS`."""
    run(write_rows(tones / "talks.jsonl", TALKS), tones / "talks")
    return tones / "talks"


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer("chatml")


@pytest.fixture
def source(talks, tokenizer):
    return ConversationSource(
        load_conversations(talks, "train"), load_clips(talks), tokenizer, max_positions=512
    )


def generator():
    return torch.Generator().manual_seed(0)


# Reading


def test_rows_are_named_by_file_and_line_and_other_columns_ignored(tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_text("\n" + json.dumps(row("hi", [hear("a.wav")], split="dev", label=7)) + "\n")
    (conversation,) = read_conversations(path)
    assert conversation.name == "talk.jsonl:2"
    assert conversation.split == "validation"
    assert conversation.audio == ["a.wav"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"audio": "a", "caption": "b"}, r":2: no 'messages' among .* in every row or in none"),
        (row("x", "y", split="devel"), r":2: split is 'devel', expected one of train"),
        (row("x", [hear(" ")]), r":2: message 2: part 1: audio is ' ', expected the path"),
        (row("x", [{"type": "audio", "audio": {"path": "a"}}]), r":2: audio is \{'path': 'a'\}"),
        (row("x\ud800", "y"), r":2: .*expected valid Unicode"),
        ({"messages": "hello"}, r":2: messages is 'hello', expected a list of messages"),
    ],
)
def test_broken_row_is_refused_with_its_line(tmp_path, values, message):
    path = write_rows(tmp_path / "talk.jsonl", [TALKS[0], values])
    for read in (read_conversations, lambda path: run(path, tmp_path / "out")):
        with pytest.raises(ValueError, match=message) as error:
            read(path)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_conversation_in_a_file_of_captions_is_refused(tmp_path):
    path = write_rows(tmp_path / "m.jsonl", [{"audio": "a.wav", "caption": "b"}, TALKS[0]])
    with pytest.raises(ValueError, match=r"m\.jsonl:2: no 'audio' among the columns \['messages'"):
        run(path, tmp_path / "out")


# Preparing


def test_prepared_folder_holds_every_sound_once_and_every_conversation(talks, tones):
    assert has_conversations(talks)
    train, validation = load_split(talks, "train"), load_split(talks, "validation")
    assert [clip.name for clip in train] == [f"{i}.wav" for i in (0, 1, 2, 4, 5)]
    assert [clip.name for clip in validation] == ["3.wav"]
    assert {clip.captions for clip in train} == {()}
    whole = tones / "captions"
    run(tones / "manifest.jsonl", whole)
    assert not has_conversations(whole)
    expected = load_clips(whole)
    for name, clip in load_clips(talks).items():
        assert clip.latents().equal(expected[name].latents())
    latents = torch.cat([clip.latents() for clip in train]).double()
    torch.testing.assert_close(
        torch.tensor(read_index(talks).latent_mean), latents.mean(0).float(), rtol=1e-6, atol=1e-7
    )
    written = [json.loads(line) for line in (talks / "conversations.jsonl").open()]
    assert written == [values | {"split": values.get("split", "train")} for values in TALKS]
    assert [c.name for c in load_conversations(talks, "validation")] == ["conversations.jsonl:5"]
    assert [c.audio for c in load_conversations(talks, "train")] == [
        ["0.wav"],
        ["1.wav", "2.wav"],
        [],
        ["0.wav", "4.wav", "5.wav"],
    ]
    with pytest.raises(ValueError, match="split is 'dev', expected one of train"):
        load_conversations(talks, "dev")


def test_sound_heard_in_train_and_elsewhere_counts_as_train(tmp_path, tones):
    rows = [
        row([hear(tones / "0.wav")], "a", split="validation"),
        row([hear(tones / "0.wav")], "b"),
    ]
    report = run(write_rows(tmp_path / "t.jsonl", rows), tmp_path / "out")
    assert report.counts == {"train": 1, "validation": 0, "test": 0}
    (conversation,) = load_conversations(tmp_path / "out", "validation")
    assert conversation.audio[0] in load_clips(tmp_path / "out")


def test_validation_share_depends_on_the_messages_alone(tmp_path, tones):
    rows = [row(f"tone {i}", [hear(tones / f"{i % 12}.wav")]) for i in range(40)]
    rows += [values | {"split": "test"} for values in rows]

    def chosen(name, rows):
        report = run(
            write_rows(tmp_path / f"{name}.jsonl", rows), tmp_path / name, validation_share=0.2
        )
        assert report.num_conversations == len(rows)
        return {c.messages for c in load_conversations(tmp_path / name, "validation")}

    first = chosen("forwards", rows)
    assert 2 <= len(first) <= 15
    assert chosen("backwards", [values | {"label": 1} for values in rows[::-1]]) == first
    assert len(load_conversations(tmp_path / "forwards", "test")) == 40


def test_conversation_that_names_a_rejected_file_is_left_out_and_counted(tmp_path, tones):
    (tmp_path / "bad.wav").write_bytes(b"not sound")
    rows = [
        row("a", [hear(tones / "0.wav")]),
        row([hear(tones / "1.wav")], [hear("bad.wav")]),
        row([hear("bad.wav")], "b", split="validation"),
        row("c", "d"),
    ]
    report = run(write_rows(tmp_path / "t.jsonl", rows), tmp_path / "out")
    assert (report.num_conversations, report.num_dropped, report.num_rejected) == (2, 2, 1)
    assert "2 conversations; 1 rows rejected, see " in str(report)
    assert str(report).endswith("; 2 conversations that name one of them are left out")
    (rejected,) = map(json.loads, (tmp_path / "out" / "rejected.jsonl").open())
    assert (rejected["audio"], rejected["line"]) == ("bad.wav", 2)
    assert [len(c.audio) for c in load_conversations(tmp_path / "out", "train")] == [1, 0]
    assert load_conversations(tmp_path / "out", "validation") == []


def test_no_conversation_left_to_train_on_is_an_error(tmp_path, tones):
    rows = [row([hear(tones / "0.wav")], [hear("none.wav")])]
    run(write_rows(tmp_path / "t.jsonl", rows), tmp_path / "out")
    with pytest.raises(ValueError, match=r"no train conversation left.* 1 name a sound file in "):
        load_conversations(tmp_path / "out", "train")


def test_conversations_without_audio_need_no_preparing(tmp_path):
    path = write_rows(tmp_path / "t.jsonl", [row("a", "b")])
    with pytest.raises(ValueError, match="no audio part in 1 conversations"):
        run(path, tmp_path / "out")


class Crash(BaseException):
    """Ends a run as a kill does: nothing may catch it."""


def test_crash_at_any_write_and_resumed_equals_uninterrupted(tmp_path, tones, monkeypatch):
    path = write_rows(tmp_path / "t.jsonl", [row("a", [hear(tones / "0.wav")]), row("c", "d")])
    run(path, tmp_path / "whole", validation_share=0)
    fsync = os.fsync

    def crash_at(call):
        calls = itertools.count()

        def crash(descriptor):
            if next(calls) == call:
                raise Crash
            fsync(descriptor)

        return crash

    # Each file syncs itself, then its folder: the index, three files of the shard, the rejected
    # rows, the conversations, the index again.
    for call in range(2 * (1 + 3 + 1 + 1 + 1)):
        out = tmp_path / f"out{call}"
        monkeypatch.setattr(os, "fsync", crash_at(call))
        with pytest.raises(Crash):
            run(path, out, validation_share=0)
        monkeypatch.undo()
        if call < 2 * (1 + 3 + 1 + 1):
            with pytest.raises((ValueError, FileNotFoundError)):  # not complete, or no index
                load_conversations(out, "train")
        run(path, out, validation_share=0)
        for file in ("index.json", "conversations.jsonl", "rejected.jsonl"):
            assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_lost_conversations_are_written_again(tmp_path, tones):
    path = write_rows(tmp_path / "t.jsonl", [row("a", [hear(tones / "0.wav")])])
    assert not run(path, tmp_path / "out").already_complete
    assert run(path, tmp_path / "out").already_complete
    file = tmp_path / "out" / "conversations.jsonl"
    whole = file.read_bytes()
    file.unlink()
    assert not run(path, tmp_path / "out").already_complete
    assert file.read_bytes() == whole


# Rows


def test_lengths_are_those_of_the_rows(source):
    special = SpecialIds.of(source.text_tokenizer)
    for index in range(len(source)):
        batch = collate([source.row(index, generator())], [source.name(index)], special)
        assert source.length(index) == int(batch.position_ids.max()) + 1


def test_conversation_as_long_as_the_backbone_passes_and_a_longer_one_is_named(source):
    longest = max(range(len(source)), key=source.length)
    limit = source.length(longest)
    assert len(replace(source, max_positions=limit)) == len(source)
    message = rf"{source.name(longest)} has {limit} elements, .*, the backbone takes {limit - 1}"
    with pytest.raises(ValueError, match=message):
        replace(source, max_positions=limit - 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            row([hear("none.wav")], "a"),
            r"t\.jsonl:1: audio 'none\.wav' is not among the 6 prepared",
        ),
        ({"messages": [{"role": "user", "content": "a"}]}, r"t\.jsonl:1: no assistant message"),
        (row("a<|im_end|>", "b"), r"t\.jsonl:1: message 1 \(user\) holds the special token"),
    ],
)
def test_conversation_that_cannot_be_learned_is_named_before_training(
    source, tmp_path, values, message
):
    conversations = read_conversations(write_rows(tmp_path / "t.jsonl", [values]))
    with pytest.raises(ValueError, match=message):
        replace(source, conversations=conversations)


def test_packed_rows_hold_what_separate_rows_hold(source):
    special = SpecialIds.of(source.text_tokenizer)
    rows = [source.row(index, generator()) for index in range(len(source))]
    names = [source.name(index) for index in range(len(source))]
    padded = collate(rows, names, special)
    packed = collate(rows, names, special, pack_tokens=300)
    assert len(packed.input_ids) < len(padded.input_ids)
    for field in ("latents", "content_positions", "target_positions", "target_latents"):
        assert getattr(packed, field).equal(getattr(padded, field))
    for field in ("target_is_end", "end_weight"):
        assert getattr(packed, field).equal(getattr(padded, field))
    lengths = [source.length(index) for index in range(len(source))]
    inside = torch.stack([torch.arange(padded.input_ids.shape[1]) < n for n in lengths])
    for field in ("input_ids", "position_ids", "is_audio", "predicts", "text_labels"):
        expected = getattr(padded, field)[inside]
        assert getattr(packed, field)[packed.segment_ids > 0].equal(expected)
    starts = packed.segment_ids.diff(prepend=torch.zeros(len(packed.input_ids), 1).long()) > 0
    assert starts.sum() == len(rows)
    assert not packed.position_ids[starts].any()


def test_masking_drops_latents_of_what_the_assistant_says_only(source, tokenizer):
    data = TrainingData(
        source=source,
        special=SpecialIds.of(tokenizer),
        masking=MaskingConfig(schedule="fixed", scale=0.5),
        config=DataConfig(unconditional_share=0.0),
        batch_size=1,
        seed=0,
    )
    heard_and_said = data.batch([3], epoch=0, step=0)
    clips = source.clips
    heard = clips["0.wav"].num_tokens
    assert heard_and_said.content_positions[:heard].equal(torch.arange(heard))
    said = clips["4.wav"].num_tokens + clips["5.wav"].num_tokens
    assert 0 < len(heard_and_said.content_positions) - heard < said
    first = heard_and_said.position_ids[0][heard_and_said.input_ids[0] == data.special.audio_start]
    whole = collate([source.row(3, generator())], ["r"], data.special)
    assert first.equal(whole.position_ids[0][whole.input_ids[0] == data.special.audio_start])


def test_batch_of_rows_without_audio_is_safe(source, tokenizer):
    text = replace(source, conversations=[c for c in source.conversations if not c.audio])
    batch = collate([text.row(0, generator())], [text.name(0)], SpecialIds.of(tokenizer))
    assert len(batch.latents) == len(batch.target_latents) == 0
    assert tokenizer.decode(batch.text_labels[batch.text_labels >= 0]) == "hello there<|im_end|>"


# Captions as conversations


def test_captioned_clip_answers_its_caption(tones, tokenizer):
    out = tones / "captioned"
    run(tones / "manifest.jsonl", out)
    clip = replace(load_split(out, "train")[0], captions=("a low beep", "a deep beep"))
    source = ClipConversations([clip], tokenizer, max_positions=512)
    drawn = set()
    for seed in range(20):
        before, audio, after = source.row(0, torch.Generator().manual_seed(seed))
        drawn.add(tokenizer.decode(before.input_ids))
        assert audio.latents.equal(clip.latents())
        assert audio.announced
        assert tokenizer.decode(after.input_ids[after.learned]) == "<|im_end|>"
    head, tail = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    assert drawn == {f"{head}{caption}{tail}" for caption in clip.captions}
    length = max(len(tokenizer(text)["input_ids"]) for text in drawn) + clip.num_tokens + 4
    assert len(ClipConversations([clip], tokenizer, max_positions=length)) == 1
    with pytest.raises(ValueError, match=rf"0\.wav has {length} elements"):
        ClipConversations([clip], tokenizer, max_positions=length - 1)
    with pytest.raises(ValueError, match=r"0\.wav: message 1 \(user\) holds the special token"):
        ClipConversations([replace(clip, captions=("<|audio|>",))], tokenizer, 512)


# Replayed text


def test_text_is_learned_whole_in_blocks(tmp_path, tokenizer):
    text = "hello there, how are you? " * 20
    path = write_rows(tmp_path / "text.jsonl", [{"text": text, "split": "x"}, {"text": "quack!"}])
    source = TextSource.read(path, tokenizer, max_positions=64, block_tokens=16)
    rows = [source.row(index, generator()) for index in range(len(source))]
    assert all(len(row) == 1 and row[0].learned.all() for row in rows)
    assert max(map(source.length, range(len(source)))) == 16
    ids = torch.cat([row[0].input_ids for row in rows[:-1]]).tolist()
    assert ids == tokenizer(text)["input_ids"][: len(ids)]
    assert len(tokenizer(text)["input_ids"]) - len(ids) <= 1
    assert [source.name(0), source.name(len(source) - 1)] == ["text.jsonl:1", "text.jsonl:2"]
    assert source.length(0) == 16
    wide = TextSource.read(path, tokenizer, max_positions=64)
    assert wide.length(0) == 64


def test_block_of_one_id_is_left_out(tmp_path, tokenizer):
    path = write_rows(tmp_path / "text.jsonl", [{"text": "hello there"}])
    length = len(tokenizer("hello there")["input_ids"])
    source = TextSource.read(path, tokenizer, 64, block_tokens=length - 1)
    assert [source.length(index) for index in range(len(source))] == [length - 1]


def test_text_has_the_tokenizers_own_beginning_and_no_structure(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = chat_tokenizer("llama2")
    bos = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    text = "hello </s>" + "".join(SPECIAL_TOKENS)
    path = write_rows(tmp_path / "text.jsonl", [{"text": text}])
    ((part,),) = [TextSource.read(path, tokenizer, 512).row(0, generator())]
    assert part.input_ids[0] == bos
    assert tokenizer.decode(part.input_ids[1:]) == text
    assert not set(part.input_ids[1:].tolist()) & set(tokenizer.added_tokens_decoder)


def test_replayed_messages_are_learned_as_the_assistant_says_them(tmp_path, tokenizer):
    path = write_rows(tmp_path / "text.jsonl", [row("hello", "fine"), {"text": "quack quack"}])
    source = TextSource.read(path, tokenizer, 64)
    ((part,),) = [source.row(0, generator())]
    assert tokenizer.decode(part.input_ids[part.learned]) == "fine<|im_end|>"
    assert len(source) == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"txt": "a"}, r"text\.jsonl:2: found \{'txt': 'a'\}, expected text or messages"),
        ({"text": " "}, r"text\.jsonl:2: found \{'text': ' '\}, expected text or messages"),
        (row("a", [hear("a.wav")]), r"text\.jsonl:2: found audio 'a\.wav' in text to replay"),
        (row("a", "hello " * 99), r"text\.jsonl:2 has \d+ elements, .*, the backbone takes 64"),
        ({"messages": [{"role": "user", "content": "a"}]}, r":2: no assistant message, expected"),
    ],
)
def test_text_that_cannot_be_replayed_is_refused_with_its_line(
    tmp_path, tokenizer, values, message
):
    path = write_rows(tmp_path / "text.jsonl", [{"text": "hello"}, values])
    with pytest.raises(ValueError, match=message) as error:
        TextSource.read(path, tokenizer, max_positions=64)
    assert "\n" not in str(error.value)


def test_empty_file_of_text_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"text\.jsonl has no rows, expected at least one"):
        TextSource.read(write_rows(tmp_path / "text.jsonl", []), tokenizer, 64)


def test_replayed_text_is_mixed_into_batches_at_its_share(source, tokenizer, tmp_path):
    texts = write_rows(tmp_path / "text.jsonl", [{"text": f"quack {i}"} for i in range(5)])
    data = TrainingData(
        source=source,
        special=SpecialIds.of(tokenizer),
        masking=MaskingConfig(schedule="ntp"),
        config=DataConfig(replay_share=0.5, unconditional_share=0.0),
        batch_size=4,
        seed=0,
        replay=TextSource.read(texts, tokenizer, 64),
    )
    (batch,) = next(data.steps(0))
    assert [name.split(":")[0] for name in batch.names] == ["conversations.jsonl"] * 2 + [
        "text.jsonl"
    ] * 2
    assert (batch.text_labels[2:] >= 0).any(1).all()
