"""`mllm-audio evaluate`: features, metrics, intervals and reports; every trap is told."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner

from mllm_audio import wav
from mllm_audio.cli import cli
from mllm_audio.evaluation import metrics, page, paper
from mllm_audio.evaluation.base import ClipFeatures, Source
from mllm_audio.evaluation.bootstrap import bootstrap, frechet_statistic
from mllm_audio.evaluation.clips import find_clips, read_clip, read_ids, to_rate
from mllm_audio.evaluation.evaluate import Options, choose_metrics, evaluate
from mllm_audio.evaluation.features import extract
from mllm_audio.evaluation.own import ClassifierConfig, MelClassifier, save_classifier
from mllm_audio.types import Clip

RATE = 8000
LABELS = ("high", "low")
QUIET = Options(num_resamples=20, progress=False)


class Ear:
    """An embedder with features that a reader can compute: powers of quarters, loudest class."""

    def __init__(self, name="ear", labels=LABELS):
        self.name, self.labels, self.label_column = name, labels, "label"
        self.sample_rate = RATE
        self.source, self.fingerprint = Source(path=Path("ear"), sha256="0" * 64), name
        self.num_heard, self.stop_after = 0, None

    def embed(self, waveforms):
        if self.stop_after is not None and self.num_heard >= self.stop_after:
            raise KeyboardInterrupt
        self.num_heard += len(waveforms)
        rows = [torch.stack([q.square().mean() for q in w[:RATE].chunk(3)]) for w in waveforms]
        rates = [(w[:RATE].diff().sign().diff() != 0).float().mean() for w in waveforms]
        return [
            ClipFeatures(row[None], torch.stack([20 * rate, 2 - 20 * rate]))
            for row, rate in zip(rows, rates, strict=True)
        ]


class Reader(Ear):
    """Captions and clips in one space."""

    def __init__(self):
        super().__init__("clap_hf")
        del self.labels

    def embed_captions(self, captions):
        return torch.tensor([[len(text), 1.0, 1.0] for text in captions])


def write_clips(folder, count=24, rate=RATE, seed=0, suffix="wav", captions=True):
    """Low and high tones in turns."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        label = LABELS[index % 2]
        time = np.arange(rate // 2) / rate
        wave = rng.uniform(0.1, 0.3) * np.sin(2 * np.pi * {"high": 2000, "low": 200}[label] * time)
        wave *= np.exp(-rng.uniform(1, 9) * time)
        soundfile.write(folder / f"clip{index:02}.{suffix}", wave, rate)
        rows.append({"audio": f"clip{index:02}.{suffix}", "caption": f"a {label} tone"})
        rows[-1]["label"] = label
    if captions:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "captions.jsonl").write_text(text)
    return folder


@pytest.fixture
def folders(tmp_path):
    """Generated clips, references of the same names, and a place for reports."""
    return (
        write_clips(tmp_path / "generated", seed=1),
        write_clips(tmp_path / "reference", seed=2),
        tmp_path / "out",
    )


def test_scores_are_the_metrics_of_the_features(folders):
    generated, reference, _ = folders
    ear = Ear()
    card = evaluate(*folders, [ear], metrics=["fd_ear", "kl_ear", "accuracy_ear"], options=QUIET)
    heard = [
        ear.embed([to_rate(read_clip(path), RATE) for path in find_clips(side).values()])
        for side in (generated, reference)
    ]
    features = [torch.cat([clip.features for clip in side]).double() for side in heard]
    logits = [torch.stack([clip.logits for clip in side]).double() for side in heard]
    assert card.value("fd_ear") == pytest.approx(metrics.frechet_distance(*features))
    assert card.value("kl_ear") == pytest.approx(metrics.kl_divergence(*logits))
    assert card.value("accuracy_ear") == 1.0
    with pytest.raises(KeyError, match="is_ear was not measured, only fd_ear"):
        card.value("is_ear")


def test_clips_pair_by_name_whatever_their_suffix(folders, tmp_path):
    generated, _, out = folders
    flac = write_clips(tmp_path / "flac", seed=2, suffix="flac")
    card = evaluate(generated, flac, out, [Ear()], metrics=["kl_ear"], options=QUIET)
    assert abs(card.value("kl_ear")) < 1e-4  # high with high, low with low
    (flac / "b").mkdir()
    for path in list(flac.glob("*[13579].flac")):  # listed behind all others
        path.rename(flac / "b" / path.name)
    card = evaluate(generated, flac, out, [Ear()], metrics=["kl_ear"], options=QUIET)
    assert abs(card.value("kl_ear")) < 1e-4
    low, high = flac / "b" / "clip01.flac", flac / "clip02.flac"
    low.rename(flac / "held.flac"), high.rename(low), (flac / "held.flac").rename(high)
    card = evaluate(generated, flac, out, [Ear()], metrics=["kl_ear"], options=QUIET)
    assert card.value("kl_ear") > 0.1


def test_a_folder_against_itself_is_perfect(folders):
    generated, _, out = folders
    card = evaluate(generated, generated, out, [Ear()], options=QUIET)
    assert card.value("fd_ear") == pytest.approx(0, abs=1e-9)
    assert card.value("kl_ear") == pytest.approx(0, abs=1e-5)
    scores = {score.name: score for score in card.scores}
    assert list(scores) == ["fd_ear", "kl_ear", "is_ear", "accuracy_ear"]
    assert scores["is_ear"].reference_value == card.value("is_ear")
    assert scores["accuracy_ear"].reference_value == 1.0
    assert scores["fd_ear"].reference_value is None


def test_clap_is_the_mean_cosine_of_clips_and_captions(folders):
    card = evaluate(*folders, [Reader()], options=QUIET)
    features = torch.cat(
        [Ear().embed([to_rate(read_clip(p), RATE)])[0].features for p in sorted_clips(folders[0])]
    ).double()
    texts = [[len(f"a {LABELS[i % 2]} tone"), 1.0, 1.0] for i in range(24)]
    assert card.value("clap_hf") == pytest.approx(metrics.mean_cosine(features, texts))


def sorted_clips(folder):
    return sorted(folder.glob("*.wav"))


def test_reading_takes_the_first_channel_without_its_mean_and_pads(tmp_path):
    left = 0.3 + 0.1 * np.sin(np.arange(RATE) / 3)
    soundfile.write(tmp_path / "a.wav", np.stack([left, -left], 1), RATE, subtype="FLOAT")
    clip = read_clip(tmp_path / "a.wav")
    np.testing.assert_allclose(clip.waveform, left - left.mean(), atol=1e-6)
    padded = to_rate(clip, 16_000)
    assert len(padded) == 32_000 and not padded[16_100:].any()
    assert len(to_rate(Clip(torch.zeros(3 * RATE), RATE), RATE)) == 3 * RATE


def test_features_are_kept_by_content_and_continue_after_ctrl_c(folders, tmp_path):
    clips = find_clips(folders[0])
    ear, cache = Ear(), tmp_path / "cache"
    ear.stop_after = 8
    with pytest.raises(KeyboardInterrupt):
        extract(ear, clips, cache, batch_size=4, progress=False)
    assert len(list(cache.rglob("*.safetensors"))) == 8
    ear.stop_after = None
    features = extract(ear, clips, cache, batch_size=4, progress=False)
    assert ear.num_heard == 24
    again = extract(ear, clips, cache, progress=False)
    assert ear.num_heard == 24
    for one, two in zip(features, again, strict=True):
        assert torch.equal(one.features, two.features) and torch.equal(one.logits, two.logits)
    # A renamed clip is known, a changed one is not, and another embedder knows none.
    sound = clips["clip00"].rename(clips["clip00"].with_name("other.wav"))
    extract(ear, {"other": sound}, cache, progress=False)
    assert ear.num_heard == 24
    wav.write(sound, torch.linspace(-0.5, 0.5, 4000).sin(), RATE)
    extract(ear, {"other": sound}, cache, progress=False)
    assert ear.num_heard == 25
    other = Ear("other")
    extract(other, {"other": sound}, cache, progress=False)
    assert other.num_heard == 1


def test_frechet_statistic_equals_the_published_way():
    rng = np.random.default_rng(0)
    for channels in (6, 60):  # more rows than channels, and fewer
        sides = [
            [rng.normal(size=(2, channels)) + shift for _ in range(12 + shift)] for shift in (0, 1)
        ]
        statistic = frechet_statistic(*sides)
        counts = [rng.multinomial(len(s), np.ones(len(s)) / len(s)) for s in sides]
        for a, b in ([np.ones(12, int), np.ones(13, int)], counts):
            repeated = [
                np.concatenate(
                    [rows for rows, n in zip(side, times, strict=True) for _ in range(n)]
                )
                for side, times in zip(sides, (a, b), strict=True)
            ]
            # The matrix root of a singular product is good to 1e-6.
            expected = metrics.frechet_distance(*repeated)
            assert statistic(a, b) == pytest.approx(expected, rel=1e-6)


def test_interval_of_a_mean_has_the_textbook_width():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    interval = bootstrap(
        values.mean(),
        lambda counts, _: (counts @ values) / counts.sum(),
        400,
        0,
        paired=False,
        num_resamples=2000,
        seed=0,
        max_seconds=60,
    )
    half = 1.96 * values.std() / 20
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_interval_holds_the_value_and_repeats_from_its_seed():
    rng = np.random.default_rng(3)
    sides = [[rng.normal(size=(1, 20)) for _ in range(30)] for _ in range(2)]
    value = frechet_statistic(*sides)(np.ones(30, int), np.ones(30, int))

    def run(seed, **options):
        return bootstrap(
            value,
            frechet_statistic(*sides),
            30,
            30,
            seed=seed,
            **{"paired": True, "num_resamples": 50, "max_seconds": 60, **options},
        )

    assert run(0).low < value < run(0).high
    assert run(0) == run(0) != run(1)
    assert run(0) != run(0, paired=False)
    assert run(0, num_resamples=0).reason == "not asked for"
    slow = run(0, max_seconds=0)
    assert slow.low is None and re.match(r"one resample takes .* s, 50 more than 0 s", slow.reason)


def test_paired_clips_are_drawn_together():
    seen = []
    bootstrap(0.0, lambda a, b: seen.append((a, b)) or 0.0, 9, 9, True, 5, 0, 60.0)
    assert all((a == b).all() and a.sum() == 9 for a, b in seen)
    assert any((a != 1).any() for a, _ in seen)


def test_ids_choose_the_clips_of_both_sides(folders, tmp_path):
    reference = folders[1]
    (reference / "clip03.wav").unlink()
    names = [f"clip{index:02}" for index in range(24) if index != 3]
    (tmp_path / "ids.txt").write_text("\n".join(f"{name}.wav" for name in names) + "\n")
    ids = read_ids(tmp_path / "ids.txt")
    assert ids == names
    card = evaluate(*folders, [Ear()], ids=ids, options=QUIET)
    assert {score.num_generated for score in card.scores} == {23}
    with pytest.raises(ValueError, match="reference lacks 1 of 24 ids: clip03; expected each"):
        evaluate(*folders, [Ear()], ids=[*ids, "clip03"], options=QUIET)


def test_few_clips_are_a_warning_that_reports_keep(folders):
    class Wide(Ear):
        def embed(self, waveforms):
            noise = torch.Generator().manual_seed(0)
            return [
                ClipFeatures(torch.randn(1, 30, generator=noise), heard.logits)
                for heard in super().embed(waveforms)
            ]

    evaluate(*folders, [Wide()], options=QUIET)
    for name in ("scores.json", "scores.md", "report.html"):
        assert "24 rows of features for 30 channels" in (folders[2] / name).read_text()


def test_reports_say_all_that_a_number_depends_on(folders):
    out = folders[2]
    evaluate(*folders, [Ear()], options=QUIET)
    values = json.loads((out / "scores.json").read_text())
    assert values["embedders"][0]["sha256"] == "0" * 64
    assert values["settings"]["resampler"].startswith("soxr ")
    assert values["settings"]["generated_rate"] == RATE
    score = values["scores"][0]
    assert score["interval"]["low"] < score["value"] < score["interval"]["high"]
    for name in ("scores.md", "report.html"):
        text = (out / name).read_text()
        assert "0" * 64 in text and "soxr " in text and "compare equal numbers only" in text
        assert "Numbers of different pipelines are not comparable" in text
    html = (out / "report.html").read_text()
    assert "AudioMNTP Base, 6-block head" in html and "14.74" in html and "0.337" in html
    assert not re.search(r"(src|href)=", html)


def test_names_in_reports_are_escaped(folders, tmp_path):
    generated = folders[0].rename(tmp_path / "<b>generated")
    card = evaluate(generated, *folders[1:], [Ear()], options=QUIET)
    assert "<b>generated" not in page.render(card)
    assert "&lt;b&gt;generated" in page.render(card)


def test_the_papers_table_stands_once():
    row = {row.system: row for row in paper.TABLE_1}["AudioMNTP Base"]
    assert (row.fd_panns, row.fad_vggish, row.kl_panns) == (14.81, 1.68, 1.16)
    assert (row.is_panns, row.clap_laion) == (9.67, 0.336)
    assert len(paper.TABLE_1) == 4


def break_unpaired(generated, reference):
    (generated / "clip00.wav").unlink()
    (reference / "clip01.wav").unlink()


def break_silent(generated, reference):
    for index in range(5):
        wav.write(generated / f"clip0{index}.wav", torch.full((4000,), 0.25), RATE)


def break_nan(generated, reference):
    samples = np.full(4000, np.nan, np.float32)
    soundfile.write(reference / "clip02.wav", samples, RATE, subtype="FLOAT")


def break_rates(generated, reference):
    wav.write(generated / "clip05.wav", torch.rand(4000), 16_000)


def break_empty(generated, reference):
    for path in reference.glob("*.wav"):
        path.unlink()


def break_stems(generated, reference):
    wav.write(reference / "clip05.flac", torch.rand(4000), RATE)


def break_label(generated, reference):
    path = generated / "captions.jsonl"
    path.write_text(path.read_text().replace('"label": "low"', '"label": "middle"'))


def break_rows(generated, reference):
    path = generated / "captions.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:22]))


def break_json(generated, reference):
    (generated / "captions.jsonl").write_text('{"audio": "clip00.wav"}\n{"audio"\n')


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (break_unpaired, r"kl_ear pairs.*1 generated.*\(clip01\) and 1 reference.*\(clip00\)"),
        (break_silent, r"5 of 24 clips .*clip00.wav is silent.*clip02.wav is silent.*and 2 more"),
        (break_nan, r"1 of 24 clips cannot.*clip02.wav holds NaN"),
        (break_rates, "mixes sample rates: clip00.wav has 8000 Hz, clip05.wav 16000 Hz"),
        (break_empty, "reference holds no clips; expected .wav, .flac"),
        (break_stems, r"clip05.flac and .*clip05.wav have one name"),
        (break_label, "labels middle, which ear does not know; it knows high, low"),
        (break_rows, r"accuracy_ear needs the label .* for 2 of 24: clip22, clip23; give them"),
        (break_json, r"captions.jsonl:2: broken JSON"),
    ],
)
def test_broken_folders_are_told(folders, mistake, message):
    mistake(*folders[:2])
    with pytest.raises(ValueError, match=message):
        evaluate(*folders, [Ear()], options=QUIET)
    assert not (folders[2] / "scores.json").exists()


def test_silent_sounds_may_be_measured_and_are_counted_but_no_silent_recordings(folders):
    break_silent(*folders[:2])
    options = replace(QUIET, allow_silent=True)
    card = evaluate(*folders, [Ear()], options=options)
    assert card.settings.num_silent == 5 and "num_silent: 5" in card.to_markdown()
    assert evaluate(*folders, [Ear()], options=options).settings.num_silent == 5  # from the cache
    wav.write(folders[1] / "clip07.wav", torch.full((4000,), 0.25), RATE)
    with pytest.raises(ValueError, match=r"clip07.wav is silent"):
        evaluate(*folders, [Ear()], options=options)


def test_captions_that_clap_needs_are_told(folders):
    (folders[0] / "captions.jsonl").unlink()
    with pytest.raises(ValueError, match=r"clap_hf needs the caption .* for 24 of 24.*--captions"):
        evaluate(*folders, [Reader()], options=QUIET)
    captions = folders[1] / "captions.jsonl"
    assert evaluate(*folders, [Reader()], captions=captions, options=QUIET).scores


def test_accuracy_is_left_out_where_nothing_has_a_label_unless_asked_for(folders):
    (folders[0] / "captions.jsonl").unlink()
    card = evaluate(*folders, [Ear()], options=QUIET)
    assert [score.name for score in card.scores] == ["fd_ear", "kl_ear", "is_ear"]
    with pytest.raises(ValueError, match="accuracy_ear needs the label of every generated clip"):
        evaluate(*folders, [Ear()], metrics=["accuracy_ear"], options=QUIET)


@pytest.mark.parametrize(
    ("embedders", "names", "message"),
    [
        ([Ear()], ["fd_eat"], "metric 'fd_eat' is unknown; did you mean 'fd_ear'"),
        ([Ear()], ["fd_panns"], "fd_panns needs the embedder panns, found ear"),
        ([Ear(), Ear()], None, "found embedders ear, ear, expected different names"),
        ([Ear("panns")], None, "the name 'panns' makes"),
        ([], None, "found no embedder"),
    ],
)
def test_metrics_that_cannot_be_are_told(embedders, names, message):
    with pytest.raises(ValueError, match=message):
        choose_metrics(embedders, names)


def test_a_missing_folder_is_told(folders):
    with pytest.raises(ValueError, match="found nothing at nowhere, expected a folder of clips"):
        evaluate(folders[0], Path("nowhere"), folders[2], [Ear()], options=QUIET)


def test_ids_that_cannot_be_are_told(tmp_path):
    path = tmp_path / "ids.txt"
    with pytest.raises(ValueError, match=r"ids\.txt is not a file"):
        read_ids(path)
    path.write_text("\n\n")
    with pytest.raises(ValueError, match="names no clip"):
        read_ids(path)
    path.write_text("a\nb\na.wav\n")
    with pytest.raises(ValueError, match="names a more than once"):
        read_ids(path)


def test_the_command_measures_with_a_classifier(folders, tmp_path):
    generated, reference, out = folders
    config = ClassifierConfig(labels=LABELS, seconds=0.5, sample_rate=RATE, num_bands=16)
    save_classifier(MelClassifier(config), config, tmp_path / "tones")
    arguments = ["evaluate", str(generated), "--reference", str(reference), "--out", str(out)]
    arguments += ["--embedder", f"tones={tmp_path / 'tones'}", "--bootstrap", "20"]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert re.search(r"fd_tones +↓ +\d+\.\d+  95 %: ", result.output)
    assert "accuracy_tones" in result.output and str(out / "report.html") in result.output
    names = {score["name"] for score in json.loads((out / "scores.json").read_text())["scores"]}
    assert names == {"fd_tones", "kl_tones", "is_tones", "accuracy_tones"}
    result = CliRunner().invoke(cli, [*arguments, "--embedder", "tones"])
    assert "found --embedder 'tones', expected NAME=PATH" in result.output
