"""Published AudioCaps results: the numbers that ours stand beside.

Figures of different pipelines are not comparable: resampler, checkpoint, number of clips and choice
of captions move all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

NOT_COMPARABLE = (
    "Numbers of different pipelines are not comparable: embedder checkpoint, resampler, the clips "
    "and captions chosen and their number all move them."
)


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """A system's results on the AudioCaps test set; None where its paper gives none."""

    system: str
    source: str
    fd_panns: float | None
    fad_vggish: float | None
    kl_panns: float | None
    is_panns: float | None
    clap_laion: float | None


PAPER = "Yang et al. 2025 (arXiv:2507.09834)"
TABLE_1 = (
    PublishedRow(
        system="AudioNTP Base",
        source=f"{PAPER}, table 1",
        fd_panns=18.52,
        fad_vggish=2.28,
        kl_panns=1.29,
        is_panns=9.42,
        clap_laion=0.308,
    ),
    PublishedRow(
        system="AudioMNTP Base",
        source=f"{PAPER}, table 1",
        fd_panns=14.81,
        fad_vggish=1.68,
        kl_panns=1.16,
        is_panns=9.67,
        clap_laion=0.336,
    ),
    PublishedRow(
        system="AudioMNTP Base, 6-block head",
        source=f"{PAPER}, table 4",
        fd_panns=14.74,
        fad_vggish=1.21,
        kl_panns=1.15,
        is_panns=9.78,
        clap_laion=0.337,
    ),
    PublishedRow(
        system="AudioMNTP Large",
        source=f"{PAPER}, table 1",
        fd_panns=14.30,
        fad_vggish=1.22,
        kl_panns=1.17,
        is_panns=9.81,
        clap_laion=0.341,
    ),
)
NEIGHBOURS = (
    PublishedRow(
        system="IMPACT base, 32 iterations",
        source="arXiv:2506.00736",
        fd_panns=14.90,
        fad_vggish=1.07,
        kl_panns=1.05,
        is_panns=10.06,
        clap_laion=0.364,
    ),
    PublishedRow(
        system="MeanAudio-S, 1 step",
        source="MeanAudio",
        fd_panns=14.30,
        fad_vggish=1.77,
        kl_panns=1.32,
        is_panns=10.02,
        clap_laion=0.290,
    ),
    PublishedRow(
        system="MeanAudio-S, 25 steps",
        source="MeanAudio",
        fd_panns=13.38,
        fad_vggish=None,
        kl_panns=1.25,
        is_panns=None,
        clap_laion=0.319,
    ),
)
