"""The table of metrics: what each is called, needs, and computes from features.

A metric's name ends in its embedder's: `fd_panns` and `fd_digits` are different numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mllm_audio.evaluation import metrics
from mllm_audio.evaluation.base import ClipFeatures
from mllm_audio.evaluation.bootstrap import Counts, frechet_statistic
from mllm_audio.evaluation.metrics import Array


@dataclass(frozen=True, kw_only=True)
class Side:
    """What one embedder made of one folder of N clips."""

    features: tuple[Array, ...]  # (n_i, E) of each clip
    logits: Array | None  # (N, K), of a classifier
    captions: Array | None = None  # (N, E), embedded captions
    targets: Array | None = None  # (N,) class that a caption's row names

    @classmethod
    def of(
        cls, heard: Sequence[ClipFeatures], captions: Array | None, targets: Array | None
    ) -> Side:
        """Stack the features of clips in float64."""
        scores = [clip.logits.double().numpy() for clip in heard if clip.logits is not None]
        return cls(
            features=tuple(clip.features.double().numpy() for clip in heard),
            logits=np.stack(scores) if scores else None,
            captions=captions,
            targets=targets,
        )

    @property
    def rows(self) -> Array:
        """Features of all clips together, (sum of n_i, E)."""
        return np.concatenate(self.features)

    def repeated(self, counts: Counts) -> Side:
        """Repeat each clip as often as (N,) counts say."""
        order = np.arange(len(counts)).repeat(counts)

        def pick(values: Array | None) -> Array | None:
            return None if values is None else values[order]

        return Side(
            features=tuple(self.features[i] for i in order),
            logits=pick(self.logits),
            captions=pick(self.captions),
            targets=pick(self.targets),
        )


Statistic = Callable[[Counts, Counts], float]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A quantity that is computed from the features of any fitting embedder."""

    title: str
    better: Literal["lower", "higher"]
    value: Callable[[Side, Side], float]  # of generated and reference
    hears_reference: bool = True  # else a function of the generated side alone
    paired: bool = False  # rows of both sides belong together by name
    note: str = ""  # for whoever reads the number
    statistic: Callable[[Side, Side], Statistic] | None = None  # a quicker way to many resamples
    resampled: bool = True  # resampling clips tells how sure the value is

    def prepare(self, generated: Side, reference: Side) -> Statistic:
        """Return the value as a function of how often each clip occurs."""
        if self.statistic is not None:
            return self.statistic(generated, reference)
        # What hears no reference must not pay for repeating it.
        return lambda counts, others: self.value(
            generated.repeated(counts),
            reference.repeated(others) if self.hears_reference else reference,
        )


def _given(values: Array | None) -> Array:
    assert values is not None  # `evaluate` asks for what a metric needs before it hears a clip
    return values


FD = Measure(
    title="Frechet distance",
    better="lower",
    value=lambda g, r: metrics.frechet_distance(g.rows, r.rows),
    statistic=lambda g, r: frechet_statistic(g.features, r.features),
)
KL = Measure(
    title="KL divergence (softmax)",
    better="lower",
    value=lambda g, r: metrics.kl_divergence(_given(g.logits), _given(r.logits)),
    paired=True,
)
KL_SIGMOID = Measure(
    title="KL divergence (sigmoid)",
    better="lower",
    value=lambda g, r: metrics.kl_divergence_sigmoid(_given(g.logits), _given(r.logits)),
    paired=True,
)
IS = Measure(
    title="inception score",
    better="higher",
    value=lambda g, _: metrics.inception_score(_given(g.logits))[0],
    hears_reference=False,
    note="grows with the number of clips: compare equal numbers only",
)
KID = Measure(
    title="kernel distance",
    better="lower",
    value=lambda g, r: metrics.kernel_distance(g.rows, r.rows)[0],
    resampled=False,
    note="repeated clips would count as equal pairs, so clips are not resampled",
)
CLAP = Measure(
    title="CLAP score",
    better="higher",
    value=lambda g, _: metrics.mean_cosine(g.rows, _given(g.captions)),
    hears_reference=False,
)
ACCURACY = Measure(
    title="accuracy",
    better="higher",
    value=lambda g, _: metrics.accuracy(_given(g.logits), _given(g.targets)),
    hears_reference=False,
)


@dataclass(frozen=True)
class Metric:
    """A measure of one embedder's features."""

    measure: Measure
    embedder: str
    default: bool = True  # measured unless others are asked for


METRICS: dict[str, Metric] = {
    "fd_panns": Metric(FD, "panns"),
    "fad_vggish": Metric(FD, "vggish"),
    "kl_panns": Metric(KL, "panns"),
    "kl_sigmoid_panns": Metric(KL_SIGMOID, "panns"),
    "is_panns": Metric(IS, "panns"),
    "kid_panns": Metric(KID, "panns", default=False),
    "clap_laion": Metric(CLAP, "clap_laion"),
    "clap_hf": Metric(CLAP, "clap_hf"),
}


def own_metrics(name: str) -> dict[str, Metric]:
    """Return the metrics of a classifier that a user trained and calls `name`."""
    return {
        f"fd_{name}": Metric(FD, name),
        f"kl_{name}": Metric(KL, name),
        f"is_{name}": Metric(IS, name),
        f"kid_{name}": Metric(KID, name, default=False),
        f"accuracy_{name}": Metric(ACCURACY, name),
    }
