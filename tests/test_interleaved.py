"""Replies of text and audio: layout, ends, seeds, text sampling, recordings in the conversation."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import chain, repeat

import pytest
import soundfile
import torch
from conftest import sine_manifest

from mllm_audio import backbone as backbones
from mllm_audio.data.clips import load_split
from mllm_audio.data.layout import Audio, Text, collate
from mllm_audio.data.messages import AudioPart, Message, TextPart, parse_messages, render
from mllm_audio.generation.decode import GenerationConfig
from mllm_audio.generation.hear import hear
from mllm_audio.generation.text import TextConfig, TextSampler, TextStream
from mllm_audio.generation.voice import Voice
from mllm_audio.heads.base import HeadConfig
from mllm_audio.modality import AudioConfig
from mllm_audio.model import AudioLanguageModel
from mllm_audio.text import SpecialIds
from mllm_audio.tokenizers import DCTTokenizer
from mllm_audio.types import AudioChunk, Clip, TextDelta

CONFIG = GenerationConfig(
    num_inference_steps=2, guidance_scale=2.0, guidance_schedule="constant", seconds=0.32
)
ASK = [{"role": "user", "content": "say two high beeps"}]
HEAD = HeadConfig(name="flow", width=32, num_blocks=1)


def build_voice(folder, **audio) -> Voice:
    """Build a voice on a tiny random base model, every audio output of it random too."""
    model = AudioLanguageModel.from_backbone(folder, AudioConfig(max_tokens=16, head=HEAD, **audio))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.audio.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return Voice(model.merge(), model.text_tokenizer, DCTTokenizer(), CONFIG)


@pytest.fixture
def voice(base):
    """A voice on a tiny random GPT-2."""
    return build_voice(base("gpt2"))


def script(voice, *said):
    """Make the model want these next: text, which may be several ids, or ids; then its end.

    Only the logits are pushed, so what may not be said is still not said.
    """
    ids: list[int] = []
    for item in said:
        ids += [item] if isinstance(item, int) else spell(voice, item)
    wanted = chain(ids, repeat(voice.text_tokenizer.eos_token_id))
    plain = AudioLanguageModel.text_logits

    def text_logits(hidden):
        logits = plain(voice.model, hidden)
        logits[:, next(wanted)] += 1000.0
        return logits

    voice.model.text_logits = text_logits
    return ids


def spell(voice, text):
    return voice.text_tokenizer(text, add_special_tokens=False)["input_ids"]


def start(voice):
    return SpecialIds.of(voice.text_tokenizer).audio_start


def force_end(voice, logit):
    with torch.no_grad():
        voice.model.audio.end_of_audio.weight.zero_()
        voice.model.audio.end_of_audio.bias.fill_(logit)


def record_states(voice):
    """Collect what every step of the model returns."""
    states, step = [], voice.model.step

    def recorded(*arguments):
        states.append(step(*arguments))
        return states[-1]

    voice.model.step = recorded
    return states


def recomputed(voice, row):
    """States of every position of a finished row in the training layout, (2, T, H)."""
    model = voice.model
    batch = collate(
        [row, row],
        ["c", "u"],
        SpecialIds.of(voice.text_tokenizer),
        unconditional=[False, True],
        end_of_audio=model.audio.config.end_of_audio,
    )
    with torch.no_grad():
        return backbones.run(model.backbone, model.embed(batch), batch.position_ids)


def assert_same_states(states, expected, first):
    """Each recorded (R', 1, H) state is the one of its position, the first at `first`."""
    scale = float(expected.abs().max())
    for index, state in enumerate(states):
        assert float((state[:, 0] - expected[:, first + index]).abs().max()) <= 1e-4 * scale, index


def prompt_text(voice, messages, **options):
    options = options or {"add_generation_prompt": True}
    return render(parse_messages(messages, "test"), voice.text_tokenizer, **options)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma3"])
def test_a_streamed_reply_equals_full_recomputation_in_the_training_layout(base, name):
    voice = build_voice(base(name))
    states = record_states(voice)
    ids = script(voice, "a low", start(voice), "beep two", start(voice), " high noise")
    events = list(voice.generate_interleaved(ASK))
    chunks = [event for event in events if isinstance(event, AudioChunk)]
    assert [len(chunk.latents) for chunk in chunks] == [8, 8]
    (prompt,) = prompt_text(voice, ASK)
    opens = [index for index, token in enumerate(ids) if token == start(voice)]
    said = [ids[: opens[0]], ids[opens[0] + 1 : opens[1]], ids[opens[1] + 1 :]]
    audio = [Audio(chunk.latents, torch.arange(8)) for chunk in chunks]
    row = [
        Text(torch.cat([prompt.input_ids, torch.tensor(said[0])])),
        audio[0],
        Text(torch.tensor(said[1])),
        audio[1],
        Text(torch.tensor(said[2])),
    ]
    length = len(prompt.input_ids)
    assert len(states) == 1 + sum(map(len, said)) + 2 * 10
    assert length + len(states) > 12  # longer than the sliding windows
    assert_same_states(states, recomputed(voice, row), length - 1)


@pytest.mark.parametrize("end_of_audio", [True, False])
def test_recordings_in_the_conversation_stand_where_training_has_them(base, end_of_audio):
    voice = build_voice(base("llama"), end_of_audio=end_of_audio)
    states = record_states(voice)
    script(voice, " two")
    generator = torch.Generator().manual_seed(3)
    heard, before, given = (torch.randn(4 * n, 128, generator=generator) for n in (3, 2, 1))
    messages = [
        Message("user", (AudioPart(heard), TextPart("a low beep"))),
        Message("assistant", (AudioPart(before),)),
        Message("user", (TextPart("noise"),)),
        Message("assistant", (TextPart("two"), AudioPart(given))),
    ]
    config = replace(CONFIG, seconds=0.48)
    chunk, *_ = voice.generate_interleaved(messages, config, continue_final_message=True)
    pieces = prompt_text_of(voice, messages)
    whole = torch.cat([given, chunk.latents])
    assert len(whole) == 12
    assert chunk.span == 0
    latents = iter([(heard, False), (before, True), (whole, True)])
    row = []
    for piece in pieces:
        if isinstance(piece, Text):
            row.append(piece)
        else:
            values, learned = next(latents)
            row.append(Audio(values, torch.arange(len(values)), learned=learned))
    row.append(Text(torch.tensor(spell(voice, " two"))))
    sizes = [len(p.input_ids) if isinstance(p, Text) else len(p.latents) + 2 for p in row]
    first = sum(sizes[:-1]) - 1 - len(chunk.latents) - 1  # the last given latent
    assert_same_states(states, recomputed(voice, row), first)


def prompt_text_of(voice, messages):
    return render(messages, voice.text_tokenizer, continue_final_message=True)


def test_a_recording_at_the_very_end_of_the_prompt_is_closed_before_the_reply(base):
    voice = build_voice(base("llama"))
    voice.text_tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    states = record_states(voice)
    script(voice, "a low")
    heard = torch.randn(8, 128, generator=torch.Generator().manual_seed(3))
    assert voice.reply([Message("user", (AudioPart(heard),))]).parts == (TextPart(" a low"),)
    row = [
        Audio(heard, torch.arange(8), learned=False),
        Text(torch.tensor(spell(voice, "a low"))),
    ]
    assert_same_states(states, recomputed(voice, row), 9)


def test_a_continued_recording_is_cut_off_its_chunk_and_kept_in_the_reply(voice):
    given = torch.randn(4, 128, generator=torch.Generator().manual_seed(3))
    messages = [Message("user", (TextPart("say"),)), Message("assistant", (AudioPart(given),))]
    config = replace(CONFIG, seconds=0.5)
    script(voice, " high", start(voice))
    events = list(voice.generate_interleaved(messages, config, seed=4, continue_final_message=True))
    chunks = [event for event in events if isinstance(event, AudioChunk)]
    assert [(chunk.span, len(chunk.latents)) for chunk in chunks] == [(0, 12), (1, 16)]
    assert len(chunks[0].waveform) == 8000 - 2560  # half a second is the whole span
    script(voice, " high", start(voice))
    reply = voice.reply(messages, config, seed=4, continue_final_message=True)
    first, text, second = reply.parts
    assert torch.equal(first.audio, torch.cat([given, chunks[0].latents]))
    assert text == TextPart(" high")
    assert torch.equal(second.audio, chunks[1].latents)


def test_a_recording_that_is_complete_gets_no_chunk(voice):
    force_end(voice, 50.0)
    config = replace(CONFIG, seconds=None, min_seconds=0.16)
    messages = [*ASK, {"role": "assistant", "content": [audio_of(torch.ones(8, 128))]}]
    script(voice, " high", start(voice))
    events = list(voice.generate_interleaved(messages, config, continue_final_message=True))
    assert isinstance(events[0], TextDelta)
    (chunk,) = [event for event in events if isinstance(event, AudioChunk)]
    assert (chunk.span, len(chunk.latents)) == (1, 4)


def audio_of(audio):
    return {"type": "audio", "audio": audio}


def test_no_two_latents_of_a_reply_share_their_noise(voice):
    drawn, sample = [], voice.model.audio.sample

    def recorded(hidden, uncond, config, noise):
        drawn.append((int(noise.seeds), int(noise.position)))
        return sample(hidden, uncond, config, noise)

    voice.model.audio.sample = recorded
    script(voice, start(voice), start(voice), start(voice))
    list(voice.generate_interleaved(ASK, seed=1))
    assert len(drawn) == len(set(drawn)) == 24
    assert [position for _, position in drawn] == [*range(8)] * 3


def test_the_same_seed_repeats_the_reply_and_another_differs(voice):
    def events(seed):
        text = TextConfig(max_new_tokens=12)
        return list(voice.generate_interleaved(ASK, text=text, seed=seed))

    # Random text, and a span wherever the coin of the first ids falls so.
    bias = torch.zeros(len(voice.text_tokenizer))
    bias[start(voice)] = 8.0
    plain = voice.model.text_logits
    voice.model.text_logits = lambda hidden: plain(hidden) + bias
    first, again, other = events(5), events(5), events(6)
    assert any(isinstance(event, AudioChunk) for event in first)
    assert any(isinstance(event, TextDelta) for event in first)
    assert_same_events(first, again)
    with pytest.raises(AssertionError):
        assert_same_events(first, other)
    joined = voice.reply(ASK, text=TextConfig(max_new_tokens=12), seed=5)
    text = "".join(event.text for event in first if isinstance(event, TextDelta))
    assert "".join(p.text for p in joined.parts if isinstance(p, TextPart)) == text
    spans = [event.latents for event in first if isinstance(event, AudioChunk)]
    heard = [part.audio for part in joined.parts if isinstance(part, AudioPart)]
    assert all(torch.equal(a, b) for a, b in zip(spans, heard, strict=True))
    assert joined.role == "assistant"


def assert_same_events(left, right):
    assert [type(event) for event in left] == [type(event) for event in right]
    for a, b in zip(left, right, strict=True):
        if isinstance(a, TextDelta):
            assert a == b
        else:
            assert torch.equal(a.latents, b.latents)
            assert torch.equal(a.waveform, b.waveform)


def test_the_noise_of_two_seeds_differs_where_the_text_does_not(voice):
    def latents(seed):
        script(voice, start(voice))
        return voice.reply(ASK, seed=seed).parts[0].audio

    assert torch.equal(latents(1), latents(1))
    assert float((latents(1) - latents(2)).abs().max()) > 0.1


def test_a_reply_is_history_for_the_next_turn(voice):
    script(voice, "a", start(voice), " beep")
    reply = voice.reply(ASK)
    messages = [*parse_messages(ASK, "test"), reply, Message("user", (TextPart("again"),))]
    states = record_states(voice)
    script(voice, "two")
    assert voice.reply(messages).parts == (TextPart(" two"),)
    assert len(states) == 2


def test_a_span_ends_at_whole_columns_between_the_guards(voice):
    config = replace(CONFIG, seconds=None, min_seconds=0.32)

    def lengths(logit, config):
        force_end(voice, logit)
        script(voice, start(voice), start(voice))
        return [len(part.audio) for part in voice.reply(ASK, config).parts]

    assert lengths(50.0, config) == [8, 8]
    assert lengths(-50.0, config) == [16, 16]
    assert lengths(-50.0, replace(config, max_seconds=0.48)) == [12, 12]


@pytest.mark.parametrize("more", range(4))
def test_spans_fit_the_positions_that_are_left(voice, more):
    force_end(voice, -50.0)
    ask = [{"role": "user", "content": "say" + " a" * (20 + more)}]
    (prompt,) = prompt_text(voice, ask)
    left = 128 - len(prompt.input_ids)

    def spans(config, messages, **options):
        states = record_states(voice)
        script(voice, *[start(voice)] * 200)
        parts = voice.reply(messages, config, **options).parts
        return [len(p.audio) for p in parts if isinstance(p, AudioPart)], len(states) - 1

    whole, rest = divmod(left, 18)
    assert rest >= 6
    free = replace(CONFIG, seconds=None)
    # Where no span has room there is text.
    assert spans(free, ask) == ([16] * whole + [(rest - 2) // 4 * 4], left)
    assert spans(replace(CONFIG, seconds=0.64), ask) == ([16] * whole, left)
    # A recording of which the whole would not fit goes on as far as it does.
    full = [{"role": "user", "content": "say" + " a" * (20 + more + left - rest)}]
    given = {"role": "assistant", "content": [audio_of(torch.ones(4, 128))]}
    lengths, steps = spans(free, [*full, given], continue_final_message=True)
    assert (lengths, steps) == ([(rest - 2) // 4 * 4], rest - 5)


def test_markers_and_spans_beyond_the_number_allowed_are_not_said(voice):
    special = SpecialIds.of(voice.text_tokenizer)
    for token in (special.audio, special.audio_end, special.cond):
        script(voice, token, "a")
        events = voice.generate_interleaved(ASK, text=TextConfig(do_sample=False))
        assert all(isinstance(event, TextDelta) for event in events)
    script(voice, *[special.audio_start] * 4)
    parts = voice.reply(ASK, text=TextConfig(max_audio_spans=2)).parts
    assert [type(part) for part in parts] == [AudioPart, AudioPart, TextPart]
    given = [*ASK, {"role": "assistant", "content": [audio_of(torch.ones(4, 128))]}]
    script(voice, special.audio_start, special.audio_start)
    text = TextConfig(max_audio_spans=1)
    parts = voice.reply(given, text=text, continue_final_message=True).parts
    assert [type(part) for part in parts] == [AudioPart, AudioPart, TextPart]


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_text_is_that_of_transformers(base, penalty):
    voice = build_voice(base("llama"))
    special = SpecialIds.of(voice.text_tokenizer)
    (prompt,) = prompt_text(voice, ASK)
    ids = voice.model.backbone.generate(
        prompt.input_ids[None],
        attention_mask=torch.ones_like(prompt.input_ids[None]),
        do_sample=False,
        max_new_tokens=20,
        repetition_penalty=penalty,
        suppress_tokens=special.all,
        eos_token_id=voice.text_tokenizer.eos_token_id,
    )[0, len(prompt.input_ids) :]
    expected = voice.text_tokenizer.decode(ids, skip_special_tokens=True)
    assert len(expected) > 10
    text = TextConfig(
        do_sample=False, max_new_tokens=20, repetition_penalty=penalty, max_audio_spans=0
    )
    events = list(voice.generate_interleaved(ASK, text=text))
    assert "".join(event.text for event in events) == expected.rstrip("\ufffd")
    assert len(events) > 3


def test_text_is_sampled_with_its_probability_from_the_nucleus():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()

    def shares(config, forbidden=(3,)):
        sampler = TextSampler(config, seed=0, input_ids=[0])
        drawn = torch.tensor([sampler.choose(logits, forbidden) for _ in range(2000)])
        return (drawn.bincount(minlength=4) / 2000).tolist()

    assert shares(TextConfig(), [1]) == pytest.approx([5 / 7, 0, 1.5 / 7, 0.5 / 7], abs=0.04)
    assert shares(TextConfig(top_p=0.6)) == pytest.approx([5 / 8, 3 / 8, 0, 0], abs=0.04)
    assert shares(TextConfig(top_k=1)) == [1, 0, 0, 0]
    sharp = shares(TextConfig(temperature=0.5))
    assert sharp == pytest.approx([25 / 36.25, 9 / 36.25, 2.25 / 36.25, 0], abs=0.04)
    assert shares(TextConfig(do_sample=False), [0]) == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0.0}, r"text.temperature=0.0, expected \(0, 100\]"),
        ({"top_p": 1.5}, r"text.top_p=1.5, expected \(0, 1\]"),
        ({"max_new_tokens": 0}, "text.max_new_tokens=0, expected"),
        ({"stop_strings": "end"}, "text.stop_strings='end', expected a tuple of strings"),
        ({"stop_strings": ("",)}, "expected a tuple of strings, none empty"),
    ],
)
def test_text_settings_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        TextConfig(**values)


def streamed(text_tokenizer, text, stop_strings=()):
    """Push a text one id at a time, up to a stop string; return the pieces and the stream."""
    stream = TextStream(text_tokenizer, text_tokenizer.get_vocab()["<|audio_end|>"], stop_strings)
    ids = text_tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = []
    while ids and not stream.stopped:
        pieces.append(stream.push(ids.pop(0)))
    return pieces, stream


def test_characters_of_several_ids_are_never_cut(text_tokenizer):
    text = " naïve 猫 👩\u200d🚀 ok"
    pieces, stream = streamed(text_tokenizer, text)
    assert len(pieces) > 20  # ids of single bytes
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.flush() == text
    half = TextStream(text_tokenizer, 0, ())
    ids = text_tokenizer("a猫", add_special_tokens=False)["input_ids"]
    assert "".join(half.push(token) for token in ids[:-1]) + half.flush() == " a"


def test_stop_strings_of_several_ids_are_held_back_and_not_emitted(text_tokenizer):
    pieces, stream = streamed(text_tokenizer, "a low beep. END of it", ("end of", "xx"))
    assert "".join(pieces) == " a low beep. "
    assert stream.stopped
    pieces, stream = streamed(text_tokenizer, "a low beep. END off", ("end off!",))
    assert not stream.stopped
    assert "".join(pieces) == " a low beep. "
    assert stream.flush() == "end off"
    pieces, stream = streamed(text_tokenizer, "xyxyz", ("xyz", "yz"))
    assert "".join(pieces) == " xy"


def test_a_stop_string_ends_the_reply_without_a_trace(voice):
    script(voice, "a low", start(voice), "beep and noise", start(voice))
    text = TextConfig(stop_strings=(" and",))
    parts = voice.reply(ASK, text=text).parts
    assert [getattr(part, "text", "audio") for part in parts] == [" a low", "audio", " beep"]


def test_every_end_id_of_the_generation_settings_ends_the_reply(voice):
    stop = spell(voice, " noise")[0]
    for listed in (stop, [5, stop]):
        voice.model.backbone.generation_config.eos_token_id = listed
        script(voice, "a low", stop, " beep")
        assert voice.reply(ASK).parts == (TextPart(" a low"),)
    voice.model.backbone.generation_config.eos_token_id = None
    script(voice, "a low", stop, " beep")
    assert voice.reply(ASK).parts == (TextPart(" a low noise beep"),)


def test_max_new_tokens_counts_text_ids_and_markers_but_no_latents(voice):
    script(voice, "a", start(voice), " low beep")
    parts = voice.reply(ASK, text=TextConfig(max_new_tokens=3)).parts
    assert [getattr(part, "text", "audio") for part in parts] == [" a", "audio", " low"]


def test_guidance_of_one_never_asks_the_unconditional_branch(voice):
    def latents(scale):
        script(voice, start(voice))
        return voice.reply(ASK, replace(CONFIG, guidance_scale=scale)).parts[0].audio

    plain, guided = latents(1.0), latents(3.0)
    with torch.no_grad():
        voice.model.audio.null_prompt.add_(1.0)
    assert torch.equal(plain, latents(1.0))
    assert not torch.equal(guided, latents(3.0))


def test_a_conversation_without_room_for_a_reply_is_refused_at_once(voice):
    (prompt,) = prompt_text(voice, ASK)
    length = len(prompt.input_ids)
    fitting = [{"role": "user", "content": "say two high beeps" + " a" * (127 - length)}]
    script(voice, "a")
    assert voice.reply(fitting).parts == (TextPart(" a"),)
    longer = [{"role": "user", "content": fitting[0]["content"] + " a"}]
    message = (
        "takes 128 positions, a reply at least 1, and the model has max_position_embeddings=128"
    )
    with pytest.raises(ValueError, match=message):
        voice.generate_interleaved(longer)
    given = {"role": "assistant", "content": [audio_of(torch.ones(16, 128))]}
    with pytest.raises(ValueError, match=r"lasts 0.64 s, the whole may last 0.32 s; shorten it"):
        voice.generate_interleaved([*ASK, given], continue_final_message=True)
    given["content"] = [audio_of(torch.ones(4, 128))]
    tight = [{"role": "user", "content": "say two high beeps" + " a" * (119 - length)}, given]
    with pytest.raises(ValueError, match="takes 124 positions, a reply at least 5"):
        voice.generate_interleaved(tight, continue_final_message=True)


def test_a_recording_is_heard_as_prepare_encodes_it(prepared):
    config = AudioConfig(max_tokens=16)
    clip = load_split(prepared, "validation")[0]
    path = prepared.parent / clip.name
    heard = hear(path, DCTTokenizer(), config)
    assert torch.equal(heard.half(), clip.latents().half())
    samples, rate = soundfile.read(path, dtype="float32")
    loud = Clip(torch.from_numpy(samples) * 3, rate)
    torch.testing.assert_close(hear(loud, DCTTokenizer(), config), heard, rtol=1e-2, atol=1e-2)
    assert hear(str(path), DCTTokenizer(), config).equal(heard)


def test_recordings_that_cannot_be_heard_are_refused_in_one_line(tmp_path):
    config, tokenizer = AudioConfig(max_tokens=16), DCTTokenizer()
    sine_manifest(tmp_path, 1, seconds=0.65)
    longest = Clip(torch.ones(int(0.64 * 44100)), 44100)
    assert len(hear(longest, tokenizer, config)) == 16
    refused = [
        (tmp_path / "0.wav", r"0.wav lasts 0.65 s, this model hears at most 0.64 s \(audio.max"),
        (Clip(torch.ones(16000), 16000), "the clip lasts 1.00 s"),
        (Clip(torch.zeros(0), 16000), "the clip holds no samples"),
        (Clip(torch.full((9,), torch.nan), 16000), "finite samples"),
        (torch.ones(20, 128), "latents lasts 0.80 s"),
        (torch.ones(5, 128), r"shape \(5, 128\), expected \(N, 128\) with N a multiple of 4"),
        (torch.tensor(1.0), r"shape \(\)"),
        (torch.full((4, 128), torch.inf), "not finite"),
        (3, "found int as audio, expected a path, a Clip or"),
        (tmp_path / "gone.wav", "is not a file"),
    ]
    for audio, message in refused:
        with pytest.raises(ValueError, match=message) as error:
            hear(audio, tokenizer, config)
        assert "\n" not in str(error.value)


def test_no_messages_are_refused(voice):
    with pytest.raises(ValueError, match="expected a list of messages"):
        voice.generate_interleaved([])


def test_an_adapter_replies_beside_its_base_wherever_that_is_now(base, tmp_path):
    config = AudioConfig(max_tokens=16, head=HEAD)
    shutil.copytree(base("gpt2"), tmp_path / "old")
    model = AudioLanguageModel.from_backbone(tmp_path / "old", config)
    Voice(model, model.text_tokenizer, DCTTokenizer(), CONFIG).save(tmp_path / "adapter")
    (tmp_path / "old").rename(tmp_path / "new")
    with pytest.raises(ValueError, match="old"):
        Voice.load(tmp_path / "adapter")
    voice = Voice.load(tmp_path / "adapter", base=str(tmp_path / "new"))
    assert voice.text_tokenizer is voice.model.text_tokenizer
    script(voice, "a low", start(voice))
    assert [type(part) for part in voice.reply(ASK).parts] == [TextPart, AudioPart]


def test_streamed_audio_is_the_same_bit_for_bit(voice):
    """Text in the same places, each span in chunks, the last of them marked; a seam is exact."""
    config = replace(CONFIG, seconds=0.6)  # cut within its last column
    special = SpecialIds.of(voice.text_tokenizer)
    script(voice, "yes", special.audio_start, "and", special.audio_start)
    whole = list(voice.generate_interleaved(ASK, config, seed=2))
    script(voice, "yes", special.audio_start, "and", special.audio_start)
    pieces = list(voice.generate_interleaved(ASK, config, seed=2, stream_audio=True))
    spans = [event for event in whole if isinstance(event, AudioChunk)]
    assert len(spans) == 2
    for span in spans:
        chunks = [e for e in pieces if isinstance(e, AudioChunk) and e.span == span.span]
        assert len(chunks) > 2 and [chunk.last for chunk in chunks[-2:]] == [False, True]
        assert torch.equal(torch.cat([chunk.waveform for chunk in chunks]), span.waveform)
        assert torch.equal(torch.cat([chunk.latents for chunk in chunks]), span.latents)
    assert "".join(e.text for e in pieces if isinstance(e, TextDelta)) == "".join(
        e.text for e in whole if isinstance(e, TextDelta)
    )


def test_a_caption_streams_what_generate_makes(voice):
    config = replace(CONFIG, seconds=0.64)
    (clip,) = voice.generate(["two high beeps"], config, seed=5)
    chunks = voice.stream("two high beeps", config, seed=5)
    first = next(chunks)
    assert 0 < len(first.waveform) <= 4 * 2560 and not first.last  # after at most four columns
    rest = list(chunks)
    assert rest[-1].last
    assert torch.equal(torch.cat([c.waveform for c in [first, *rest]]), clip.waveform)


def test_a_continued_recording_streams_its_new_sound_alone(voice):
    given = AudioPart(torch.randn(8, 128, generator=torch.Generator().manual_seed(4)))
    messages = [Message("user", (TextPart("go on"),)), Message("assistant", (given,))]
    config = replace(CONFIG, seconds=0.64)
    options = {"seed": 1, "continue_final_message": True}
    (span, *_) = voice.generate_interleaved(messages, config, **options)
    pieces = voice.generate_interleaved(messages, config, **options, stream_audio=True)
    chunks = [event for event in pieces if isinstance(event, AudioChunk) and event.span == 0]
    assert torch.equal(torch.cat([chunk.waveform for chunk in chunks]), span.waveform)
    assert len(span.waveform) == 2 * 2560
