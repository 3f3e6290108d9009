"""Two folders of clips to a scorecard: `mllm-audio evaluate`. It never imports the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np

from mllm_audio.config import nearest
from mllm_audio.evaluation.base import CaptionEmbedder, Classifier, Embedder
from mllm_audio.evaluation.bootstrap import Interval, bootstrap
from mllm_audio.evaluation.clips import Folder, check_pairs, few, is_silent, read_clip
from mllm_audio.evaluation.features import extract, resampler
from mllm_audio.evaluation.measures import (
    ACCURACY,
    CLAP,
    FD,
    IS,
    METRICS,
    Metric,
    Side,
    own_metrics,
)
from mllm_audio.evaluation.metrics import NUM_SPLITS, Array
from mllm_audio.evaluation.scorecard import EmbedderRecord, Score, Scorecard, Settings


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to measure."""

    batch_size: int = 16  # clips heard at once
    num_resamples: int = 200  # of the intervals, 0 for none
    max_seconds: float = 120.0  # that the resamples of one metric may take
    seed: int = 0  # of the resamples
    progress: bool = True  # show bars
    allow_silent: bool = False  # measure silent generated clips as they are, and count them


def evaluate(
    generated: Path,
    reference: Path,
    out: Path,
    embedders: Sequence[Embedder],
    *,
    metrics: Sequence[str] | None = None,
    captions: Path | None = None,
    ids: Sequence[str] | None = None,
    cache: Path | None = None,
    options: Options | None = None,
) -> Scorecard:
    """Measure generated clips against recordings and write scores.json, scores.md, report.html.

    Args:
        generated: folder of clips, or `.jsonl` file whose rows name them.
        reference: the same of recordings; paired metrics go by file name.
        out: receives the reports.
        embedders: from `load_embedder`; their names end the metrics'.
        metrics: names; by default all that the embedders allow.
        captions: `.jsonl` file of {audio, caption, ...} about the generated clips; by default
            captions.jsonl beside them, where it exists.
        ids: names of the clips to measure, on both sides; by default all.
        cache: folder of features; by default OUT/features.
        options: how to measure.

    Raises:
        ValueError: for an unknown metric, folders that are empty, mixed or do not pair up, clips
            that cannot be heard, and captions or labels that are missing.
        ImportError: if a metric needs an extra that is not installed.
    """
    options = options or Options()
    chosen = choose_metrics(embedders, metrics)
    ours, theirs = Folder.open(generated, captions, ids), Folder.open(reference, None, ids)
    if metrics is None:
        chosen = {k: m for k, m in chosen.items() if _is_possible(m, ours, embedders)}
    _check_needs(chosen, embedders, ours, theirs)
    scores = []
    for embedder in embedders:
        wanted = {name: m for name, m in chosen.items() if m.embedder == embedder.name}
        if wanted:
            heard = cache or out / "features"
            sides = [
                _hear(embedder, ours, heard, options),
                _hear(embedder, theirs, heard, replace(options, allow_silent=False)),
            ]
            paired = list(ours.clips) == list(theirs.clips)
            scores += [
                _score(name, metric, sides[0], sides[1], paired, options)
                for name, metric in wanted.items()
            ]
    card = Scorecard(
        scores=tuple(scores),
        embedders=tuple(_record(e) for e in embedders if any(s.embedder == e.name for s in scores)),
        settings=Settings(
            generated=str(generated),
            reference=str(reference),
            captions=str(ours.captions) if ours.rows else None,
            ids=None if ids is None else f"{len(ids)} clips named",
            generated_rate=ours.sample_rate,
            reference_rate=theirs.sample_rate,
            resampler=resampler(),
            num_resamples=options.num_resamples,
            seed=options.seed,
            num_silent=sum(
                is_silent(read_clip(path, allow_silent=True)) for path in ours.clips.values()
            ),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            version=version("mllm-audio"),
        ),
    )
    card.write(out)
    return card


def choose_metrics(
    embedders: Sequence[Embedder], names: Sequence[str] | None = None
) -> dict[str, Metric]:
    """Return the metrics of `names`, or the default ones that the embedders allow.

    Raises:
        ValueError: if two embedders have one name, a metric is unknown or its embedder is missing,
            or there is nothing to measure.
    """
    given = [embedder.name for embedder in embedders]
    if len(set(given)) < len(given):
        raise ValueError(f"found embedders {', '.join(given)}, expected different names")
    known = dict(METRICS)
    for embedder in embedders:
        if isinstance(embedder, Classifier):
            if clash := own_metrics(embedder.name).keys() & METRICS.keys():
                raise ValueError(
                    f"the name {embedder.name!r} makes {sorted(clash)}; choose another"
                )
            known |= own_metrics(embedder.name)
    if names is None:
        chosen = {k: m for k, m in known.items() if m.default and m.embedder in given}
    else:
        for name in names:
            if name not in known:
                raise ValueError(f"metric {name!r} is unknown; {nearest(name, known)}")
            if known[name].embedder not in given:
                raise ValueError(
                    f"{name} needs the embedder {known[name].embedder}, found "
                    f"{', '.join(given) or 'none'}; give its weights"
                )
        chosen = {name: known[name] for name in names}
    if not chosen:
        raise ValueError("found no embedder, expected one: --panns, --vggish, --clap or --embedder")
    return chosen


def _is_possible(metric: Metric, folder: Folder, embedders: Sequence[Embedder]) -> bool:
    """Leave accuracy out where no row has a label: nobody asked for it."""
    if metric.measure is not ACCURACY:
        return True
    column = _classifier(metric, embedders).label_column
    return any(column in row for row in folder.rows.values())


def _classifier(metric: Metric, embedders: Sequence[Embedder]) -> Classifier:
    embedder = next(e for e in embedders if e.name == metric.embedder)
    assert isinstance(embedder, Classifier)  # only they have ACCURACY, see `choose_metrics`
    return embedder


def _check_needs(
    chosen: Mapping[str, Metric], embedders: Sequence[Embedder], ours: Folder, theirs: Folder
) -> None:
    """Refuse what a metric cannot do without, before any clip is heard."""
    for name, metric in chosen.items():
        if metric.measure.paired:
            check_pairs(list(ours.clips), list(theirs.clips), name)
        if metric.measure is CLAP:
            ours.require("caption", name)
        if metric.measure is ACCURACY:
            classifier = _classifier(metric, embedders)
            ours.require(classifier.label_column, name)
            found = {str(row[classifier.label_column]) for row in ours.rows.values()}
            if unknown := sorted(found - set(classifier.labels)):
                raise ValueError(
                    f"{ours.captions} has labels {few(unknown)}, which {metric.embedder} does not "
                    f"know; it knows {', '.join(classifier.labels)}"
                )


def _hear(embedder: Embedder, folder: Folder, cache: Path, options: Options) -> Side:
    """Embed a folder's clips, and what its rows say of every one of them."""
    heard = extract(
        embedder,
        folder.clips,
        cache,
        options.batch_size,
        options.progress,
        options.allow_silent,
    )
    rows = [folder.rows.get(name, {}) for name in folder.clips]
    captions: Array | None = None
    targets: Array | None = None
    if isinstance(embedder, CaptionEmbedder) and all(row.get("caption") for row in rows):
        texts = [str(row["caption"]) for row in rows]
        captions = embedder.embed_captions(texts).double().numpy()
    if isinstance(embedder, Classifier):
        labels = [str(row.get(embedder.label_column, "")) for row in rows]
        if set(labels) <= set(embedder.labels):
            targets = np.array([embedder.labels.index(label) for label in labels])
    return Side.of(heard, captions, targets)


def _score(
    name: str, metric: Metric, generated: Side, reference: Side, paired: bool, options: Options
) -> Score:
    """Measure one metric and how sure it is."""
    measure = metric.measure
    value = measure.value(generated, reference)
    counts = len(generated.features), len(reference.features)
    interval = Interval(None, None, 0, measure.note)
    if measure.resampled:
        interval = bootstrap(
            value,
            measure.prepare(generated, reference),
            *counts,
            paired=paired,
            num_resamples=options.num_resamples,
            seed=options.seed,
            max_seconds=options.max_seconds,
        )
    return Score(
        name=name,
        title=measure.title,
        embedder=metric.embedder,
        better=measure.better,
        value=value,
        interval=interval,
        num_generated=counts[0],
        num_reference=counts[1] if measure.hears_reference else 0,
        reference_value=_reference_value(metric, reference),
        notes=_notes(metric, generated, reference),
    )


def _reference_value(metric: Metric, reference: Side) -> float | None:
    """Measure the recordings themselves, where that has a meaning and all it needs is known."""
    measure = metric.measure
    is_known = {
        CLAP.title: reference.captions is not None,
        ACCURACY.title: reference.targets is not None,
        IS.title: len(reference.features) >= NUM_SPLITS,
    }
    return measure.value(reference, reference) if is_known.get(measure.title) else None


def _notes(metric: Metric, generated: Side, reference: Side) -> tuple[str, ...]:
    """Say what a reader must know about a number."""
    notes = [metric.measure.note] if metric.measure.note else []
    rows, channels = min(len(generated.rows), len(reference.rows)), reference.rows.shape[1]
    if metric.measure is FD and rows <= channels:
        notes.append(
            f"warning: {rows} rows of features for {channels} channels make a singular covariance; "
            "the distance is too large, compare equal numbers of clips only"
        )
    return tuple(notes)


def _record(embedder: Embedder) -> EmbedderRecord:
    return EmbedderRecord(
        name=embedder.name,
        path=str(embedder.source.path),
        sha256=embedder.source.sha256,
        sample_rate=embedder.sample_rate,
    )
