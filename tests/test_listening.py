"""Blind listening tests: the plan, the file of ratings, the server, the page in a browser."""

from __future__ import annotations

import csv
import http.client
import io
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import wave
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from browser import launched_browser
from click.testing import CliRunner
from PIL import Image

from mllm_audio.cli import cli, main
from mllm_audio.data.manifest import read_manifest
from mllm_audio.listening import plan, results
from mllm_audio.listening.panel import PLAYED_RATE, Panel, encode_wav
from mllm_audio.listening.server import HEADERS, MAX_BODY, ListeningServer
from mllm_audio.listening.speech import mentions_speech
from mllm_audio.listening.store import QUESTIONS, Rating, opened

CAPTIONS = [
    "a man speaks while a dog barks",
    "rain falls on a metal roof",
    "a woman is talking over music",
    "a car engine idles",
]
SYSTEMS = {"zebra_model": 16000, "yak_model": 22050}  # sample rate of each


def write_system(folder: Path, captions=CAPTIONS, sample_rate=16000, seconds=0.2) -> Path:
    folder.mkdir(parents=True)
    rows = []
    for index, caption in enumerate(captions):
        time = np.arange(int(sample_rate * seconds)) / sample_rate
        tone = 0.3 * np.sin(2 * np.pi * (sample_rate / 80 + 50 * index) * time)
        soundfile.write(folder / f"{index:03}.wav", tone, sample_rate)
        rows.append({"audio": f"{index:03}.wav", "caption": caption, "seed": index})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def folders(tmp_path):
    return {name: write_system(tmp_path / name, sample_rate=r) for name, r in SYSTEMS.items()}


def stimuli_of(name, folder):
    rows = [(row.audio, row.captions[0]) for row in read_manifest(folder / "captions.jsonl")]
    return plan.read_stimuli(name, folder, rows)


def test_of(folders, **options):
    read = [stimuli_of(name, folder) for name, folder in folders.items()]
    return plan.ListeningTest(stimuli=plan.pair(read, False), folders=folders, **options)


test_of.__test__ = False  # a helper, not a test


@contextmanager
def serving(folders, out, raters=(), **options):
    with (
        opened(out, serve=True) as store,
        ListeningServer(
            Panel(test_of(folders, **options), store, raters), "127.0.0.1", 0
        ) as server,
    ):
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server, method, path, body=None, headers=None):
    """Send one request; give the status, the headers and the body."""
    connection = http.client.HTTPConnection(*server.server_address, timeout=20)
    if isinstance(body, dict):
        body, headers = json.dumps(body), {"Content-Type": "application/json", **(headers or {})}
    with closing(connection):
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.headers, response.read()


def post(server, path, body, headers=None):
    status, _, answer = ask(server, "POST", path, body, headers)
    return status, json.loads(answer)


def rating(**values):
    given = {"rater": "ann", "clip": "c", "question": "REL", "score": 3, "plays": 1}
    return Rating(**{**given, "rated_at": "2025-01-01T00:00:00.000+00:00", **values})


def stimulus(system="a", caption="x", speech=False, take=0):
    return plan.Stimulus(
        system=system, caption=caption, take=take, audio="0.wav", sha256="0", speech=speech
    )


# The plan.


@pytest.mark.parametrize(
    "caption",
    [
        "A man speaks",
        "People speaking in the distance",
        "a crowd and then SPEECH.",
        "A woman talks as water runs",
        "the man says something",
        "Male voice over static",
        "a conversation in a cafe",
        "an announcer is narrating",
        "a child whispers",
    ],
)
def test_captions_that_mention_speech(caption):
    assert mentions_speech(caption)


@pytest.mark.parametrize(
    "caption",
    [
        "music from a loudspeaker",
        "a speaker hums",
        "a walkie-talkie beeps",
        "a man laughs and a baby cries",
        "a woman sings",
        "printing an invoice",
        "stalks rustle in the wind",
        "",
    ],
)
def test_captions_that_do_not_mention_speech(caption):
    assert not mentions_speech(caption)


def test_an_order_follows_from_seed_and_rater_alone(folders):
    test = test_of(folders)
    ann = plan.clips_of("ann", test.stimuli, 0)
    assert ann == plan.clips_of("ann", test.stimuli[::-1], 0)
    assert set(ann) == set(test.stimuli)
    others = [plan.clips_of("bob", test.stimuli, 0), plan.clips_of("ann", test.stimuli, 1)]
    assert ann not in others


def test_orders_are_uniform_over_raters(folders):
    stimuli = test_of(folders).stimuli
    first = [plan.clips_of(f"r{index}", stimuli, 0)[0] for index in range(800)]
    counts = [first.count(stimulus) for stimulus in stimuli]
    expected = 800 / len(stimuli)
    chi_square = sum((count - expected) ** 2 / expected for count in counts)
    assert chi_square < 24.3  # 0.1 % of 7 degrees of freedom


def test_a_share_of_the_clips_is_whole_prompts_first(folders):
    stimuli = test_of(folders).stimuli
    chosen = plan.clips_of("ann", stimuli, 0, clips_per_rater=5)
    assert len(chosen) == 5
    captions = [stimulus.caption for stimulus in chosen]
    assert sorted(map(captions.count, set(captions))) == [1, 2, 2]
    assert len({plan.clips_of(f"r{i}", stimuli, 0, 1)[0] for i in range(100)}) == len(stimuli)


def test_equal_captions_are_paired_as_takes(tmp_path):
    both = [stimuli_of(n, write_system(tmp_path / n, ["x", "x", "y"])) for n in ("a", "b")]
    assert [s.prompt for s in plan.pair(both, False)] == [("x", 0), ("x", 1), ("y", 0)] * 2


def test_clips_that_not_all_systems_have_are_listed_or_left_out(tmp_path):
    a = stimuli_of("a", write_system(tmp_path / "a"))
    b = stimuli_of("b", write_system(tmp_path / "b", [*CAPTIONS[:3], "a bell"]))
    with pytest.raises(ValueError, match="2 of 5 prompts") as error:
        plan.pair([a, b], False)
    assert "a lacks 'a bell', b lacks 'a car engine idles'" in str(error.value)
    assert {s.caption for s in plan.pair([a, b], True)} == set(CAPTIONS[:3])
    with pytest.raises(ValueError, match="no caption is common"):
        plan.pair([a, stimuli_of("c", write_system(tmp_path / "c", ["a gong"]))], True)


def test_a_list_decides_which_prompts_are_speech(folders, tmp_path):
    stimuli = test_of(folders).stimuli
    assert [s.speech for s in stimuli] == [True, False, True, False] * 2
    listed = tmp_path / "speech.txt"
    listed.write_text(f"{CAPTIONS[1]}\n\n003.wav\n")
    split = plan.split_by_file(stimuli, listed)
    assert [s.speech for s in split] == [False, True, False, True] * 2
    listed.write_text(f"{CAPTIONS[1]}\nno such caption\n")
    with pytest.raises(ValueError, match=r"speech\.txt:2: 'no such caption' is neither"):
        plan.split_by_file(stimuli, listed)


def test_what_generate_writes_is_a_system(folders):
    from mllm_audio.generation.write import write_captions

    folder = folders["yak_model"]
    write_captions(CAPTIONS[::-1], sorted(folder.glob("*.wav")), seed=7)
    assert [s.caption for s in stimuli_of("yak_model", folder)] == CAPTIONS[::-1]


def test_a_name_has_one_form():
    assert plan.rater_name("  Ann  B.") == plan.rater_name("ann b.") == "ann b."
    assert plan.rater_name("José") == "josé"
    for wrong in ("", "   ", "x" * 41, "<b>", "a\x00", "a/b"):
        with pytest.raises(ValueError, match="expected 1 to 40 letters"):
            plan.rater_name(wrong)


# The file of ratings.


def test_an_answer_is_one_row_and_the_last_one_counts(folders, tmp_path):
    with opened(tmp_path / "r.sqlite", serve=True) as store:
        clip = next(iter(store.register(test_of(folders))))
        for score in (2, 2, 5):
            store.rate("ann", clip, "REL", score, 1)
        store.rate("bob", clip, "REL", 1, 2)
        assert store.answers("ann") == {(clip, "REL"): 5}
        assert len(store.ratings()) == 2
        for values in (
            ("x", clip, "REL", 6, 1),
            ("x", "none", "REL", 5, 1),
            ("x", clip, "Q", 5, 1),
        ):
            with pytest.raises(sqlite3.IntegrityError):
                store.rate(*values)
        assert len(store.ratings()) == 2


def test_threads_lose_no_rating(folders, tmp_path):
    with opened(tmp_path / "r.sqlite", serve=True) as store:
        clips = list(store.register(test_of(folders)))

        def rate_all(rater):
            for clip in clips:
                for question in QUESTIONS:
                    store.rate(rater, clip, question, 4, 1)

        threads = [threading.Thread(target=rate_all, args=(f"r{i}",)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(store.ratings()) == 6 * 2 * len(clips)


def test_a_test_goes_on_and_another_one_is_refused(folders, tmp_path):
    out = tmp_path / "r.sqlite"
    with opened(out, serve=True) as store:
        store.register(test_of(folders, seed=7))  # without ratings it may still change
        first = store.register(test_of(folders))
        store.rate("ann", next(iter(first)), "OVL", 4, 1)
    with opened(out, serve=True) as store:
        assert store.register(test_of(folders)) == first
        for options, message in [
            ({"seed": 1}, "--seed 0 there, 1 here"),
            ({"clips_per_rater": 3}, "--clips-per-rater None there, 3 here"),
        ]:
            with pytest.raises(ValueError, match=message):
                store.register(test_of(folders, **options))
        with pytest.raises(ValueError, match="of 'yak_model' is only there"):
            store.register(test_of({"zebra_model": folders["zebra_model"]}))
        shutil.copy(folders["yak_model"] / "000.wav", folders["yak_model"] / "001.wav")
        with pytest.raises(ValueError, match=r"the sound of 'rain .* of 'yak_model' has changed"):
            store.register(test_of(folders))


def test_a_file_has_one_server_at_a_time_and_can_be_read_meanwhile(folders, tmp_path):
    out = tmp_path / "r.sqlite"
    with opened(out, serve=True) as store:
        clip = next(iter(store.register(test_of(folders))))
        with pytest.raises(ValueError, match="another process serves"), opened(out, serve=True):
            pass
        store.rate("ann", clip, "REL", 3, 1)
        with opened(out, serve=False) as reader:
            assert [rating.score for rating in reader.ratings()] == [3]


def test_foreign_files_are_refused_and_left_as_they_are(tmp_path):
    text, foreign, newer = (tmp_path / name for name in ("a.txt", "b.sqlite", "c.sqlite"))
    text.write_text("not a database at all, but long enough to be read as the header of one" * 9)
    with closing(sqlite3.connect(foreign)) as connection:
        connection.execute("CREATE TABLE t (x)")
    with opened(newer, serve=True):
        pass
    with closing(sqlite3.connect(newer)) as connection:
        connection.execute("PRAGMA user_version = 99")
    for path, message in [
        (text, "a.txt cannot be used as a file of ratings .*not a database"),
        (foreign, "b.sqlite is a database of another program"),
        (newer, "c.sqlite has version 99, this mllm-audio knows 1"),
        (tmp_path, "cannot be used as a file of ratings"),
        (tmp_path / "no" / "r.sqlite", "no is not a folder"),
    ]:
        before = path.read_bytes() if path.is_file() else None
        with pytest.raises(ValueError, match=message), opened(path, serve=True):
            pass
        assert before == (path.read_bytes() if path.is_file() else None)


# Results.


def test_means_and_spreads_are_those_of_the_ratings():
    clips = {
        "a1": stimulus("a", "x", speech=True),
        "a2": stimulus("a", "y"),
        "b1": stimulus("b", "x", speech=True),
        "b2": stimulus("b", "y"),
    }
    given = [
        rating(clip="a1", score=1),
        rating(clip="a1", score=3, rater="bob"),
        rating(clip="a2", score=5),
        rating(clip="b1", score=4),
        rating(clip="a1", score=2, question="OVL"),
    ]
    found = {(s.question, s.prompts, s.system): s for s in results.summarize(given, clips)}
    assert set(found) == {
        *(("REL", p, "a") for p in ("all", "speech", "non-speech")),
        *((q, p, s) for q, s in (("REL", "b"), ("OVL", "a")) for p in ("all", "speech")),
    }
    whole = found["REL", "all", "a"]
    assert whole.mean == pytest.approx(3)
    assert whole.std == pytest.approx(2)  # of 1, 3, 5 with N - 1
    assert (whole.num_clips, whole.num_ratings, whole.num_raters) == (2, 3, 2)
    assert (whole.low, whole.high) == (2, 5)  # of the means 2, 3 and 5 that two clips can give
    assert found["REL", "speech", "a"].std == pytest.approx(2**0.5)
    assert (found["REL", "all", "b"].std, found["REL", "all", "b"].low) == (None, None)
    assert "4.00 +- -" in results.lay_out(list(found.values()))


def test_the_interval_is_that_of_a_normal_mean():
    generator = np.random.default_rng(0)
    scores = generator.integers(1, 6, size=(400, 1))
    low, high = results.bootstrap_interval(scores.tolist(), seed=0)
    half = 1.96 * scores.std() / len(scores) ** 0.5
    assert low == pytest.approx(scores.mean() - half, abs=0.02)
    assert high == pytest.approx(scores.mean() + half, abs=0.02)
    # Ratings of one clip that agree add nothing: clips are drawn, not ratings.
    repeated = np.repeat(scores, 5, axis=1)
    assert results.bootstrap_interval(repeated.tolist(), seed=0) == (low, high)


# The server.


def test_every_sound_is_played_in_one_format(tmp_path):
    time = np.arange(4410) / 44100
    stereo = np.stack([1.6 * np.sin(440 * 2 * np.pi * time)] * 2, axis=1)
    soundfile.write(tmp_path / "a.flac", stereo / 2, 44100)
    soundfile.write(tmp_path / "b.wav", stereo, 44100, subtype="FLOAT")
    for name, peak in (("a.flac", 0.8), ("b.wav", 1.0)):
        data = encode_wav(tmp_path / name)
        with wave.open(io.BytesIO(data)) as file:
            assert file.getparams()[:4] == (1, 2, PLAYED_RATE, 4800)
            samples = np.frombuffer(file.readframes(4800), "<i2")
        assert len(data) == 44 + 2 * 4800  # no metadata
        assert np.abs(samples).max() / 32767 == pytest.approx(peak, abs=0.01)


def test_a_test_over_http_is_blind_and_ends(folders, tmp_path):
    seen = []
    with serving(folders, tmp_path / "r.sqlite") as server:
        for path in ("/", "/page.js", "/page.css"):
            status, headers, body = ask(server, "GET", path)
            assert status == 200
            assert HEADERS.items() <= dict(headers).items()
            seen += [body, str(headers).encode()]
        for done in range(8):
            _, state = post(server, "/next", {"rater": "Ann"})
            assert (state["done"], state["total"]) == (done, 8)
            clip = state["clip"]["id"]
            status, headers, body = ask(server, "GET", f"/clip/{clip}")
            assert status == 200
            assert headers["Content-Type"] == "audio/wav"
            seen += [json.dumps(state).encode(), body, str(headers).encode()]
            for question in QUESTIONS:
                answer = {"rater": "ann", "clip": clip, "question": question, "score": 4}
                assert post(server, "/rate", {**answer, "plays": 1}) == (200, {"stored": True})
        assert post(server, "/next", {"rater": "ann"})[1]["clip"] is None
    everything = b"".join(seen).lower()
    for told in ("zebra", "yak", "captions.jsonl", ".wav", str(tmp_path).lower()):
        assert told.encode() not in everything
    for size in {len(body) for body in seen if body[:4] == b"RIFF"}:
        assert size == 44 + 2 * PLAYED_RATE // 5  # the systems' rates would show


def test_wrong_requests_are_refused_and_store_nothing(folders, tmp_path):
    with serving(folders, tmp_path / "r.sqlite", raters=["Ann", "bob"]) as server:
        clip = post(server, "/next", {"rater": "ann"})[1]["clip"]["id"]
        good = {"rater": "ann", "clip": clip, "question": "REL", "score": 4, "plays": 1}
        for wrong, message in [
            ({"rater": "eve"}, "'eve' is not a rater of this test"),
            ({"rater": "a/b"}, "as a rater's name"),
            ({"rater": 3}, "rater is int, expected str"),
            ({"clip": "0" * 16}, "not among yours"),
            ({"question": "MOS"}, "found MOS=4"),
            ({"score": 6}, "found REL=6"),
            ({"score": True}, "score is bool"),
            ({"score": "4"}, "score is str"),
            ({"plays": 0}, "listen to the clip to its end first"),
            ({"plays": None}, "plays is NoneType"),
        ]:
            status, answer = post(server, "/rate", {**good, **wrong})
            assert status == 400, wrong
            assert message in answer["error"]
        typed = {"Content-Type": "application/json"}
        for method, path, body, headers, status in [
            ("POST", "/rate", json.dumps(good), {"Content-Type": "text/plain"}, 415),
            ("POST", "/rate", "{", typed, 400),
            ("POST", "/rate", "[" * 3000, typed, 400),
            ("POST", "/rate", "[1]", typed, 400),
            ("POST", "/rate", "x" * (MAX_BODY + 1), typed, 413),
            ("POST", "/rate", None, {**typed, "Content-Length": "9" * 30}, 413),
            ("POST", "/rate", None, {**typed, "Content-Length": "-1"}, 411),
            ("POST", "/rate", good, {"Origin": "http://evil.example"}, 403),
            ("POST", "/rate", good, {"Host": "evil.example"}, 421),
            ("GET", "/", None, {"Host": "evil.example:8765"}, 421),
            ("GET", "/", None, {"Host": "192.168.0.9"}, 421),
            ("GET", "/", None, {"Host": "[::1"}, 421),
            ("GET", "/", None, {"Host": "localhost:8765"}, 200),
            ("GET", "/clip/" + "0" * 16, None, {}, 404),
            ("GET", "/clip/../../zebra_model/000.wav", None, {}, 404),
            ("GET", "/clip/..%2f..%2fzebra_model%2f000.wav", None, {}, 404),
            ("GET", "/page.html", None, {}, 404),
            ("GET", "//etc/passwd", None, {}, 404),
            ("POST", "/", good, {}, 404),
            ("PUT", "/rate", None, {}, 501),
        ]:
            assert ask(server, method, path, body, headers)[0] == status, (method, path, headers)
        assert server.panel.next_clip("ann")["clip"]["answers"] == {}
        same_site = {"Origin": f"http://127.0.0.1:{server.server_address[1]}"}
        assert post(server, "/rate", good, same_site) == (200, {"stored": True})


def test_a_sound_that_is_gone_is_told_to_the_terminal_not_to_the_rater(folders, tmp_path, capsys):
    with serving(folders, tmp_path / "r.sqlite") as server:
        clip = post(server, "/next", {"rater": "ann"})[1]["clip"]["id"]
        for folder in folders.values():
            shutil.rmtree(folder)
        status, _, body = ask(server, "GET", f"/clip/{clip}")
        assert status == 500
        assert b"model" not in body
    assert "is not a file" in capsys.readouterr().err


def test_only_this_machine_is_served_unless_asked(folders, tmp_path):
    with opened(tmp_path / "r.sqlite", serve=True) as store:
        panel = Panel(test_of(folders), store)
        for host in ("0.0.0.0", "192.168.0.1", "example.org", ""):
            with pytest.raises(ValueError, match="--allow-remote"):
                ListeningServer(panel, host, 0)
        with ListeningServer(panel, "localhost", 0) as server:
            assert server.url.startswith("http://127.0.0.1:")
            with pytest.raises(ValueError, match=r"port \d+ \(Address already in use\)"):
                ListeningServer(panel, "127.0.0.1", server.server_address[1])
        with ListeningServer(panel, "0.0.0.0", 0, allow_remote=True) as server:
            assert server.knows("192.168.0.9:80")
            assert server.knows(f"{socket.gethostname().upper()}:80")
            assert not server.knows("evil.example")


# The command.

COMMAND = [sys.executable, "-m", "mllm_audio", "listen"]


@contextmanager
def listening(*arguments):
    """Run the command; give the process and where it serves."""
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A test run in the background of a shell inherits an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        process.stdout.readline()
        line = process.stdout.readline()
        assert "rate at http://127.0.0.1:" in line, process.communicate()
        port = int(line.split("127.0.0.1:")[1].split("/")[0])
        yield process, SimpleNamespace(server_address=("127.0.0.1", port))
    finally:
        process.kill()
        process.communicate()


def test_kill_loses_no_answer_and_the_same_command_goes_on(folders, tmp_path):
    out = tmp_path / "r.sqlite"
    arguments = [*folders.values(), "--out", out, "--seed", 3]
    sent = {}
    with listening(*arguments) as (process, server):
        for score in (2, 5, 3):
            clip = post(server, "/next", {"rater": "ann"})[1]["clip"]["id"]
            for question in QUESTIONS:
                answer = {"rater": "ann", "clip": clip, "question": question, "score": score}
                assert post(server, "/rate", {**answer, "plays": 1})[0] == 200
                sent[clip, question] = score
        process.kill()  # SIGKILL
        process.wait()
    with opened(out, serve=False) as store:
        assert store.answers("ann") == sent
    with listening(*arguments) as (process, server):
        assert post(server, "/next", {"rater": "ann"})[1]["done"] == 3
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "interrupted, 6 ratings in" in errors
    assert "Traceback" not in errors


def test_results_from_the_command_line(folders, tmp_path):
    out, table, listed = (tmp_path / name for name in ("r.sqlite", "all.csv", "speech.txt"))
    with opened(out, serve=True) as store:
        clips = store.register(test_of(folders))
        for clip, rated in clips.items():
            store.rate("ann", clip, "REL", 5 if rated.system == "zebra_model" else 2, 1)
            store.rate("bob", clip, "REL", 4 if rated.system == "zebra_model" else 1, 1)
    run = CliRunner().invoke
    printed = run(cli, ["listen-results", str(out), "--csv", str(table)]).output.splitlines()
    assert printed[0].split()[:3] == ["question", "prompts", "system"]
    assert " ".join(printed[1].split()) == "REL all zebra_model 4.50 +- 0.53 4.50 to 4.50 4 8 2"
    assert len(printed) == 1 + 3 * 2
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    assert {row["rater"] for row in rows if row["score"] == "1"} == {"bob"}
    assert rows[0]["caption"] in CAPTIONS
    listed.write_text(CAPTIONS[0])
    arguments = ["listen-results", str(out), "--json", "--speech", str(listed)]
    values = json.loads(run(cli, arguments).output)
    found = {(v["prompts"], v["system"]): v for v in values}
    assert found["speech", "yak_model"]["num_clips"] == 1
    assert found["speech", "yak_model"]["low"] is None
    assert found["non-speech", "yak_model"]["mean"] == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_folder"], "no_folder is not a folder"),
        (["=zebra_model"], "has no name before ="),
        (["empty"], "captions.jsonl is not a file"),
        (["blank"], "has no rows"),
        (["zebra_model", "x/../zebra_model"], "two systems are called 'zebra_model'"),
        (["broken"], "000.wav is not readable sound"),
        (["silent"], "000.wav holds no samples"),
        (["zebra_model", "--host", "0.0.0.0"], "lets other machines in"),
        (["zebra_model", "--raters", "ann,,bob"], "found '' as a rater's name"),
        (["zebra_model", "--speech", "no.txt"], "no.txt is not a file"),
        (["zebra_model", "--out", "empty"], "cannot be used as a file of ratings"),
        (["zebra_model", "--port", "70000"], "70000 is not in the range"),
        (["--results", "no.sqlite"], "no.sqlite is not a file; type the --out"),
        (["--results", "new.sqlite"], "there are no ratings yet"),
        (["--results", "zebra_model/captions.jsonl"], "file is not a database"),
    ],
)
def test_mistakes_are_one_line(folders, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "x"):
        Path(name).mkdir()
    write_system(Path("blank"), [])
    (write_system(Path("broken")) / "000.wav").write_bytes(b"no sound")
    write_system(Path("silent"), seconds=0)
    with opened(Path("new.sqlite"), serve=True) as store:
        store.register(test_of(folders))
    name = "listen-results" if arguments[0] == "--results" else "listen"
    given = arguments[1:] if name == "listen-results" else ["--out", "r.sqlite", *arguments]
    monkeypatch.setattr(sys, "argv", ["mllm-audio", name, *given])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


# The page.


@pytest.fixture(scope="module")
def chromium():
    with launched_browser() as browser:
        yield browser


@contextmanager
def at(chromium, server, **context):
    """Open the page in a fresh profile; fail on errors of its script."""
    profile = chromium.new_context(**context)
    page = profile.new_page()
    page.set_default_timeout(15_000)
    page.traffic, page.problems = [], []
    page.on("request", lambda request: page.traffic.append(request.url))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on(
        "console", lambda said: page.problems.append(said.text) if said.type == "error" else None
    )
    page.goto(server.url)
    try:
        yield page
        assert page.problems == []
    finally:
        profile.close()


def begin(page, name="Ann"):
    page.fill("#name", name)
    page.keyboard.press("Enter")
    page.wait_for_selector("#play:enabled")


def listen_to_end(page):
    page.wait_for_selector("#REL:enabled")


def wait_for_sound(page, number):
    """Wait until the page has gone on to a clip and loaded it."""
    page.wait_for_selector(f"#count:has-text('Sound {number} of')")
    page.wait_for_selector("#play:enabled")


def choose(page, question, score):
    page.click(f"#{question} label:nth-child({score})")


def stored(server, rater="ann"):
    """Scores in the file, by caption and system."""
    clips = server.panel._store.clips()
    return {(clips[c].key, q): s for (c, q), s in server.panel._store.answers(rater).items()}


@pytest.mark.slow
def test_a_rater_clicks_types_leaves_and_resumes(folders, tmp_path, chromium):
    with serving(folders, tmp_path / "r.sqlite") as server, at(chromium, server) as page:
        order = plan.clips_of("ann", test_of(folders).stimuli, 0)
        begin(page)
        # By mouse; nothing can be answered before the sound has ended.
        assert page.inner_text("#caption") == order[0].caption
        assert page.is_disabled("#OVL label:nth-child(1) input")
        page.keyboard.press("5")
        page.click("#play")
        listen_to_end(page)
        assert stored(server) == {}
        choose(page, "OVL", 2)
        choose(page, "REL", 1)
        choose(page, "REL", 4)  # a slip, corrected
        page.click("#next")
        wait_for_sound(page, 2)
        expected = {(order[0].key, "REL"): 4, (order[0].key, "OVL"): 2}
        assert stored(server) == expected
        # By keyboard alone, three clips.
        for index in (1, 2, 3):
            page.wait_for_selector("#play:enabled")
            page.keyboard.press("Space")
            listen_to_end(page)
            page.keyboard.press("3")
            page.keyboard.press(str(index + 1))
            expected |= {(order[index].key, "REL"): 3, (order[index].key, "OVL"): index + 1}
            page.keyboard.press("Enter")
            wait_for_sound(page, index + 2)
        assert stored(server) == expected
        # Half an answer, then away: it is there after the reload, and the sound is to be heard.
        page.wait_for_selector("#play:enabled")
        page.keyboard.press("Space")
        listen_to_end(page)
        page.keyboard.press("5")
        page.wait_for_selector("#REL :checked", state="attached")
        page.reload()
        page.wait_for_selector("#play:enabled")
        assert page.inner_text("#count") == "Sound 5 of 8"
        assert page.locator("#REL :checked").get_attribute("value") == "5"
        assert page.is_disabled("#OVL label:nth-child(1) input")
        assert stored(server) == expected | {(order[4].key, "REL"): 5}
        # Radio buttons answer to the arrows, and a focused question to its digits.
        page.keyboard.press("Space")
        listen_to_end(page)
        page.focus("#REL :checked")
        page.keyboard.press("2")
        page.keyboard.press("Tab")
        page.keyboard.press("Space")  # plays, and does not choose
        page.keyboard.press("4")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("Enter")
        wait_for_sound(page, 6)
        expected |= {(order[4].key, "REL"): 2, (order[4].key, "OVL"): 3}
        assert stored(server) == expected
        for told in ("zebra", "yak", "000.wav"):
            assert told not in page.content().lower()
            assert told not in " ".join(page.traffic).lower()
        assert all(url.startswith((server.url, "blob:", "data:")) for url in page.traffic)


@pytest.mark.slow
def test_two_tabs_of_a_rater_and_a_server_that_stops(folders, tmp_path, chromium):
    out = tmp_path / "r.sqlite"
    with serving(folders, out, clips_per_rater=2) as server, at(chromium, server) as page:
        begin(page)
        other = page.context.new_page()
        other.goto(server.url)
        other.wait_for_selector("#play:enabled")
        assert other.inner_text("#caption") == page.inner_text("#caption")
        for tab, score in ((page, 2), (other, 5)):
            tab.bring_to_front()
            tab.click("#play")
            listen_to_end(tab)
            choose(tab, "REL", score)
            choose(tab, "OVL", score)
            tab.dblclick("#next")
            wait_for_sound(tab, 2)
        assert sorted(stored(server).values()) == [5, 5]
        other.close()
        page.bring_to_front()
        # An answer that cannot be stored is taken back and said.
        page.wait_for_selector("#play:enabled")
        page.click("#play")
        listen_to_end(page)
        page.route("**/rate", lambda route: route.abort())
        choose(page, "REL", 3)
        page.wait_for_selector("#problem:visible")
        assert "The server does not answer" in page.inner_text("#problem")
        assert page.locator("#REL :checked").count() == 0
        page.unroute("**/rate")
        assert page.problems.pop().startswith("Failed to load resource")
        choose(page, "REL", 3)
        choose(page, "OVL", 1)
        page.click("#next")
        page.wait_for_selector("#thanks:visible")
        assert page.is_hidden("#problem")
        assert sorted(stored(server).values()) == [1, 3, 5, 5]


@pytest.mark.slow
def test_the_page_fits_a_phone_and_a_dark_room(folders, tmp_path, chromium):
    """MLLM_AUDIO_SCREENSHOT=FILE keeps what it looks like."""
    shots = []
    with serving(folders, tmp_path / "r.sqlite") as server:
        for _ in range(3):
            clip = server.panel.next_clip("ann")["clip"]["id"]
            for question in QUESTIONS:
                server.panel.rate("ann", clip, question, 3, 1)
        for scheme, width in (("light", 640), ("dark", 640), ("dark", 320)):
            size = {"width": width, "height": 620}
            with at(chromium, server, color_scheme=scheme, viewport=size) as page:
                begin(page)
                page.click("#play")
                listen_to_end(page)
                choose(page, "REL", 4)
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                shots.append(
                    Image.open(io.BytesIO(page.screenshot(animations="disabled"))).convert("RGB")
                )
    light, dark, _ = shots
    assert min(light.getpixel((3, 3))) > 200 > 60 > max(dark.getpixel((3, 3)))
    if "MLLM_AUDIO_SCREENSHOT" in os.environ:
        sheet = Image.new("RGB", (2 * light.width, light.height))
        sheet.paste(light, (0, 0))
        sheet.paste(dark, (light.width, 0))
        sheet.quantize(128, dither=Image.Dither.NONE).save(
            os.environ["MLLM_AUDIO_SCREENSHOT"], optimize=True
        )
