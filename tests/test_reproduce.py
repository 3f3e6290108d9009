"""`mllm-audio reproduce`: rows are presets, stages are kept, tables say what is known."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from conftest import labelled_manifest
from tiny_encoders import write_clap, write_t5

from mllm_audio.cli.reproduce import TABLES as TYPED
from mllm_audio.data.prepare import prepare
from mllm_audio.evaluation.own import ClassifierConfig, MelClassifier, save_classifier
from mllm_audio.generation.decode import GenerationConfig
from mllm_audio.presets import PAPER_PRESETS, get_preset
from mllm_audio.presets.scaled import PROMPTED_APART
from mllm_audio.reproduce.figures import Axis, Point, chart, figure_6
from mllm_audio.reproduce.report import PUBLISHED, write_table
from mllm_audio.reproduce.stages import Job, train
from mllm_audio.reproduce.table import Judgement, reproduce
from mllm_audio.reproduce.tables import TABLES, System, choose_rows
from mllm_audio.wav import write


def test_every_row_is_a_preset_with_settings_that_exist():
    assert tuple(TABLES) == TYPED
    for table, systems in TABLES.items():
        assert len({system.label for system in systems}) == len(systems), table
        for system in systems:
            assert system.preset in PAPER_PRESETS
            GenerationConfig(**dict(system.generation))
            assert system.paper is None or system.paper in PUBLISHED
            if system.preset not in PROMPTED_APART:
                assert get_preset(f"{system.preset}_small").preset == f"{system.preset}_small"
    assert [system.label for system in TABLES["table3"]] == list("ABCDEFGHIJK")


def test_rows_are_chosen_by_label():
    assert [s.preset for s in choose_rows("table3", ["G", "A"])] == [
        "audiomntp_base",
        "audiontp_base",
    ]
    with pytest.raises(ValueError, match="table3 has no row 'L'; known: A, B"):
        choose_rows("table3", ["L"])
    with pytest.raises(ValueError, match="unknown table 'table2'; did you mean 'table"):
        choose_rows("table2")


def row(label: str, seed: int, value: float, **more) -> dict:
    values = {
        "label": label, "seed": seed, "scores": {"fd_panns": {"value": value}}, "num_clips": 3,
        "num_silent": 0, "steps": 5, "generation_seed": 0, "tokenizer": "dct x",
        "conditioner": "words y", "embedders": "panns", "commit": "c", "machine": "m",
    }  # fmt: skip
    return {**values, **more}


def test_a_table_means_over_seeds_beside_the_papers_value(tmp_path):
    systems = choose_rows("table3", ["A", "E"])
    text = write_table(tmp_path / "t", "table3", systems, [row("A", 0, 18.0), row("A", 1, 20.0)])
    lines = text.splitlines()
    assert lines[4] == "| A | next-token prediction | 2 | 19 ± 1.4 [18.52] |"
    assert lines[5].endswith("| 0 | not run |")
    assert "- clips: 3" in lines and "- tokenizer: dct x" in lines
    assert "not comparable" in lines[-1]
    assert "<td>19 ± 1.4 [18.52]" in (tmp_path / "t.html").read_text()
    mixed = write_table(tmp_path / "t", "t", systems, [row("A", 0, 1.0), row("E", 0, 2.0, steps=6)])
    assert "- optimizer steps: 5; 6" in mixed


def test_a_chart_puts_points_where_they_belong():
    svg = chart(
        {"a": [Point(0.01, 1.0, "slow"), Point(1.0, 2.0, "fast")]}, "RTF", "fad", log_x=True
    )
    root = ElementTree.fromstring(svg)
    dots = [node for node in root.iter() if node.tag.endswith("circle")]
    (x1, y1), (x2, y2) = [(float(d.get("cx")), float(d.get("cy"))) for d in dots]
    assert x1 < x2 and y1 > y2  # up is down in SVG
    middle = chart({"a": [Point(0.01, 1.0), Point(0.1, 1.0), Point(1.0, 1.0)]}, "", "", log_x=True)
    places = [float(d.get("cx")) for d in ElementTree.fromstring(middle).iter() if d.get("cx")]
    assert places[1] == pytest.approx((places[0] + places[2]) / 2, abs=0.2)


def test_ticks_are_round_and_inside():
    assert Axis(0.0, 1.0, 0, 1).ticks() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert Axis(-130.0, 420.0, 0, 1).ticks() == [-100, 0, 100, 200, 300, 400]
    assert Axis(0.03, 3.0, 0, 1, log=True).ticks() == pytest.approx([0.05, 0.1, 0.2, 0.5, 1, 2])
    assert Axis(0.08, 0.14, 0, 1, log=True).ticks() == pytest.approx([0.08, 0.1, 0.12, 0.14])
    narrow = chart({"": [Point(0.0, 588.41), Point(1.0, 588.44)]}, "", "")
    assert ">588.41<" in narrow and ">588.42<" in narrow  # digits that tell ticks apart
    one = Axis.around([5.0], 0, 100)
    assert one.at(5.0) == 50 and len(one.ticks()) >= 2


def test_figure_6_has_a_line_per_schedule_and_one_of_temperatures(tmp_path):
    rows = [
        row(system.label, 0, float(number), generation=dict(system.generation))
        for number, system in enumerate(TABLES["figure6"])
    ]
    out = tmp_path / "figure6/fd_panns"
    paths = figure_6(rows, "fd_panns", out)
    assert [path.name for path in paths] == ["figure6_guidance.svg", "figure6_temperature.svg"]
    guidance = paths[0].read_text()
    assert guidance.count("<polyline") == 3 and guidance.count("<circle") == 3 * 6
    assert paths[1].read_text().count("<circle") == 6
    two_seeds = [
        row("temp0.6", seed, seed + 1.0, generation={"temperature": 0.6}) for seed in (0, 1)
    ]
    (drawn,) = figure_6([*two_seeds, {**row("x", 0, 0.0), "scores": {}}], "fd_panns", out)
    assert drawn.read_text() == chart({"": [Point(0.6, 1.5)]}, "temperature", "fd_panns")
    only = choose_rows("figure6", ["constant1", "annealed3"])
    chosen = [row(s.label, 0, 1.0, generation=dict(s.generation)) for s in only]
    (drawn,) = figure_6(chosen, "fd_panns", out)
    assert drawn.read_text().count("<circle") == 2 and ">linear<" not in drawn.read_text()


def test_the_papers_systems_ask_for_mars_weights(tmp_path):
    job = Job(out=tmp_path, data=tmp_path, captions=tmp_path, small=False)
    with pytest.raises(ValueError, match=r"type --init-from MAR_CHECKPOINT\.pth"):
        train(job, TABLES["table1"][1], 0)


def test_a_training_that_fails_says_where_to_look(tmp_path):
    job = Job(out=tmp_path, data=tmp_path / "nowhere", captions=tmp_path, small=True)
    with pytest.raises(RuntimeError, match=r"abl_e_small-seed0 ended with 2, see .*seed0.log"):
        train(job, System(label="E", preset="abl_e", what=""), 0, threads=1)
    assert "nowhere" in (tmp_path / "logs/abl_e_small-seed0.log").read_text()


def test_recordings_are_refused_before_any_training(tmp_path):
    for name, rate in (("a", 16_000), ("b", 44_100)):
        write(tmp_path / f"{name}.wav", torch.rand(rate), rate)
    rows = [{"audio": f"{name}.wav", "caption": name} for name in "ab"]
    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join(json.dumps(values) + "\n" for values in rows))
    job = Job(out=tmp_path / "out", data=tmp_path / "nowhere", captions=captions, small=True)
    systems, judgement = choose_rows("table3", ["A"]), Judgement(reference=tmp_path, embedders=[])
    with pytest.raises(ValueError, match=r"mixes sample rates: a\.wav has 16000 Hz, b\.wav 44100"):
        reproduce("table3", systems, [0], job, judgement)
    (tmp_path / "b.wav").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of 2 ids: b"):
        reproduce("table3", systems, [0], job, judgement)


def judge(folder: Path) -> Path:
    torch.manual_seed(0)
    config = ClassifierConfig(labels=("a", "b"), seconds=1.0)
    save_classifier(MelClassifier(config), config, folder)
    return folder


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "mllm_audio", "reproduce", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True)


SIZE = [
    "backbone.hidden_size=32", "backbone.num_heads=2", "backbone.num_layers=2",
    "audio.head.width=32", "train.batch_size=4", "train.precision=float32",
]  # fmt: skip


@pytest.fixture
def recordings(tmp_path):
    """Twelve labelled recordings of train, and as many of test."""
    return labelled_manifest(tmp_path)


@pytest.mark.slow
def test_a_table_runs_at_small_scale_and_continues(recordings, tmp_path):
    out = tmp_path / "out"
    judge(out / "judge")  # trained already: it is kept
    typed = ["table3", "--scale", "small", "--data", recordings, "--out", out, "--rows", "A,K"]
    typed += ["--steps", 2, "--jobs", 2, "--num-clips", 10, *SIZE]
    first = command(*typed)
    assert first.returncode == 0, first.stderr
    assert "| A | next-token prediction | 1 |" in first.stdout
    values = json.loads((out / "rows/table3/A-seed0.json").read_text())
    assert values["num_clips"] == 10 and values["steps"] == 2
    assert values["tokenizer"].startswith("dct ") and values["conditioner"].startswith("words ")
    assert {"fd_judge", "accuracy_judge"} <= values["scores"].keys()
    kept = [out / "runs/audiontp_base_small-seed0/model.safetensors", out / "table3.md"]
    kept += [out / "rows/table3/A-seed0.json", out / "scores/audiontp_base_small-seed0/scores.json"]
    kept += (out / "sounds/audiontp_base_small-seed0").glob("*.wav")
    before = {path: path.read_bytes() for path in kept}
    (out / "rows/table3/K-seed0.json").unlink()
    again = command(
        *typed[: typed.index("--rows")], *typed[typed.index("--rows") + 2 :], "--rows", "K"
    )
    assert again.returncode == 0, again.stderr
    assert (out / "rows/table3/K-seed0.json").is_file()
    assert {path: path.read_bytes() for path in kept} == before  # the table shows row A too
    other = command(*typed, "backbone.num_heads=4")
    assert other.returncode == 2
    assert "holds a run with backbone.num_heads=2, found 4; type another --out" in other.stderr


@pytest.mark.slow
def test_a_table_runs_at_the_papers_scale_with_its_kinds_of_files(recordings, tmp_path):
    spec = f"clap_t5:clap={write_clap(tmp_path / 'clap')},t5={write_t5(tmp_path / 't5')}"
    data, out = tmp_path / "data", tmp_path / "out"
    options = {"max_seconds": 1.28, "pad": True, "conditioner_spec": spec, "progress": False}
    prepare(recordings, data, "dct", **options)
    reference = recordings
    typed = ["table5", "--scale", "paper", "--data", data, "--out", out, "--rows", "clap,both"]
    typed += ["--captions", recordings, "--reference", reference, "--steps", 2]
    typed += ["--embedder", f"tiny={judge(tmp_path / 'judge')}", *SIZE, "init=random"]
    typed += ["audio.max_tokens=32", "backbone.max_positions=128"]
    done = command(*typed)
    assert done.returncode == 0, done.stderr
    assert "| both | CLAP and FLAN-T5 | 1 |" in done.stdout
    values = json.loads((out / "rows/table5/clap-seed0.json").read_text())
    assert values["preset"] == "prompt_clap" and spec in values["conditioner"]
    sounds = out / "sounds/audiomntp_base-seed0"
    drawn = command(
        "figure4", f"base={sounds}", f"clap={out / 'sounds/prompt_clap-seed0'}", "--metric",
        "fd_tiny", "--reference", reference, "--out", out / "figure4",
        "--embedder", f"tiny={tmp_path / 'judge'}",
    )  # fmt: skip
    assert drawn.returncode == 0, drawn.stderr
    rtf = json.loads((sounds / "timing.json").read_text())["rtf"]
    assert f"| base | {rtf:.4g} |" in drawn.stdout
    assert (out / "figure4/figure4.svg").read_text().count("<circle") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table3", "--data", "d", "--out", "o"], "Missing option '--scale'"),
        (["table3", "--scale", "paper", "--data", "d", "--out", "o"], "needs --captions and"),
        (["table9"], "No such command 'table9'"),
        (
            ["table3", "--scale", "small", "--data", "d.jsonl", "--out", "o", "--rows", "Z"],
            "no row",
        ),
        (["figure4", "nowhere", "--reference", "r", "--out", "o"], "expected NAME=SOUNDS"),
        (["figure4", "a=nowhere", "--reference", "r", "--out", "o"], "holds no timing.json"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys, monkeypatch, tmp_path):
    from mllm_audio.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mllm-audio", "reproduce", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
