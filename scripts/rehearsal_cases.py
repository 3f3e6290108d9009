"""Train across two nodes while processes, nodes and saves are killed; compare with one process.

    scripts/two_node_rehearsal.sh [OUT]

makes the nodes, two network namespaces, and types

    python scripts/rehearsal_cases.py OUT NAMESPACE/DEVICE NAMESPACE/DEVICE

OUT/data holds what `mllm-audio prepare` wrote. A case writes OUT/<case>/ (the run), and what its
agents print, OUT/<case>.node0.log and node1.log. Random draws of a step depend on its number alone, so whatever happens
to a run, its losses must be those of the reference.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mllm_audio.training.checkpoint import LATEST, list_checkpoints, read_weights
from mllm_audio.training.log import read_log

NUM_STEPS = 120
SAVE_EVERY = 10
TOLERANCE = 1e-5  # of a loss in float32
PATIENCE = 120.0  # seconds until whatever is waited for counts as failed
LOSSES = ("train/audio_loss", "train/end_loss")
OVERRIDES = [
    "backbone.hidden_size=32", "backbone.num_layers=2", "backbone.num_heads=2",
    "audio.head.width=32", "audio.head.num_blocks=1", "train.batch_size=4",
    "train.micro_batch_size=2", "train.precision=float32", "train.max_minutes=none",
    "train.log_every=1", f"train.num_steps={NUM_STEPS}", f"train.save_every={SAVE_EVERY}",
    "train.optim.warmup_steps=5", "train.timeout_seconds=60",
]  # fmt: skip


class CaseError(Exception):
    """A case did not go as it must."""


@dataclass(frozen=True)
class Node:
    """A host: a network namespace and what is in it."""

    number: int
    namespace: str
    device: str  # of its network
    address: str

    def start(self, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a command there; its process id is that of the command."""
        environment = {
            **os.environ,
            "GLOO_SOCKET_IFNAME": self.device,
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        with log.open("ab") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    def processes(self) -> list[int]:
        """List the ids of all processes there."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=True
        )
        return [int(line) for line in listed.stdout.split()]


def send(number: signal.Signals, pids: list[int]) -> None:
    """Send a signal to processes, some of which may have ended."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Wait until a condition holds.

    Raises:
        CaseError: if it does not within `PATIENCE`.
    """
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise CaseError(f"no {what} within {PATIENCE:.0f} s")
        time.sleep(0.02)


class Run:
    """One training run and its agents, one on each node.

    Attributes:
        redone: optimizer steps that were done, lost and done again.
    """

    def __init__(self, out: Path, name: str, nodes: list[Node]) -> None:
        self.folder = out / name
        self.nodes = nodes
        self.redone = 0
        self.agents: dict[int, subprocess.Popen[bytes]] = {}
        self.command = [
            "-m", "mllm_audio", "train", "--preset", "tiny", "--data", str(out / "data"),
            "--out", str(self.folder), "--deepspeed", str(out / "zero2.json"), *OVERRIDES,
        ]  # fmt: skip

    def alone(self) -> None:
        """Train to the end on one process of this machine."""
        with self.log(0).open("ab") as log:
            command = [sys.executable, *self.command]
            if subprocess.run(command, stdout=log, stderr=log, check=False).returncode:
                raise CaseError(f"failed, see {self.log(0)}")

    def log(self, number: int) -> Path:
        """Name the file of what the agent of a node prints."""
        return self.folder.with_name(f"{self.folder.name}.node{number}.log")

    def torchrun(self, *numbers: int) -> None:
        """Start the agent of each node named, of both if none is."""
        for node in self.nodes:
            if not numbers or node.number in numbers:
                agent = [
                    sys.executable, "-m", "torch.distributed.run", "--nnodes=2",
                    "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d",
                    "--rdzv-id=rehearsal", f"--rdzv-endpoint={self.nodes[0].address}:29400",
                    f"--rdzv-conf=join_timeout=60,is_host={int(node.number == 0)}",
                    f"--local-addr={node.address}",
                ]  # fmt: skip
                command = [*agent, *self.command]
                self.agents[node.number] = node.start(command, self.log(node.number))

    def deepspeed(self) -> None:
        """Start the deepspeed launcher on both nodes, as where there is no ssh."""
        hosts = self.folder.with_name("hostfile")
        hosts.write_text("".join(f"{node.address} slots=1\n" for node in self.nodes))
        for node in self.nodes:
            launcher = [
                str(Path(sys.executable).with_name("deepspeed")), "--hostfile", str(hosts),
                "--no_ssh", "--node_rank", str(node.number), "--master_addr",
                self.nodes[0].address, "--module", *self.command[1:],
            ]  # fmt: skip
            self.agents[node.number] = node.start(launcher, self.log(node.number))

    def reach(self, step: int) -> None:
        """Wait until a step is on record."""
        wait_for(lambda: self.step() >= step or self.ended(), f"step {step}")
        if self.step() < step:
            raise CaseError(f"an agent ended before step {step}, see {self.log(0)}")

    def step(self) -> int:
        """Return the last step on record."""
        return max((int(record["step"]) for record in read_log(self.folder)), default=0)

    def ended(self) -> bool:
        """Tell whether an agent has ended."""
        return any(agent.poll() is not None for agent in self.agents.values())

    def workers(self, number: int) -> list[int]:
        """List the processes that train on a node."""
        return [p for p in self.nodes[number].processes() if p != self.agents[number].pid]

    def kill(self, pids: list[int]) -> None:
        """Kill processes, then check what is left on disk and count what is lost."""
        send(signal.SIGKILL, pids)
        time.sleep(0.5)  # what still runs finishes its step
        self.count()

    def count(self) -> None:
        """Add the steps since the last checkpoint, which must be complete, to those redone."""
        latest = (
            self.folder / "checkpoints" / (self.folder / "checkpoints" / LATEST).read_text().strip()
        )
        for kind in ("weight", "average", "exp_avg", "exp_avg_sq"):
            read_weights(latest, kind)  # raises if an element is missing
        self.redone += self.step() - int(latest.name.removeprefix("step-"))

    def wait(self) -> list[int]:
        """Wait until both agents have ended; return their exit codes."""
        agents = self.agents.values()
        wait_for(lambda: all(a.poll() is not None for a in agents), "end of the agents")
        return [agent.returncode for agent in agents]

    def finish(self) -> None:
        """Wait for the end of the training."""
        codes = self.wait()
        if any(codes):
            raise CaseError(f"exit codes {codes} of the agents, see {self.log(0)}")

    def check(self, reference: Run) -> float:
        """Return the largest difference of a loss to those of the reference.

        Raises:
            CaseError: if it is too large, or steps or checkpoints are not those of a whole run.
        """
        found, expected = read_log(self.folder), read_log(reference.folder)
        if [r["step"] for r in found] != list(range(1, NUM_STEPS + 1)):
            raise CaseError(f"{self.folder}/log.jsonl does not hold every step once")
        left = [p.name for p in (self.folder / "checkpoints").glob("*.partial")]
        if left or [p.name for p in list_checkpoints(self.folder)][-1] != f"step-{NUM_STEPS:08d}":
            raise CaseError(f"checkpoints are not those of a whole run; left over: {left}")
        pairs = zip(found, expected, strict=True)
        worst = max(abs(a[name] - b[name]) for a, b in pairs for name in LOSSES)
        if not worst <= TOLERANCE:
            raise CaseError(f"losses differ by {worst:.2g}")
        return worst


def undisturbed(run: Run) -> None:
    """Leave it alone."""
    run.torchrun()
    run.finish()


def deepspeed_launcher(run: Run) -> None:
    """Leave it alone, started by `deepspeed` on each node."""
    run.deepspeed()
    run.finish()


def worker_killed(run: Run) -> None:
    """Kill one process of training; its agent starts it again."""
    run.torchrun()
    run.reach(37)
    run.kill(run.workers(1))
    run.finish()


def node_killed(run: Run) -> None:
    """Kill all that runs on the second node, and start its agent again."""
    run.torchrun()
    run.reach(37)
    run.kill(run.nodes[1].processes())
    run.torchrun(1)
    run.finish()


def first_node_killed(run: Run) -> None:
    """Kill the node where the others meet: the job ends, and is started again."""
    run.torchrun()
    run.reach(37)
    run.kill(run.nodes[0].processes())
    if not all(run.wait()):
        raise CaseError("an agent reports success though the first node was lost")
    run.torchrun()
    run.finish()


def save_killed(run: Run) -> None:
    """Kill all processes of training while a checkpoint is half written."""
    run.torchrun()
    run.reach(25)
    workers = run.workers(0) + run.workers(1)
    folder = run.folder / "checkpoints"

    def caught() -> bool:
        # Stopped first, as a save may end between the look and the kill.
        if not any(folder.glob("*.partial")):
            return False
        send(signal.SIGSTOP, workers)
        if any(folder.glob("*.partial")):
            return True
        send(signal.SIGCONT, workers)
        return False

    deadline = time.monotonic() + PATIENCE
    while not caught():
        if time.monotonic() > deadline or run.ended():
            raise CaseError("met no save to interrupt")
    run.kill(workers)
    if not any(folder.glob("*.partial")):
        raise CaseError("the save was complete after all")
    run.finish()


def stopped(run: Run) -> None:
    """Stop the agents by Ctrl-C, go on, stop them by SIGTERM, go on."""
    for step, number in ((37, signal.SIGINT), (73, signal.SIGTERM)):
        run.torchrun()
        run.reach(step)
        send(number, [agent.pid for agent in run.agents.values()])
        if not all(run.wait()):
            raise CaseError(f"an agent reports success after {number.name}")
        run.count()
    if run.redone:
        raise CaseError(f"stopping lost {run.redone} steps")
    run.torchrun()
    run.finish()


CASES: dict[str, tuple[str, Callable[[Run], None]]] = {
    "undisturbed": ("both nodes, torchrun, undisturbed", undisturbed),
    "deepspeed": ("both nodes, deepspeed launcher", deepspeed_launcher),
    "worker": ("worker killed, elastic restart", worker_killed),
    "node": ("second node killed, its agent relaunched", node_killed),
    "first": ("first node killed, both relaunched", first_node_killed),
    "save": ("killed in the middle of a save", save_killed),
    "stopped": ("Ctrl-C, then SIGTERM, typed again", stopped),
}


def main() -> None:
    """Run the reference and every case; print a row of the table for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("nodes", nargs=2, metavar="NAMESPACE/DEVICE")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    nodes = [
        Node(i, *name.split("/"), address=f"10.77.0.{i + 1}")
        for i, name in enumerate(arguments.nodes)
    ]
    (out / "zero2.json").write_text('{"zero_optimization": {"stage": 2}}\n')
    reference = Run(out, "reference", nodes)
    reference.alone()
    print(f"{NUM_STEPS} steps, a checkpoint every {SAVE_EVERY}; ZeRO 2, float32")
    print(f"{'case':<42}{'loss difference':>16}{'redone':>8}{'seconds':>9}", flush=True)
    failed = 0
    for name, (title, case) in CASES.items():
        run = Run(out, name, nodes)
        began = time.monotonic()
        try:
            case(run)
            result = f"{run.check(reference):>16.1e}{run.redone:>8}"
        except (CaseError, ValueError, OSError) as error:
            failed += 1
            result = f"  FAILED: {error}"
        finally:
            for node in nodes:
                send(signal.SIGKILL, node.processes())
        print(f"{title:<42}{result}{time.monotonic() - began:>9.1f}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
