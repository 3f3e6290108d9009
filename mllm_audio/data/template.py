"""What a tokenizer's chat template makes of a conversation, and where replies stand in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from mllm_audio.text import COND, SPECIAL_TOKENS, adds_bos

# For tokenizers without a chat template, base models such as GPT-2: a reply ends with the end of
# text, every other message with its line.
PLAIN_TEMPLATE = (
    "{{ start }}{% for message in messages %}{{ message.content }}"
    "{{ (message.role == 'assistant' and eos_token) or '\\n' }}{% endfor %}"
)
Chat = list[dict[str, str]]  # role and content of each message, as templates take them
MARK = COND  # splits text where replies begin; no message may hold it, and no row keeps it


@dataclass(frozen=True)
class Reply:
    """Where the assistant speaks in the text of a conversation."""

    start: int  # behind the generation prompt
    end: int  # of what it says
    end_token: str  # special token that follows, `MARK` without one


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """List the strings that the tokenizer reads as structure, the longest first."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    tokens = {*SPECIAL_TOKENS, *tokenizer.all_special_tokens, *added}
    return sorted(filter(None, tokens), key=len, reverse=True)


def write(
    chat: Chat, tokenizer: PreTrainedTokenizerBase, special: Sequence[str], prompt: bool
) -> tuple[str, list[Reply]]:
    """Write `chat` with the chat template, and find the assistant's replies in it."""
    turns = [i for i, message in enumerate(chat) if message["role"] == "assistant"]
    prompts = _apply(tokenizer, [chat[:i] for i in turns], True)
    if prompt:  # nothing is learned, so templates may rewrite replies: some leave reasoning out
        text = _apply(tokenizer, [chat], True)[0]
        starts = [len(before) for before in prompts if text.startswith(before)]
        return text, [Reply(start, start, MARK) for start in starts]
    probe = [dict(message) for message in chat]
    for i in turns:  # before white space at its end, which templates may trim
        body = chat[i]["content"].rstrip()
        probe[i]["content"] = body + MARK + chat[i]["content"][len(body) :]
    text, probed = _apply(tokenizer, [chat, probe], False)
    *heads, _ = probed.split(MARK)
    if probed.replace(MARK, "") != text or len(heads) != len(turns):
        raise ValueError(
            "the chat template does not write each assistant message once and as it is; use another"
        )
    ends = accumulate(len(head) for head in heads)
    return text, [
        _reply(text, before, end, chat[i]["content"], i + 1, special)
        for i, before, end in zip(turns, prompts, ends, strict=True)
    ]


def _reply(
    text: str, prompt: str, end: int, content: str, number: int, special: Sequence[str]
) -> Reply:
    """Check the reply that follows `prompt`, and find the token that ends it in `text`."""
    if not text.startswith(prompt) or len(prompt) >= end:
        raise ValueError(
            f"the chat template rewrites what comes before message {number} (assistant) once it is "
            "there, expected it to begin with the generation prompt; use another template"
        )
    if not text[:end].endswith(content.strip()):
        raise ValueError(
            f"the chat template changes what message {number} (assistant) says; take out what it "
            "changes, such as the reasoning of earlier turns, or use another template"
        )
    space = content[len(content.rstrip()) :]
    if text.startswith(space, end):
        end += len(space)
    after = len(text) - len(text[end:].lstrip())
    followers = (t for t in special if t not in SPECIAL_TOKENS and text.startswith(t, after))
    return Reply(len(prompt), end, next(followers, MARK))


def _apply(tokenizer: PreTrainedTokenizerBase, chats: list[Chat], prompt: bool) -> list[str]:
    """Write each of several conversations, with the generation prompt or without."""
    if not chats:
        return []
    try:
        texts: list[str] = tokenizer.apply_chat_template(
            chats,
            chat_template=None if tokenizer.chat_template else PLAIN_TEMPLATE,
            start=tokenizer.bos_token if adds_bos(tokenizer) else "",
            add_generation_prompt=prompt,
            tokenize=False,
        )
    except TemplateError as error:
        raise ValueError(
            f"the chat template refuses these roles in this order ({error}); change them"
        ) from error
    return texts


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Look up a special token."""
    found = tokenizer.convert_tokens_to_ids(token)
    if found is None or tokenizer.convert_ids_to_tokens(found) != token:
        raise ValueError(f"the text tokenizer lacks {token}; was it saved by mllm-audio?")
    return int(found)


def end_of_reply(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id that the chat template ends a reply with, None without one."""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    _, (reply,) = write(chat, tokenizer, special_tokens(tokenizer), False)
    return None if reply.end_token == MARK else token_id(tokenizer, reply.end_token)
