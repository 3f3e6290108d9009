"""What a latent costs far into a clip: the last columns of clips of several lengths.

What stands before them is fed at once, as audio that a user sends is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from mllm_audio.audiomar import AudioMAR
from mllm_audio.backbone import blocks
from mllm_audio.benchmarks.reads import weight_bytes
from mllm_audio.benchmarks.timing import Stopwatch
from mllm_audio.data.dataset import seeded
from mllm_audio.data.layout import Audio, Prompt, Text, collate
from mllm_audio.generation.decode import GenerationConfig, audio_span, token_limits
from mllm_audio.generation.graph import without_graphs
from mllm_audio.generation.parallel import asked_targets
from mllm_audio.generation.rows import NEXT, Rows
from mllm_audio.generation.voice import Voice
from mllm_audio.text import SpecialIds

LAST_COLUMNS = 4  # that are decoded, and measured after the first of them


@torch.inference_mode()
def length_figures(
    voice: Voice,
    part: Text | Prompt,
    config: GenerationConfig,
    num_rows: int,
    lengths: Sequence[float],
) -> dict[str, float]:
    """Measure the last latents of clips so many seconds long.

    Args:
        voice: with a model that makes clips so long.
        part: the prompt of every row.
        config: guidance and steps; its duration is replaced.
        num_rows: clips at once.
        lengths: in seconds, at least `LAST_COLUMNS` + 1 columns.

    Returns:
        By name and length: milliseconds of a latent in the backbone and in the head, and the bytes
        that the backbone must read for it, its blocks' weights and the cache.

    Raises:
        ValueError: for an AudioMAR, or a length beyond what the model makes.
    """
    if isinstance(voice.model, AudioMAR):
        raise ValueError(
            "found --lengths with an AudioMAR, which has no cache; leave --lengths out"
        )
    weights = weight_bytes(blocks(voice.decoder.backbone))
    figures: dict[str, float] = {}
    for seconds in lengths:
        timed = replace(config, seconds=seconds)
        _, num_tokens = token_limits(voice.model.audio.config, timed)
        per_column = voice.model.audio.config.tokens_per_column
        first = num_tokens - LAST_COLUMNS * per_column
        asked = asked_targets(first, config.tokens_per_step, num_tokens)
        rows = _rows(voice, part, num_rows, first, timed.is_guided(num_tokens), asked)
        watch = Stopwatch(voice.model.device)
        steps = audio_span(rows, range(num_rows), timed, num_tokens, first)
        with without_graphs():
            for _ in range(per_column):  # unmeasured
                next(steps)
        with (
            watch.watching(voice.model, "step", "backbone"),
            watch.watching(voice.model.audio, "sample", "head"),
        ):
            for _ in steps:
                pass
        name = f"length.{seconds:g}"
        figures[f"{name}.backbone_ms"] = 1e3 * watch.typical("backbone")
        figures[f"{name}.head_ms"] = 1e3 * watch.typical("head")
        figures[f"{name}.read_bytes"] = weights + _cache_bytes(rows)
    return figures


def _rows(
    voice: Voice, part: Text | Prompt, num_rows: int, given: int, guided: bool, asked: range = NEXT
) -> Rows:
    """Feed the prompt and `given` random latents, the last of which predicts what is `asked`."""
    model, copies = voice.decoder, 2 if guided else 1
    shape = (given + 1, model.audio.config.latent_dim)  # one more, cut off again below
    latents = torch.randn(shape, generator=seeded("benchmark latents"))
    row = [part, Audio(latents, torch.arange(len(latents)))]
    special = SpecialIds.of(voice.text_tokenizer)
    batch = collate(
        [row] * (copies * num_rows),
        ["benchmark"] * (copies * num_rows),
        special,
        unconditional=[index >= num_rows for index in range(copies * num_rows)],
        end_of_audio=model.audio.config.end_of_audio,
    ).to(model.device)
    start = int((batch.input_ids[0] == special.audio_start).nonzero()[0])
    length = start + 1 + given
    embeds = model.embed(batch)[:, :length]  # (R', T, H)
    positions = batch.position_ids[:, :length]
    mask = torch.ones_like(positions, dtype=torch.bool)
    return Rows.begin(model, special, guided, embeds, positions, mask, asked)


def _cache_bytes(rows: Rows) -> int:
    """Count the bytes of the keys and values that a step reads."""
    layers = rows.cache.layers
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


def length_lines(figures: dict[str, float], lengths: Sequence[float]) -> list[str]:
    """Tabulate time against length; beside the growth of the backbone's, what must be read more."""
    first = f"length.{lengths[0]:g}"
    lines = [f"{'at':<10}{'backbone ms':>12}{'head ms':>10}{'growth':>8}{'bytes read':>12}{'':>8}"]
    for seconds in lengths:
        name = f"length.{seconds:g}"
        backbone, read = figures[f"{name}.backbone_ms"], figures[f"{name}.read_bytes"]
        growth = backbone / figures[f"{first}.backbone_ms"]
        more = read / figures[f"{first}.read_bytes"]
        lines.append(
            f"{seconds:>7g} s {backbone:>12.2f}{figures[f'{name}.head_ms']:>10.2f}{growth:>7.2f}x"
            f"{read / 2**20:>8.0f} MiB{more:>7.2f}x"
        )
    return lines
