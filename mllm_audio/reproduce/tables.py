"""The rows of the paper's tables and figures: which preset, sampled how, beside which value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mllm_audio.config import nearest


@dataclass(frozen=True, kw_only=True)
class System:
    """A row."""

    label: str  # of the row, as typed with --rows
    preset: str  # rows of one preset share its training
    what: str  # in words
    paper: str | None = (
        None  # row of `evaluation.paper` with the paper's values; None: not on record
    )
    generation: tuple[tuple[str, Any], ...] = ()  # fields of GenerationConfig that differ


NTP = System(label="A", preset="audiontp_base", what="next-token prediction", paper="AudioNTP Base")
MNTP = System(
    label="G",
    preset="audiomntp_base",
    what="masked next-token prediction",
    paper="AudioMNTP Base",
)


def _system(
    label: str, preset: str, what: str, paper: str | None = None, **generation: Any
) -> System:
    return System(
        label=label, preset=preset, what=what, paper=paper, generation=tuple(generation.items())
    )


TABLE_1 = (
    _system("ntp", "audiontp_base", "AudioNTP Base", "AudioNTP Base"),
    _system("base", "audiomntp_base", "AudioMNTP Base", "AudioMNTP Base"),
    _system("base6", "head_6", "AudioMNTP Base, head of 6 blocks", "AudioMNTP Base, 6-block head"),
    _system("large", "audiomntp_large", "AudioMNTP Large", "AudioMNTP Large"),
)
TABLE_3 = (
    NTP,
    _system("B", "abl_b", "NTP from AudioMAR's weights"),
    _system("C", "abl_c", "masked latents as zeros"),
    _system("D", "abl_d", "masked latents as Gaussian noise"),
    _system("E", "abl_e", "masked latents dropped, immediate next predicted"),
    _system("F", "abl_f", "C with schedule C"),
    MNTP,
    _system("H", "abl_h", "MNTP with schedule D"),
    _system("I", "abl_i", "MNTP without target positions"),
    _system("J", "abl_j", "MNTP from random weights"),
    _system("K", "audiomar_base", "AudioMAR, random order, 64 steps"),
)
TABLE_4 = (
    _system("1", "head_1", "head of 1 block"),
    _system("3", "audiomntp_base", "head of 3 blocks", "AudioMNTP Base"),
    _system("6", "head_6", "head of 6 blocks", "AudioMNTP Base, 6-block head"),
)
TABLE_5 = (
    _system("clap", "prompt_clap", "CLAP"),
    _system("t5", "prompt_t5", "FLAN-T5"),
    _system("both", "audiomntp_base", "CLAP and FLAN-T5", "AudioMNTP Base"),
)
TABLE_6 = (
    _system("random64", "audiomar_base", "AudioMAR, random order, 64 steps", decoding_steps=64),
    _system(
        "causal64",
        "audiomar_base",
        "AudioMAR, causal order, 64 steps",
        decoding_order="causal",
        decoding_steps=64,
    ),
    _system(
        "causal256",
        "audiomar_base",
        "AudioMAR, causal order, 256 steps",
        decoding_order="causal",
        decoding_steps=256,
    ),
    _system("mntp", "audiomntp_base", "AudioMNTP, causal, 256 steps", "AudioMNTP Base"),
)
TABLE_8 = (
    _system("A", "schedule_a", "schedule A"),
    _system("B", "schedule_b", "schedule B"),
    _system("C", "audiomntp_base", "schedule C, A and B mixed", "AudioMNTP Base"),
    _system("D", "abl_h", "schedule D, MAR's shifted"),
)
FIGURE_6 = (
    *(
        _system(
            f"{schedule}{scale:g}",
            "audiomntp_base",
            f"guidance {scale:g}, {schedule}",
            guidance_schedule=schedule,
            guidance_scale=scale,
        )
        for schedule in ("constant", "linear", "annealed")
        for scale in (1.0, 2.0, 3.0, 5.0, 7.0, 9.0)
        if scale != 1 or schedule == "constant"  # 1 is no guidance on any schedule
    ),
    *(
        _system(f"temp{value:g}", "audiomntp_base", f"temperature {value:g}", temperature=value)
        for value in (0.6, 0.7, 0.8, 0.9, 1.0, 1.1)
    ),
)
TABLES: dict[str, tuple[System, ...]] = {
    "table1": TABLE_1,
    "table3": TABLE_3,
    "table4": TABLE_4,
    "table5": TABLE_5,
    "table6": TABLE_6,
    "table8": TABLE_8,
    "figure6": FIGURE_6,
}


def choose_rows(table: str, labels: Sequence[str] = ()) -> tuple[System, ...]:
    """List the rows of a table, or those with these labels.

    Raises:
        ValueError: for an unknown table or label, with the nearest.
    """
    if table not in TABLES:
        raise ValueError(f"unknown table {table!r}; {nearest(table, [*TABLES, 'figure4'])}")
    rows = {row.label: row for row in TABLES[table]}
    for label in labels:
        if label not in rows:
            raise ValueError(f"{table} has no row {label!r}; {nearest(label, rows)}")
    return tuple(rows[label] for label in labels) or TABLES[table]
