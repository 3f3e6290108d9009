"""Reading at scale: the order of an epoch, shards from folders and URLs, and what runs ahead."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, replace
from itertools import islice

import fsspec
import pytest
import torch
from click.testing import CliRunner
from conftest import sine_manifest, test_run_config

from mllm_audio.cli import cli
from mllm_audio.config import override
from mllm_audio.data import remote, stream
from mllm_audio.data.captioned import CaptionedClips
from mllm_audio.data.clips import load_split
from mllm_audio.data.dataset import DataConfig, TrainingData
from mllm_audio.data.prefetch import prefetched
from mllm_audio.data.prepare import prepare
from mllm_audio.data.remote import RemoteFolder, open_folder
from mllm_audio.data.shards import LATENTS, ROWS
from mllm_audio.data.sources import TextSource
from mllm_audio.data.stream import ClipStream, ShardedClips, captions
from mllm_audio.masking import MaskingConfig
from mllm_audio.run import train_run
from mllm_audio.training.log import read_log

CONFIG = DataConfig(shuffle_shards=3, length_group=2, prefetch_steps=0)
BATCH = 4


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A prepared folder of 45 train and 15 validation clips of two lengths in 15 shards."""
    folder = tmp_path_factory.mktemp("many")
    manifest = sine_manifest(folder, count=60, seconds=0.3)
    prepare(manifest, folder / "data", "dct", shard_size=4, progress=False)
    return folder / "data"


@pytest.fixture
def make(many, text_tokenizer, special):
    """Build training data over `many`, or another place or source."""

    def build(where=many, source=None, config=CONFIG, **options):
        if source is None:
            folder = open_folder(where, config)
            clips = ClipStream(folder, "train", config.shuffle_shards)
            source = ShardedClips(clips, text_tokenizer)
        masking = MaskingConfig(schedule="uniform")
        options = {"batch_size": BATCH, "seed": 0} | options
        return TrainingData(
            source=source, special=special, masking=masking, config=config, **options
        )

    return build


@pytest.fixture
def bucket(many):
    """The folder `many` at a URL of its own, as a fixture that can be damaged."""
    files = fsspec.filesystem("memory")
    files.put(str(many), "/bucket", recursive=True)
    yield files
    files.rm("/bucket", recursive=True)


def cached(tmp_path, **options):
    return replace(CONFIG, cache_dir=str(tmp_path / "cache"), **options)


def same(first, second):
    """Whether two batches hold the same."""
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(astuple(first), astuple(second), strict=True)
    )


def by_row(batches):
    """What each row of some batches holds, by its name: latents, positions and targets."""
    rows = {}
    for batch in batches:
        latents = batch.latents.split(batch.is_audio.sum(1).tolist())
        targets = batch.target_positions.split(batch.predicts.sum(1).tolist())
        for index, name in enumerate(batch.names):
            inside = batch.input_ids[index] > 0
            ids, null = batch.input_ids[index][inside], batch.is_null[index][inside]
            assert name not in rows
            rows[name] = [t.tolist() for t in (ids, null, latents[index], targets[index])]
    return rows


# The order of an epoch


@pytest.mark.parametrize("shuffle_shards", [1, 3, 16])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 44, 45])
def test_every_row_is_in_an_epoch_once_but_for_a_tail(make, shuffle_shards, batch_size):
    data = make(config=replace(CONFIG, shuffle_shards=shuffle_shards), batch_size=batch_size)
    orders = [list(data.epoch(number)) for number in range(2)]
    for batches in orders:
        assert len(batches) == data.batches_per_epoch == 45 // batch_size
        assert {len(batch) for batch in batches} == {batch_size}
        assert max(Counter(row for batch in batches for row in batch).values()) == 1
    assert orders[0] != orders[1]
    assert orders[0] == list(data.epoch(0))


def test_no_row_is_always_in_the_tail(make):
    data = make(batch_size=7)
    seen = Counter(row for number in range(60) for batch in data.epoch(number) for row in batch)
    assert sorted(seen) == list(range(45))
    assert min(seen.values()) > 60 * 42 / 45 - 15  # 4 of 60 epochs leave a row out, std 1.9


@pytest.mark.parametrize("num_micro_batches", [4, 8])
def test_a_step_holds_the_same_rows_and_masks_on_1_2_and_4_processes(make, num_micro_batches):
    data = make(batch_size=8, micro_batch_size=8 // num_micro_batches)
    num_steps = data.batches_per_epoch
    alone = list(islice(data.steps(0), num_steps))
    names = [name for batches in alone for batch in batches for name in batch.names]
    assert len(set(names)) == len(names) == 45 // 8 * 8
    for size in (2, 4):
        shares = [list(islice(data.steps(0, rank, size), num_steps)) for rank in range(size)]
        for step, batches in enumerate(alone):
            together = [share[step] for share in shares]
            assert len({batch.masking_ratio for own in together for batch in own}) == 1
            for number, batch in enumerate(batches):
                assert same(together[number % size][number // size], batch)


def test_cutting_a_step_into_micro_batches_changes_no_row(make):
    whole = list(islice(make(batch_size=8).steps(0), 7))
    cut = list(islice(make(batch_size=8, micro_batch_size=2).steps(0), 7))
    for (batch,), batches in zip(whole, cut, strict=True):
        assert [len(part.names) for part in batches] == [2] * 4
        assert by_row([batch]) == by_row(batches)
        assert {part.masking_ratio for part in batches} == {batch.masking_ratio}
    assert len({batch.masking_ratio for (batch,) in whole}) == 7


def test_replayed_rows_are_spread_over_the_micro_batches(make, tmp_path, text_tokenizer):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"beep number {i}"}) + "\n" for i in range(50)))
    replay = TextSource.read(path, text_tokenizer, 64)
    options = {"batch_size": 8, "replay": replay, "config": replace(CONFIG, replay_share=0.5)}
    (whole,) = next(make(**options).steps(3))
    parts = next(make(**options, micro_batch_size=2).steps(3))
    assert [["text" in name for name in part.names] for part in parts] == [[False, True]] * 4
    assert sorted(whole.names) == sorted(name for part in parts for name in part.names)


@pytest.mark.parametrize("prefetch_steps", [0, 3])
def test_resuming_at_any_step_continues_the_uninterrupted_stream(make, prefetch_steps):
    data = make(config=replace(CONFIG, prefetch_steps=prefetch_steps), micro_batch_size=2)
    num_steps = 2 * data.batches_per_epoch + 2
    whole = list(islice(data.steps(0), num_steps))
    for first in range(num_steps):
        fresh = make(config=data.config, micro_batch_size=2)
        resumed = next(fresh.steps(first))
        assert all(same(a, b) for a, b in zip(resumed, whole[first], strict=True)), first


def test_resuming_opens_no_shard_of_a_consumed_block(make, monkeypatch):
    opened = []
    original = stream.read_shard
    monkeypatch.setattr(stream, "read_shard", lambda p: (opened.append(p.name), original(p))[1])
    data = make()
    rows = list(data.epoch(0))
    group_of = {row: n for n, g in enumerate(data.source.groups()) for row in g}
    assert len(set(opened)) == len(data.source.groups()) == 15
    for skip in range(len(rows)):
        opened.clear()
        resumed = make()
        for indices in islice(resumed.epoch(0, skip), 1):
            resumed.batch(indices, 0, skip)
        # The rows left over from the block before lie in its shards: fewer than a batch of them.
        assert len(set(opened)) <= CONFIG.shuffle_shards + BATCH - 1
        if skip == len(rows) - 1:
            last = {data.source.clips.folder.index.shards[group_of[row]].file for row in rows[-1]}
            assert {f"shards/{name}" for name in opened} >= last
            assert len(set(opened)) < 15 / 2


def test_shards_open_at_once_are_bounded(make, monkeypatch):
    readers = weakref.WeakSet()
    original = stream.read_shard

    def counting(path):
        clips = original(path)
        readers.update(clip.reader for clip in clips)
        return clips

    monkeypatch.setattr(stream, "read_shard", counting)
    most = 0
    for _ in islice(make().steps(0), 25):
        most = max(most, len(readers))
    assert CONFIG.shuffle_shards <= most <= 2 * CONFIG.shuffle_shards


def test_streamed_clips_are_those_of_the_lists(make, many, text_tokenizer):
    config = replace(CONFIG, shuffle_shards=15)
    clips = load_split(many, "train")
    streamed = make(config=config)
    assert len(streamed.source) == len(clips) == 45
    for number, clip in enumerate(clips):
        assert streamed.source.name(number) == clip.name
        assert streamed.source.length(number) == clip.num_tokens
        assert streamed.source.clips[number].latents().equal(clip.latents())
    # One group is shuffled as a whole: another order, the same rows.
    listed = make(source=CaptionedClips(clips, text_tokenizer))
    assert len(list(listed.epoch(0))) == len(list(streamed.epoch(0)))
    folder = open_folder(many, config)
    wordings = [caption for clip in clips for caption in clip.captions]
    assert list(captions(folder, ["train"])) == wordings
    assert len(list(captions(folder, ["train", "validation"]))) == 60


def test_data_smaller_than_a_batch_is_one_smaller_batch(make):
    data = make(batch_size=64)
    steps = data.steps(0)
    first, second = next(steps), next(steps)
    assert [len(batch.names) for batch in first + second] == [45, 45]
    with pytest.raises(ValueError, match=r"found 45 training rows, expected at least 64 for 2"):
        make(batch_size=64, micro_batch_size=32).steps(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batch_size": 3}, r"train.batch_size=4 is not a multiple of .*_batch_size=3"),
        ({"micro_batch_size": 2, "size": 4}, r"has 2 micro-batches for 4 processes, expected a mu"),
    ],
)
def test_uneven_micro_batches_are_refused(make, options, message):
    size = options.pop("size", 1)
    with pytest.raises(ValueError, match=message):
        make(**options).steps(0, 0, size)


# What runs ahead


def test_next_block_is_read_while_this_one_is_consumed(make, monkeypatch):
    asked = []
    original = remote.LocalFolder.file

    def recording(self, shard, suffix):
        asked.append(threading.current_thread().name.split("_")[0])
        return original(self, shard, suffix)

    monkeypatch.setattr(remote.LocalFolder, "file", recording)
    data = make()
    steps = data.steps(0)
    next(steps)
    deadline = time.monotonic() + 20
    while asked.count("shards") < 2 * 2 * CONFIG.shuffle_shards and time.monotonic() < deadline:
        time.sleep(0.01)
    # Both files of the shards of this block and of the next, and nothing after them.
    assert asked.count("shards") == 2 * 2 * CONFIG.shuffle_shards


def test_prefetching_changes_nothing_and_keeps_to_its_depth():
    made = []

    def count():
        for number in range(10):
            made.append(number)
            yield number

    for depth in (0, 1, 3):
        made.clear()
        items = prefetched(count(), depth)
        assert next(items) == 0
        deadline = time.monotonic() + 20
        while len(made) < 1 + depth and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
        assert made == list(range(1 + depth))
        assert list(items) == list(range(1, 10))


def test_prefetching_raises_where_the_item_is_asked_for_and_leaves_no_thread():
    closed = []

    def failing():
        try:
            yield 1
            yield 2
            raise OSError("disk on fire")
        finally:
            closed.append(True)

    items = prefetched(failing(), 5)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(OSError, match="disk on fire"):
        next(items)
    unfinished = prefetched((n for n in range(10)), 2)
    next(unfinished)
    unfinished.close()
    early = prefetched(failing(), 1)
    next(early)
    early.close()
    assert closed == [True, True]
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


# Damage


def test_a_damaged_shard_stops_with_its_name_and_the_remedy(make, many, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(many, folder)
    path = folder / "shards" / "00007.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    message = r"00007\.safetensors is missing or differs from its checksum .* `mllm-audio prepare"
    with pytest.raises(ValueError, match=message) as error:
        list(islice(make(folder).steps(0), 11))
    assert "\n" not in str(error.value)
    path.with_suffix(".jsonl").unlink()
    with pytest.raises(ValueError, match=r"00007\.jsonl is missing or differs"):
        list(captions(open_folder(folder, CONFIG), ["train"]))


# URLs


def test_a_url_gives_the_batches_of_the_folder(make, bucket, many, tmp_path):
    config = cached(tmp_path)
    for place in ("memory://bucket", "memory://bucket/", f"file://{many}"):
        steps = zip(islice(make(place, config=config).steps(0), 12), make().steps(0), strict=False)
        assert all(same(a, b) for (a,), (b,) in steps)
    files = list((tmp_path / "cache").iterdir())
    assert Counter(file.suffix for file in files) == {".safetensors": 15, ".jsonl": 15, ".lock": 15}


def test_a_run_from_a_url_is_the_run_from_the_folder(prepared, tmp_path):
    config = test_run_config(num_steps=3, log_every=1, validate_every=3, precision="float32")
    config = override(config, [f"data.cache_dir={tmp_path / 'cache'}"])
    train_run(config, prepared, tmp_path / "folder")
    train_run(config, f"file://{prepared}", tmp_path / "url")
    logs = [
        [r.get("train/audio_loss", r.get("validation/audio_loss")) for r in read_log(tmp_path / n)]
        for n in ("folder", "url")
    ]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 4


def test_a_shard_asked_for_by_many_is_fetched_once(bucket, tmp_path, monkeypatch):
    config = cached(tmp_path)
    folders = [open_folder("memory://bucket", config) for _ in range(8)]
    fetched = []
    original = type(bucket).get_file

    def slow(self, source, target, **options):
        fetched.append(source)
        time.sleep(0.05)
        return original(self, source, target, **options)

    monkeypatch.setattr(type(bucket), "get_file", slow)
    shard = folders[0].index.shards[2]
    with ThreadPoolExecutor(8) as processes:
        paths = list(processes.map(lambda folder: folder.file(shard, LATENTS), folders))
    assert len(set(paths)) == len(fetched) == 1


def test_a_damaged_copy_is_fetched_again_and_a_damaged_original_refused(
    bucket, tmp_path, monkeypatch
):
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    config = cached(tmp_path)
    first = open_folder("memory://bucket", config)
    shard = first.index.shards[0]
    path = first.file(shard, LATENTS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])  # as after a crash: the name promises what is not there
    assert open_folder("memory://bucket", config).file(shard, LATENTS).read_bytes() == whole
    path.unlink()
    bucket.pipe_file("/bucket/" + shard.file, whole[:-1])
    message = rf"memory://bucket/{shard.file} differs from its checksum .*; upload the folder again"
    with pytest.raises(OSError, match=message):
        open_folder("memory://bucket", config).file(shard, LATENTS)
    bucket.rm_file("/bucket/" + shard.file)
    with pytest.raises(ValueError, match=rf"{shard.file} is missing; upload the folder again"):
        open_folder("memory://bucket", config).file(shard, LATENTS)
    assert not path.exists()


def test_a_network_that_fails_for_a_while_is_waited_for(bucket, tmp_path, monkeypatch):
    waits, original = [], type(bucket).get_file
    monkeypatch.setattr(remote.time, "sleep", waits.append)

    def flaky(self, source, target, **options):
        if len(waits) < 2:
            raise ConnectionError("reset by peer")
        return original(self, source, target, **options)

    monkeypatch.setattr(type(bucket), "get_file", flaky)
    folder = open_folder("memory://bucket", cached(tmp_path))
    assert folder.file(folder.index.shards[0], ROWS).is_file()
    assert waits == [1, 2]
    waits.clear()
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    with pytest.raises(OSError, match=r"00001\.jsonl cannot be read \(.*reset.*check the network"):
        folder.file(folder.index.shards[1], ROWS)


def test_the_cache_is_bounded_and_the_oldest_goes_first(bucket, tmp_path):
    folder = RemoteFolder("memory://bucket", tmp_path / "cache", cache_gib=1)
    paths = [folder.file(shard, LATENTS) for shard in folder.index.shards[:4]]
    for age, path in enumerate(paths):
        os.utime(path, (1000 - age, 1000 - age))
    folder.file(folder.index.shards[1], LATENTS)  # used again: not old
    room = sum(path.stat().st_size for path in paths)
    small = RemoteFolder("memory://bucket", tmp_path / "cache", cache_gib=room / 2**30)
    new = small.file(folder.index.shards[4], LATENTS)
    kept = {p for p in (tmp_path / "cache").iterdir() if p.suffix == LATENTS}
    assert paths[3] not in kept
    assert {new, paths[0], paths[1]} <= kept
    assert sum(path.stat().st_size for path in kept) <= room
    # What was removed is fetched again.
    assert small.file(folder.index.shards[3], LATENTS).is_file()


def test_a_cache_too_small_for_what_is_shuffled_is_refused_with_a_size_that_works(
    bucket, tmp_path, monkeypatch
):
    config = cached(tmp_path, cache_gib=1e-6)
    with pytest.raises(ValueError, match=r"cache_gib=1e-06 is too small for 3 x .*=3") as error:
        open_folder("memory://bucket", config)
    size = float(re.search(r"set data.cache_gib=(\d+)", str(error.value))[1])
    assert open_folder("memory://bucket", replace(config, cache_gib=size)).index.shards


def test_an_incomplete_or_missing_index_behind_a_url_is_one_line(bucket, tmp_path):
    values = json.loads(bucket.cat_file("/bucket/index.json"))
    cases = [
        (json.dumps(values | {"complete": False}), r"memory://bucket: FOLDER is not complete; fin"),
        ("{", r"memory://bucket: FOLDER/index.json is damaged .* and upload FOLDER again"),
    ]
    for text, message in cases:
        bucket.pipe_file("/bucket/index.json", text.encode())
        with pytest.raises(ValueError, match=message) as error:
            open_folder("memory://bucket", cached(tmp_path))
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"memory://nothing holds no index.json, expected"):
        open_folder("memory://nothing", cached(tmp_path))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket/data", r"type  pip install s3fs$"),
        ("gs://bucket/data", r"type  pip install gcsfs$"),
        ("abfs://bucket/data", r"type  pip install adlfs$"),
        ("sftp://host/data", r"type  pip install 'fsspec\[sftp\]'$"),
        ("https://host/data", r"type  pip install 'fsspec\[http\]'$"),
    ],
)
def test_a_missing_package_is_named(url, message, monkeypatch):
    def missing(place):
        raise ImportError("not installed")

    monkeypatch.setattr(remote, "url_to_fs", missing)
    with pytest.raises(ImportError, match=message):
        open_folder(url, CONFIG)


def test_an_unknown_kind_of_url_is_refused():
    with pytest.raises(ValueError, match=r"s4://bucket: Protocol not known: s4; expected s3://"):
        open_folder("s4://bucket", CONFIG)


def test_conversations_behind_a_url_are_refused_by_train(bucket, tmp_path):
    bucket.pipe_file("/bucket/conversations.jsonl", b"{}\n")
    config = override(test_run_config(), [f"data.cache_dir={tmp_path / 'cache'}"])
    with pytest.raises(ValueError, match=r"memory://bucket holds conversations.*--data FOLDER"):
        train_run(config, "memory://bucket", tmp_path / "run")


# The benchmark


def test_bench_reads_as_training_does_and_states_the_size_of_1000_hours(tmp_path):
    command = ["bench", "data", str(tmp_path / "random"), "--seconds", "0.2", "--ranks", "2"]
    result = CliRunner().invoke(cli, [*command, "--synthetic", "0.2", "masking.schedule=ntp"])
    assert result.exit_code == 0, result.output
    assert re.search(r"train clips +70$", result.output, re.MULTILINE)
    assert re.search(r"samples/s/worker +[\d,]+ at masking ratio 0\.00$", result.output, re.M)
    assert "360,000 clips x 256 x 128 x 2 bytes = 23.6 GB" in result.output
    again = CliRunner().invoke(cli, [*command, "--synthetic", "0.2"])
    assert "expected a new or empty folder" in str(again.exception)
    url = CliRunner().invoke(
        cli,
        [*command[:2], f"file://{tmp_path}/random", *command[3:], f"data.cache_dir={tmp_path}/c"],
    )
    assert url.exit_code == 0, url.output
