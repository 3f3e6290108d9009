"""A benchmark from its options to what is printed and written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mllm_audio.benchmarks.baseline import check_comparable, comparison_lines
from mllm_audio.benchmarks.report import Check, Header, Report
from mllm_audio.benchmarks.subject import num_threads

Benchmark = Callable[[int, Check], tuple[Report, list[str]]]  # of the number of threads


@dataclass(frozen=True, kw_only=True)
class SessionConfig:
    """What all benchmarks are asked alike."""

    threads: int | None = None  # of torch; None: as many as it takes
    json_file: Path | None = None  # where the report goes
    baseline: Path | None = None  # an earlier report to compare with
    any_machine: bool = False  # compare even if machine or settings were others


def run_session(
    benchmark: Benchmark, config: SessionConfig, say: Callable[[str], object]
) -> Report:
    """Run a benchmark, say what it found beside the baseline, and write it down.

    Raises:
        ValueError: before anything is measured, if a file cannot be read or written, or the
            baseline cannot be compared with.
    """
    json_file, file = config.json_file, config.baseline
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise ValueError(f"--json {json_file}: there is no folder {json_file.parent}; make it")
    earlier = None if file is None else Report.load(file)

    def check(header: Header) -> None:
        if earlier is not None and file is not None:
            check_comparable(earlier, header, file, config.any_machine)
        say(str(header))

    with num_threads(config.threads) as count:
        report, lines = benchmark(count, check)
    say("\n".join(lines))
    if earlier is not None and file is not None:
        say("\n".join(comparison_lines(earlier, report, file)))
    if json_file is not None:
        report.save(json_file)
    return report
