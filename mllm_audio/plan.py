"""`mllm-audio plan`: a training run on paper, from a configuration and a number of GPUs.

Nothing is measured but the parameters: the rest is the formulas of `costs.py` and `flops.py`, and
the `Assumptions` that the table names.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean

from mllm_audio.costs import STAGES, activation_bytes, sent_bytes, state_bytes
from mllm_audio.hardware import GPU, get_gpu
from mllm_audio.info import count_components, sketch, text_side
from mllm_audio.masking import SCHEDULES, MaskingConfig, num_copies, num_kept
from mllm_audio.model import AudioLanguageModel
from mllm_audio.presets import PRESETS, RunConfig
from mllm_audio.training.flops import ModelFlops, model_flops
from mllm_audio.types import StepCounts

GPUS_PER_NODE = 8
# For the CUDA context, DeepSpeed's buckets, gradients of activations, and fragmentation.
MEMORY_MARGIN = 0.1
QUADRATURE_POINTS = 1000  # over the quantiles of a masking schedule


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What the configuration of a run does not say."""

    gpus: int = 8
    gpu: str = "h100"  # key in hardware.GPUS
    clips: int = 360_000  # 1,000 h in clips of 10 s
    epochs: int = 1000  # the paper's
    mfu: float = 0.4  # share of the GPUs' bf16 peak that model FLOPs reach
    caption_tokens: int = 16  # of a caption, on average

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("gpus", "clips", "epochs", "caption_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"found {name} {getattr(self, name)}, expected at least 1")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"found an MFU of {self.mfu:g}, expected a share in (0, 1], e.g. 0.4")


def quantiles(masking: MaskingConfig) -> list[float]:
    """List masking ratios at the middles of equal parts: their mean is the expected ratio."""
    schedule, points = SCHEDULES[masking.schedule], QUADRATURE_POINTS
    return [masking.scale * schedule((i + 0.5) / points) for i in range(points)]


def lowest(masking: MaskingConfig) -> float:
    """Find the lowest masking ratio, whose steps are the largest."""
    schedule, points = SCHEDULES[masking.schedule], QUADRATURE_POINTS
    return masking.scale * min(schedule(i / points) for i in range(points))


def kept_latents(config: RunConfig, ratio: float) -> int:
    """Count the places of a clip's latents that stay at a masking ratio."""
    masked = config.masking.hidden == "drop"  # else masked latents keep theirs
    return num_kept(config.audio.max_tokens, ratio if masked else 0.0)


def row_counts(config: RunConfig, ratio: float, rows: int, caption_tokens: int) -> StepCounts:
    """Count what `rows` captioned clips of full length hold at a masking ratio."""
    kept = kept_latents(config, ratio)
    copies = num_copies(config.masking, 1 + kept)
    prompt = config.audio.prompt_length or caption_tokens
    return StepCounts(
        rows=rows,
        elements=rows * (prompt + 1 + kept + copies),  # 1: the start of the audio
        latents=rows * (kept + copies),
        targets=rows * (kept + copies + config.audio.end_of_audio),
    )


def plan(config: RunConfig, given: Assumptions) -> str:
    """Lay out what training `config` takes.

    Raises:
        ValueError: if the GPU is not known, GPUs and micro-batches do not divide the batch, or the
            preset is for a trained language model.
    """
    gpu, batch = get_gpu(given.gpu), config.train.batch_size
    if config.backbone is None:
        known = [name for name, preset in PRESETS.items() if preset().backbone is not None]
        raise ValueError(
            f"preset {config.preset!r} takes the size of a trained language model, which is not "
            f"known here; type --preset {' or '.join(known)}"
        )
    if config.architecture != "decoder":
        raise ValueError(
            f"preset {config.preset!r} is an {config.architecture}, whose cost is not planned; "
            "expected a causal decoder, e.g. --preset audiomntp_base"
        )
    rows = config.train.rows_at_once(given.gpus)
    if given.clips < batch:
        raise ValueError(
            f"found {given.clips} clips for a batch of {batch}; type --batch {given.clips} or less"
        )
    model = sketch(config)
    assert isinstance(model, AudioLanguageModel)
    parameters = count_components(model)["total"]
    time_lines, run = _time_lines(config, given, gpu, model_flops(model))
    return "\n".join(
        [
            f"model     {config.preset}: {parameters:,} parameters",
            f"text      {text_side(config)}",
            *time_lines,
            *_stage_lines(config, given, run, parameters, rows),
            f"assumed   MFU {given.mfu:g}, {config.audio.prompt_length or given.caption_tokens} "
            f"tokens of text, full clips, {GPUS_PER_NODE} GPUs a node, no time for offload's host",
            f"source    {gpu.source}",
        ]
    )


@dataclass(frozen=True)
class _Run:
    """What the lines of the table share."""

    steps: int
    seconds: float  # of a step's arithmetic
    bandwidth: float  # GB/s of the slowest link
    memory: float  # bytes of a GPU that may be taken

    def hours(self, seconds: float) -> float:
        """Give the hours of the run at `seconds` a step."""
        return self.steps * seconds / 3600


def _time_lines(
    config: RunConfig, given: Assumptions, gpu: GPU, flops: ModelFlops
) -> tuple[list[str], _Run]:
    """Say how large a step is, and how long its arithmetic takes."""
    batch, audio = config.train.batch_size, config.audio
    drawn = [row_counts(config, r, batch, given.caption_tokens) for r in quantiles(config.masking)]
    peak = given.gpus * 1e12 * gpu.bf16_tflops * given.mfu
    plain = mean(flops.step(counts) for counts in drawn)
    recomputed = mean(flops.step(counts, recompute=True) for counts in drawn)
    kept = mean(kept_latents(config, ratio) for ratio in quantiles(config.masking))
    prompt = 1 + (audio.prompt_length or given.caption_tokens)
    elements = mean(counts.elements for counts in drawn) / batch
    clip_bytes = audio.max_tokens * audio.latent_dim * 2
    rate = batch * peak / plain
    run = _Run(
        steps=given.epochs * (given.clips // batch),
        seconds=plain / peak,
        bandwidth=gpu.node_gb_s if given.gpus <= GPUS_PER_NODE else gpu.network_gb_s,
        memory=(1 - MEMORY_MARGIN) * 1e9 * gpu.memory_gb,
    )
    hours, longer = run.hours(run.seconds), recomputed / plain
    lines = [
        f"data      {given.clips:,} clips x {audio.max_tokens} x {audio.latent_dim} in float16: "
        f"{given.clips * clip_bytes / 2**30:.1f} GiB; read up to {rate:,.0f} clips/s, "
        f"{rate * clip_bytes / 1e9:,.3g} GB/s",
        f"masking   schedule {config.masking.schedule} keeps {kept / audio.max_tokens:.1%} of the "
        f"latents: {elements:.0f} of {audio.max_tokens + prompt} elements a row on average",
        f"step      {plain / 1e15:,.3g} PFLOP: {run.seconds:.3g} s at {given.mfu:.0%} of "
        f"{given.gpus} {given.gpu} x {gpu.bf16_tflops:g} TFLOPS in bf16",
        f"training  {given.epochs:,} epochs = {run.steps:,} steps = {run.steps * plain:.3g} FLOP: "
        f"{hours:,.1f} h, {hours * given.gpus:,.0f} GPU-hours",
        f"          with gradient checkpointing, GPUs as busy: {hours * longer:,.1f} h, "
        f"{hours * longer * given.gpus:,.0f} GPU-hours",
    ]
    return lines, run


def _stage_lines(
    config: RunConfig, given: Assumptions, run: _Run, parameters: int, rows: int
) -> list[str]:
    """Tabulate stages: what a GPU holds at the step that drops the fewest latents, and sends."""
    precision = config.train.precision
    accumulated = config.train.batch_size // (rows * given.gpus)
    counts = row_counts(config, lowest(config.masking), rows, given.caption_tokens)
    activations, fewer = (
        activation_bytes(config, counts.elements, counts.latents, checkpointing)
        for checkpointing in (False, True)
    )
    lines = [
        f"batch     {config.train.batch_size} clips a step = {given.gpus} GPUs x {rows} at once x "
        f"{accumulated} in turn",
        f"memory    GiB per GPU in {precision}, {run.memory / 2**30:.1f} may be taken; optimizer: "
        "masters, moments, averages",
        f"          activations {activations / 2**30:.1f}, with gradient checkpointing "
        f"{fewer / 2**30:.1f}, of {counts.elements:,} elements, {counts.latents:,} latents",
        f"messages  GB that a GPU sends in a step, at {run.bandwidth:g} GB/s; hours of computing "
        "or of sending, the more",
        "stage     weights gradients optimizer |  total fit | checkpoint fit |  host |   "
        "sent seconds   hours",
    ]
    for stage in STAGES:
        state = state_bytes(parameters, stage, given.gpus, precision)
        held = state.weights + state.gradients + state.optimizer
        totals = held + activations, held + fewer
        fits = ["yes" if total <= run.memory else "NO" for total in totals]
        values = (state.weights, state.gradients, state.optimizer, *totals, state.host)
        weights, gradients, optimizer, total, checkpointed, host = (x / 2**30 for x in values)
        sent = sent_bytes(parameters, stage, given.gpus, accumulated, precision) / 1e9
        seconds = sent / run.bandwidth
        lines.append(
            f"{stage:<9} {weights:7.2f} {gradients:9.2f} {optimizer:9.2f} | {total:6.2f} "
            f"{fits[0]:>3} | {checkpointed:10.2f} {fits[1]:>3} | {host:5.2f} | {sent:6.2f} "
            f"{seconds:7.3f} {run.hours(max(seconds, run.seconds)):7,.1f}"
        )
    return lines
