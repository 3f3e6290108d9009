"""`mllm-audio bench generate`: prompts to sound, through the code that `generate` runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from mllm_audio.audiomar import AudioMAR, decode_order
from mllm_audio.benchmarks.decode import networks, random_latents, watching
from mllm_audio.benchmarks.generate_config import GenerateConfig, listed_settings
from mllm_audio.benchmarks.lengths import length_figures, length_lines
from mllm_audio.benchmarks.reads import Reads, read_lines
from mllm_audio.benchmarks.report import Check, Header, Machine, Report, part_figures, part_lines
from mllm_audio.benchmarks.subject import Subject, prompt_part
from mllm_audio.benchmarks.timing import Stopwatch, forget_peak, middle, peak_memory
from mllm_audio.data.layout import Prompt, stacked
from mllm_audio.generation.decode import GenerationConfig, decode, token_limits
from mllm_audio.generation.graph import capture_on, is_uniform, without_graphs
from mllm_audio.generation.precision import cast, cast_decoder
from mllm_audio.generation.voice import Voice
from mllm_audio.model import AudioLanguageModel
from mllm_audio.text import SpecialIds

WARM_COLUMNS = 2  # decoded before anything is measured
PROBE_COLUMNS = 4  # of which guidance's share is measured
MODEL_PARTS = ("prompt", "backbone", "head")


@dataclass(frozen=True)
class Task:
    """Clips to decode again and again."""

    voice: Voice
    config: GenerationConfig
    rows: int

    @property
    def num_tokens(self) -> int:
        """Count the latents of a clip."""
        return token_limits(self.voice.model.audio.config, self.config)[1]

    def latents(self, columns: int | None = None) -> Tensor:
        """Decode every row, or its first columns where the model is causal; (R, N, D)."""
        voice, part, seeds = self.voice, prompt_part(self.voice), range(self.rows)
        if isinstance(voice.model, AudioMAR):
            assert isinstance(part, Prompt)
            streams = stacked([part] * self.rows)
            return decode_order(voice.model, streams, seeds, self.config, self.num_tokens)
        limit = columns and columns * voice.model.audio.config.tokens_per_column
        return torch.stack(list(islice(self.steps(), limit)), dim=1)

    def steps(self) -> Iterator[Tensor]:
        """Decode a latent of every row at a time, (R, D) each, with a causal model."""
        voice, part = self.voice, prompt_part(self.voice)
        prompt = part if isinstance(part, Prompt) else part.input_ids
        special = SpecialIds.of(voice.text_tokenizer)
        steps = decode(voice.decoder, [prompt] * self.rows, special, range(self.rows), self.config)
        return (step.latents for step in steps)

    @contextmanager
    def watched(self, watch: Stopwatch) -> Iterator[None]:
        """Time the parts of the model for as long as the context lasts, so without graphs."""
        model = self.voice.model
        with ExitStack() as stack:
            enter = stack.enter_context
            enter(without_graphs())
            if isinstance(model, AudioMAR):
                enter(watch.watching(model, "hidden_states", "backbone"))
            else:
                # The prompt is the first thing that a model is fed.
                name = partial(_first_or, watch, "prompt", "backbone")
                enter(watch.watching(model, "step", name))
            enter(watch.watching(model.audio, "sample", "head"))
            yield


def _first_or(watch: Stopwatch, first: str, other: str) -> str:
    """Name a part by whether it ran before."""
    return other if first in watch.laps else first


def bench_generate(
    subject: Subject, config: GenerateConfig, threads: int, check: Check
) -> tuple[Report, list[str]]:
    """Generate clips; return the report and its lines.

    A random model's latents are no sound, so standard normal ones are decoded in their place.

    Args:
        subject: what to measure; its weights are cast in place.
        config: what to generate.
        threads: that torch uses.
        check: called with machine and settings before anything is measured.

    Raises:
        ValueError: if the model cannot decode so.
    """
    voice = subject.voice
    audio = voice.model.audio.config
    num_parameters = subject.num_parameters  # before they are cast: int8 weights are buffers
    cast(voice.model, config.dtype)
    cast_decoder(voice.audio_tokenizer, config.dtype, voice.model.device)
    task = Task(voice, config.resolve(voice.defaults, voice.model), config.batch_size)
    num_tokens = task.num_tokens
    header = Header(
        benchmark="generate",
        settings=listed_settings(subject, config, task.config, threads),
        machine=Machine.here(voice.model.device),
    )
    check(header)
    figures = _clip_figures(task, subject, config.repetitions)
    clip_seconds = num_tokens / audio.tokens_per_column * audio.column_seconds
    figures["rtf"] = figures["seconds"] / clip_seconds
    figures["audio_seconds_per_second"] = task.rows * clip_seconds / figures["seconds"]
    figures["latents_per_second"] = task.rows * num_tokens / figures["span.seconds"]
    if task.config.is_guided(num_tokens):
        figures |= _guidance_figures(task)
    if isinstance(voice.model, AudioLanguageModel):
        reads = Reads.of(voice.model, task.config, task.rows, num_tokens)
        figures |= reads.figures(figures, voice.model.device)
    if config.lengths:
        part = prompt_part(voice)
        figures |= length_figures(voice, part, task.config, task.rows, config.lengths)
    report = Report(header=header, repetitions=config.repetitions, figures=figures)
    weights = "random weights" if subject.is_random else "trained weights"
    model = f"model     {num_parameters:,} parameters, {weights}, {num_tokens} latents a clip"
    return report, [model, *_lines(report, subject, config.lengths)]


def _clip_figures(task: Task, subject: Subject, repetitions: int) -> dict[str, float]:
    """Time whole clips, from prompts to sound."""
    voice, watches = task.voice, []
    tokenizer = voice.audio_tokenizer
    drawn = random_latents(tokenizer, task.config.seconds or 0.0, task.rows)  # (R, N, D)
    warm_up(task)
    voice.to_clip(drawn[0], task.config)
    # Parts cannot be told apart inside a graph: where steps are one, they are also timed whole.
    whole = "graphed" if _is_graphed(task) else "span"
    forget_peak(voice.model.device)
    for _ in range(repetitions):
        watch = Stopwatch(voice.model.device)
        with task.watched(watch), watch.part("span"):
            latents = task.latents()
        if whole == "graphed":
            with watch.part(whole):
                latents = task.latents()
        with watching(watch, tokenizer), watch.part("decode"):
            for row in drawn if subject.is_random else latents:
                voice.to_clip(row, task.config)
        watches.append(watch)
    watch = middle(watches, whole, "decode")
    parts, decoders = [*MODEL_PARTS], networks(tokenizer)
    return {
        **part_figures(watch, [*parts, *decoders]),
        "other.seconds": watch.total("span") - watch.total(*parts),
        # What the networks leave of the tokenizer: all of it where there are none.
        "decode.seconds": watch.total("decode") - watch.total(*decoders),
        "watched.seconds": watch.total("span", "decode"),
        "span.seconds": watch.total(whole),
        "seconds": watch.total(whole, "decode"),
        "peak.bytes": peak_memory(voice.model.device),
    }


def _is_graphed(task: Task) -> bool:
    """Tell whether steps are decoded as graphs, if the backbone's cache can be fixed."""
    model, count = task.voice.model, task.num_tokens
    if isinstance(model, AudioMAR) or capture_on(model.device) is None:
        return False
    samplings = [task.config.sampling_at(index, count) for index in range(count)]
    return is_uniform(samplings, task.config.tokens_per_step)


def warm_up(task: Task) -> None:
    """Decode a little, so that memory is mapped and kernels are chosen."""
    quick = replace(task.config, decoding_steps=2)  # of AudioMAR, which cannot stop half-way
    replace(task, config=quick).latents(WARM_COLUMNS)


def _guidance_figures(task: Task) -> dict[str, float]:
    """Measure what of a latent's time goes into guidance: the same latents with and without.

    The two take turns latent by latent, so that what else the machine does slows both.
    """
    unguided = replace(task.config, guidance_scale=1.0, guidance_weight=None)
    tasks = (task, replace(task, config=unguided))
    watches = [Stopwatch(task.voice.model.device) for _ in tasks]
    warm_up(tasks[1])
    if isinstance(task.voice.model, AudioMAR):
        turns: list[Callable[[], object]] = [probe.latents for probe in tasks]
        count = 1
    else:
        turns = [partial(next, probe.steps()) for probe in tasks]
        columns = PROBE_COLUMNS * task.voice.model.audio.config.tokens_per_column
        count = min(task.num_tokens, columns)
    for _ in range(count):
        for probe, watch, turn in zip(tasks, watches, turns, strict=True):
            with probe.watched(watch):
                turn()
    guided, plain = watches
    parts = ("backbone", "head")
    shares = {f"guidance.{p}_share": 1 - plain.typical(p) / guided.typical(p) for p in parts}
    whole = [sum(watch.typical(part) for part in parts) for watch in watches]
    return {**shares, "guidance.share": 1 - whole[1] / whole[0]}


def _lines(report: Report, subject: Subject, lengths: tuple[float, ...]) -> list[str]:
    """Say what was found."""
    figures = report.figures
    names = [*MODEL_PARTS, "other", *networks(subject.voice.audio_tokenizer), "decode"]
    lines = [
        *part_lines(figures, names, figures["watched.seconds"]),
        f"rtf       {figures['rtf']:.3f}: {figures['seconds']:.2f} s a clip, the model "
        f"{figures['span.seconds']:.2f} s; {figures['audio_seconds_per_second']:.3g} s of sound "
        f"and {figures['latents_per_second']:.3g} latents a second",
    ]
    if figures["watched.seconds"] != figures["seconds"]:
        lines.append("graph     the parts are of steps without a graph, rtf is of steps with one")
    if "guidance.share" in figures:
        lines.append(
            f"guidance  {figures['guidance.share']:.0%} of backbone and head: "
            f"{figures['guidance.backbone_share']:.0%} of the backbone, "
            f"{figures['guidance.head_share']:.0%} of the head"
        )
    if "head.read_bytes" in figures:
        lines += read_lines(figures)
    lines.append(f"memory    {figures['peak.bytes'] / 2**30:.2f} GiB at the peak")
    return lines + (length_lines(figures, lengths) if lengths else [])
