"""Chat messages: what is read, how templates write them, what is learned, what is refused."""

from __future__ import annotations

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mllm_audio.data.layout import Audio, Text, collate
from mllm_audio.data.messages import (
    AudioPart,
    AudioPiece,
    Message,
    TextPart,
    parse_messages,
    render,
    to_row,
)
from mllm_audio.text import SPECIAL_TOKENS, SpecialIds, add_special_tokens

# As the models' own templates write text, without tools.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set reasoning, answer = '', m.content %}{% if '</think>' in m.content %}"
    "{% set reasoning = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set answer = m.content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or reasoning) %}"
    "<think>\n{{ reasoning }}\n</think>\n\n{% endif %}{{ answer }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Template, its special tokens, and what ends a reply.
FORMATS = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "llama3": (
        LLAMA3,
        ["<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|eot_id|>",
    ),
    "qwen3": (QWEN3, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "llama2": (LLAMA2, ["<s>", "</s>"], " </s>"),
    # Their tokens swallow the line break that follows.
    "phi3": (PHI3, ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"], "<|end|>"),
}
TALK = (
    "say seven! Sure: that was seven.\n\nuser assistant think hello there, how are you? fine "
    "thanks and you [INST] [/INST] a duck says quack quack"
)


def chat_tokenizer(name, metaspace=False):
    """Train a small BPE with the special tokens of a format, and ours."""
    template, special, _ = FORMATS.get(name, (None, ["<|endoftext|>"], None))
    bpe = Tokenizer(models.BPE())
    if metaspace:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        bpe.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
        alphabet = sorted(set(TALK) | {"▁", "\n"})
    else:
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokens = [AddedToken(t, special=True, rstrip=name == "phi3") for t in special]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=tokens, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([TALK] * 3, trainer)
    known = {"bos_token": "<s>"} if "<s>" in special else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=special[-1], clean_up_tokenization_spaces=False, **known
    )
    tokenizer.chat_template = template
    add_special_tokens(tokenizer)
    return tokenizer


@pytest.fixture(params=FORMATS)
def formatted(request):
    """Each format: its tokenizer, and what ends a reply."""
    return chat_tokenizer(request.param), FORMATS[request.param][2]


@pytest.fixture
def chatml():
    return chat_tokenizer("chatml")


def messages(*turns):
    """Write messages of alternating users and assistants; a tuple stands for an audio part."""
    return tuple(
        Message(
            "user" if i % 2 == 0 else "assistant",
            tuple(
                AudioPart(p[0]) if isinstance(p, tuple) else TextPart(p)
                for p in (turn if isinstance(turn, list) else [turn])
            ),
        )
        for i, turn in enumerate(turns)
    )


def plain(talk):
    return [{"role": m.role, "content": "".join(p.text for p in m.parts)} for m in talk]


def learned(tokenizer, pieces):
    """Decode what is learned, and name the audio that is."""
    return [
        piece.audio if isinstance(piece, AudioPiece) else tokenizer.decode(ids)
        for piece in pieces
        if (isinstance(piece, AudioPiece) and piece.said)
        or (isinstance(piece, Text) and len(ids := piece.input_ids[piece.learned]))
    ]


def ids_of(pieces):
    assert all(isinstance(piece, Text) for piece in pieces)
    return torch.cat([piece.input_ids for piece in pieces]).tolist()


# Templates

TALKS = {
    "one turn": messages("say seven!", "Sure: that was seven."),
    "spaces": messages(" say seven \n", "  Sure: seven \n"),
    "three turns": messages("hello", "hello there", "how are you?", "fine", "thanks", "quack!"),
    "words of the template": messages("assistant", "think", "user", "end", "im", "assistant\n"),
    "user last": messages("hello", "hello there", "how are you?"),
}


# A token of Phi-3 swallows the spaces that begin a reply, so its prompt ends inside of it.
PAIRS = [(f, t) for f in FORMATS for t in TALKS if (f, t) != ("phi3", "spaces")]


@pytest.mark.parametrize(("name", "talk"), PAIRS)
@pytest.mark.parametrize("prompted", [False, True])
def test_text_has_the_ids_of_apply_chat_template(name, talk, prompted):
    tokenizer, talk = chat_tokenizer(name), TALKS[talk]
    expected = tokenizer.apply_chat_template(
        plain(talk), tokenize=True, add_generation_prompt=prompted, return_dict=False
    )
    assert ids_of(render(talk, tokenizer, add_generation_prompt=prompted)) == expected


def test_ids_hold_for_tokenizers_that_begin_text_with_a_space():
    tokenizer = chat_tokenizer("chatml", metaspace=True)
    assert (
        tokenizer("hello", add_special_tokens=False)["input_ids"]
        == (tokenizer(" hello", add_special_tokens=False)["input_ids"])
    )
    talk = messages("hello", "quack")
    expected = tokenizer.apply_chat_template(plain(talk), tokenize=True, return_dict=False)
    assert ids_of(render(talk, tokenizer)) == expected


def test_reply_and_the_token_that_ends_it_are_learned(formatted):
    tokenizer, end = formatted
    talk = messages("say seven!", "Sure: seven.", "thanks", "quack quack")
    (text,) = render(talk, tokenizer)
    think = "<think>\n\n</think>\n\n" if tokenizer.chat_template == QWEN3 else ""
    space = " " if tokenizer.chat_template == LLAMA2 else ""
    expected = f"{space}Sure: seven.{end}{space}{think}quack quack{end}"
    assert tokenizer.decode(text.input_ids[text.learned]) == expected


def test_learned_ids_are_those_that_transformers_marks_as_generated(chatml):
    turn = "{{ m.content }}<|im_end|>"
    said = "{% generation %}" + turn + "{% endgeneration %}"
    template = CHATML.replace(
        turn,
        f"{{% if m.role == 'assistant' %}}{said}{{% else %}}{turn}{{% endif %}}{{{{ '\\n' }}}}",
    ).replace("}}\n{% endfor", "}}{% endfor")
    for talk in TALKS.values():
        expected = chatml.apply_chat_template(
            plain(talk), chat_template=template, return_assistant_tokens_mask=True, return_dict=True
        )
        (text,) = render(talk, chatml)
        assert text.input_ids.tolist() == expected["input_ids"]
        assert text.learned.long().tolist() == expected["assistant_masks"]


@pytest.mark.parametrize("word", ["think", "im", "end", "assistant", "e", "|"])
def test_reply_that_is_a_word_of_the_template_is_learned_whole(formatted, word):
    tokenizer, end = formatted
    (text,) = render(messages(word, word), tokenizer)
    said = tokenizer.decode(text.input_ids[text.learned])
    assert said.removeprefix("<think>\n\n</think>\n\n").strip() == word + end


def test_every_prompt_is_tokenised_as_the_beginning_of_its_conversation(formatted):
    tokenizer, _ = formatted
    talk = messages("say seven!", "\n Sure: seven.", "thanks", "  quack")
    whole = ids_of(render(talk, tokenizer))
    for turn in (1, 3):
        prompt = ids_of(render(talk[:turn], tokenizer, add_generation_prompt=True))
        assert whole[: len(prompt)] == prompt
        mask = torch.cat([text.learned for text in render(talk, tokenizer)])
        assert mask[len(prompt)]
        assert not mask[len(prompt) - 1]


def test_continued_message_is_cut_where_it_ends(formatted):
    tokenizer, _ = formatted
    for reply in ("Sure:", "Sure: "):
        talk = messages("say seven!", reply)
        expected = tokenizer.apply_chat_template(
            plain(talk), tokenize=False, continue_final_message=True
        )
        pieces = render(talk, tokenizer, continue_final_message=True)
        text = tokenizer.decode(ids_of(pieces)).replace("<|assistant|>", "<|assistant|>\n")
        text = text.replace("<|user|>", "<|user|>\n").replace("<|end|>", "<|end|>\n")
        if tokenizer.chat_template == LLAMA2:
            text, expected = text.rstrip(), expected.rstrip()  # its own space follows any reply
        assert text == expected


def test_audio_of_a_continued_message_is_heard(chatml):
    talk = messages("say seven!", ["Sure:", ("a",), " that"])
    before, audio, after = render(talk, chatml, continue_final_message=True)
    assert chatml.decode(before.input_ids).endswith("<|im_start|>assistant\nSure:")
    assert audio == AudioPiece("a", True)
    assert chatml.decode(after.input_ids) == " that"


def test_tokenizer_without_template_writes_lines_and_ends_replies():
    tokenizer = chat_tokenizer("none")
    assert tokenizer.chat_template is None
    talk = messages(["hello", ("a",)], ["fine", ("b",)])
    before, heard, after, said, end = render(talk, tokenizer)
    assert (heard.said, said.said) == (False, True)
    assert tokenizer.decode(before.input_ids) == "hello"
    assert tokenizer.decode(after.input_ids) == "\nfine"
    assert tokenizer.decode(after.input_ids[after.learned]) == "fine"
    assert tokenizer.decode(end.input_ids) == "<|endoftext|>"
    assert end.learned.all()
    (text,) = render(messages("hello"), tokenizer, add_generation_prompt=True)
    assert tokenizer.decode(text.input_ids) == "hello\n"


def test_reply_without_an_end_token_is_learned_through_its_text():
    tokenizer = chat_tokenizer("none")
    tokenizer.eos_token = None
    (text,) = render(messages("hello", "fine!", "thanks", "quack"), tokenizer)
    assert tokenizer.decode(text.input_ids) == "hello\nfine!\nthanks\nquack\n"
    assert tokenizer.decode(text.input_ids[text.learned]) == "fine!quack"


def test_reply_ends_where_nothing_but_audio_follows():
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    pieces = render(messages("hello", "fine", [("q",)]), tokenizer)
    assert tokenizer.decode(pieces[0].input_ids[pieces[0].learned]) == "fine"
    assert pieces[1] == AudioPiece("q", False)


def test_longest_token_ends_a_reply(chatml):
    chatml.add_tokens([AddedToken("<|im_e", special=True)], special_tokens=True)
    (text,) = render(messages("hello", "fine"), chatml)
    assert chatml.decode(text.input_ids[text.learned]) == "fine<|im_end|>"


def test_tokenizer_set_to_split_special_tokens_keeps_those_of_the_template(chatml):
    expected = ids_of(render(messages("hello", "fine"), chatml))
    chatml.split_special_tokens = True
    assert ids_of(render(messages("hello", "fine"), chatml)) == expected


# Audio


def test_audio_stands_where_it_was_put(formatted):
    tokenizer, end = formatted
    talk = messages(
        [("q1",), "hello", ("q2",)],
        ["Sure:", ("a1",), ("a2",), " that was seven."],
        [("q3",)],
        [("a3",)],
    )
    pieces = render(talk, tokenizer)
    spans = [piece for piece in pieces if isinstance(piece, AudioPiece)]
    assert [(span.audio, span.said) for span in spans] == [
        ("q1", False),
        ("q2", False),
        ("a1", True),
        ("a2", True),
        ("q3", False),
        ("a3", True),
    ]
    shown = "".join(
        f"({p.audio})" if isinstance(p, AudioPiece) else tokenizer.decode(p.input_ids)
        for p in pieces
    )
    for said in ("(q1)hello(q2)", "Sure:(a1)(a2) that was seven." + end, "(q3)", "(a3)" + end):
        assert shown.count(said) == 1
    assert SPECIAL_TOKENS[0] not in shown
    parts = learned(tokenizer, pieces)
    assert [p.strip() for p in parts][:4] == ["Sure:", "a1", "a2", "that was seven." + end]
    assert [p.removeprefix("<think>\n\n</think>\n\n").strip() for p in parts if p.strip()][-2:] == [
        "a3",
        end.strip(),
    ]


def test_text_around_audio_keeps_its_tokens(chatml):
    pieces = render(messages("hello", ["Sure:", ("a",), " that was seven."]), chatml)
    whole = ids_of(render(messages("hello", "Sure:"), chatml))
    assert pieces[0].input_ids.tolist() == whole[:-2]  # without the end of the turn
    expected = chatml(" that was seven.<|im_end|>\n", add_special_tokens=False)["input_ids"]
    assert pieces[2].input_ids.tolist() == expected


def test_row_learns_what_the_assistant_says_and_sounds(chatml):
    latents = {"q": torch.randn(2, 4), "a": torch.randn(3, 4)}
    talk = messages(["hello", ("q",)], ["Sure:", ("a",), "fine"])
    row = to_row(render(talk, chatml), latents.__getitem__)
    heard, said = (part for part in row if isinstance(part, Audio))
    assert (heard.learned, heard.announced) == (False, False)
    assert (said.learned, said.announced) == (True, True)
    assert said.kept.tolist() == [0, 1, 2]
    special = SpecialIds.of(chatml)
    batch = collate([row], ["r"], special)
    labels = batch.text_labels[batch.text_labels >= 0]
    assert chatml.decode(labels) == "Sure:<|audio_start|>fine<|im_end|>"
    assert batch.latents.equal(torch.cat([latents["q"], latents["a"]]))
    assert batch.target_latents.equal(torch.cat([latents["a"], torch.zeros(1, 4)]))
    assert (batch.input_ids == special.audio_start).sum() == 2


def test_row_of_text_alone_has_no_audio(chatml):
    row = to_row(render(messages("hello", "fine"), chatml), {}.__getitem__)
    batch = collate([row], ["r"], SpecialIds.of(chatml))
    assert not batch.is_audio.any()
    assert not batch.predicts.any()
    assert chatml.decode(batch.text_labels[batch.text_labels >= 0]) == "fine<|im_end|>"


# Reading


def test_messages_are_read_from_text_and_lists_of_parts():
    values = [
        {"role": "system", "content": "be kind", "name": "ignored"},
        {"role": "user", "content": [{"type": "audio", "audio": "a.wav", "text": None}]},
        {"role": "assistant", "content": [{"type": "text", "text": "hi"}]},
    ]
    assert parse_messages(values, "here") == (
        Message("system", (TextPart("be kind"),)),
        Message("user", (AudioPart("a.wav"),)),
        Message("assistant", (TextPart("hi"),)),
    )


def content(value):
    return [{"role": "user", "content": value}]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], r"here: messages is \[\], expected a list of messages"),
        ({"role": "user"}, r"here: messages is \{'role': 'user'\}, expected a list"),
        (["hi"], r"here: message 1 is 'hi', expected an object with role and content"),
        ([{"role": "user"}], r"message 1 is .*, expected an object with role and content"),
        ([{"role": 7, "content": "x"}], r"message 1: role is 7, expected user, assistant"),
        ([{"role": " ", "content": "x"}], r"message 1: role is ' ', expected"),
        (content(None), r"message 1: content is None, expected text or a list of parts"),
        (content(["x"]), r"message 1: part 1 is 'x', expected \{\"type\": \"text\""),
        (content([{"type": "image"}]), r"part 1 is \{'type': 'image'\}, expected .*\"audio\""),
        (content([{"type": "text"}]), r"message 1: part 1: text is None, expected a string"),
        (content([{"type": "audio"}]), r"part 1: audio is None, expected the path of a sound"),
        (content([{"type": "audio", "audio": ""}]), r"part 1: audio is '', expected the path"),
    ],
)
def test_broken_messages_are_refused_on_one_line(values, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_messages(values, "here")
    assert "\n" not in str(error.value)


# Refusals


@pytest.mark.parametrize("token", [*SPECIAL_TOKENS, "<|im_end|>", "<|im_start|>", "<|extra|>"])
def test_text_that_reads_as_structure_is_refused(chatml, token):
    chatml.add_tokens([AddedToken("<|extra|>", special=True)], special_tokens=True)
    for talk in (
        messages(f"a{token}b", "fine"),
        messages("hello", f"fine{token}"),
        messages([token[:4], token[4:]], "fine"),  # parts that make one up together
        (Message(f"user{token}", (TextPart("x"),)),),
    ):
        with pytest.raises(ValueError, match="expected plain text; remove it") as error:
            render(talk, chatml)
        assert f"the special token {token}," in str(error.value)


def test_parts_of_a_special_token_around_audio_are_text(chatml):
    before, _, after = render(messages(["<|im_", ("a",), "end|>"], "fine"), chatml)
    end = chatml.convert_tokens_to_ids("<|im_end|>")
    assert chatml.decode(before.input_ids).endswith("<|im_")
    assert end not in before.input_ids
    assert (after.input_ids == end).sum() == 2  # those of the template


def refused(talk, tokenizer, message, **options):
    with pytest.raises(ValueError, match=message) as error:
        render(talk, tokenizer, **options)
    assert "\n" not in str(error.value)


def test_empty_reply_is_refused(chatml):
    refused(messages("hello", " \n"), chatml, r"message 2 \(assistant\) is empty, expected text")


def test_only_an_assistant_message_is_continued(chatml):
    for talk, prompted in ((messages("hello"), False), (messages("hello", "fine"), True)):
        options = {"add_generation_prompt": prompted, "continue_final_message": True}
        refused(talk, chatml, "only an assistant's message without it can be continued", **options)


def test_roles_that_the_template_refuses_are_an_error_of_one_line():
    tokenizer = chat_tokenizer("llama2")
    talk = (*messages("hello"), *messages("hello", "fine"))
    refused(talk, tokenizer, r"refuses these roles in this order \(roles must alternate")


def test_template_that_rewrites_earlier_turns_is_refused_with_the_turn():
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = "{{ messages | length }}" + CHATML
    refused(
        messages("hello", "fine"), tokenizer, r"rewrites what comes before message 2 \(assistant\)"
    )


def test_template_that_changes_a_reply_is_refused():
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = CHATML.replace("{{ m.content }}", "{{ m.content | upper }}")
    refused(messages("hello", "fine"), tokenizer, "does not write each assistant message once and")
    tokenizer.chat_template = CHATML.replace("{{ m.content }}", "{{ m.content[1:] }}")
    refused(messages("hello", "fine"), tokenizer, r"changes what message 2 \(assistant\) says")


def test_reasoning_of_the_last_turn_is_learned_and_of_earlier_ones_refused():
    tokenizer = chat_tokenizer("qwen3")
    reply = "<think>\nhow\n</think>\n\nfine"
    (text,) = render(messages("hello", reply), tokenizer)
    assert tokenizer.decode(text.input_ids[text.learned]) == f"{reply}<|im_end|>"
    refused(
        messages("hello", reply, "thanks", "quack"), tokenizer, "changes what message 2 .*reasoning"
    )


def test_reasoning_of_earlier_turns_is_left_out_of_a_prompt_and_audio_keeps_its_speaker():
    tokenizer = chat_tokenizer("qwen3")
    reply = "<think>\nhow\n</think>\n\nfine"
    talk = messages(["hello", ("a",)], [reply, ("b",)], "thanks")
    pieces = render(talk, tokenizer, add_generation_prompt=True)
    texts = [tokenizer.decode(p.input_ids) for p in pieces if isinstance(p, Text)]
    assert "how" not in "".join(texts)
    assert "fine" in "".join(texts)
    assert [(p.audio, p.said) for p in pieces if not isinstance(p, Text)] == [
        ("a", False),
        ("b", True),
    ]
    assert not any(p.learned.any() for p in pieces if isinstance(p, Text))


def test_template_that_leaves_audio_out_is_refused():
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = CHATML.replace("{{ m.content }}", "{{ m.content if not loop.first }}")
    refused(messages([("a",)], "fine"), tokenizer, "writes 0 of 1 audio parts, expected each once")


def test_tokenizer_without_the_audio_tokens_is_refused(chatml):
    bare = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), eos_token="</s>", unk_token="<unk>"
    )
    refused(messages("hello", "fine"), bare, r"the text tokenizer lacks <\|cond\|>")
