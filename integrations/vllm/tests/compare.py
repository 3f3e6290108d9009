"""Requests through the engine, and whether they are what the project's own generation makes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from checkpoints import DEFAULTS, Expected, Reference

from mllm_audio.data.layout import Audio
from mllm_audio.generation.decode import GenerationConfig
from mllm_audio_vllm.options import AudioOptions

# Of latents, whose magnitudes are up to 30; in proportion to the hundreds of thousands that an
# untrained DDPM chain ends at, its first step being so wide.
TOLERANCE = 1e-3
KEYS = itertools.count()


@dataclass
class Request:
    """One request, and what it should give."""

    row: list
    config: GenerationConfig = DEFAULTS
    seed: int = 0
    max_tokens: int = 60
    open_span: bool = False
    spans: int | None = None
    salt: str | None = ""  # "": its key
    key: str = field(default_factory=lambda: f"request-{next(KEYS)}")

    def ids(self, reference: Reference) -> list[int]:
        special, ids = reference.special, []
        for index, part in enumerate(self.row):
            if isinstance(part, Audio):
                ids += [special.audio_start, *[special.audio] * len(part.latents)]
                if not (self.open_span and index + 1 == len(self.row)):
                    ids.append(special.audio_end)
            else:
                ids += part.input_ids.tolist()
        return ids

    def prompt(self, reference: Reference) -> dict:
        salt = self.key if self.salt == "" else self.salt
        prompt = {"prompt_token_ids": self.ids(reference)}
        return prompt if salt is None else {**prompt, "cache_salt": salt}

    def sampling(self, reference: Reference):
        from vllm import SamplingParams

        spans = [part for part in self.row if isinstance(part, Audio)]
        latents = b"".join(part.latents.float().numpy().tobytes() for part in spans)
        options = AudioOptions(
            key=self.key,
            generation=self.config,
            seed=self.seed,
            max_audio_spans=self.spans,
            learned=tuple(part.learned for part in spans),
            latents=latents,
        )
        return SamplingParams(
            temperature=0,
            max_tokens=self.max_tokens,
            stop_token_ids=sorted(reference.end_ids),
            extra_args=options.to_extra_args(),
        )

    def expected(self, reference: Reference) -> Expected:
        return reference.reply(
            self.row,
            self.config,
            self.seed,
            self.max_tokens,
            open_span=self.open_span,
            spans=self.spans,
        )


def run(llm, reference, requests) -> list[list[int]]:
    """Give requests to the engine together; return the ids of each."""
    prompts = [request.prompt(reference) for request in requests]
    sampling = [request.sampling(reference) for request in requests]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    replies = [list(output.outputs[0].token_ids) for output in outputs]
    return [ids[:-1] if ids[-1] in reference.end_ids else ids for ids in replies]


def differences(reference, requests, replies, pushed) -> list[str]:
    """List in words where replies are not what they should be."""
    found = []
    for request, ids in zip(requests, replies, strict=True):
        expected = request.expected(reference)
        if ids != expected.ids:
            found.append(f"{request.key}: ids {ids}, expected {expected.ids}")
            continue
        begin = len(request.ids(reference))
        audio = reference.special.audio
        places = [begin + n for n, token in enumerate(ids) if token == audio]
        latents = pushed.of(request.key, len(places))
        if sorted(latents) != places:
            found.append(f"{request.key}: latents at {sorted(latents)}, expected {places}")
        elif any(len(copies) != 1 for copies in latents.values()):
            found.append(f"{request.key}: repeated latents")
        elif places:
            stacked, wanted = (
                torch.stack(values)
                for values in ([latents[place][0] for place in places], expected.latents)
            )
            error, largest = float((stacked - wanted).abs().max()), float(wanted.abs().max())
            if error > TOLERANCE * (largest if largest > 100 else 1):
                found.append(f"{request.key}: latents differ by {error}, the largest is {largest}")
    return found


def check(llm, reference, requests, pushed) -> list[list[int]]:
    """Run requests together, and assert that each is as it should be."""
    replies = run(llm, reference, requests)
    found = differences(reference, requests, replies, pushed)
    assert not found, "\n".join(found)
    return replies


def stats(llm) -> dict[str, int]:
    """Ask the worker what it holds."""
    return llm.collective_rpc("audio_stats")[0]
