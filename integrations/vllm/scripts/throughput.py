"""Audio tokens a second: one stream and eight in vLLM, beside the project's own `generate`.

    python integrations/vllm/scripts/throughput.py RUN [--seconds 2.56] [--repeats 5]

The eight requests are the same everywhere; `generate` is given them one after another. All three
are measured in turn, so that what else the machine does falls on all, and medians are printed.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

CAPTION = "two low beeps then a rising sweep"
STREAMS = 8


def main() -> None:
    """Measure, and print a line each."""
    from vllm import LLM, SamplingParams

    from mllm_audio.generation.voice import Voice
    from mllm_audio.text import SpecialIds
    from mllm_audio_vllm.options import AudioOptions

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a checkpoint folder")
    parser.add_argument("--seconds", type=float, help="of each sound; default: the longest")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    voice = Voice.load(options.run)
    audio, special = voice.decoder.audio.config, SpecialIds.of(voice.text_tokenizer)
    config = replace(voice.defaults, seconds=options.seconds or audio.max_seconds)
    ids = [*voice.prompts([CAPTION], config)[0].tolist(), special.audio_start]
    limit = voice.decoder.backbone.config.max_position_embeddings
    llm = LLM(
        model=options.run,
        dtype="float32",
        enforce_eager=True,
        max_model_len=limit,
        max_num_seqs=STREAMS,
        block_size=32,
    )
    num_tokens = sum(len(latents) for latents in voice.generate_latents([CAPTION], config, [0]))

    def served(streams: int) -> None:
        made = [
            AudioOptions(generation=config, seed=seed, single=True, learned=(True,))
            for seed in range(streams)
        ]
        params = [
            SamplingParams(max_tokens=num_tokens, extra_args=one.to_extra_args()) for one in made
        ]
        salts = [f"{time.monotonic_ns()}-{seed}" for seed in range(streams)]
        prompts = [{"prompt_token_ids": ids, "cache_salt": salt} for salt in salts]
        llm.generate(prompts, params, use_tqdm=False)

    def own() -> None:
        for seed in range(STREAMS):
            voice.generate_latents([CAPTION], config, [seed])

    def rate(work: Callable[[], None], streams: int) -> float:
        start = time.perf_counter()
        work()
        return streams * num_tokens / (time.perf_counter() - start)

    cases: dict[str, tuple[Callable[[], None], int]] = {
        "vLLM, 1 stream": (lambda: served(1), 1),
        f"vLLM, {STREAMS} streams": (lambda: served(STREAMS), STREAMS),
        f"generate, {STREAMS} one after another": (own, STREAMS),
    }
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(options.repeats + 1):
        for name, (work, streams) in cases.items():
            found = rate(work, streams)
            if repeat:  # the first warms up
                rates[name].append(found)
    one, eight, alone = (median(values) for values in rates.values())
    for name, values in rates.items():
        print(f"{name}: {median(values):.0f} audio tokens/s")
    print(f"8 streams are {eight / one:.1f}x one, and {eight / alone:.1f}x generate")


if __name__ == "__main__":
    main()
