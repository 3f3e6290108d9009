"""Figures beside those of an earlier report."""

from __future__ import annotations

from pathlib import Path

from mllm_audio.benchmarks.report import Header, Report


def check_comparable(baseline: Report, header: Header, file: Path, any_machine: bool) -> None:
    """Refuse to compare what was measured otherwise.

    Versions of torch and of this package may differ: what they changed is what one looks for.

    Args:
        baseline: the earlier report.
        header: of the one that is about to be made.
        file: where the earlier one is from.
        any_machine: allow another machine and other settings; never another benchmark.

    Raises:
        ValueError: naming everything that differs.
    """
    before = baseline.header
    if before.benchmark != header.benchmark:
        raise ValueError(
            f"{file} is of `bench {before.benchmark}`, expected one of `bench {header.benchmark}`; "
            "name another --baseline"
        )
    if any_machine:
        return
    differences = []
    if before.machine.hardware != header.machine.hardware:
        differences.append(f"machine {before.machine.hardware} (here {header.machine.hardware})")
    for key in sorted(before.settings.keys() | header.settings.keys()):
        then, now = (_as_json(h.settings.get(key)) for h in (before, header))
        if then != now:
            differences.append(f"{key} {then} (here {now})")
    if differences:
        raise ValueError(
            f"{file} was measured with {'; '.join(differences)}; measure a baseline with the same, "
            "or type --any-machine to compare all the same"
        )


def compare(baseline: Report, report: Report) -> dict[str, float]:
    """Divide each figure by that of the baseline, except where one of them has none, or 0.

    The ratio of a time is below 1 where it became faster.
    """
    before = baseline.figures
    return {
        name: value / before[name]
        for name, value in report.figures.items()
        if value and before.get(name)
    }


def comparison_lines(baseline: Report, report: Report, file: Path) -> list[str]:
    """Lay both reports out beside one another."""
    before, now, ratios = baseline.figures, report.figures, compare(baseline, report)
    width = max(map(len, [*now, f"against {file}"]))
    lines = [f"{f'against {file}':<{width}} {'before':>12}{'now':>12}{'now/before':>12}"]
    lines += [
        f"{name:<{width}} {before[name]:>12.5g}{now[name]:>12.5g}{ratio:>12.3f}"
        for name, ratio in ratios.items()
    ]
    alone = sorted(report.figures.keys() ^ baseline.figures.keys())
    return lines + ([f"in one of them alone: {', '.join(alone)}"] if alone else [])


def _as_json(value: object) -> object:
    """Make what a file gives back of a setting."""
    return list(value) if isinstance(value, tuple) else value
