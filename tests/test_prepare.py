"""Manifests and prepared folders: what is read, what is refused, and what survives a crash."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import mllm_audio.data.prepare as prepare_module
from mllm_audio import wav
from mllm_audio.data.clips import load_split
from mllm_audio.data.manifest import read_manifest, with_validation
from mllm_audio.data.prepare import prepare
from mllm_audio.data.shards import read_index
from mllm_audio.tokenizers import load_tokenizer

RATE = load_tokenizer("dct").sample_rate


def write_tone(path, seconds=0.3, rate=RATE, channels=1, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    times = np.arange(round(seconds * rate)) / rate
    frequency = 200 + sum(path.name.encode()) % 97 * 10  # another pitch for another name
    tone = 0.5 * np.sin(2 * np.pi * frequency * times)
    soundfile.write(path, np.stack([tone] * channels, 1), rate, **options)


def write_manifest(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tones(folder, count, **columns):
    """Write `count` sounds of different lengths and a manifest of them."""
    for i in range(count):
        write_tone(folder / f"{i}.wav", seconds=0.2 + 0.05 * (i % 5))
    rows = [{"audio": f"{i}.wav", "caption": f"tone {i}"} | columns for i in range(count)]
    return write_manifest(folder / "manifest.jsonl", rows)


def run(manifest, out, **options):
    return prepare(manifest, out, "dct", progress=False, **options)


def contents(out):
    """All bytes that readers of a prepared folder see."""
    files = [out / "index.json", out / "rejected.jsonl", *sorted((out / "shards").iterdir())]
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


def rejected(out):
    return [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]


# Manifests


@pytest.mark.parametrize("name", ["valid", "val", "dev", "validation"])
def test_other_names_of_the_validation_split_are_understood(tmp_path, name):
    manifest = tmp_path / "m.csv"
    manifest.write_text(f"audio,caption,split\na.wav,a sound,{name}\n")
    assert [row.split for row in read_manifest(manifest)] == ["validation"]


def test_jsonl_row_keeps_wordings_in_order_and_other_columns_as_text(tmp_path):
    row = {"audio": "a.wav", "caption": " b ", "captions": ["c", "b"], "fold": 1, "label": "x"}
    manifest = write_manifest(tmp_path / "m.jsonl", [row])
    (read,) = read_manifest(manifest)
    assert (read.audio, read.captions, read.split, read.line) == ("a.wav", ("b", "c"), "train", 1)
    assert read.extra == {"fold": "1", "label": "x"}


def test_csv_equals_jsonl(tmp_path):
    (tmp_path / "m.csv").write_text(
        '\ufeffaudio,caption,split,label\na.wav,"one, two",test,x\nb.wav,"a\nb",,y\n'
    )
    rows = [
        {"audio": "a.wav", "caption": "one, two", "split": "test", "label": "x"},
        {"audio": "b.wav", "caption": "a\nb", "label": "y"},
    ]
    expected = read_manifest(write_manifest(tmp_path / "m.jsonl", rows))
    found = read_manifest(tmp_path / "m.csv")
    # The cell of the second row spans two lines, and the header is a line.
    assert [replace(row, line=0) for row in found] == [replace(row, line=0) for row in expected]
    assert [row.line for row in found] == [2, 4]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.jsonl", '{"audio": "a"}\n', r"m\.jsonl:1: no 'caption' among the columns \['audio'\]"),
        ("m.jsonl", '{"audio": "a", "caption": "b"}\n\n{"audio', r"m\.jsonl:3: broken JSON"),
        ("m.jsonl", "[1]\n", r"m\.jsonl:1: found '\[1\]', expected a JSON object"),
        ("m.jsonl", '{"audio": "a", "caption": " "}', r":1: caption is ' ', expected text"),
        ("m.jsonl", '{"audio": 7, "caption": "b"}', r":1: audio is 7, expected text"),
        ("m.jsonl", '{"audio": "a", "caption": "\\ud800"}', r":1: .*expected valid Unicode"),
        ("m.jsonl", '{"audio": "a", "caption": "b", "captions": "c"}', r":1: captions is 'c'"),
        ("m.jsonl", '{"audio": "a", "caption": "b", "captions": [""]}', r":1: captions is ''"),
        ("m.jsonl", '{"audio": "a", "caption": "b", "split": "devel"}', r":1: split is 'devel'"),
        ("m.jsonl", "", "has no rows"),
        ("m.jsonl", b"\xff\xfe", "not UTF-8"),
        ("m.csv", "audio,text\na,b\n", r"m\.csv:2: no 'caption' among the columns"),
        ("m.csv", "audio,caption\na,b\na,b,c\n", r"m\.csv:3: the number of cells"),
        ("m.csv", "audio,caption\na\n", r"m\.csv:2: the number of cells"),
        ("m.csv", 'audio,caption\na,"b"c\n', r"m\.csv:2: broken CSV"),
        ("m.csv", "audio,caption,captions\na,b,c\n", r"m\.csv:1: column 'captions' holds lists"),
        ("m.tsv", "audio\tcaption\n", r"ends in '\.tsv', expected \.jsonl or \.csv"),
    ],
)
def test_broken_manifest_is_refused_with_its_line(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path / name)


def test_missing_manifest_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.csv is not a file"):
        read_manifest(tmp_path / "none.csv")


def test_validation_share_depends_on_the_paths_alone(tmp_path):
    rows = [{"audio": f"{i // 2}.wav", "caption": str(i)} for i in range(2000)]
    rows[-1]["split"] = "test"
    read = read_manifest(write_manifest(tmp_path / "m.jsonl", rows))
    split = {row.audio: row.split for row in with_validation(read, 0.1)}
    assert 70 < list(split.values()).count("validation") < 130
    assert with_validation(read, 0.1)[-1].split == "test"
    backwards = with_validation(read[::-1], 0.1)
    assert {row.audio: row.split for row in backwards[::-1]} == split
    # Both rows of a file are on the same side.
    assert len({(row.audio, row.split) for row in backwards if row.split != "test"}) == 1000


def test_validation_share_leaves_named_splits_alone_and_takes_at_least_one_file(tmp_path):
    rows = [{"audio": f"{i}.wav", "caption": "c"} for i in range(3)]
    read = read_manifest(write_manifest(tmp_path / "m.jsonl", rows))
    count = [row.split for row in with_validation(read, 0.001)].count("validation")
    assert count == 1
    assert [row.split for row in with_validation(read, 0.999)].count("train") >= 1
    assert with_validation(read, 0) == read
    assert with_validation(read[:1], 0.5) == read[:1]
    named = [*read, replace(read[0], split="validation")]
    assert with_validation(named, 0.5) == named


# Contents


def test_any_rate_channel_count_and_format_is_prepared(tmp_path):
    kinds = [
        ("a.wav", {"rate": 8000, "subtype": "PCM_16"}),
        ("b.wav", {"rate": 44100, "channels": 2, "subtype": "PCM_24"}),
        ("c.wav", {"rate": 48000, "channels": 5, "subtype": "FLOAT"}),
        ("deep/d.flac", {"rate": 22050, "channels": 2}),
        ("e.ogg", {"rate": 16000}),
        ("f.ogg", {"rate": 44100, "channels": 2}),
    ]
    for name, options in kinds:
        write_tone(tmp_path / name, seconds=0.5, **options)
    lines = "".join(f"{name},tone,train\n" for name, _ in kinds)
    (tmp_path / "m.csv").write_text("audio,caption,split\n" + lines)
    report = run(tmp_path / "m.csv", tmp_path / "out", validation_share=0)
    assert report.num_rejected == 0
    tokenizer = load_tokenizer("dct")
    clips = load_split(tmp_path / "out", "train")
    assert [clip.name for clip in clips] == [name for name, _ in kinds]
    for clip in clips:
        assert abs(clip.num_samples - 0.5 * RATE) <= 2
        columns = -(-clip.num_samples // tokenizer.samples_per_column)
        assert clip.num_tokens == columns * tokenizer.tokens_per_column
        assert clip.latents().shape == (clip.num_tokens, tokenizer.latent_dim)


def test_latents_equal_the_tokenizer_and_statistics_a_direct_computation(tmp_path):
    manifest = tones(tmp_path, 7, note="x")
    run(manifest, tmp_path / "out", shard_size=3, validation_share=0.3)
    index = read_index(tmp_path / "out")
    train = load_split(tmp_path / "out", "train")
    validation = load_split(tmp_path / "out", "validation")
    assert index.counts == {"train": len(train), "validation": len(validation), "test": 0}
    assert len(index.shards) == 3
    assert sum(shard.num_clips for shard in index.shards) == 7
    first = [clip.split for clip in sorted([*train, *validation], key=lambda c: c.name)[:3]]
    assert index.shards[0].counts == {s: first.count(s) for s in ("train", "validation", "test")}
    longest = max(clip.num_tokens for clip in [*train, *validation])
    names = sorted(c.name for c in [*train, *validation] if c.num_tokens == longest)
    assert (index.longest_clip, index.longest_clip_name) == (longest, names[0])
    assert train[0].extra == {"note": "x"}
    tokenizer = load_tokenizer("dct")
    for clip in [*train, *validation]:
        waveform = wav.read(tmp_path / clip.name, tokenizer.sample_rate).waveform
        waveform = wav.normalize_level(waveform)
        torch.testing.assert_close(
            clip.latents(), tokenizer.encode(waveform[None])[0].half().float(), rtol=2e-3, atol=1e-4
        )
        assert clip.captions == (f"tone {clip.name[0]}",)
    latents = torch.cat([clip.latents() for clip in train]).double()
    mean, std = torch.tensor(index.latent_mean), torch.tensor(index.latent_std)
    torch.testing.assert_close(mean, latents.mean(0).float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(std, latents.std(0, correction=0).float(), rtol=1e-5, atol=1e-6)


def test_clips_survive_pickling(tmp_path):
    run(tones(tmp_path, 2), tmp_path / "out", validation_share=0)
    (clip, _) = load_split(tmp_path / "out", "train")
    latents = clip.latents()  # the memory map is open now
    assert pickle.loads(pickle.dumps(clip)).latents().equal(latents)


def test_crop_keeps_the_head_or_a_part_drawn_from_seed_and_path(tmp_path):
    for name in ("a.wav", "b.wav"):
        rng = np.random.default_rng(0)
        soundfile.write(tmp_path / name, 0.3 * rng.standard_normal(2 * RATE), RATE)
    manifest = write_manifest(
        tmp_path / "m.jsonl", [{"audio": f"{name}.wav", "caption": "c"} for name in "ab"]
    )

    def latents(out, **options):
        run(manifest, tmp_path / out, max_seconds=0.5, validation_share=0, **options)
        clips = load_split(tmp_path / out, "train")
        assert {clip.num_samples for clip in clips} == {RATE // 2}
        return [clip.latents() for clip in clips]

    head, one, again, other = (
        latents("head"),
        latents("one", crop="random", seed=1),
        latents("again", crop="random", seed=1),
        latents("other", crop="random", seed=2),
    )
    assert head[0].equal(head[1])
    assert one[0].equal(again[0])
    assert not one[0].equal(one[1])  # another path, another part
    assert not one[0].equal(other[0])  # another seed, another part


# Rejections


def test_unusable_files_are_named_with_their_reason(tmp_path):
    manifest = tones(tmp_path, 10)
    (tmp_path / "1.wav").write_bytes(b"not sound at all")
    (tmp_path / "2.wav").unlink()
    write_tone(tmp_path / "3.wav", seconds=0)
    write_tone(tmp_path / "4.wav", seconds=1.5)
    write_tone(tmp_path / "5.wav", seconds=3)
    soundfile.write(tmp_path / "6.wav", np.full(RATE, np.nan), RATE, subtype="FLOAT")
    (tmp_path / "7.wav").write_bytes(b"")
    options = {"crop": "reject", "max_seconds": 1, "longest_file_seconds": 2, "shard_size": 4}
    soundfile.write(tmp_path / "9.wav", np.ones(1), 100 * RATE)  # nothing is left at RATE
    report = run(manifest, tmp_path / "out", validation_share=0, **options)
    reasons = {row["audio"]: row["reason"] for row in rejected(tmp_path / "out")}
    assert list(reasons) == [f"{i}.wav" for i in (*range(1, 8), 9)]
    for i, words in {
        1: "not readable sound",
        2: "is not a file",
        3: "holds no samples",
        4: r"too long: 1\.50 s, max_seconds is 1$",
        5: r"too long: 3\.0 s, longest_file_seconds is 2$",
        6: "NaN or infinite",
        7: "not readable sound",
        9: f"no samples at {RATE} Hz",
    }.items():
        assert re.search(words, reasons[f"{i}.wav"]), reasons
    assert [row["line"] for row in rejected(tmp_path / "out")] == [*range(2, 9), 10]
    assert report.num_rejected == 8
    assert "8 rows rejected, see " + str(report.rejected_path) in str(report)
    assert [clip.name for clip in load_split(tmp_path / "out", "train")] == ["0.wav", "8.wav"]


def test_repaired_file_is_tried_again(tmp_path):
    manifest = tones(tmp_path, 6)
    shutil.move(tmp_path / "1.wav", tmp_path / "away.wav")
    assert run(manifest, tmp_path / "out", shard_size=3).num_rejected == 1
    shutil.move(tmp_path / "away.wav", tmp_path / "1.wav")
    assert run(manifest, tmp_path / "out", shard_size=3).num_rejected == 0
    run(manifest, tmp_path / "whole", shard_size=3)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("scale", "reason"), [(1e6, "float16 holds 65504"), (np.inf, "not finite")]
)
def test_latents_beyond_float16_are_rejected(tmp_path, monkeypatch, scale, reason):
    class Loud(type(load_tokenizer("dct"))):
        def encode(self, waveforms):
            latents = super().encode(waveforms)
            return latents * scale if waveforms.shape[1] == RATE // 5 else latents

    manifest = tones(tmp_path, 2)  # the first lasts a fifth of a second
    loud = load_tokenizer("dct")
    loud.__class__ = Loud
    monkeypatch.setattr(prepare_module, "load_tokenizer", lambda spec: loud)
    run(manifest, tmp_path / "out", validation_share=0)
    ((row),) = rejected(tmp_path / "out")
    assert row["audio"] == "0.wav"
    assert reason in row["reason"]


def test_all_rows_rejected_is_an_error(tmp_path):
    manifest = write_manifest(tmp_path / "m.jsonl", [{"audio": "x.wav", "caption": "c"}])
    with pytest.raises(
        ValueError, match=r"no train row is left of 1 rows .* first because: .*x\.wav"
    ):
        run(manifest, tmp_path / "out")
    write_tone(tmp_path / "x.wav")
    assert run(manifest, tmp_path / "out").counts["train"] == 1


# Resuming


# The command line with slow workers, which say when they begin to import.
SLOW = """
import pathlib, sys, time
if __name__ == "__mp_main__":
    pathlib.Path(__file__).with_name("importing").touch()
    time.sleep(0.2)
from mllm_audio import wav
read = wav.read
wav.read = lambda *args: (time.sleep(0.04), read(*args))[1]
if __name__ == "__main__":
    from mllm_audio.cli import main
    main()
"""


def start(manifest, out, until, **options):
    """Begin a slow run of the command line in a session of its own; return when `until()`."""
    script = manifest.with_name("slow.py")
    script.write_text(SLOW)
    arguments = ["prepare", str(manifest), "--out", str(out), "--tokenizer", "dct"]
    for name, value in options.items():
        arguments += ["--" + name.replace("_", "-"), str(value)]
    root = Path(prepare_module.__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments],
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        # A test run in the background of a shell inherits an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not until():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "the run did not get there in a minute"
        time.sleep(0.005)
    return process


def members(session):
    """Count the processes of a session that are still alive."""
    stats = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            stats.append(path.read_text().rpartition(")")[2].split())
        except OSError:  # ended meanwhile
            continue
    return sum(int(fields[3]) == session and fields[0] != "Z" for fields in stats)


@pytest.mark.parametrize(
    ("sent", "while_importing"),
    [(signal.SIGKILL, False), (signal.SIGINT, False), (signal.SIGINT, True)],
)
def test_killed_and_resumed_equals_uninterrupted(tmp_path, sent, while_importing):
    manifest = tones(tmp_path, 40)
    (tmp_path / "33.wav").write_bytes(b"broken")
    options = {"shard_size": 4, "seed": 3, "crop": "random", "max_seconds": 0.3}
    out = tmp_path / "out"

    def until():
        if while_importing:
            return (tmp_path / "importing").exists()
        return len(list((out / "records").glob("*.json"))) >= 2

    process = start(manifest, out, until, num_workers=1, **options)
    if sent == signal.SIGINT:  # a terminal sends Ctrl-C to parent and workers
        os.killpg(process.pid, sent)
    else:
        process.send_signal(sent)
    _, stderr = process.communicate(timeout=30)
    if sent == signal.SIGINT:
        assert process.returncode == 130
        assert stderr.splitlines()[-1].startswith("error: interrupted")
        assert "Traceback" not in stderr
    else:
        assert process.returncode == -sent
    deadline = time.monotonic() + 20
    while members(process.pid):
        assert time.monotonic() < deadline, "workers outlived the parent"
        time.sleep(0.05)
    with pytest.raises(ValueError, match=r"is not complete; finish it with `mllm-audio prepare "):
        load_split(out, "train")
    kept = {path: path.stat().st_mtime_ns for path in (out / "records").glob("*.json")}
    assert (0 if while_importing else 2) <= len(kept) < 10
    assert not run(manifest, out, **options).already_complete
    assert kept.items() <= {p: p.stat().st_mtime_ns for p in (out / "records").iterdir()}.items()
    run(manifest, tmp_path / "whole", **options)
    assert contents(out) == contents(tmp_path / "whole")
    assert not list(out.rglob("*.tmp"))


class Crash(BaseException):
    """Ends a run as a kill does: nothing may catch it."""


def test_crash_at_any_write_and_resumed_equals_uninterrupted(tmp_path, monkeypatch):
    manifest = tones(tmp_path, 2)
    run(manifest, tmp_path / "whole", shard_size=1)
    fsync = os.fsync

    def crash_at(call):
        calls = itertools.count()

        def crash(descriptor):
            if next(calls) == call:
                raise Crash
            fsync(descriptor)

        return crash

    # Each file syncs itself, then its folder: the index, three files of each shard, the
    # rejected rows, the index again.
    for call in range(2 * (1 + 2 * 3 + 1 + 1)):
        out = tmp_path / f"out{call}"
        monkeypatch.setattr(os, "fsync", crash_at(call))
        with pytest.raises(Crash):
            run(manifest, out, shard_size=1)
        monkeypatch.undo()
        run(manifest, out, shard_size=1)
        assert contents(out) == contents(tmp_path / "whole")
        assert not list(out.rglob("*.tmp"))


def test_parallel_equals_serial(tmp_path):
    manifest = tones(tmp_path, 11)
    (tmp_path / "4.wav").unlink()
    run(manifest, tmp_path / "serial", shard_size=3)
    run(manifest, tmp_path / "parallel", shard_size=3, num_workers=2)
    assert contents(tmp_path / "serial") == contents(tmp_path / "parallel")


def test_finished_folder_is_said_to_be_complete_and_left_alone(tmp_path):
    manifest = tones(tmp_path, 3)
    report = run(manifest, tmp_path / "out")
    assert not report.already_complete
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    report = run(manifest, tmp_path / "out", num_workers=2)
    assert report.already_complete
    assert "was already complete: 2 train, 1 validation, 0 test clips" in str(report)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


def test_full_disk_is_one_line_and_the_run_resumes(tmp_path, monkeypatch):
    manifest = tones(tmp_path, 6)
    fsync, calls = os.fsync, []

    def fail_late(descriptor):
        calls.append(descriptor)
        if len(calls) > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_late)
    with pytest.raises(
        OSError, match=r"cannot write .* \(No space left on device\); free space"
    ) as e:
        run(manifest, tmp_path / "out", shard_size=2)
    assert "\n" not in str(e.value)
    assert e.value.errno == errno.ENOSPC
    assert not list((tmp_path / "out").rglob("*.tmp"))
    monkeypatch.undo()
    run(manifest, tmp_path / "out", shard_size=2)
    run(manifest, tmp_path / "whole", shard_size=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_error_in_a_worker_reaches_the_caller(tmp_path):
    manifest = tones(tmp_path, 4)
    out = tmp_path / "out"
    run(manifest, out, shard_size=2)
    # A folder where the shard should go: the worker cannot replace it.
    (out / "shards" / "00001.safetensors").unlink()
    (out / "shards" / "00001.safetensors").mkdir()
    with pytest.raises(OSError, match=r"cannot write .*00001\.safetensors"):
        run(manifest, out, shard_size=2, num_workers=1)


def test_killed_worker_is_reported_instead_of_waited_for(tmp_path):
    manifest = tones(tmp_path, 4)

    def kill_first_child():
        while not multiprocessing.active_children():
            time.sleep(0.005)
        multiprocessing.active_children()[0].kill()

    killer = threading.Thread(target=kill_first_child)
    killer.start()
    with pytest.raises(RuntimeError, match=r"exit code -9, expected 0 .* with fewer workers"):
        run(manifest, tmp_path / "out", num_workers=1)
    killer.join()


# Refusals


@pytest.mark.parametrize("name", ["00000.safetensors", "00001.jsonl"])
@pytest.mark.parametrize("change", ["flip", "truncate", "delete"])
def test_damaged_shard_is_refused_and_repaired_by_the_command_named(tmp_path, name, change):
    manifest = tones(tmp_path, 4)
    run(manifest, tmp_path / "out", shard_size=2, validation_share=0)
    whole = contents(tmp_path / "out")
    file = tmp_path / "out" / "shards" / name
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data if change == "flip" else data[:-1])
    if change == "delete":
        file.unlink()
    command = (
        f"mllm-audio prepare {manifest} --out {tmp_path}/out --tokenizer dct --validation-share 0.0"
    )
    with pytest.raises(ValueError, match=re.escape(f"{file} is missing or differs")) as error:
        load_split(tmp_path / "out", "train")
    assert f"`{command} --shard-size 2`" in str(error.value)
    run(manifest, tmp_path / "out", shard_size=2, validation_share=0)
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_seconds", 5.0),
        ("crop", "random"),
        ("seed", 1),
        ("shard_size", 1),
        ("validation_share", 0.5),
        ("longest_file_seconds", 9.0),
    ],
)
def test_changed_setting_is_refused(tmp_path, option, value):
    manifest = tones(tmp_path, 2)
    run(manifest, tmp_path / "out")
    message = rf"{option} was .*, now {value!r}\. .*or continue this one with `mllm-audio prepare"
    with pytest.raises(ValueError, match=message):
        run(manifest, tmp_path / "out", **{option: value})


def test_changed_manifest_or_tokenizer_is_refused(tmp_path, monkeypatch):
    manifest = tones(tmp_path, 2)
    run(manifest, tmp_path / "out")
    index = tmp_path / "out" / "index.json"
    text = index.read_text()
    fingerprint = load_tokenizer("dct").fingerprint
    index.write_text(text.replace(fingerprint, "0ther"))
    with pytest.raises(ValueError, match=f"tokenizer fingerprint was '0ther', now '{fingerprint}'"):
        run(manifest, tmp_path / "out")
    index.write_text(text)
    manifest.write_text(manifest.read_text().replace("tone 1", "tone one"))
    with pytest.raises(ValueError, match="SHA-256 of the manifest was"):
        run(manifest, tmp_path / "out")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("max_seconds", 0, "max_seconds is 0.0, expected a positive"),
        ("longest_file_seconds", float("nan"), "longest_file_seconds is nan"),
        ("crop", "tail", "crop is 'tail', expected one of head, random, reject"),
        ("validation_share", 1, "validation_share is 1.0, expected"),
        ("shard_size", 0, "shard_size is 0, expected at least 1"),
        ("num_workers", -1, "num_workers is -1, expected 0 or more"),
    ],
)
def test_wrong_setting_is_refused(tmp_path, option, value, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "m.jsonl", tmp_path / "out", **{option: value})


def test_foreign_folder_is_refused(tmp_path):
    manifest = tones(tmp_path, 1)
    with pytest.raises(ValueError, match="exists and was not made by prepare"):
        run(manifest, tmp_path)
    with pytest.raises(ValueError, match="exists and was not made by prepare"):
        run(manifest, manifest)


def test_conversation_without_an_answer_is_refused_before_anything_is_encoded(tmp_path):
    talk = [{"role": "user", "content": [{"type": "audio", "audio": "0.wav"}]}]
    answer = [{"role": "assistant", "content": "a tone"}]
    rows = [{"messages": talk + answer}, {"messages": talk, "split": "test"}]
    manifest = write_manifest(tmp_path / "m.jsonl", rows)
    with pytest.raises(ValueError, match=r"m\.jsonl:2: no assistant message, expected one to lea"):
        run(manifest, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unreadable_index_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no index\.json"):
        read_index(tmp_path)
    run(tones(tmp_path, 2), tmp_path / "out")
    index = tmp_path / "out" / "index.json"
    text = index.read_text()
    for broken, message in [
        (text[:99], "is damaged"),
        (
            text.replace('"format_version": 2', '"format_version": 1'),
            "format_version 1, expected 2; prepare the manifest again into a new folder",
        ),
        (text.replace('"num_rows": 2,', ""), "is damaged .*num_rows"),
        (text.replace('"num_rows": 2', '"num_rows": "x"'), "num_rows='x'"),
        (text.replace('"seed"', '"sead"'), "unknown key 'sead'.*did you mean 'seed'"),
    ]:
        index.write_text(broken)
        with pytest.raises(ValueError, match=message):
            read_index(tmp_path / "out")


def test_unknown_split_is_refused_and_an_unused_one_is_empty(tmp_path):
    run(tones(tmp_path, 2), tmp_path / "out")
    assert load_split(tmp_path / "out", "test") == []
    with pytest.raises(ValueError, match="split is 'dev', expected one of train"):
        load_split(tmp_path / "out", "dev")
