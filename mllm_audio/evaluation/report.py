"""Reports a person reads: spectrogram pictures, loss curves, one HTML page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mllm_audio.tokenizers.mel import log_mel
from mllm_audio.types import Clip

# Dark to bright through blue, magenta and orange: perceptually ordered, readable in grey.
_COLOURS = np.array(
    [
        [0, 0, 4],
        [40, 11, 84],
        [101, 21, 110],
        [159, 42, 99],
        [212, 72, 66],
        [245, 125, 21],
        [252, 255, 164],
    ]
)
_FLOOR, _CEILING = -9.0, 1.5  # natural log of mel magnitude shown as black and as brightest
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;width:100%}
td,th{padding:.4em .6em;vertical-align:top;text-align:left}
tr{border-top:1px solid #ddd}img{width:100%;height:110px;image-rendering:auto;display:block}
audio{width:100%;height:32px}.wrong{color:#b00}.right{color:#070}
code{background:#f3f3f3;padding:0 .3em}
svg{background:#fafafa;border:1px solid #ddd;margin-right:1em}
"""


@dataclass(frozen=True)
class Pair:
    """A caption with a reference recording beside the generated one."""

    caption: str
    label: str  # the events asked for
    heard: str  # the events recognised in the generated clip
    reference: Path  # audio file
    generated: Path  # audio file
    reference_clip: Clip
    generated_clip: Clip


def spectrogram(clip: Clip, height: int = 128, width: int | None = None) -> Image.Image:
    """Draw the log-mel spectrogram of a clip: time to the right, frequency up."""
    mel = log_mel(clip.waveform[None])[0].T.flip(0)  # (64, F)
    level = ((mel - _FLOOR) / (_CEILING - _FLOOR)).clamp(0, 1).numpy() * (len(_COLOURS) - 1)
    low = level.astype(int).clip(0, len(_COLOURS) - 2)
    share = (level - low)[..., None]
    pixels = _COLOURS[low] * (1 - share) + _COLOURS[low + 1] * share  # (64, F, 3)
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    return picture.resize((width or mel.shape[1] * 2, height), Image.Resampling.BILINEAR)


def side_by_side(clips: Sequence[Clip], columns: int, gap: int = 6) -> Image.Image:
    """Lay the spectrograms of several clips out in a grid on one time scale."""
    longest = max(len(clip.waveform) for clip in clips)
    pictures = []
    for clip in clips:
        waveform = torch.nn.functional.pad(clip.waveform, (0, longest - len(clip.waveform)))
        pictures.append(spectrogram(Clip(waveform, clip.sample_rate)))
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * (width + gap), index // columns * (height + gap)))
    return sheet


def loss_chart(records: Iterable[dict[str, float]], names: Sequence[str]) -> str:
    """Plot logged values against the step as one SVG, a line per name."""
    records = list(records)
    lines, legend = [], []
    values = [r[n] for r in records for n in names if n in r]
    if not values:
        return ""
    top, last = float(np.percentile(values, 99)), max(r["step"] for r in records)
    for index, name in enumerate(names):
        colour = ("#1f6feb", "#d1242f", "#1a7f37")[index % 3]
        points = [(r["step"] / last * 440 + 40, r[name] / top) for r in records if name in r]
        path = " ".join(f"{x:.1f},{190 - 170 * min(y, 1.05):.1f}" for x, y in points)
        lines.append(f'<polyline fill="none" stroke="{colour}" points="{path}"/>')
        legend.append(
            f'<text x="{60 + 150 * index}" y="14" fill="{colour}">{html.escape(name)}</text>'
        )
    axes = (
        f'<text x="2" y="24">{top:.2g}</text><text x="20" y="192">0</text>'
        f'<text x="430" y="208">step {last:.0f}</text>'
        f'<path d="M40 20V190H480" fill="none" stroke="#888"/>'
    )
    return f'<svg width="500" height="215" font-size="12">{axes}{"".join(lines + legend)}</svg>'


def write_page(
    path: Path, title: str, summary: str, charts: Sequence[str], pairs: Sequence[Pair]
) -> None:
    """Write the HTML report; `summary` and `charts` are HTML, everything else is escaped."""
    rows = "".join(_row(path.parent, pair) for pair in pairs)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>{summary}{''.join(charts)}"
        "<table><tr><th>caption<th>reference (held out, never trained on)<th>generated</tr>"
        f"{rows}</table></html>"
    )
    path.write_text(page, encoding="utf-8")


def _row(folder: Path, pair: Pair) -> str:
    verdict = "right" if pair.heard == pair.label else "wrong"
    return (
        f"<tr><td>{html.escape(pair.caption)}<br><span class={verdict}>heard: "
        f"<code>{html.escape(pair.heard or 'nothing')}</code></span>"
        f"<td>{_player(folder, pair.reference, pair.reference_clip)}"
        f"<td>{_player(folder, pair.generated, pair.generated_clip)}</tr>"
    )


def _player(folder: Path, file: Path, clip: Clip) -> str:
    buffer = io.BytesIO()
    spectrogram(clip).save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    source = html.escape(file.relative_to(folder).as_posix())
    return (
        f'<img alt="spectrogram" src="data:image/png;base64,{data}">'
        f'<audio controls preload="none" src="{source}"></audio>'
    )
