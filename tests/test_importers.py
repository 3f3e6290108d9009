"""`mllm-audio import`: small copies of the published layouts, up to what `prepare` accepts."""

from __future__ import annotations

import csv
import io
import json
import sys
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import soundfile

TONE = (0.3 * np.sin(np.arange(8000) / 5)).astype(np.float32)


@pytest.fixture
def run(capsys, monkeypatch):
    """Type a command; return the exit code, its output and its last line of errors."""
    from mllm_audio.cli import main

    def type_in(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mllm-audio", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr()
        return int(stopped.value.code or 0), said.out, (said.err.strip().splitlines() or [""])[-1]

    return type_in


def sound(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, TONE, 16000)
    return path


def table(path: Path, header: str, *rows: tuple) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header.split(), *rows])


def manifest(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def check_prepared(run, folder: Path, expected: str) -> None:
    """Let `prepare` judge a manifest: every path must lead to sound."""
    code, said, error = run(
        "prepare", folder / "manifest.jsonl", "--out", folder / "prepared", "--num-workers", 0,
        "--validation-share", 0,
    )  # fmt: skip
    assert code == 0, error
    assert expected in said
    assert "rejected" not in said


AUDIOCAPS = "audiocap_id youtube_id start_time caption"
# Names that downloads give to a clip; ids begin with - and _, hold _, or begin with Y.
NAMES = {
    "-abcdefghi1": ("30", "-abcdefghi1_30.wav"),
    "_bcd_fghij2": ("30", "_bcd_fghij2_30000.flac"),
    "Ybc-efghij3": ("30", "YYbc-efghij3.wav"),
    "Ybc_efghij4": ("30", "Ybc_efghij4.wav"),
    "abcd_30_000": ("0", "abcd_30_000_0_10000.wav"),
    "abcdefghij_": ("7", "Yabcdefghij__7.000_17.000.wav"),
    "abcdefghij7": ("130", "abcdefghij7_130-140.wav"),
    "abcdefghij8": ("130", "1008.wav"),
}


def audiocaps(folder: Path) -> Path:
    rows = [(1001 + n, key, start, f"a {key}, of course") for n, (key, (start, _)) in
            enumerate(NAMES.items())]  # fmt: skip
    table(folder / "csv/train.csv", AUDIOCAPS, *rows)
    table(folder / "csv/val.csv", AUDIOCAPS, (2001, "vvvvvvvvvvv", "10", "wind"))
    five = [(3000 + n, "ttttttttttt", "20", f"wording {n}") for n in range(5)]
    table(folder / "csv/test.csv", AUDIOCAPS, *five, (3100, "uuuuuuuuuuu", "0", "rain"))
    for n, (_, name) in enumerate(NAMES.values()):
        sound(folder / f"clips/{n % 2}" / name)
    sound(folder / "clips/Yttttttttttt_20.wav")
    return folder


def test_audiocaps_finds_every_way_to_name_a_clip(run, tmp_path):
    folder, out = audiocaps(tmp_path), tmp_path / "out"
    code, said, error = run(
        "import", "audiocaps", folder / "csv", "--audio", folder / "clips", "--out", out
    )
    assert code == 0, error
    rows = manifest(out)
    found = {row["youtube_id"]: Path(row["audio"]).name for row in rows}
    assert found == {
        **{key: name for key, (_, name) in NAMES.items()},
        "ttttttttttt": "Yttttttttttt_20.wav",
    }
    (test,) = [row for row in rows if row["split"] == "test"]
    assert test["caption"] == "wording 0"
    assert test["captions"] == [f"wording {n}" for n in range(5)]
    assert rows[0]["caption"] == "a -abcdefghi1, of course"
    assert (out / "missing.txt").read_text().split() == ["vvvvvvvvvvv_10", "uuuuuuuuuuu_0"]
    assert "train       8 of 8 clips, published 49,838 (2.0: 91,256)" in said
    assert "validation  0 of 1 clips, published 495" in said
    assert "test        1 of 2 clips, published 975" in said
    assert "2 missing, named in" in said
    check_prepared(run, out, "8 train, 0 validation, 1 test")


def test_audiocaps_takes_the_clip_of_the_right_start(run, tmp_path):
    table(tmp_path / "train.csv", AUDIOCAPS, (1, "abcdefghijk", "30", "a"),
          (2, "abcdefghijk", "60", "b"), (3, "abcdefghijk", "90", "c"))  # fmt: skip
    for name in ("abcdefghijk_60.wav", "abcdefghijk_30000_40000.wav"):
        sound(tmp_path / "clips" / name)
    out = tmp_path / "out"
    code, _, error = run(
        "import", "audiocaps", tmp_path / "train.csv", "--audio", tmp_path / "clips", "--out", out
    )
    assert code == 0, error
    assert [(row["caption"], Path(row["audio"]).name) for row in manifest(out)] == [
        ("a", "abcdefghijk_30000_40000.wav"),
        ("b", "abcdefghijk_60.wav"),
    ]
    assert (out / "missing.txt").read_text() == "abcdefghijk_90\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ids.txt", "ttttttttttt\n\nsomeoneelse\n"),
        ("ids.txt", "Yttttttttttt.wav\nsomeoneelse"),
        ("ids.csv", "audiocap_id,caption\n3002,x\n9,y\n"),
        ("ids.csv", "file\nttttttttttt_20.wav\nsomeoneelse\n"),
        ("ids.json", '["ttttttttttt", "someoneelse"]'),
        ("ids.json", '[{"id": 3004}, {"id": 9}]'),
    ],
)
def test_ids_keep_test_clips_and_leave_other_splits(run, tmp_path, name, text):
    folder, ids = audiocaps(tmp_path), tmp_path / name
    ids.write_text(text)
    code, said, error = run(
        "import", "audiocaps", folder / "csv", "--audio", folder / "clips", "--out",
        tmp_path / "out", "--ids", ids,
    )  # fmt: skip
    assert code == 0, error
    assert "train       8 of 8" in said
    assert "test        1 of 1" in said
    assert f"{ids} names 2 clips, 1 of them in test.csv" in said


def test_a_second_import_forgets_what_was_missing(run, tmp_path):
    folder, out = audiocaps(tmp_path), tmp_path / "out"
    arguments = ["import", "audiocaps", folder / "csv", "--audio", folder / "clips", "--out", out]
    run(*arguments)
    assert (out / "missing.txt").is_file()
    sound(folder / "clips/vvvvvvvvvvv_10.wav")
    sound(folder / "clips/uuuuuuuuuuu.ogg")
    assert "missing" not in run(*arguments)[1]
    assert not (out / "missing.txt").exists()


def wavcaps(folder: Path) -> Path:
    def write(name: str, *entries: dict) -> None:
        (folder / "json").mkdir(parents=True, exist_ok=True)
        data = {"num_captions_per_audio": 1, "data": entries}
        (folder / "json" / name).write_text(json.dumps(data))

    write(
        "as_final.json",
        {"id": "Y-abcdefghi1.wav", "caption": "A dog barks.", "duration": 10, "audio": "wav_path"},
        {"id": "Yr1nicOVtvkQ.wav", "caption": "Water pours.", "duration": 10, "audio": "wav_path"},
    )
    write(
        "fsd_final.json",
        {"id": "2219", "caption": "A train.", "duration": 3.5, "download_link": "https://x"},
        {"id": "7", "caption": "A bell.", "duration": 3.5},
    )
    write("sb_final.json", {"id": "2219", "caption": "An airplane lands.", "duration": 14})
    for name in ("AudioSet_SL_flac/Y-abcdefghi1", "AudioSet_SL_flac/Yr1nicOVtvkQ",
                 "FreeSound_flac/2219", "SoundBible_flac/2219", "FreeSound_flac/7"):  # fmt: skip
        sound(folder / "mnt/waveforms" / f"{name}.flac")
    return folder


def test_wavcaps_keeps_sources_apart(run, tmp_path):
    folder, out = wavcaps(tmp_path), tmp_path / "out"
    code, said, error = run(
        "import", "wavcaps", folder / "json", "--audio", folder / "mnt", "--out", out
    )
    assert code == 0, error
    rows = {(row["source"], row["id"]): row for row in manifest(out)}
    assert len(rows) == 5
    assert rows["SoundBible", "2219"]["audio"].endswith("SoundBible_flac/2219.flac")
    assert rows["FreeSound", "2219"]["audio"].endswith("FreeSound_flac/2219.flac")
    assert rows["AudioSet_SL", "Y-abcdefghi1.wav"]["caption"] == "A dog barks."
    assert "AudioSet_SL  2 of 2 clips, published 108,317" in said
    assert "FreeSound    2 of 2 clips, published 262,300" in said
    check_prepared(run, out, "5 train")


def test_wavcaps_does_not_take_a_clip_of_another_source(run, tmp_path):
    folder, out = wavcaps(tmp_path), tmp_path / "out"
    (folder / "mnt/waveforms/SoundBible_flac/2219.flac").unlink()
    run("import", "wavcaps", folder / "json", "--audio", folder / "mnt", "--out", out)
    assert (out / "missing.txt").read_text() == "SoundBible/2219\n"


def test_wavcaps_leaves_out_blacklisted_clips_of_the_named_source(run, tmp_path):
    folder, out = wavcaps(tmp_path), tmp_path / "out"
    (tmp_path / "test_ac.json").write_text(
        json.dumps({"AudioSet": ["Yr1nicOVtvkQ.wav"], "FreeSound": ["2219"]})
    )
    (tmp_path / "mine.txt").write_text("7\n")
    code, said, error = run(
        "import", "wavcaps", folder / "json", "--audio", folder / "mnt", "--out", out,
        "--exclude", tmp_path / "test_ac.json", "--exclude", tmp_path / "mine.txt",
    )  # fmt: skip
    assert code == 0, error
    assert {(row["source"], row["id"]) for row in manifest(out)} == {
        ("AudioSet_SL", "Y-abcdefghi1.wav"),
        ("SoundBible", "2219"),
    }
    assert "3 excluded by --exclude" in said


def test_clotho_prefers_the_folder_of_the_part(run, tmp_path):
    header = "file_name caption_1 caption_2 caption_3 caption_4 caption_5"
    captions = [f"rain, {n}" for n in range(1, 6)]
    for part in ("development", "validation", "evaluation"):
        rows = [("a b.wav", *captions), (f"{part}.wav", *captions)]
        table(tmp_path / f"clotho_captions_{part}.csv", header, *rows)
        sound(tmp_path / "clips" / part / "a b.wav")
    sound(tmp_path / "clips/development.wav")
    out = tmp_path / "out"
    code, said, error = run(
        "import", "clotho", tmp_path, "--audio", tmp_path / "clips", "--out", out
    )
    assert code == 0, error
    rows = manifest(out)
    assert [(row["split"], row["audio"]) for row in rows] == [
        ("train", "../clips/development/a b.wav"),
        ("train", "../clips/development.wav"),
        ("validation", "../clips/validation/a b.wav"),
        ("test", "../clips/evaluation/a b.wav"),
    ]
    assert rows[0]["captions"] == captions
    assert (out / "missing.txt").read_text() == "validation.wav\nevaluation.wav\n"
    assert "train       2 of 2 clips, published 3,839 (v2.1)" in said
    check_prepared(run, out, "2 train, 1 validation, 1 test")


@cache  # Ogg draws a serial number
def encoded(container: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, TONE, 16000, format=container)
    return file.getvalue()


CONTAINERS = {"FLAC": ".flac", "WAV": ".wav", "OGG": ".ogg", "MP3": ".mp3", "AIFF": ".aiff"}


def saved_dataset(folder: Path) -> Path:
    from datasets import Audio, Dataset, DatasetDict

    def split(*kinds: str) -> Dataset:
        columns = {
            "audio": [{"bytes": encoded(kind), "path": None} for kind in kinds],
            "caption": [f"a {kind} tone" for kind in kinds],
            "license": ["CC0"] * len(kinds),
        }
        return Dataset.from_dict(columns).cast_column("audio", Audio())

    DatasetDict({"train": split(*CONTAINERS), "eval": split("WAV")}).save_to_disk(folder)
    return folder


def test_hf_writes_embedded_sound_unchanged(run, tmp_path):
    source, out = saved_dataset(tmp_path / "saved"), tmp_path / "out"
    code, said, error = run("import", "hf", source, "--out", out)
    assert code == 0, error
    assert "train  5 of 5 clips" in said
    rows = manifest(out)
    assert [row["split"] for row in rows] == ["train"] * 5 + ["test"]
    for row, (container, suffix) in zip(rows, CONTAINERS.items(), strict=False):
        assert Path(row["audio"]).suffix == suffix
        assert (out / row["audio"]).read_bytes() == encoded(container)
        assert row["license"] == "CC0"
    assert not list(out.glob("*.part*"))
    check_prepared(run, out, "5 train, 0 validation, 1 test")


def test_hf_reads_parquet_with_lists_of_captions_and_rows_without_sound(run, tmp_path):
    from datasets import Dataset

    Dataset.from_dict(
        {
            "sound": [{"bytes": encoded("FLAC"), "path": "x.flac"}, None, None],
            "text": [["one", " ", "two"], ["three"], []],
        }
    ).to_parquet(tmp_path / "source/data.parquet")
    columns = ["--audio-column", "sound", "--caption-column", "text", "--split", "train=validation"]
    out = tmp_path / "out"
    code, said, error = run("import", "hf", tmp_path / "source", "--out", out, *columns)
    assert code == 0, error
    (row,) = manifest(out)
    assert row["captions"] == ["one", "two"]
    assert row["split"] == "validation"
    assert (out / "missing.txt").read_text().splitlines() == [
        "train row 1: no sound",
        "train row 2: no sound",
    ]
    assert "validation  1 of 3 clips" in said


def test_hf_names_local_files_where_they_are(run, tmp_path):
    source, out = tmp_path / "folder", tmp_path / "out"
    sound(source / "train/a.flac")
    sound(source / "train/b.wav")
    (source / "train/metadata.csv").write_text("file_name,caption\na.flac,a tone\nb.wav,two\n")
    code, _, error = run("import", "hf", source, "--out", out)
    assert code == 0, error
    assert {(row["audio"], row["caption"]) for row in manifest(out)} == {
        ("../folder/train/a.flac", "a tone"),
        ("../folder/train/b.wav", "two"),
    }
    check_prepared(run, out, "2 train")


def test_hf_fetches_sound_behind_a_url(tmp_path):
    from mllm_audio.data.importers.huggingface import _place

    data = encoded("FLAC")
    with zipfile.ZipFile(tmp_path / "far.zip", "w") as file:
        file.writestr("a.flac", data)
    path = f"zip://a.flac::{tmp_path / 'far.zip'}"
    assert _place({"bytes": None, "path": path}, tmp_path, "x") == "audio/x.flac"
    assert (tmp_path / "audio/x.flac").read_bytes() == data


def test_hf_resumed_equals_uninterrupted(run, tmp_path, monkeypatch):
    from mllm_audio.data.importers import huggingface

    source = saved_dataset(tmp_path / "saved")
    run("import", "hf", source, "--out", tmp_path / "whole")
    out, place, calls = tmp_path / "out", huggingface._place, []

    def stop(value, folder, stem):
        calls.append(stem)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return place(value, folder, stem)

    monkeypatch.setattr(huggingface, "_place", stop)
    assert run("import", "hf", source, "--out", out)[0] == 130
    with (out / "manifest.jsonl.part").open("a") as file:
        file.write('train\t{"audio": "half a li')
    calls[:] = [""] * 9
    assert run("import", "hf", source, "--out", out)[0] == 0
    assert calls[9:] == ["train-0000003", "train-0000004", "eval-0000000"]
    assert manifest(out) == manifest(tmp_path / "whole")
    for row in manifest(out):
        assert (out / row["audio"]).read_bytes() == (tmp_path / "whole" / row["audio"]).read_bytes()
    assert run("import", "hf", source, "--out", out)[0] == 0
    assert len(calls) == 12


def test_hf_mistakes(run, tmp_path):
    from datasets import Dataset

    source, out = saved_dataset(tmp_path / "saved"), tmp_path / "out"
    cases = [
        (["nowhere"], "cannot open the dataset 'nowhere'"),
        ([source, "--caption-column", "text"], "found no column 'text' among audio, caption"),
        ([source, "--audio-column", "caption"], "the audio column holds 'a FLAC tone'"),
        ([source, "--split", "dev"], "--split dev: the dataset has train, eval"),
        ([source, "--split", "train=all"], "type --split train=train, =validation or =test"),
    ]
    for number, (arguments, message) in enumerate(cases):
        code, _, error = run("import", "hf", *arguments, "--out", tmp_path / f"out{number}")
        assert code == 2
        assert message in error
    Dataset.from_dict({"audio": [b"????"], "caption": ["x"]}).save_to_disk(tmp_path / "odd")
    _, _, error = run("import", "hf", tmp_path / "odd", "--out", tmp_path / "odd_out")
    assert "unknown container (first bytes b'????')" in error
    Dataset.from_dict({"audio": [b"fLaC"], "caption": [""]}).save_to_disk(tmp_path / "mute")
    _, _, error = run("import", "hf", tmp_path / "mute", "--out", tmp_path / "mute_out")
    assert "no row of the dataset can be used (train row 0: no caption)" in error
    run("import", "hf", source, "--out", out, "--split", "train")
    _, _, error = run("import", "hf", source, "--out", out)
    assert f"{out} holds an import with splits {{'train': 'train'}}" in error
    _, _, error = run("import", "hf", source, "--out", tmp_path)
    assert "is not empty and holds no import" in error


def test_mistakes_say_what_was_looked_for(run, tmp_path):
    folder = audiocaps(tmp_path / "ac")
    wav = wavcaps(tmp_path / "wc")
    sound(tmp_path / "other/noise.wav")
    (tmp_path / "empty").mkdir()
    (tmp_path / "ids.txt").write_text("someoneelse\n")
    (tmp_path / "none.txt").write_text("\n")
    (tmp_path / "group.json").write_text('{"Freesound": ["1"]}')
    (tmp_path / "ids.csv").write_text("video,start\nx,1\n")
    (tmp_path / "lfs").mkdir()
    (tmp_path / "lfs/fsd_final.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    table(tmp_path / "bad/train.csv", AUDIOCAPS, (1, "abcdefghijk", "soon", "x"))
    table(tmp_path / "odd/train.csv", "id text", (1, "x"))
    csvs, clips, other = folder / "csv", folder / "clips", tmp_path / "other"
    cases = [
        (["audiocaps", csvs, other], "none of the clips is among the 1 sound files"),
        (["audiocaps", csvs, other], "(e.g. noise.wav); looked for ID_START, ID_START_END"),
        (["audiocaps", csvs, tmp_path / "empty"], "holds no sound, expected files .wav, .flac"),
        (["audiocaps", csvs, tmp_path / "gone"], "gone is not a folder"),
        (["audiocaps", other, clips], "found none of train.csv, val.csv, test.csv"),
        (["audiocaps", tmp_path / "bad", clips], "train.csv:2: start_time is 'soon'"),
        (["audiocaps", tmp_path / "odd", clips], "train.csv:2: no audiocap_id"),
        (["audiocaps", tmp_path, clips], "expected one train.csv; type its folder"),
        (["audiocaps", csvs, clips, "--ids", tmp_path / "ids.txt"], "none of the 1 ids of"),
        (["audiocaps", csvs, clips, "--ids", tmp_path / "none.txt"], "holds no ids"),
        (["audiocaps", csvs, clips, "--ids", tmp_path / "ids.csv"], "holds no list of ids"),
        (["audiocaps", csvs, clips, "--ids", tmp_path / "gone.txt"], "gone.txt is not a file"),
        (["wavcaps", wav / "json", other], "looked for ID, with .wav stripped"),
        (["wavcaps", tmp_path / "lfs", clips], "git lfs pull"),
        (["wavcaps", wav / "json", wav, "--exclude", tmp_path / "group.json"],
         "lists ids of 'Freesound', expected one of AudioSet, AudioSet_SL, FreeSound"),
        (["clotho", csvs, clips], "found none of clotho_captions_development.csv"),
    ]  # fmt: skip
    for (kind, source, audio, *rest), message in cases:
        code, _, error = run(
            "import", kind, source, "--audio", audio, "--out", tmp_path / "out", *rest
        )
        assert code == 2
        assert message in error
    assert not (tmp_path / "out").exists()


def test_without_datasets_the_import_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "mllm_audio.data.importers.huggingface", raising=False)
    _, _, error = run("import", "hf", "x", "--out", tmp_path / "out")
    assert "pip install 'mllm-audio[datasets]'" in error
