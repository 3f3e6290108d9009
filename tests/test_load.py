"""The load generator against a server with known delays: figures, errors, bounds, interruption."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import httpx
import pytest
from click.testing import CliRunner
from speech_server import CHUNK_SECONDS, SpeechServer, serving

from mllm_audio.cli import cli
from mllm_audio.serving.client import Arrival, Ask, Outcome, send
from mllm_audio.serving.load import CAPTIONS, NOT_SENT, Level, check_url
from mllm_audio.serving.report import head_start, summarize


def bench(server, tmp_path, *options):
    """Run the command; return its JSON and what it printed."""
    file = tmp_path / "figures.json"
    command = ["bench", "serve", server.url, "--json", str(file), *map(str, options)]
    result = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(file.read_text()), result.output


@pytest.mark.parametrize("mode", ["speech", "chat"])
def test_figures_are_those_of_the_servers_delays(tmp_path, mode):
    with serving(SpeechServer(first=0.3, gap=0.05, chunks=4)) as server:
        values, output = bench(
            server, tmp_path, "--streams", "1,4", "--seconds", 1.5, "--mode", mode
        )
    one, four = values["levels"]
    for level, streams in ((one, 1), (four, 4)):
        assert level["errors"] == {}
        assert 0.3 <= level["first_audio"]["p50"] < 0.4
        # The last chunk comes after 0.3 + 3 x 0.05 s, of 0.4 s of sound.
        assert 0.45 / 0.4 <= level["rtf"]["p50"] < 0.6 / 0.4
        assert level["stalled"] == 0 and level["head_start"]["p95"] < 0.05
        # A stream sends 0.4 s of sound every 0.45 s.
        assert level["audio_seconds_per_second"] == pytest.approx(streams * 0.4 / 0.47, rel=0.2)
        assert level["audio_tokens_per_second"] == pytest.approx(
            25 * level["audio_seconds_per_second"], rel=0.01
        )
    assert one["requests"] == 4 and 12 <= four["requests"] <= 16
    assert "4 streams" in output and output.count("\n") == 3


def test_closed_loop_keeps_so_many_in_flight_and_asks_what_was_typed(tmp_path):
    with serving(SpeechServer(first=0.05, gap=0.0)) as server:
        bench(
            server, tmp_path, "--streams", 5, "--seconds", 0.4, "--seed", 7, "--warmup", 0,
            "--clip-seconds", 1.5, "--guidance-scale", 2, "--num-inference-steps", 9,
        )  # fmt: skip
    assert server.most == 5
    assert [request["seed"] for request in server.asked[:6]] == [7, 8, 9, 10, 11, 12]
    assert [request["input"] for request in server.asked[:2]] == list(CAPTIONS[:2])
    assert server.asked[0]["response_format"] == "pcm"
    assert server.asked[0]["mllm_audio"] == {
        "seconds": 1.5, "guidance_scale": 2, "num_inference_steps": 9,
    }  # fmt: skip


def test_open_loop_arrivals_are_poisson_seeded_and_do_not_wait_for_answers(tmp_path):
    with serving(SpeechServer(first=1.0, gap=0.0)) as server:
        values, _ = bench(server, tmp_path, "--rates", 20, "--seconds", 1, "--warmup", 0)
    (level,) = values["levels"]
    gaps, due, expected = random.Random("0 20.0"), 0.0, 0
    while (due := due + gaps.expovariate(20)) <= 1:
        expected += 1
    assert level["requests"] == len(server.asked) == expected > 10
    assert server.most > 10  # each answer takes a second, so none had ended
    assert level["first_audio"]["p50"] == pytest.approx(1.0, abs=0.15)
    assert level["audio_seconds_per_second"] == 0  # all of it came after the second


def test_bounds_on_requests_in_flight_and_in_all(tmp_path):
    with serving(SpeechServer(first=0.5, gap=0.0)) as server:
        values, output = bench(
            server, tmp_path, "--rates", 50, "--seconds", 0.4, "--max-in-flight", 2, "--warmup", 0
        )
        assert server.most == 2
        (level,) = values["levels"]
        assert level["errors"] == {NOT_SENT: level["requests"] - 2}
        assert NOT_SENT in output
        server.first = 0.0
        values, _ = bench(server, tmp_path, "--streams", 2, "--max-requests", 5)
    assert values["levels"][0]["requests"] == 5
    assert values["levels"][0]["seconds"] < 5  # of 30


def test_errors_are_counted_by_kind_and_leave_the_figures_alone(tmp_path):
    kinds = {"a": "503", "b": "silent", "c": "cut", "d": "hang"}
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join([*kinds, "good"]))
    with serving(SpeechServer(first=0.02, gap=0.01, failing=kinds)) as server:
        values, output = bench(
            server, tmp_path, "--captions", captions, "--streams", 1, "--max-requests", 5,
            "--timeout", 0.5, "--warmup", 0,
        )  # fmt: skip
    (level,) = values["levels"]
    assert level["errors"] == {"HTTP 503": 1, "no sound": 1, "cut short": 1, "timeout": 1}
    assert level["requests"] == 5
    assert level["first_audio"]["p95"] < 0.1
    assert "1 stream: 1 x HTTP 503, 1 x cut short, 1 x no sound, 1 x timeout" in output


def test_a_server_that_stops_is_no_connection():
    async def once():
        async with httpx.AsyncClient(base_url="http://127.0.0.1:9") as client:
            return await send(client, Ask(), "a", 0, since=0.0, record=lambda outcome: None)

    assert asyncio.run(once()).error == "no connection"


def test_an_answer_beyond_its_bytes_is_cut_off():
    async def once(url, mode):
        async with httpx.AsyncClient(base_url=url) as client:
            ask = Ask(mode=mode, max_bytes=3000)
            return await send(client, ask, "a", 0, since=0.0, record=lambda outcome: None)

    with serving(SpeechServer(first=0.0, gap=0.0, chunks=1000)) as server:
        for mode in ("speech", "chat"):
            assert asyncio.run(once(server.url, mode)).error == "answer too long"


def test_stalls_are_those_of_a_player_that_starts_at_once():
    steady = [Arrival(1.0, 0.5), Arrival(1.4, 0.5), Arrival(1.9, 0.5)]
    late = [Arrival(1.0, 0.5), Arrival(1.7, 0.5), Arrival(2.3, 0.5)]
    assert head_start(steady) == 0
    assert head_start(late) == pytest.approx(0.3)  # the third is due at 2.0, the second at 1.5
    jitter = [Arrival(1.0, 0.5), Arrival(1.52, 0.5), Arrival(1.9, 0.5)]
    level = Level("three", window=10.0)
    for arrivals in (steady, late, jitter):
        level.outcomes.append(Outcome(sent=0.0, seconds=2.5, arrivals=tuple(arrivals)))
    figures = summarize(level)
    assert figures.stalled == pytest.approx(1 / 3)
    assert figures.audio_seconds_per_second == pytest.approx(0.45)
    assert figures.audio_tokens_per_second is None  # nobody says


def test_stalling_server_is_seen(tmp_path):
    with serving(SpeechServer(first=0.02, gap=1.5 * CHUNK_SECONDS, chunks=5)) as server:
        values, _ = bench(server, tmp_path, "--streams", 1, "--seconds", 0.5)
    (level,) = values["levels"]
    assert level["stalled"] == 1
    assert level["head_start"]["p50"] == pytest.approx(4 * 0.5 * CHUNK_SECONDS, abs=0.08)


def test_tokens_come_from_usage_where_the_model_tells_no_frame_rate(tmp_path):
    outcome = Outcome(sent=0.0, seconds=1.0, arrivals=(Arrival(0.5, 2.0),), audio_tokens=50)
    figures = summarize(Level("one", window=4.0, outcomes=[outcome]))
    assert figures.audio_tokens_per_second == pytest.approx(2.0 / 4 * 25)
    with serving(SpeechServer(first=0.0, gap=0.0, frame_rate=None)) as server:
        _, output = bench(server, tmp_path, "--streams", 1, "--max-requests", 1)
    assert "neither the server nor its answers say how many latents" in output


def test_ctrl_c_prints_what_was_measured_so_far(tmp_path):
    file = tmp_path / "figures.json"
    with serving(SpeechServer(first=0.05, gap=0.02)) as server:
        process = subprocess.Popen(
            [sys.executable, "-m", "mllm_audio", "bench", "serve", server.url, "--streams", "1,2",
             "--seconds", "1", "--timeout", "60", "--json", str(file)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while server.most < 2 and time.monotonic() < deadline:  # until the second level
            time.sleep(0.02)
        server.first = 30.0  # what is in flight now would keep the level waiting
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=20)
    assert process.returncode == 130, errors
    assert "1 stream " in output and "2 streams" in output
    assert "2 x interrupted" in output
    assert "interrupted, 2 levels begun" in errors
    values = json.loads(file.read_text())
    assert values["interrupted"] is True
    assert values["levels"][0]["errors"] == {} and values["levels"][0]["requests"] > 3
    assert values["levels"][1]["errors"] == {"interrupted": 2}


def test_json_has_machine_versions_server_and_settings_but_no_key(tmp_path):
    with serving(SpeechServer(first=0.0, gap=0.0, key="secret-7")) as server:
        values, output = bench(
            server, tmp_path, "--streams", 1, "--max-requests", 1, "--api-key", "secret-7"
        )
    assert f"{os.cpu_count()} cores" in values["machine"]
    assert {"python", "mllm-audio", "httpx"} <= set(values["versions"])
    assert values["server"]["model"] == "fake"
    assert values["settings"]["max_requests"] == 1
    assert "secret-7" not in json.dumps(values) + output


@pytest.mark.parametrize(
    "options, message",
    [
        (["http://10.0.0.7:8000"], r"10\.0\.0\.7 is not this machine; type --allow-remote"),
        (["http://localhost.evil:8000"], r"localhost\.evil is not this machine"),
        (["127.0.0.1:8000"], r"found URL '127\.0\.0\.1:8000', expected one such as http://"),
        (["http://127.0.0.1:99999"], r"found URL .*99999"),
        (["http://u:p@127.0.0.1:80"], r"found URL"),
        (["--streams", "0"], r"found 0 streams, expected 1 to 256"),
        (["--streams", "one"], r"found 'one', expected whole numbers such as 1,8,32"),
        (["--rates", "-1"], r"found rate -1\.0"),
        (["--seconds", "0"], r"bench\.seconds=0\.0"),
        (["http://127.0.0.1:9"], r"no server answers at http://127\.0\.0\.1:9 .*mllm-audio serve"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(options, message):
    result = CliRunner().invoke(cli, ["bench", "serve", *options])
    assert result.exit_code != 0
    said = f"{result.output} {result.exception}"
    assert re.search(message, said), said


def test_another_server_and_a_missing_key_are_told_apart():
    with serving(SpeechServer(key="k")) as server:
        result = CliRunner().invoke(cli, ["bench", "serve", server.url])
    assert "asks for an API key; type --api-key" in str(result.exception)
    with serving(SpeechServer()) as server:
        result = CliRunner().invoke(cli, ["bench", "serve", f"{server.url}/elsewhere"])
    assert "answers HTTP 404 to /v1/audio/model" in str(result.exception)


def test_loopback_addresses_are_let_through():
    for url in ("http://127.0.0.1:1", "http://localhost:1/", "https://[::1]:1"):
        assert check_url(url, allow_remote=False) == url.rstrip("/")
    assert check_url("http://10.0.0.7:1", allow_remote=True) == "http://10.0.0.7:1"
