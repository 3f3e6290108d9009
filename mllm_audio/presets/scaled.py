"""The paper's systems at a size that two CPU cores train in minutes: the same tables, small."""

from __future__ import annotations

from dataclasses import replace

from mllm_audio.conditioners.words import Words
from mllm_audio.presets.config import RunConfig
from mllm_audio.presets.paper import prompted_by
from mllm_audio.presets.small import digits

PROMPTED_APART = ("prompt_clap", "prompt_t5")  # table 5 is about encoders that are not here


def small(config: RunConfig) -> RunConfig:
    """Scale a system of the paper down to the size of `digits`.

    What makes it that system stays: architecture, masking, target positions, blocks of the head,
    and an AudioMAR to start from. Size, head (flow matching), optimizer and sampling are those of
    `digits`, prompts the words of the caption as random vectors, and the start is random where the
    paper's is MAR's image weights. As in the paper, every clip has the full length.

    Raises:
        ValueError: for a system that differs in its text encoders alone.
    """
    if config.preset in PROMPTED_APART:
        raise ValueError(
            f"{config.preset} differs in its text encoder alone, which is not there at small "
            "scale; reproduce table 5 with --scale paper"
        )
    base = digits()
    assert base.backbone is not None
    made = replace(
        base,
        preset=config.preset,
        architecture=config.architecture,
        init="audiomar" if config.init == "audiomar" else "random",
        init_from=config.init_from if config.init == "audiomar" else None,
        backbone=replace(base.backbone, initialisation="xavier"),
        masking=config.masking,
        audio=replace(
            base.audio,
            end_of_audio=False,
            target_positions=config.audio.target_positions,
            head=replace(base.audio.head, num_blocks=config.audio.head.num_blocks),
        ),
        train=replace(base.train, num_steps=2500, max_minutes=None),
    )
    return prompted_by(made, *Words.streams)
