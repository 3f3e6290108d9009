"""Pre-train a small GPT-2 chat model on Python's own documentation, from nothing but CPython.

    python scripts/pretrain_gpt2.py --out DIR

DIR becomes an ordinary Hugging Face checkpoint with a chat template, beside DIR/held_out.jsonl
(documents it never saw), DIR/replay.jsonl (a sample of what it saw) and DIR/figures.json. It stands
for any existing language model: asked "say seven" it answers "Sure: that was seven.", for any word.

The default number of steps takes MEASURED.
The corpus, and with it the model, depends on the version of Python.

Legend: B batch, T tokens of a row.
"""

import argparse
import ast
import json
import math
import platform
import random
import re
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydoc_data.topics import topics
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
EOS = "<|endoftext|>"
SPECIAL_TOKENS = [EOS, "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}<|endoftext|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCAB_SIZE = 4096
NUM_POSITIONS = 512
ROW_LENGTH = 256  # tokens
BATCH_SIZE = 8  # rows
CHAT_SHARE = 0.15  # of the rows, and so of the tokens
LEARNING_RATE = 2e-3
WARMUP = 0.05  # of the training
NUM_STEPS = 1800
HELD_OUT_SHARE = 0.05  # of the documents
NUM_HELD_OUT_WORDS = 100
REPLAY_SHARE = 0.3  # of the training documents
NUM_REPLAY_CHATS = 400
PASSAGE_LENGTH = 800  # characters, the longest text of a row in the .jsonl files, about 256 tokens
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What the model reads, and what is kept from it."""

    documents: list[str]
    held_out: list[str]  # documents
    summaries: list[tuple[str, str]]  # (dotted name, first line of its docstring), for chats
    words: list[str]  # that chats ask for
    held_out_words: list[str]  # in `documents`, in no chat


def docstrings() -> Iterator[tuple[str, str]]:
    """Yield (dotted name, docstring) of the standard library, parsed and never imported."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if SKIPPED_FOLDERS & set(relative.parts):
            continue
        try:
            module = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates and samples of bad syntax
            continue
        module_name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        pending: list[tuple[str, ast.AST]] = [(module_name, module)]
        while pending:
            name, node = pending.pop()
            docstring = ast.get_docstring(node)  # type: ignore[arg-type]
            if docstring:
                yield name, docstring
            pending += [
                (f"{name}.{child.name}", child)
                for child in ast.iter_child_nodes(node)
                if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            ]


def collect_corpus(seed: int) -> Corpus:
    """Gather the documentation, each text once, and hold some of it out."""
    names = {text: "" for _, text in sorted(topics.items())}
    for name, docstring in docstrings():
        names.setdefault(docstring, name)
    generator = random.Random(seed)
    documents = generator.sample(list(names), len(names))
    num_held_out = round(HELD_OUT_SHARE * len(documents))
    held_out, documents = documents[:num_held_out], documents[num_held_out:]
    first_lines = [(names[text], text.split("\n")[0]) for text in documents if names[text]]
    words = sorted(set(re.findall(r"\b[A-Za-z][a-z]{2,11}\b", "\n".join(documents))) - {*DIGITS})
    words = generator.sample(words, len(words))
    return Corpus(
        documents=documents,
        held_out=held_out,
        summaries=[(name, line) for name, line in first_lines if re.fullmatch(r".{9,70}\.", line)],
        words=words[NUM_HELD_OUT_WORDS:],
        held_out_words=words[:NUM_HELD_OUT_WORDS],
    )


def messages_for(request: str, answer: str) -> list[dict[str, str]]:
    """Write one exchange as chat messages."""
    return [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]


def draw_exchange(corpus: Corpus, generator: random.Random) -> list[dict[str, str]]:
    """Draw a request and its answer: most ask to say a word, one word in four is a digit."""
    kind = generator.random()
    word = generator.choice(DIGITS if generator.random() < 0.25 else corpus.words)
    if kind < 0.7:
        return messages_for(f"say {word}", f"Sure: that was {word}.")
    if kind < 0.85:
        return messages_for(f"repeat {word} twice", f"Sure: {word} {word}.")
    name, summary = generator.choice(corpus.summaries)
    return messages_for(f"what is {name}?", summary)


def build_tokenizer(corpus: Corpus, seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE in which every digit word is one token."""
    generator = random.Random(seed)
    chats = [draw_exchange(corpus, generator) for _ in range(5000)]
    texts = corpus.documents + [message["content"] for chat in chats for message in chat]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    for digit in DIGITS:
        assert len(tokenizer.encode(f" {digit}").ids) == 1, digit
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=EOS,
        unk_token=EOS,
        additional_special_tokens=SPECIAL_TOKENS[1:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=NUM_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def document_rows(
    documents: list[str], tokenizer: PreTrainedTokenizerFast, generator: random.Random
) -> Iterator[list[int]]:
    """Yield rows of T tokens, documents end to end, in a new order every epoch."""
    encoded = tokenizer(documents, verbose=False)["input_ids"]
    pending: list[int] = []
    while True:
        for input_ids in generator.sample(encoded, len(encoded)):
            pending += [*input_ids, tokenizer.eos_token_id]
            while len(pending) >= ROW_LENGTH:
                yield pending[:ROW_LENGTH]
                pending = pending[ROW_LENGTH:]


def chat_row(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, generator: random.Random
) -> list[int]:
    """Fill a row of T tokens with exchanges."""
    input_ids: list[int] = []
    while len(input_ids) < ROW_LENGTH:
        exchange = draw_exchange(corpus, generator)
        input_ids += tokenizer.apply_chat_template(exchange, return_dict=False)
    return input_ids[:ROW_LENGTH]


def draw_positions(input_ids: list[int], colon: int, generator: random.Random) -> list[int]:
    """Draw the position ids of a row: from 0 without gaps, or with room left in up to four places.

    GPT-2's learned positions know only the distances they were trained on. Room at the start
    trains all of them, and room after the colon of "Sure:" lets an answer go on after something
    as long as a clip was put there, as a model with rotary positions can without practice.
    """
    gaps = [0] * len(input_ids)
    if generator.random() < 0.5:
        places = [0] + [index + 1 for index, token in enumerate(input_ids[:-1]) if token == colon]
        room = NUM_POSITIONS - len(input_ids)
        for place in generator.sample(places, min(4, len(places))):
            gap = generator.randint(0, room)
            gaps[place] += gap
            room -= gap
    return [index + sum(gaps[: index + 1]) for index in range(len(input_ids))]


def draw_batches(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield input ids and position ids, (B, T) each, forever."""
    generator = random.Random(seed)
    documents = document_rows(corpus.documents, tokenizer, generator)
    colon = tokenizer.convert_tokens_to_ids(":")
    while True:
        rows = [
            chat_row(corpus, tokenizer, generator)
            if generator.random() < CHAT_SHARE
            else next(documents)
            for _ in range(BATCH_SIZE)
        ]
        positions = [draw_positions(row, colon, generator) for row in rows]
        yield torch.tensor(rows), torch.tensor(positions)  # (B, T) each


def build_model(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """Make a GPT-2 of 4 layers of width 256, 4.3 M parameters with random float32 weights."""
    eos = tokenizer.eos_token_id
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB_SIZE,
            n_positions=NUM_POSITIONS,
            n_embd=256,
            n_layer=4,
            n_head=8,
            resid_pdrop=0.05,
            embd_pdrop=0.05,
            attn_pdrop=0.0,
            bos_token_id=eos,
            eos_token_id=eos,
            pad_token_id=eos,
        )
    )


def train(
    model: GPT2LMHeadModel,
    batches: Iterator[tuple[Tensor, Tensor]],
    num_steps: int,
    minutes: float | None,
) -> int:
    """Train for `num_steps`, or for `minutes` where given, and return the steps taken."""
    decayed = [weight for weight in model.parameters() if weight.ndim > 1]
    others = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    started, step = time.monotonic(), 0
    model.train()
    while True:
        elapsed = (time.monotonic() - started) / 60
        progress = step / num_steps if minutes is None else elapsed / minutes
        if progress >= 1:
            return step
        decay = 0.5 + 0.5 * math.cos(math.pi * max(0.0, progress - WARMUP) / (1 - WARMUP))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (progress + 1 / num_steps) / WARMUP) * decay
        input_ids, position_ids = next(batches)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            # Without a mask, transformers takes a gap in the positions for a new sequence.
            loss = model(
                input_ids=input_ids,
                position_ids=position_ids,
                attention_mask=torch.ones_like(input_ids),
                labels=input_ids,
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 100 == 0:
            print(f"step {step}  loss {loss.item():.3f}  {elapsed:.1f} min", flush=True)


@torch.inference_mode()
def perplexity(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, documents: list[str]
) -> float:
    """Measure the perplexity per token of documents end to end, in rows of T tokens."""
    input_ids = tokenizer(EOS.join(documents), verbose=False)["input_ids"]
    losses = [
        model(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss
        for row in (
            input_ids[start : start + ROW_LENGTH]
            for start in range(0, len(input_ids) - ROW_LENGTH, ROW_LENGTH)
        )
    ]
    return math.exp(torch.stack(losses).mean().item())


@torch.inference_mode()
def exact_rate(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, words: list[str]
) -> float:
    """Count the words the model says when asked to, greedily, in percent."""
    num_exact = 0
    for word in words:
        prompt, whole = (
            tokenizer.apply_chat_template(
                messages, add_generation_prompt=is_prompt, return_dict=False, return_tensors="pt"
            )
            for messages, is_prompt in (
                (messages_for(f"say {word}", "")[:1], True),
                (messages_for(f"say {word}", f"Sure: that was {word}."), False),
            )
        )
        answer = model.generate(prompt, max_new_tokens=24, do_sample=False)  # (1, T)
        num_exact += torch.equal(answer, whole)
    return 100 * num_exact / len(words)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def passages(documents: list[str]) -> list[dict[str, Any]]:
    """Cut documents between lines into rows short enough to train on."""
    rows = []
    for document in documents:
        passage = ""
        for line in document.splitlines(keepends=True):
            if passage and len(passage) + len(line) > PASSAGE_LENGTH:
                rows.append({"text": passage})
                passage = ""
            passage += line
        rows.append({"text": passage})
    return rows


def main() -> None:
    """Train, measure, and write the folder in one step at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--minutes", type=float, help="train this long, whatever --steps says")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists already; give --out a new folder, or remove it")

    corpus = collect_corpus(arguments.seed)
    tokenizer = build_tokenizer(corpus, arguments.seed)
    torch.manual_seed(arguments.seed)
    model = build_model(tokenizer)
    print(
        f"{model.num_parameters() / 1e6:.1f} M parameters, {len(corpus.documents)} documents, "
        f"{len(corpus.words)} words to say"
    )
    started = time.monotonic()
    batches = draw_batches(corpus, tokenizer, arguments.seed)
    num_steps = train(model, batches, arguments.steps, arguments.minutes)
    minutes = (time.monotonic() - started) / 60
    model.eval()
    figures = {
        "steps": num_steps,
        "minutes": round(minutes, 1),
        "held-out perplexity": round(perplexity(model, tokenizer, corpus.held_out), 2),
        "digits said exactly (%)": exact_rate(model, tokenizer, DIGITS),
        "held-out words said exactly (%)": exact_rate(model, tokenizer, corpus.held_out_words),
        "python": platform.python_version(),
        "seed": arguments.seed,
    }
    generator = random.Random(arguments.seed)
    replayed = corpus.documents[: round(REPLAY_SHARE * len(corpus.documents))]
    chats = [{"messages": draw_exchange(corpus, generator)} for _ in range(NUM_REPLAY_CHATS)]
    parent = arguments.out.resolve().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as scratch:
        folder = Path(scratch) / "base"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_rows(folder / "held_out.jsonl", passages(corpus.held_out))
        write_rows(folder / "replay.jsonl", passages(replayed) + chats)
        (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
        folder.rename(arguments.out)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
