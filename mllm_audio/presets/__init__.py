"""Named configurations, each a function; a variant is derived from another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mllm_audio.config import nearest
from mllm_audio.presets.config import RunConfig
from mllm_audio.presets.paper import PAPER_PRESETS, base_193m, large_462m
from mllm_audio.presets.scaled import small
from mllm_audio.presets.small import digits, tiny, voice, voice_digits

PRESETS: dict[str, Callable[[], RunConfig]] = {
    "tiny": tiny,
    "digits": digits,
    "base_193m": base_193m,
    "large_462m": large_462m,
    "voice": voice,
    "voice_digits": voice_digits,
    **PAPER_PRESETS,
}


SMALL = "_small"  # behind the name of a system of the paper: `small` of it


def get_preset(name: str) -> RunConfig:
    """Build the preset called `name`; a system of the paper also scaled down, as "abl_e_small".

    Raises:
        ValueError: for an unknown name, with the nearest known one.
    """
    paper = name.removesuffix(SMALL)
    if name != paper and paper in PAPER_PRESETS:
        return replace(small(PAPER_PRESETS[paper]()), preset=name)
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; {nearest(name, PRESETS)}")
    return PRESETS[name]()
