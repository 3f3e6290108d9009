"""Draw the cost of a training step against the share of latents that masking leaves.

mllm-audio bench train --preset audiomntp_base --ratios 0,0.25,0.5,0.75 --json figures.json
python scripts/training_cost.py figures.json cost.svg
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mllm_audio.benchmarks.report import Report
from mllm_audio.files import write_atomic
from mllm_audio.reproduce.figures import Point, chart


def main() -> None:
    """Draw measured seconds, counted FLOPs and 1 - r, each as a share of no masking."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figures", type=Path, help="what bench train --ratios --json wrote")
    parser.add_argument("out", type=Path, help="an .svg file")
    arguments = parser.parse_args()
    figures = Report.load(arguments.figures).figures
    names = [n for n in figures if ".ratio." in n and n.endswith(".seconds")]
    timed = [name.removesuffix(".seconds").partition(".ratio.") for name in names]
    ratios = sorted({float(ratio) for _, _, ratio in timed})
    if 0.0 not in ratios:
        parser.error(f"{arguments.figures} has ratios {ratios}, expected 0 among them; type them")
    dtypes = list(dict.fromkeys(dtype for dtype, _, _ in timed))
    keys = {f"measured, {dtype}": (dtype, "seconds") for dtype in dtypes}
    lines = {
        title: [
            Point(1 - r, figures[f"{dtype}.ratio.{r:g}.{key}"] / figures[f"{dtype}.ratio.0.{key}"])
            for r in ratios
        ]
        for title, (dtype, key) in {**keys, "counted": (dtypes[0], "flops")}.items()
    }
    lines["1 - r"] = [Point(1 - r, 1 - r) for r in ratios]
    text = chart(
        lines, "share of latents that stay, 1 - r", "cost of a training step, 1 without masking"
    )
    write_atomic(arguments.out, text.encode())


if __name__ == "__main__":
    main()
