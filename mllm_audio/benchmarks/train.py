"""`mllm-audio bench train`: optimizer steps of a preset on random clips in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

import torch

from mllm_audio.benchmarks.report import Check, Header, Machine, Report, part_lines
from mllm_audio.benchmarks.subject import Subject, prompt_part
from mllm_audio.benchmarks.timing import Stopwatch, forget_peak, middle, peak_memory
from mllm_audio.config import check_range, nearest
from mllm_audio.data.config import DataConfig
from mllm_audio.data.dataset import InMemory, TrainingData, seeded
from mllm_audio.data.layout import Audio, Prompt, Row, Text
from mllm_audio.masking import MaskingConfig
from mllm_audio.model import AudioLanguageModel
from mllm_audio.plan import quantiles
from mllm_audio.presets import RunConfig
from mllm_audio.text import SpecialIds
from mllm_audio.training.config import PRECISIONS
from mllm_audio.training.engine import SingleProcessEngine
from mllm_audio.training.flops import model_flops
from mllm_audio.types import Batch, StepCounts

PARTS = ("forward", "backward", "optimizer", "average")
PRECISION_OF = {"float32": "float32", "bfloat16": "bf16"}  # bf16 is autocast over float32 weights


@dataclass(frozen=True, kw_only=True)
class TrainBenchConfig:
    """What is trained on, and how often."""

    batch_size: int = 4  # clips of full length
    dtypes: tuple[str, ...] = ("float32", "bfloat16")  # in PRECISION_OF, measured in this order
    ratios: tuple[float, ...] = ()  # masking ratios to sweep, beside the preset's mean
    repetitions: int = 3  # steps of each, after one that is not measured

    def __post_init__(self) -> None:
        """Check ranges and types."""
        assert set(PRECISION_OF.values()) == set(PRECISIONS)
        check_range("bench", self, 1, 10_000, "batch_size", "repetitions")
        for dtype in self.dtypes:
            if dtype not in PRECISION_OF:
                raise ValueError(f"unknown dtype {dtype!r}; {nearest(dtype, PRECISION_OF)}")
        if len(set(self.dtypes)) != len(self.dtypes) or not self.dtypes:
            raise ValueError(f"found dtypes {self.dtypes}, expected each once, float32 or bfloat16")
        if any(not 0 <= ratio < 1 for ratio in self.ratios):
            raise ValueError(f"found ratios {self.ratios}, expected [0, 1), as in 0,0.25,0.5,0.75")


@dataclass(frozen=True)
class RandomClips(InMemory):
    """Clips of one length under one prompt."""

    part: Text | Prompt
    clip: Audio
    num_rows: int

    def __len__(self) -> int:
        return self.num_rows

    def length(self, index: int) -> int:
        """Count the latents of a row, all alike."""
        return len(self.clip.latents)

    def name(self, index: int) -> str:
        """Number a row."""
        return f"random clip {index}"

    def row(self, index: int, generator: torch.Generator) -> Row:
        """Give the prompt and the clip."""
        return [self.part, self.clip]


def mean_ratio(masking: MaskingConfig) -> float:
    """Give the share of latents that training drops on average."""
    return mean(quantiles(masking))


def bench_train(
    subject: Subject, preset: RunConfig, config: TrainBenchConfig, threads: int, check: Check
) -> tuple[Report, list[str]]:
    """Train a few steps; return the report and its lines.

    Batches are built beforehand: `bench data` measures how fast training is fed.

    Args:
        subject: the model of `preset`, trained in place.
        preset: masking and optimizer.
        config: how much.
        threads: that torch uses.
        check: called with machine and settings before anything is measured.

    Raises:
        ValueError: if a sweep of ratios is asked of a model that keeps every place.
        RuntimeError: if a step is not finite.
    """
    if config.ratios and preset.masking.hidden != "drop":
        raise ValueError(
            f"found --ratios, but {preset.preset} keeps masked latents' places "
            f"(masking.hidden={preset.masking.hidden}), so its cost does not fall; leave it out"
        )
    settings: dict[str, Any] = {
        "model": preset.preset,
        "dtypes": list(config.dtypes),
        "threads": threads,
        "batch_size": config.batch_size,
        "masking_ratio": round(mean_ratio(preset.masking), 4),
        "ratios": list(config.ratios),
    }
    model = subject.voice.model
    header = Header(benchmark="train", settings=settings, machine=Machine.here(model.device))
    check(header)
    figures: dict[str, float] = {}
    for dtype in config.dtypes:
        figures |= _dtype_figures(subject, preset, config, dtype)
    for dtype in config.dtypes[1:]:
        ratio = figures[f"{dtype}.tokens_per_second"]
        figures[f"{dtype}.speedup"] = ratio / figures[f"{config.dtypes[0]}.tokens_per_second"]
    report = Report(header=header, repetitions=config.repetitions, figures=figures)
    return report, _lines(report, subject, config)


def _dtype_figures(
    subject: Subject, preset: RunConfig, config: TrainBenchConfig, dtype: str
) -> dict[str, float]:
    """Measure steps in one precision, at the mean masking ratio and at those of the sweep."""
    model = subject.voice.model.train()
    engine = SingleProcessEngine(model, replace(preset.train, precision=PRECISION_OF[dtype]))
    forget_peak(model.device)
    flops = model_flops(model) if isinstance(model, AudioLanguageModel) else None
    batch = build_batch(subject, preset, mean_ratio(preset.masking), config.batch_size)
    counts, watch = batch.counts, _steps(engine, batch, config.repetitions)
    seconds = watch.total("step")
    figures = {f"{dtype}.{part}.seconds": watch.total(part) for part in PARTS if part in watch.laps}
    figures[f"{dtype}.backward.seconds"] = seconds - watch.total("forward", "optimizer", "average")
    figures[f"{dtype}.step.seconds"] = seconds
    figures[f"{dtype}.elements_per_second"] = counts.elements / seconds
    figures[f"{dtype}.latents_per_second"] = counts.latents / seconds
    figures[f"{dtype}.tokens_per_second"] = (counts.elements + counts.latents) / seconds
    if flops is not None:
        figures[f"{dtype}.tflops"] = flops.step(counts) / seconds / 1e12
    for ratio in config.ratios:
        batch = build_batch(subject, preset, ratio, config.batch_size)
        name = f"{dtype}.ratio.{ratio:g}"
        figures[f"{name}.seconds"] = _steps(engine, batch, config.repetitions).total("step")
        figures[f"{name}.elements"] = batch.counts.elements
        if flops is not None:
            figures[f"{name}.flops"] = flops.step(batch.counts)
    figures[f"{dtype}.peak.bytes"] = peak_memory(model.device)
    return figures


def build_batch(subject: Subject, preset: RunConfig, ratio: float, num_rows: int) -> Batch:
    """Lay out random clips of full length at a masking ratio, as training does."""
    audio = preset.audio
    generator = seeded("benchmark latents")
    latents = torch.randn(audio.max_tokens, audio.latent_dim, generator=generator)  # (N, D)
    clip = Audio(latents, torch.arange(audio.max_tokens))
    model = subject.voice.model
    data = TrainingData(
        source=RandomClips(prompt_part(subject.voice), clip, num_rows),
        special=SpecialIds.of(subject.voice.text_tokenizer),
        masking=replace(preset.masking, schedule="fixed", scale=ratio),
        config=DataConfig(unconditional_share=preset.data.unconditional_share),
        batch_size=num_rows,
        seed=0,
        end_of_audio=audio.end_of_audio,
        statistics=(model.audio.latent_mean.cpu(), model.audio.latent_std.cpu()),
    )
    return data.batch(range(num_rows), epoch=0, step=0).to(model.device)


@contextmanager
def _watched(watch: Stopwatch, engine: SingleProcessEngine) -> Iterator[None]:
    """Time what a step does beside its backward pass and clipping."""
    with (
        watch.watching(engine, "losses", "forward"),
        watch.watching(engine.optimizer, "step", "optimizer"),
        watch.watching(engine.ema, "update", "average"),
    ):
        yield


def _steps(engine: SingleProcessEngine, batch: Batch, repetitions: int) -> Stopwatch:
    """Take optimizer steps, the first one unmeasured; return the one of median time.

    Raises:
        RuntimeError: if one is not finite: the optimizer would be left out of its time.
    """
    counts: StepCounts = batch.counts
    lr, watches = engine.config.optim.lr, []
    for number in range(1 + repetitions):
        watch = Stopwatch(engine.model.device)
        with _watched(watch, engine), watch.part("step"):
            result = engine.train_step([batch], counts, lr, number)
        if not result.is_finite:
            raise RuntimeError(
                f"step {number} gave loss {result.total:g} and gradient norm {result.grad_norm:g}, "
                "expected finite ones; measure again with another preset"
            )
        watches.append(watch)
    return middle(watches[1:], "step")


def _lines(report: Report, subject: Subject, config: TrainBenchConfig) -> list[str]:
    """Say what was found."""
    figures = report.figures
    lines = [f"model     {subject.num_parameters:,} parameters, random weights"]
    for dtype in config.dtypes:
        own = {k.removeprefix(f"{dtype}."): v for k, v in figures.items() if k.startswith(dtype)}
        rate = f", {own['tflops']:.3g} TFLOPS" if "tflops" in own else ""
        faster = f", {own['speedup']:.2f} x {config.dtypes[0]}" if "speedup" in own else ""
        seconds, tokens = own["step.seconds"], own["tokens_per_second"]
        elements, latents = own["elements_per_second"], own["latents_per_second"]
        lines += [
            f"{dtype:<10}{seconds:.3f} s a step, {tokens:,.0f} tokens/s ({elements:,.0f} elements, "
            f"{latents:,.0f} predicted latents){rate}{faster}; "
            f"{own['peak.bytes'] / 2**30:.2f} GiB at the peak",
            *part_lines(own, PARTS, seconds),
            *_ratio_lines(own, config.ratios),
        ]
    return lines


def _ratio_lines(own: dict[str, float], ratios: tuple[float, ...]) -> list[str]:
    """Tabulate cost against the masking ratio, all relative to the first one."""
    if not ratios:
        return []
    lines = [f"{'ratio':<10}{'seconds':>9}{'cost':>8}{'1 - r':>8}{'elements':>10}{'FLOPs':>8}"]
    for ratio in ratios:
        cells = [(1 - ratio) / (1 - ratios[0])]
        cells += [
            own[f"ratio.{ratio:g}.{key}"] / own[f"ratio.{ratios[0]:g}.{key}"]
            for key in ("seconds", "elements", "flops")
            if f"ratio.{ratio:g}.{key}" in own
        ]
        share, cost, elements, *flops = (f"{cell:.3f}" for cell in cells)
        seconds = own[f"ratio.{ratio:g}.seconds"]
        lines.append(
            f"{ratio:<10g}{seconds:>9.3f}{cost:>8}{share:>8}{elements:>10}"
            + "".join(f"{cell:>8}" for cell in flops)
        )
    return lines
