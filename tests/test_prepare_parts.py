"""Preparing one manifest as parts on many machines, and joining them."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import sine_manifest
from test_conversations import TALKS, write_rows
from test_prepare import Crash, run, tones

from mllm_audio.cli import cli
from mllm_audio.data.clips import load_split
from mllm_audio.data.conversations import load_conversations
from mllm_audio.data.merge import merge
from mllm_audio.data.shards import read_index
from mllm_audio.tokenizers import load_tokenizer

SCRIPT = Path(__file__).parents[1] / "scripts/prepare_slurm.sh"


def every_file(out):
    """All bytes of a prepared folder but its lock."""
    files = [path for path in out.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


def prepare_parts(manifest, folder, num_parts, **options):
    folders = [folder / f"{part}-of-{num_parts}" for part in range(1, num_parts + 1)]
    for part, out in enumerate(folders, start=1):
        run(manifest, out, part=part, num_parts=num_parts, **options)
    return folders


def join(folders, out):
    return merge(folders, out, progress=False)


def type_command(message):
    """Run the last command that an error names."""
    program, *arguments = shlex.split(re.findall(r"`([^`]+)`", message)[-1])
    assert program == "mllm-audio"
    cli.main(arguments, standalone_mode=False)


FSYNC = os.fsync


def crash_at(monkeypatch, call):
    """End the run as a kill does when a file or folder is synced for the `call`-th time."""
    calls = itertools.count()

    def crash(descriptor):
        if next(calls) == call:
            raise Crash
        FSYNC(descriptor)

    monkeypatch.setattr(os, "fsync", crash)


def refuse_links(monkeypatch, code=errno.EXDEV):
    """Let no file be linked, as between two file systems."""

    def refuse(*arguments, **options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)


@pytest.fixture
def captions(tmp_path):
    """Eleven sounds in four shards; two are rejected, the second shard holds no train row."""
    manifest = tones(tmp_path, 11)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for row in rows[3:6]:
        row["split"] = "test"
    write_rows(manifest, rows)
    (tmp_path / "1.wav").unlink()
    (tmp_path / "7.wav").write_bytes(b"broken")
    return manifest


OPTIONS = {"shard_size": 3, "validation_share": 0.2}


@pytest.fixture
def parts(captions, tmp_path):
    return prepare_parts(captions, tmp_path / "parts", 2, **OPTIONS)


@pytest.fixture
def whole(captions, tmp_path):
    run(captions, tmp_path / "whole", **OPTIONS)
    return tmp_path / "whole"


# Equality


@pytest.mark.parametrize("num_parts", [1, 2, 4, 6])  # of four shards: the last has empty parts
def test_merged_parts_are_the_bytes_of_a_single_run(captions, whole, tmp_path, num_parts):
    folders = prepare_parts(captions, tmp_path / "parts", num_parts, **OPTIONS)
    report = join(folders[::-1], tmp_path / "out")
    assert every_file(tmp_path / "out") == every_file(whole)
    assert not report.already_complete
    assert str(report) == str(run(captions, whole, **OPTIONS)).replace(
        "whole was already", "out is"
    ).replace("whole", "out")
    assert run(captions, tmp_path / "out", **OPTIONS).already_complete
    assert join(folders, tmp_path / "out").already_complete
    indexes = [read_index(folder, allow_incomplete=True) for folder in folders]
    assert sum(index.counts["train"] for index in indexes) == report.counts["train"] > 0
    if num_parts == 4:
        assert indexes[1].counts == {"train": 0, "validation": 0, "test": 3}
    if num_parts == 6:
        assert [index.shards for index in indexes[4:]] == [(), ()]


def test_merged_conversations_are_the_bytes_of_a_single_run(tmp_path):
    sine_manifest(tmp_path)
    (tmp_path / "4.wav").unlink()
    manifest = write_rows(tmp_path / "talks.jsonl", TALKS)
    run(manifest, tmp_path / "whole", shard_size=2)
    folders = prepare_parts(manifest, tmp_path / "parts", 3, shard_size=2)
    report = join(folders, tmp_path / "out")
    assert every_file(tmp_path / "out") == every_file(tmp_path / "whole")
    assert (report.num_conversations, report.num_dropped) == (4, 1)
    assert run(manifest, tmp_path / "out", shard_size=2).already_complete
    assert len(load_conversations(tmp_path / "out", "train")) == 3
    # Every part need not keep them all.
    assert [(folder / "conversations.jsonl").exists() for folder in folders] == [True, False, False]


def test_part_is_complete_when_run_again_and_says_what_it_is(captions, parts):
    report = run(captions, parts[1], part=2, num_parts=2, **OPTIONS)
    assert report.already_complete
    assert f"{parts[1]} was already complete as part 2 of 2: " in str(report)
    names = sorted(file.name for file in (parts[1] / "shards").iterdir())
    assert names == [f"0000{k}.{end}" for k in (1, 3) for end in ("jsonl", "safetensors")]


def test_shards_are_linked_on_one_file_system_and_copied_to_another(
    parts, whole, tmp_path, monkeypatch
):
    join(parts, tmp_path / "linked")
    shard = "shards/00001.safetensors"
    assert (tmp_path / "linked" / shard).samefile(parts[1] / shard)
    refuse_links(monkeypatch)
    join(parts, tmp_path / "copied")
    assert not (tmp_path / "copied" / shard).samefile(parts[1] / shard)
    assert every_file(tmp_path / "copied") == every_file(tmp_path / "linked") == every_file(whole)


# Interruptions


@pytest.mark.parametrize("is_linked", [True, False])
def test_merge_killed_at_any_write_is_completed_by_the_same_command(
    parts, whole, tmp_path, monkeypatch, is_linked
):
    if not is_linked:
        refuse_links(monkeypatch)
    before = [every_file(part) for part in parts]
    # Each file syncs itself, then its folder: the index, rows and record of each shard and the
    # shard too if it is copied, the rejected rows, the index again.
    num_calls = 2 * (1 + 4 * (2 if is_linked else 3) + 1 + 1)
    for call in range(num_calls + 1):
        out = tmp_path / f"out{call}"
        crash_at(monkeypatch, call)
        if call < num_calls:
            with pytest.raises(Crash):
                join(parts, out)
        else:
            join(parts, out)
        monkeypatch.setattr(os, "fsync", FSYNC)
        if call < num_calls - 1:
            with pytest.raises((ValueError, FileNotFoundError)):  # not complete, or no index
                load_split(out, "train")
        join(parts, out)
        assert every_file(out) == every_file(whole)
    assert [every_file(part) for part in parts] == before


def test_full_disk_leaves_the_parts_intact_and_the_merge_continues(
    parts, whole, tmp_path, monkeypatch
):
    before = [every_file(part) for part in parts]
    calls = itertools.count()

    def fail_late(descriptor):
        if next(calls) > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        FSYNC(descriptor)

    refuse_links(monkeypatch, errno.ENOSPC)
    monkeypatch.setattr(os, "fsync", fail_late)
    with pytest.raises(OSError, match=r"cannot write .* \(No space left on device\); free") as e:
        join(parts, tmp_path / "out")
    assert "\n" not in str(e.value)
    monkeypatch.undo()
    assert [every_file(part) for part in parts] == before
    join(parts, tmp_path / "out")
    assert every_file(tmp_path / "out") == every_file(whole)


@pytest.mark.parametrize("num_parts", [1, 2])
def test_repair_of_a_complete_folder_killed_midway_is_finished_by_the_same_command(
    captions, tmp_path, monkeypatch, num_parts
):
    folders = prepare_parts(captions, tmp_path / "parts", num_parts, **OPTIONS)
    (tmp_path / "7.wav").write_bytes((tmp_path / "8.wav").read_bytes())
    crash_at(monkeypatch, 2 * 3)  # the shard, its rows and its record are written, the index is not
    with pytest.raises(Crash):
        run(captions, folders[0], part=1, num_parts=num_parts, **OPTIONS)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"00002\.json is missing or differs from") as error:
        join(folders, tmp_path / "out")
    type_command(str(error.value))
    join(folders, tmp_path / "out")
    run(captions, tmp_path / "fresh", **OPTIONS)
    assert every_file(tmp_path / "out") == every_file(tmp_path / "fresh")


# Refusals


def test_part_is_refused_by_training_with_what_to_type(parts, whole, tmp_path):
    with pytest.raises(ValueError, match=r"2-of-2 is part 2 of 2, expected a whole; ") as error:
        load_split(parts[1], "train")
    assert "\n" not in str(error.value)
    message = str(error.value).replace("PART...", shlex.join(map(str, parts)))
    type_command(message.replace("DATA", str(tmp_path / "out")))
    assert every_file(tmp_path / "out") == every_file(whole)


@pytest.mark.parametrize("change", ["kill", "flip", "rows", "record", "lose"])
def test_incomplete_or_damaged_part_is_refused_and_mended_by_the_command_named(
    captions, parts, whole, tmp_path, change
):
    index = parts[1] / "index.json"
    file = (
        parts[1]
        / {
            "kill": "index.json",
            "flip": "shards/00003.safetensors",
            "rows": "shards/00001.jsonl",
            "record": "records/00003.json",
            "lose": "shards/00001.safetensors",
            "restart": "records/00001.json",
        }[change]
    )
    data = bytearray(file.read_bytes())
    if change == "kill":
        index.write_text(index.read_text().replace('"complete": true', '"complete": false'))
    elif change == "lose":
        file.unlink()
    else:
        data[-2] ^= 1
        file.write_bytes(data)
    expected = "is not complete; finish it with" if change == "kill" else rf"{file} is missing or"
    with pytest.raises(ValueError, match=expected) as error:
        join(parts, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert "part 2 of 2" in str(error.value)
    type_command(str(error.value))
    join(parts, tmp_path / "out")
    assert every_file(tmp_path / "out") == every_file(whole)


def test_missing_part_is_named_with_the_command_that_makes_it(
    captions, whole, tmp_path, monkeypatch
):
    folders = prepare_parts(captions, tmp_path / "parts", 3, **OPTIONS)
    with pytest.raises(ValueError, match=r"found 1 of 3 parts, missing 1, 3; .*--shard 1/3"):
        join(folders[1:2], tmp_path / "out")
    with pytest.raises(ValueError, match="found 2 of 3 parts, missing 3; name") as error:
        join(folders[:2], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.chdir(tmp_path)
    type_command(str(error.value))
    join([*folders[:2], tmp_path / "PART"], tmp_path / "out")
    assert every_file(tmp_path / "out") == every_file(whole)


def test_same_part_twice_and_parts_of_two_divisions_are_refused(captions, parts, whole, tmp_path):
    three = prepare_parts(captions, tmp_path / "three", 3, **OPTIONS)
    with pytest.raises(ValueError, match=r"1-of-2 \(part 1 of 2\) is the same part as .*1-of-2"):
        join([*parts, parts[0]], tmp_path / "out")
    with pytest.raises(ValueError, match=r"\(part 1 of 2\) and .* \(part 3 of 3\) are parts of"):
        join([*parts, three[2]], tmp_path / "out")
    with pytest.raises(ValueError, match=r"\(part 1 of 2\) and .*whole \(part 1 of 1\) are parts"):
        join([*parts, whole], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_part_that_lists_a_shard_of_another_is_refused(parts, tmp_path):
    index = parts[1] / "index.json"
    index.write_text(index.read_text().replace("shards/00003", "shards/00002"))
    message = r"lists the shards shards/00001\..* shards/00002\..*, expected .* shards/00003\."
    with pytest.raises(ValueError, match=message):
        join(parts, tmp_path / "out")


@pytest.mark.parametrize("what", ["seed", "tokenizer fingerprint", "SHA-256 of the manifest"])
def test_parts_that_were_prepared_differently_are_refused(captions, parts, tmp_path, what):
    other = tmp_path / "other"
    if what == "SHA-256 of the manifest":
        captions.write_text(captions.read_text().replace("tone 2", "tone two"))
    run(captions, other, part=2, num_parts=2, **OPTIONS, seed=int(what == "seed"))
    if what == "tokenizer fingerprint":
        index = other / "index.json"
        index.write_text(index.read_text().replace(load_tokenizer("dct").fingerprint, "0ther"))
    with pytest.raises(ValueError, match=rf"were prepared differently: {what} is .* and ") as error:
        join([parts[0], other], tmp_path / "out")
    assert f"{parts[0]} and {other}" in str(error.value)
    assert "--shard 2/2" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_lost_or_changed_conversations_are_refused_and_repaired_by_the_command_named(tmp_path):
    sine_manifest(tmp_path)
    manifest = write_rows(tmp_path / "talks.jsonl", TALKS)
    folders = prepare_parts(manifest, tmp_path / "parts", 2)
    file = folders[0] / "conversations.jsonl"
    whole = file.read_bytes()
    for broken in (whole.replace(b"seven", b"eight"), None):
        file.unlink() if broken is None else file.write_bytes(broken)
        with pytest.raises(ValueError, match=r"conversations\.jsonl is missing or diff") as error:
            join(folders, tmp_path / "out")
        type_command(str(error.value))
        assert file.read_bytes() == whole


def test_merging_into_a_part_or_a_foreign_folder_is_refused(parts, tmp_path):
    before = every_file(parts[0])
    with pytest.raises(ValueError, match="prepared differently: part was '1/2', now '1/1'"):
        join(parts, parts[0])
    assert every_file(parts[0]) == before
    with pytest.raises(ValueError, match="exists and was not made by prepare"):
        join(parts, tmp_path)
    assert not (tmp_path / ".lock").exists()
    with pytest.raises(FileNotFoundError, match=r"holds no index\.json"):
        join([*parts, tmp_path], tmp_path / "out")


def test_part_cannot_be_continued_as_another(captions, parts):
    with pytest.raises(ValueError, match="part was '1/2', now '2/2'"):
        run(captions, parts[0], part=2, num_parts=2, **OPTIONS)
    with pytest.raises(ValueError, match=r"part was '1/2', now '1/1'\. .* --shard 1/2"):
        run(captions, parts[0], **OPTIONS)
    with pytest.raises(ValueError, match="found part 3/2, expected i/n with i from 1 to n"):
        run(captions, parts[0], part=3, num_parts=2)


def test_parts_without_any_train_row_are_refused_together_only(tmp_path):
    manifest = tones(tmp_path, 4, split="test")
    folders = prepare_parts(manifest, tmp_path / "parts", 2, shard_size=2)
    with pytest.raises(ValueError, match="no train row is left of 4 rows"):
        join(folders, tmp_path / "out")


def test_second_process_in_a_folder_is_refused(captions, parts, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for begin in (lambda: run(captions, out), lambda: join(parts, out)):
            with pytest.raises(ValueError, match=r"another process is preparing .*out, expected"):
                begin()
        assert [path.name for path in out.iterdir()] == [".lock"]
    assert not run(captions, out).already_complete


def test_file_system_without_locks_is_refused_in_one_line(captions, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match=r"cannot be locked \(Function not implemented\), expected"):
        run(captions, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b"], "found 2 manifests, expected one; to join prepared parts type --merge"),
        (["a", "--shard", "0/2"], "found '0/2', expected i/n with i from 1 to n, e.g. 3/16"),
        (["a", "--shard", "3/2"], "found '3/2', expected i/n"),
        (["a", "--shard", "half"], "found 'half', expected i/n"),
        (["a", "b", "--merge", "--shard", "1/2"], "found --merge and --shard, expected --out"),
        (["a", "b", "--merge", "--max-seconds", "2"], "leave out --max-seconds"),
        (["--merge"], "Missing argument"),
    ],
)
def test_mistake_on_the_command_line_says_what_to_type(tmp_path, arguments, message):
    import click

    arguments = ["prepare", *arguments, "--out", str(tmp_path / "out")]
    with pytest.raises(click.UsageError) as error:
        cli.main(arguments, standalone_mode=False)
    assert message in error.value.format_message()


# The script


def script(*arguments, **environment):
    """Run the job script as SLURM would."""
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    return subprocess.run(
        ["bash", SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**inherited, "PATH": tools, "OMP_NUM_THREADS": "1", **environment},
    )


def test_job_array_and_its_merge_equal_a_single_run(tmp_path):
    manifest, out = sine_manifest(tmp_path), tmp_path / "my data"
    for task in ("1", "2"):
        array = {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_COUNT": "2"}
        done = script(manifest, f"{out}/", "--shard-size", 4, "--num-workers", 0, **array)
        assert f"my data.parts/{task}-of-2 is complete as part {task} of 2: " in done.stdout, done
    done = script("--merge", out)
    assert f"{out} is complete: 9 train, 3 validation, 0 test clips" in done.stdout, done
    run(manifest, tmp_path / "whole", shard_size=4)
    assert every_file(out) == every_file(tmp_path / "whole")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["m.jsonl"],
            "type scripts/prepare_slurm.sh MANIFEST OUT [prepare options], or --merge OUT",
        ),
        (["m.jsonl", "out"], "found no job array, expected sbatch --array=1-n"),
    ],
)
def test_job_without_its_arguments_or_array_says_what_to_type(arguments, message):
    done = script(*arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
