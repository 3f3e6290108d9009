"""`mllm-audio bench decode`: latents to sound, without a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from mllm_audio.benchmarks.report import Check, Header, Machine, Report, part_figures, part_lines
from mllm_audio.benchmarks.timing import Stopwatch, forget_peak, middle, peak_memory
from mllm_audio.config import check_range
from mllm_audio.data.dataset import seeded
from mllm_audio.model import default_device
from mllm_audio.tokenizers import AudioLDMTokenizer, load_tokenizer
from mllm_audio.tokenizers.base import AudioTokenizer, num_columns

RANDOM = "audioldm-random"
# As published: 55,376,873 and 55,264,897 parameters.
VAE = {
    "in_channels": 1,
    "out_channels": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (128, 256, 512),
    "layers_per_block": 2,
    "latent_channels": 8,
    "norm_num_groups": 32,
    "scaling_factor": 0.9227914214134216,
}
VOCODER = {
    "model_in_dim": 64,
    "sampling_rate": 16_000,
    "upsample_initial_channel": 1024,
    "upsample_rates": [5, 4, 2, 2, 2],
    "upsample_kernel_sizes": [16, 16, 8, 4, 4],
    "resblock_kernel_sizes": [3, 7, 11],
    "resblock_dilation_sizes": [[1, 3, 5]] * 3,
    "normalize_before": False,
}


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """What is decoded, and how."""

    tokenizer: str = "dct"  # spec for `load`
    seconds: float = 10.24  # of each clip, filled up to whole columns
    batch_size: int = 1  # clips at once
    dtype: str = "float32"  # of the weights; or bfloat16
    stream: bool = False  # also decode column by column, as sound is streamed
    repetitions: int = 3

    def __post_init__(self) -> None:
        """Check ranges and the type."""
        check_range("bench", self, 1, 10_000, "batch_size", "repetitions")
        check_range("bench", self, 0, 86_400, "seconds", open_low=True)
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"unknown dtype {self.dtype!r}; type float32 or bfloat16")
        if self.dtype == "bfloat16" and self.tokenizer.partition(":")[0] == "dct":
            raise ValueError("tokenizer 'dct' decodes in float32; leave --dtype bfloat16 out")


def load(spec: str) -> AudioTokenizer:
    """Load what `spec` names; "audioldm-random" is AudioLDM's architecture with random weights.

    Raises:
        ImportError: if diffusers is not installed and needed.
        ValueError: if there is no such tokenizer.
    """
    if spec != RANDOM:
        return load_tokenizer(spec)
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ImportError(
            f"{RANDOM} needs diffusers ({error}); run: pip install 'mllm-audio[audioldm]'"
        ) from error
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded("benchmark tokenizer").initial_seed())
        vae, vocoder = AutoencoderKL(**VAE), SpeechT5HifiGan(SpeechT5HifiGanConfig(**VOCODER))
    return AudioLDMTokenizer(vae, vocoder, RANDOM)


def networks(tokenizer: AudioTokenizer) -> tuple[str, ...]:
    """Name the parts of decoding that `watching` tells apart."""
    return ("vae", "vocoder") if isinstance(tokenizer, AudioLDMTokenizer) else ()


@contextmanager
def watching(watch: Stopwatch, tokenizer: AudioTokenizer) -> Iterator[None]:
    """Time the networks of a tokenizer for as long as the context lasts."""
    with ExitStack() as stack:
        if isinstance(tokenizer, AudioLDMTokenizer):
            stack.enter_context(watch.watching(tokenizer._vae, "decode", "vae"))
            stack.enter_context(watch.watching(tokenizer._vocoder, "forward", "vocoder"))
        yield


def random_latents(tokenizer: AudioTokenizer, seconds: float, rows: int) -> Tensor:
    """Draw standard normal latents of whole columns, (rows, N, D)."""
    columns = num_columns(tokenizer, round(seconds * tokenizer.sample_rate))
    shape = (rows, columns * tokenizer.tokens_per_column, tokenizer.latent_dim)
    return torch.randn(shape, generator=seeded("benchmark latents"))


def bench_decode(config: DecodeConfig, threads: int, check: Check) -> tuple[Report, list[str]]:
    """Decode random latents; return the report and its lines.

    Args:
        config: what to decode.
        threads: that torch uses.
        check: called with machine and settings before anything is measured.

    Raises:
        ValueError: if there is no such tokenizer.
    """
    tokenizer, device = load(config.tokenizer), default_device()
    settings = {
        "tokenizer": config.tokenizer,
        "seconds": config.seconds,
        "batch_size": config.batch_size,
        "dtype": config.dtype,
        "stream": config.stream,
        "threads": threads,
    }
    header = Header(benchmark="decode", settings=settings, machine=Machine.here(device))
    check(header)
    latents = random_latents(tokenizer, config.seconds, config.batch_size).to(device)
    duration = latents.shape[1] / tokenizer.tokens_per_column * tokenizer.samples_per_column
    duration /= tokenizer.sample_rate
    narrow = config.dtype != "float32"
    exact = tokenizer.decode(latents) if narrow else None
    tokenizer.decode_in(getattr(torch, config.dtype))
    figures = _measure(tokenizer, latents, config)
    if exact is not None:
        figures["error"] = float((tokenizer.decode(latents) - exact).norm() / exact.norm())
    if config.stream:
        figures |= _measure_stream(tokenizer, latents, config, duration)
    figures["rtf"] = figures["seconds"] / duration
    figures["audio_seconds_per_second"] = config.batch_size * duration / figures["seconds"]
    report = Report(header=header, repetitions=config.repetitions, figures=figures)
    return report, _lines(report, networks(tokenizer), duration)


def _measure(tokenizer: AudioTokenizer, latents: Tensor, config: DecodeConfig) -> dict[str, float]:
    """Decode (B, N, D) latents at once, the first time unmeasured."""
    tokenizer.decode(latents)
    forget_peak(latents.device)
    watches = []
    for _ in range(config.repetitions):
        watch = Stopwatch(latents.device)
        with watching(watch, tokenizer), watch.part("decode"):
            tokenizer.decode(latents)
        watches.append(watch)
    watch, names = middle(watches, "decode"), networks(tokenizer)
    return {
        **part_figures(watch, names),
        "other.seconds": watch.total("decode") - watch.total(*names),
        "seconds": watch.total("decode"),
        "peak.bytes": peak_memory(latents.device),
    }


def _measure_stream(
    tokenizer: AudioTokenizer, latents: Tensor, config: DecodeConfig, duration: float
) -> dict[str, float]:
    """Decode (B, N, D) latents a column at a time, the first time unmeasured."""
    columns = latents.split(tokenizer.tokens_per_column, dim=1)
    warm = tokenizer.stream()
    for column in columns[:16]:
        warm.push(column)
    watches, first = [], 0
    for _ in range(config.repetitions):
        watch, decoder, samples = Stopwatch(latents.device), tokenizer.stream(), []
        for column in columns:
            with watch.part("push"):
                samples.append(decoder.push(column).shape[1])
        with watch.part("finish"):
            samples.append(decoder.finish().shape[1])
        first = sum(1 for _ in takewhile(lambda size: size == 0, samples)) + 1
        watches.append(watch)
    watch = middle(watches, "push", "finish")
    laps = [*watch.laps["push"], *watch.laps["finish"]]
    seconds = watch.total("push", "finish")
    return {
        "stream.seconds": seconds,
        "stream.rtf": seconds / duration,
        "stream.slowest_ms": 1e3 * max(laps),
        "stream.first_columns": first,
        "stream.first_ms": 1e3 * sum(laps[:first]),
    }


def _lines(report: Report, names: tuple[str, ...], duration: float) -> list[str]:
    """Say what was found."""
    figures = report.figures
    lines = part_lines(figures, [*names, "other"], figures["seconds"])
    lines.append(
        f"rtf       {figures['rtf']:.3f}: {figures['seconds']:.3f} s for {duration:g} s of sound, "
        f"{figures['audio_seconds_per_second']:.2f} s of sound a second"
    )
    if "error" in figures:
        lines.append(f"error     {figures['error']:.1e} of the samples' norm, against float32")
    if "stream.rtf" in figures:
        lines.append(
            f"stream    rtf {figures['stream.rtf']:.3f} a column at a time; first sound after "
            f"{figures['stream.first_columns']:.0f} columns and {figures['stream.first_ms']:.1f} "
            f"ms of decoding, slowest piece {figures['stream.slowest_ms']:.1f} ms"
        )
    lines.append(f"memory    {figures['peak.bytes'] / 2**30:.2f} GiB at the peak")
    return lines
