"""`generate --captions FILE`: a sound per row, named after its recording, continued."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import CAPTIONS

from mllm_audio import wav
from mllm_audio.data.requests import read_requests
from mllm_audio.generation.decode import GenerationConfig
from mllm_audio.generation.requests import generate_requests
from mllm_audio.generation.voice import Voice
from mllm_audio.tokenizers import load_tokenizer

CONFIG = GenerationConfig(num_inference_steps=2, seconds=0.32, guidance_scale=1.0)


@pytest.fixture
def voice(make_model, text_tokenizer, tmp_path):
    made = Voice(make_model(), text_tokenizer, load_tokenizer("dct"), CONFIG)
    made.save(tmp_path / "run")
    return made


@pytest.fixture
def manifest(tmp_path):
    path = tmp_path / "test.jsonl"
    rows = [
        {
            "audio": f"clips/b{i}.flac",
            "caption": c,
            "label": "x",
            "split": ["test", "train"][i == 1],
        }
        for i, c in enumerate(CAPTIONS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_become_sounds_named_after_their_recordings(voice, manifest, tmp_path):
    requests = read_requests(manifest, seed=5, split="test")
    assert [(r.name, r.seed) for r in requests] == [("b0", 5), ("b2", 6), ("b3", 7)]
    paths = generate_requests(voice, tmp_path / "run", requests, tmp_path / "out", CONFIG)
    assert [p.name for p in paths] == ["b0.wav", "b2.wav", "b3.wav"]
    rows = [json.loads(line) for line in (tmp_path / "out/captions.jsonl").open()]
    assert rows[1] == {
        "audio": "b2.wav", "caption": CAPTIONS[2], "label": "x", "split": "test", "seed": 6,
    }  # fmt: skip
    clip = voice.generate([CAPTIONS[2]], CONFIG, seed=6)[0]
    written = wav.read(paths[1], clip.sample_rate).waveform
    assert (written - clip.waveform / max(1, clip.waveform.abs().max())).abs().max() < 1e-3


def test_a_broken_off_folder_is_continued_without_making_sounds_again(voice, manifest, tmp_path):
    requests = read_requests(manifest)
    out, run = tmp_path / "out", tmp_path / "run"
    first = [p.read_bytes() for p in generate_requests(voice, run, requests, out, CONFIG)]
    (out / "b2.wav").unlink()
    (out / ".b2.wav").write_bytes(b"half")
    before = (out / "b0.wav").stat().st_mtime_ns
    paths = generate_requests(voice, run, requests, out, CONFIG, batch_size=1)
    assert (out / "b0.wav").stat().st_mtime_ns == before
    assert not (out / ".b2.wav").exists()
    again = [path.read_bytes() for path in paths]
    assert again[:2] + again[3:] == first[:2] + first[3:]
    # Float rounding in another batch may change the phase that is recovered, not the length.
    assert len(again[2]) == len(first[2])


def test_other_settings_are_refused_by_name(voice, manifest, tmp_path):
    requests = read_requests(manifest)
    out, run = tmp_path / "out", tmp_path / "run"
    generate_requests(voice, run, requests, out, CONFIG)
    with pytest.raises(ValueError, match="was generated with other generation; type another --out"):
        generate_requests(voice, run, requests, out, replace(CONFIG, temperature=0.5))
    with pytest.raises(ValueError, match="other requests"):
        generate_requests(voice, run, requests[:1], out, CONFIG)
    with torch.no_grad():
        voice.model.audio.null_prompt.add_(1)
    voice.save(run)
    with pytest.raises(ValueError, match="other weights"):
        generate_requests(voice, run, requests, out, CONFIG)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "a.wav").touch()
    with pytest.raises(ValueError, match="holds sounds but no"):
        generate_requests(voice, run, requests, foreign, CONFIG)


def test_text_lines_are_numbered_and_mistakes_are_named(tmp_path, manifest):
    path = tmp_path / "captions.txt"
    path.write_text("a dog barks\n\nrain\n")
    assert [(r.name, r.caption) for r in read_requests(path)] == [
        ("000", "a dog barks"), ("001", "rain"),
    ]  # fmt: skip
    assert len(read_requests(path, limit=1)) == 1
    with pytest.raises(ValueError, match="has no rows of split validation"):
        read_requests(manifest, split="validation")
    with manifest.open("a") as file:
        file.write(json.dumps({"audio": "other/b0.wav", "caption": "again"}) + "\n")
    with pytest.raises(ValueError, match=r"test.jsonl:5: a second row named 'b0'"):
        read_requests(manifest)


def test_the_command_makes_them(voice, manifest, tmp_path):
    command = ["generate", tmp_path / "run", "--captions", manifest, "--out", tmp_path / "out"]
    command += ["--limit", "2", "--seed", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "mllm_audio", *map(str, command)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "b0.wav", "b1.wav", "captions.jsonl", "generation.json", "timing.json",
    ]  # fmt: skip
