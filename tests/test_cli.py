"""The trips from the command line, and what a user's mistakes print."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile
from conftest import sine_manifest

SMALL = [
    "backbone.hidden_size=32",
    "backbone.num_layers=2",
    "backbone.num_heads=2",
    "audio.head.width=32",
    "audio.head.num_blocks=1",
    "train.max_minutes=none",
    "train.batch_size=4",
    "train.num_steps=6",
    "train.log_every=1",
    "generation.num_inference_steps=2",
]


def command(*arguments: object, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "mllm_audio", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        **options,
    )


@pytest.fixture(scope="module")
def trip(tmp_path_factory):
    """Prepare and train once through the command line."""
    folder = tmp_path_factory.mktemp("trip")
    manifest = sine_manifest(folder)
    (folder / "broken.wav").write_bytes(b"not a sound")
    with manifest.open("a") as file:
        file.write(json.dumps({"audio": "broken.wav", "caption": "x"}) + "\n")
        file.write(json.dumps({"audio": "gone.wav", "caption": "y"}) + "\n")
    data, run = folder / "data", folder / "run"
    prepared = command("prepare", manifest, "--out", data, "--num-workers", 0)
    assert prepared.returncode == 0, prepared.stderr
    trained = command("train", "--preset", "tiny", "--data", data, "--out", run, *SMALL)
    assert trained.returncode == 0, trained.stderr
    return folder, prepared, trained


def test_prepare_says_what_it_rejected(trip):
    folder, prepared, _ = trip
    assert "9 train" in prepared.stdout
    assert "2 rows rejected" in prepared.stdout
    rows = [json.loads(line) for line in (folder / "data/rejected.jsonl").read_text().splitlines()]
    assert {row["audio"] for row in rows} == {"broken.wav", "gone.wav"}


def test_train_writes_a_voice_and_a_record(trip):
    folder, _, trained = trip
    run = folder / "run"
    assert f"mllm-audio generate {run}" in trained.stdout
    for name in ("config.json", "model.safetensors", "tokenizer.json", "run.json", "log.jsonl"):
        assert (run / name).is_file(), name
    saved = json.loads((run / "run.json").read_text())
    assert saved["backbone"]["hidden_size"] == 32
    assert saved["audio"]["tokenizer_fingerprint"]


def test_generate_one_file_with_a_duration(trip, tmp_path):
    folder, _, _ = trip
    out = tmp_path / "beep.wav"
    done = command("generate", folder / "run", "a low beep", "--out", out, "--seconds", 0.3)
    assert done.returncode == 0, done.stderr
    waveform, sample_rate = soundfile.read(out)
    assert sample_rate == 16000
    assert len(waveform) == 4800
    again = tmp_path / "again.wav"
    command("generate", folder / "run", "a low beep", "--out", again, "--seconds", 0.3)
    assert out.read_bytes() == again.read_bytes()
    other = tmp_path / "other.wav"
    command("generate", folder / "run", "a low beep", "--out", other, "--seconds", 0.3, "--seed", 1)
    assert out.read_bytes() != other.read_bytes()


def test_generate_a_folder_with_every_option(trip, tmp_path):
    folder, _, _ = trip
    options = ["--num-inference-steps", 2, "--guidance-weight", 1.5, "--temperature", 0.9]
    done = command(
        "generate", folder / "run", "a low beep", "two high beeps", "--out", tmp_path / "out",
        "--sampler", "midpoint", "--seed", 5, "--batch-size", 1, *options,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out/captions.jsonl").read_text().splitlines()]
    assert rows == [
        {"audio": "000.wav", "caption": "a low beep", "seed": 5},
        {"audio": "001.wav", "caption": "two high beeps", "seed": 6},
    ]
    assert all((tmp_path / "out" / row["audio"]).is_file() for row in rows)


def test_info_counts_every_component_of_a_run_and_a_preset(trip):
    folder, _, _ = trip
    for name in (folder / "run", "tiny", "digits"):
        lines = command("info", name).stdout.splitlines()
        counts = {line.split()[0]: int(line.split()[1].replace(",", "")) for line in lines[2:]}
        assert sum(v for k, v in counts.items() if k != "total") == counts["total"]
        assert {"backbone.blocks", "audio.head", "audio.null_prompt"} <= counts.keys()
    assert counts["total"] <= 10_000_000  # digits


def test_an_interrupted_training_says_how_to_continue_and_does(trip, tmp_path):
    folder, _, _ = trip
    arguments = ["train", "--preset", "tiny", "--data", folder / "data", "--out", tmp_path / "run"]
    long = [*SMALL, "train.num_steps=100000", "train.save_every=100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mllm_audio", *map(str, arguments), *long],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A test run in the background of a shell inherits an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    log = tmp_path / "run/log.jsonl"
    while time.monotonic() < deadline and not (log.is_file() and log.read_text().count("\n") > 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "type the same command again to continue" in errors.splitlines()[-1]
    stopped = int(json.loads(log.read_text().splitlines()[-1])["step"])
    finished = command(*arguments, *long, f"train.num_steps={stopped + 2}")
    assert finished.returncode == 0, finished.stderr
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, stopped + 3))


MISTAKES = [
    (["trian"], "No such command 'trian'"),
    (["train", "--preset", "tiny", "--data", "nowhere", "--out", "x"], "nowhere"),
    (["train", "--preset", "tinny", "--data", "DATA", "--out", "x"], "did you mean 'tiny'?"),
    (["train", "--preset", "tiny", "--data", "DATA", "--out", "x", "train.stepz=3"], "unknown key"),
    (["train", "--preset", "tiny", "--data", "DATA"], "Missing option '--out'"),
    (["prepare", "nowhere.jsonl", "--out", "x"], "nowhere.jsonl"),
    (["prepare", "MANIFEST", "--out", "x", "--tokenizer", "mp3"], "tokenizer 'mp3' is unknown"),
    (["prepare", "MANIFEST", "--out", "x", "--crop", "tail"], "tail"),
    (["generate", "nowhere", "a beep", "--out", "x.wav"], "found no config.json in nowhere"),
    (["generate", "RUN", "--out", "x.wav"], "expected captions, or --captions FILE"),
    (["generate", "RUN", "a", "--captions", "MANIFEST", "--out", "x"], "expected captions, or"),
    (["generate", "RUN", "--captions", "no.jsonl", "--out", "x"], "no.jsonl"),
    (["generate", "RUN", "--captions", "MANIFEST", "--split", "tset", "--out", "x"], "'tset'"),
    (["generate", "RUN", " ", "--out", "x.wav"], "empty caption"),
    (["generate", "RUN", "a beep", "--out", "x.mp3"], "unknown suffix '.mp3'"),
    (["generate", "RUN", "a", "b", "--out", "x.wav"], "one file, found 2 captions"),
    (["generate", "RUN", "a beep", "--out", "x.wav", "--seconds", "99"], "asked for 99.0 s"),
    (["generate", "RUN", "a beep", "--out", "x.wav", "--seconds", "long"], "not a valid float"),
    (["generate", "RUN", "a beep", "--out", "x.wav", "--sampler", "ddim"], "ddim"),
    (
        [
            "generate",
            "RUN",
            "a",
            "--out",
            "x.wav",
            "--guidance-scale",
            "2",
            "--guidance-weight",
            "1",
        ],
        "both --guidance-scale and --guidance-weight",
    ),
    (["generate", "RUN", "xyz " * 99, "--out", "x.wav"], "text tokens, the model has room for"),
    (["generate", "RUN", "a", "--out", "x.wav", "--seconds", "inf"], "generation.seconds=inf"),
    (["generate", "RUN", "a", "--out", "RUN/config.json/x.wav"], "config.json"),
    (["info", "base"], "found neither a folder nor a preset 'base'"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_a_mistake_is_one_line_and_exit_code_two(
    trip, tmp_path, capsys, monkeypatch, arguments, message
):
    from mllm_audio.cli import main

    folder, _, _ = trip
    places = {"RUN": folder / "run", "DATA": folder / "data", "MANIFEST": folder / "manifest.jsonl"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "mllm-audio",
            *[str(places.get(a, a.replace("RUN", str(places["RUN"])))) for a in arguments],
        ],
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    errors = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert message in errors[-1], errors
    assert errors[-1].startswith("error: ")
    assert not any("Traceback" in line for line in errors)
    assert not (Path(tmp_path) / "x.wav").exists()


def test_a_missing_optional_dependency_says_what_to_install(tmp_path, capsys, monkeypatch):
    from mllm_audio.cli import main

    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setattr(
        sys, "argv",
        ["mllm-audio", "prepare", str(sine_manifest(tmp_path)), "--out", str(tmp_path / "x"),
         "--tokenizer", f"audioldm:{tmp_path}"],
    )  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "mllm-audio[audioldm]" in capsys.readouterr().err
