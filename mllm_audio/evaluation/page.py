"""The page of a scorecard: one HTML file without anything outside it."""

from __future__ import annotations

from dataclasses import asdict

from mllm_audio.evaluation.paper import NEIGHBOURS, NOT_COMPARABLE, TABLE_1
from mllm_audio.evaluation.scorecard import ARROWS, Scorecard

PUBLISHED = {  # columns of the published table
    "fd_panns": "FD ↓",
    "fad_vggish": "FAD ↓",
    "kl_panns": "KL ↓",
    "is_panns": "IS ↑",
    "clap_laion": "CLAP ↑",
}

_TEMPLATE = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>Evaluation of {{ settings.generated }}</title>
<style>
body{font:15px/1.5 system-ui,sans-serif;max-width:1050px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.4em}h2{font-size:1.1em;margin-top:2em}
table{border-collapse:collapse;width:100%}
td,th{padding:.35em .6em;text-align:left;vertical-align:top}
tr+tr{border-top:1px solid #ddd}
table+table{margin-top:1.5em}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
code{background:#f3f3f3;padding:0 .3em;overflow-wrap:anywhere}
.ours{background:#eef5ff;font-weight:600}.quiet{color:#666;font-size:.9em}
.warning{background:#fff4e0;padding:.5em .8em;border-left:4px solid #e0a030}
@media(prefers-color-scheme:dark){body{background:#16181c;color:#ddd}tr+tr{border-color:#383c44}
code{background:#262a31}.ours{background:#1d2c44}.quiet{color:#999}.warning{background:#3a2f18}}
</style>
<h1>Evaluation of {{ settings.generated }}</h1>
<p>Against the recordings in {{ settings.reference }}.</p>
<table><tr><th>metric<th><th class=n>value<th class=n>95 % interval<th class=n>N
<th class=n>N reference<th class=n>recordings<th>embedder</tr>
{% for s in card.scores %}<tr><td><code>{{ s.name }}</code><td>{{ s.title }} {{ arrows[s.better] }}
<td class=n>{{ s.value|figures }}
<td class=n>{% if s.interval.low is none %}<span class=quiet>none</span>{% else %}{{ s.range }}
{% endif %}<td class=n>{{ s.num_generated }}<td class=n>{{ s.num_reference or "" }}
<td class=n>{{ s.reference_value|figures }}<td>{{ s.embedder }}</tr>
{% endfor %}</table>
<p class=quiet>Intervals come from {{ settings.num_resamples }} resamples of the clips, seed
{{ settings.seed }}, and are laid around the measured value. “Recordings” is the metric of the
reference itself.</p>
{% for s in card.scores %}{% for note in s.notes %}
<p class="{{ "warning" if note.startswith("warning") else "quiet" }}"><code>{{ s.name }}</code>:
{{ note }}.</p>{% endfor %}{% if s.interval.low is none and s.interval.reason not in s.notes %}
<p class=quiet><code>{{ s.name }}</code> has no interval: {{ s.interval.reason }}.</p>{% endif %}
{% endfor %}
<h2>Published on AudioCaps</h2>
<p class=warning>{{ not_comparable }}</p>
<table><tr><th>system{% for title in published.values() %}<th class=n>{{ title }}{% endfor %}
<th>source</tr>
{% if ours %}<tr class=ours><td>this evaluation
{% for name in published %}<td class=n>{{ ours.get(name)|fixed(name) }}{% endfor %}
<td>{{ clap_source }}</tr>{% endif %}
{% for row in rows %}<tr><td>{{ row.system }}
{% for name in published %}<td class=n>{{ row[name]|fixed(name) }}{% endfor %}
<td>{{ row.source }}</tr>
{% endfor %}</table>
<h2>How it was measured</h2>
<table><tr><th>embedder<th class=n>Hz<th>checkpoint<th>sha256</tr>
{% for e in card.embedders %}<tr><td>{{ e.name }}<td class=n>{{ e.sample_rate }}<td>{{ e.path }}
<td><code>{{ e.sha256 }}</code></tr>
{% endfor %}</table>
<table>{% for key, value in all_settings.items() %}<tr><td>{{ key.replace("_", " ") }}
<td>{{ value if value is not none else "none" }}</tr>{% endfor %}</table>
</html>
"""


def render(card: Scorecard) -> str:
    """Return the page of a scorecard."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True)
    environment.filters["figures"] = lambda value: "" if value is None else f"{value:.4g}"
    environment.filters["fixed"] = _fixed
    values = {score.name: score.value for score in card.scores}
    is_hf = "clap_hf" in values and "clap_laion" not in values
    if is_hf:
        values["clap_laion"] = values["clap_hf"]
    return environment.from_string(_TEMPLATE).render(
        card=card,
        settings=card.settings,
        all_settings=asdict(card.settings),
        arrows=ARROWS,
        not_comparable=NOT_COMPARABLE,
        published=PUBLISHED,
        clap_source="CLAP by clap_hf" if is_hf else "",
        ours={name: values[name] for name in PUBLISHED if name in values},
        rows=[asdict(row) for row in (*TABLE_1, *NEIGHBOURS)],
    )


def _fixed(value: float | None, name: str) -> str:
    """Print as many decimals as the tables of papers."""
    return "" if value is None else f"{value:.{3 if name.startswith('clap') else 2}f}"
