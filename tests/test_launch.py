"""Launchers: torchrun, deepspeed, SLURM, a host file, and what of a run survives a kill."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mllm_audio.training.checkpoint import LATEST
from mllm_audio.training.log import read_log

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
SMALL = [
    "backbone.hidden_size=32", "backbone.num_layers=2", "backbone.num_heads=2",
    "audio.head.width=32", "audio.head.num_blocks=1", "audio.max_tokens=16",
    "train.batch_size=4", "train.micro_batch_size=2", "train.max_minutes=none",
    "train.log_every=1", "train.optim.schedule=constant", "train.timeout_seconds=60",
]  # fmt: skip
TWO = ["--standalone", "--nproc_per_node", "2"]
# The fakes of a cluster. The real srun, too, answers SIGTERM by killing its tasks at once.
FAKES = {
    "scontrol": """
        case $1 in
          show) printf '%s\\n' localhost 127.0.0.1 ;;
          requeue) echo "$2" >>requeued ;;
        esac""",
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        trap 'kill -9 $(jobs -p)' TERM
        SLURM_NODEID=0 SLURMD_NODENAME=localhost "$@" & first=$!
        SLURM_NODEID=1 SLURMD_NODENAME=127.0.0.1 "$@" & second=$!
        echo $first $second >tasks
        status=0
        for task in $first $second; do wait $task || status=$?; done
        exit $status""",
    "scancel": '[ "$*" = "--signal=TERM 7" ] && kill -TERM $(cat tasks)',
    "ssh": """
        while [[ $1 == -* ]]; do shift 2; done
        bash -c "$2" """,
}


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(command, folder, **variables):
    """Start a launcher in `folder`, with the fakes in front of its PATH."""
    bin_folder = folder / "bin"
    bin_folder.mkdir(parents=True, exist_ok=True)
    for name, text in FAKES.items():
        (bin_folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (bin_folder / name).chmod(0o755)
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "TORCHELASTIC"))},
        "PATH": f"{bin_folder}:{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    """Wait for a launcher; return its exit code and what it printed."""
    printed, _ = process.communicate(timeout=400)
    return process.returncode, printed


def errors(printed):
    return [line for line in printed.splitlines() if line.startswith("error:")]


def steps(run):
    return [record["step"] for record in read_log(run) if "train/audio_loss" in record]


def stop_after(run, step, send):
    """Call `send` once the run is past a step."""
    deadline = time.monotonic() + 240
    while not (steps(run) or [0])[-1] > step:
        assert time.monotonic() < deadline, f"no step {step + 1}"
        time.sleep(0.05)
    send()


@pytest.fixture
def zero(tmp_path):
    """A DeepSpeed file of stage 2 in float32 weights."""
    path = tmp_path / "zero2.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    return path


@pytest.fixture
def arguments(tmp_path, prepared, zero):
    """What is typed after `train`, to end after 4 steps."""
    typed = ["--preset", "tiny", "--data", prepared, "--out", tmp_path / "run"]
    return [*typed, "--deepspeed", zero, *SMALL, "train.num_steps=4"]


def saved_step(run):
    latest = (run / "checkpoints" / LATEST).read_text().strip()
    assert (run / "checkpoints" / latest / "state.json").is_file()
    assert len(list((run / "checkpoints" / latest).glob("rank-*"))) == 2
    return int(latest.removeprefix("step-"))


@pytest.mark.timeout(1200)
def test_two_nodes_end_on_the_reference_curve_whatever_is_killed(tmp_path):
    out = tmp_path / "out"
    process = start([ROOT / "scripts/two_node_rehearsal.sh", out], tmp_path)
    printed, _ = process.communicate(timeout=1150)
    if process.returncode == 77:
        pytest.skip(printed.strip())
    print(printed)
    assert process.returncode == 0, printed


def test_rehearsal_without_root_is_skipped_in_one_line(tmp_path):
    script = ROOT / "scripts/two_node_rehearsal.sh"
    process = start(["bash", "-c", f"id() {{ echo 1000; }}; export -f id; {script}"], tmp_path)
    assert finish(process) == (77, "skipped: network namespaces need root\n")


def test_slurm_job_saves_before_its_time_is_up_requeues_and_goes_on(tmp_path, arguments):
    script, run = ROOT / "scripts/train_slurm.sh", tmp_path / "run"
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "PROCESSES_PER_NODE": "1",
        "MAX_RESTARTS": "0",
    }
    long = ["train.num_steps=100000", "train.save_every=100000"]
    process = start([script, *arguments, *long], tmp_path, PORT=str(free_port()), **job)
    stop_after(run, 2, lambda: process.send_signal(signal.SIGUSR1))
    code, printed = finish(process)
    assert code == 0, printed
    assert (tmp_path / "requeued").read_text() == "7\n"
    stopped = steps(run)[-1]
    assert saved_step(run) == stopped
    assert f"error: interrupted, stopped after step {stopped};" in printed

    again = {**job, "SLURM_RESTART_COUNT": "1", "PORT": str(free_port())}
    longer = [*arguments, f"train.num_steps={stopped + 2}"]
    code, printed = finish(start([script, *longer], tmp_path, **again))
    assert code == 0, printed
    assert "job 7, start 2: 2 nodes" in printed
    assert steps(run) == list(range(1, stopped + 3))

    again["PORT"] = str(free_port())
    code, printed = finish(start([script, *arguments, "train.seed=1"], tmp_path, **again))
    assert code != 0
    assert f"error: {run} holds another run (train.seed 0 -> 1)" in printed
    assert (tmp_path / "requeued").read_text() == "7\n"


def test_host_file_run_saves_on_sigterm_and_goes_on(tmp_path, arguments):
    hosts, run = tmp_path / "hosts", tmp_path / "run"
    hosts.write_text("# two names of one machine\nlocalhost slots=1\n127.0.0.1 slots=1\n")
    command = [ROOT / "scripts/train_hostfile.sh", hosts, *arguments]
    long = ["train.num_steps=100000", "train.save_every=100000"]
    process = start([*command, *long], tmp_path, PORT=str(free_port()))
    stop_after(run, 2, lambda: process.send_signal(signal.SIGTERM))
    code, printed = finish(process)
    stopped = steps(run)[-1]
    assert code != 0
    assert saved_step(run) == stopped, printed
    longer = [*command, f"train.num_steps={stopped + 2}"]
    code, printed = finish(start(longer, tmp_path, PORT=str(free_port())))
    assert code == 0, printed
    assert steps(run) == list(range(1, stopped + 3))


@pytest.mark.parametrize(("text", "message"), [
    ("node1\n", "error: found 'node1 ' in hosts, expected 'node1 slots=N'"),
    ("# none\n", "error: found no host in hosts, expected 'HOST slots=N'"),
])  # fmt: skip
def test_host_file_with_a_mistake_is_named(tmp_path, text, message):
    (tmp_path / "hosts").write_text(text)
    code, printed = finish(start([ROOT / "scripts/train_hostfile.sh", "hosts"], tmp_path))
    assert (code, printed.strip()) == (2, message)


def test_deepspeed_launcher_trains_on_two_processes(tmp_path, arguments):
    launcher = [BIN / "deepspeed", "--num_accelerators", "2", "--master_port", free_port()]
    command = [*launcher, "--module", "mllm_audio", "train", *arguments]
    code, printed = finish(start(command, tmp_path))
    assert code == 0, printed
    assert steps(tmp_path / "run") == [1, 2, 3, 4]
    assert saved_step(tmp_path / "run") == 4


@pytest.mark.parametrize(("removed", "added", "message"), [
    (["--deepspeed"], [], "found 2 processes (WORLD_SIZE) and no --deepspeed"),
    (["--deepspeed"], ["--deepspeed", "absent.json"], "found no DeepSpeed file absent.json"),
    ([], ["train.batch_size=3"], "train.batch_size=3 is not a multiple of 2 processes"),
    ([], ["train.lr=3"], "unknown key 'lr' in train"),
    (["--data"], [], "Missing option '--data'"),
])  # fmt: skip
def test_a_mistake_under_torchrun_is_one_line(tmp_path, arguments, removed, added, message):
    for option in removed:
        index = arguments.index(option)
        del arguments[index : index + 2]
    command = [BIN / "torchrun", *TWO, "-m", "mllm_audio", "train", *arguments, *added]
    code, printed = finish(start(command, tmp_path))
    assert code != 0
    assert len(errors(printed)) == 1, printed
    assert message in errors(printed)[0]


def test_an_out_that_one_node_sees_is_refused_on_every_node(tmp_path, arguments):
    arguments[arguments.index("--out") + 1] = "run"  # relative, and the nodes stand elsewhere
    port, nodes = free_port(), []
    for rank in (0, 1):
        meet = ["--nnodes", 2, "--nproc_per_node", 1, "--node_rank", rank]
        meet += ["--master_addr", "127.0.0.1", "--master_port", port]
        command = [BIN / "torchrun", *meet, "-m", "mllm_audio", "train", *arguments]
        nodes.append(start(command, tmp_path / f"node{rank}"))
    for node in nodes:
        code, printed = finish(node)
        assert code != 0
        assert len(errors(printed)) == 1, printed
        assert "process 1 on" in errors(printed)[0]
        assert "does not see run" in errors(printed)[0]
