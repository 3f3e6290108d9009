"""Train across two nodes while processes, nodes and saves are killed; compare with one process.

    scripts/two_node_rehearsal.sh [OUT]

makes the nodes, two network namespaces, and types

    python scripts/rehearsal_cases.py OUT NAMESPACE/DEVICE NAMESPACE/DEVICE

OUT/data holds what `mllm-audio prepare` wrote. A case writes OUT/<case>/ (the run), and what its
agents print, OUT/<case>.node0.log and node1.log. Random draws of a step depend on its number alone,
so whatever happens to a run, its losses must be those of the reference.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mllm_audio.training.checkpoint import KINDS, LATEST, list_checkpoints, read_weights
from mllm_audio.training.log import read_log

NUM_STEPS = 80
SAVE_EVERY = 10
TOLERANCE = 1e-5  # of a loss in float32
PATIENCE = 120.0  # seconds until whatever is waited for counts as failed
OVERRIDES = f"""
backbone.hidden_size=32 backbone.num_layers=2 backbone.num_heads=2
audio.head.width=32 audio.head.num_blocks=1 train.precision=float32
train.batch_size=4 train.micro_batch_size=2 train.max_minutes=none train.num_steps={NUM_STEPS}
train.log_every=1 train.save_every={SAVE_EVERY} train.timeout_seconds=60
""".split()


class CaseError(Exception):
    """A case did not go as it must."""


@dataclass(frozen=True)
class Node:
    """A host: a network namespace and what is in it."""

    number: int
    namespace: str
    device: str  # of its network

    @property
    def address(self) -> str:
        """Return its address, as the shell script set it."""
        return f"10.77.0.{self.number + 1}"

    def start(self, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a command there; its process id is that of the command."""
        inside = ["ip", "netns", "exec", self.namespace, "env", f"GLOO_SOCKET_IFNAME={self.device}"]
        with log.open("ab") as file:
            return subprocess.Popen([*inside, *command], stdout=file, stderr=file)

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


def wait_for(condition: Callable[[], bool], what: str, every: float = 0.02) -> None:
    """Wait until a condition holds, looking every so many seconds.

    Raises:
        CaseError: if it does not within `PATIENCE`.
    """
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise CaseError(f"no {what} within {PATIENCE:.0f} s")
        time.sleep(every)


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

    def log(self, number: int) -> Path:
        """Name the file of what the agent of a node prints."""
        return self.folder.with_name(f"{self.folder.name}.node{number}.log")

    def torchrun(self, *numbers: int) -> None:
        """Start the agent of each node named, of both if none is."""
        meet = (
            f"--rdzv-backend=c10d --rdzv-id=rehearsal --rdzv-endpoint={self.nodes[0].address}:29400"
        )
        options = f"--nnodes=2 --nproc-per-node=1 --max-restarts=3 {meet}".split()
        for node in self.nodes:
            if node.number in (numbers or (0, 1)):
                own = f"--rdzv-conf=join_timeout=60,is_host={int(node.number == 0)}"
                command = [*options, own, f"--local-addr={node.address}", *self.command]
                self.start(node, [sys.executable, "-m", "torch.distributed.run", *command])

    def deepspeed(self) -> None:
        """Start the deepspeed launcher on both nodes, as where there is no ssh."""
        hosts = self.folder.with_name("hostfile")
        hosts.write_text("".join(f"{node.address} slots=1\n" for node in self.nodes))
        launcher = [str(Path(sys.executable).with_name("deepspeed")), "--hostfile", str(hosts)]
        for node in self.nodes:
            own = (
                f"--no_ssh --node_rank {node.number} --master_addr {self.nodes[0].address}".split()
            )
            self.start(node, [*launcher, *own, "--module", *self.command[1:]])

    def start(self, node: Node, command: list[str]) -> None:
        """Start the agent of a node."""
        self.agents[node.number] = node.start(command, self.log(node.number))

    def reach(self, step: int) -> None:
        """Wait until a step is on record."""
        wait_for(lambda: self.step() >= step or any(self.codes()), f"step {step}")
        if self.step() < step:
            raise CaseError(f"an agent ended before step {step}, see {self.log(0)}")

    def step(self) -> int:
        """Return the last step on record."""
        return max((int(record["step"]) for record in read_log(self.folder)), default=0)

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
        folder = self.folder / "checkpoints"
        latest = folder / (folder / LATEST).read_text().strip()
        for kind in KINDS:
            read_weights(latest, kind)  # raises if an element is missing
        self.redone += self.step() - int(latest.name.removeprefix("step-"))

    def codes(self) -> list[int | None]:
        """List the exit codes of the agents, None of those that run."""
        return [agent.poll() for agent in self.agents.values()]

    def end(self, *, well: bool = True) -> None:
        """Wait until both agents have ended, and hold them to their exit codes."""
        wait_for(lambda: None not in self.codes(), "end of the agents")
        if any((code == 0) != well for code in self.codes()):
            raise CaseError(f"found exit codes {self.codes()} of the agents, see {self.log(0)}")

    def losses(self) -> list[tuple[str, float]]:
        """List every loss on record, of training and of the averaged weights on held-out clips."""
        return [
            (f"{record['step']} {name}", value)
            for record in read_log(self.folder)
            for name, value in record.items()
            if name.endswith("_loss")
        ]

    def check(self, reference: Run) -> float:
        """Return the largest difference of a loss to those of the reference.

        Raises:
            CaseError: if it is too large, or steps or checkpoints are not those of a whole run.
        """
        found, expected = self.losses(), reference.losses()
        if [name for name, _ in found] != [name for name, _ in expected]:
            raise CaseError(f"{self.folder}/log.jsonl does not hold every step once")
        left = [p.name for p in (self.folder / "checkpoints").glob("*.partial")]
        if left or [p.name for p in list_checkpoints(self.folder)][-1] != f"step-{NUM_STEPS:08d}":
            raise CaseError(f"checkpoints are not those of a whole run; left over: {left}")
        worst = max(abs(a - b) for (_, a), (_, b) in zip(found, expected, strict=True))
        if not worst <= TOLERANCE:
            raise CaseError(f"losses differ by {worst:.2g}")
        return worst


def torchrun_undisturbed(run: Run) -> None:
    """Both nodes by torchrun, left alone."""
    run.torchrun()
    run.end()


def deepspeed_undisturbed(run: Run) -> None:
    """Both nodes by the deepspeed launcher, left alone."""
    run.deepspeed()
    run.end()


def worker_killed(run: Run) -> None:
    """One process killed; torchrun restarts all."""
    run.torchrun()
    run.reach(37)
    run.kill(run.workers(1))
    run.end()


def second_node_killed(run: Run) -> None:
    """Second node killed; its agent typed again."""
    run.torchrun()
    run.reach(37)
    run.kill(run.nodes[1].processes())
    run.torchrun(1)
    run.end()


def first_node_killed(run: Run) -> None:
    """First node killed, which ends the other; both typed again."""
    run.torchrun()
    run.reach(37)
    run.kill(run.nodes[0].processes())
    run.end(well=False)
    run.torchrun()
    run.end()


def save_killed(run: Run) -> None:
    """Killed in the middle of a save; torchrun restarts all."""
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

    wait_for(caught, "save to interrupt", every=0.0005)
    run.kill(workers)
    if not any(folder.glob("*.partial")):
        raise CaseError("the save was complete after all")
    run.end()


def stopped(run: Run) -> None:
    """Stopped by Ctrl-C, then by SIGTERM; typed again."""
    for step, number in ((27, signal.SIGINT), (53, signal.SIGTERM)):
        run.torchrun()
        run.reach(step)
        send(number, [agent.pid for agent in run.agents.values()])
        run.end(well=False)
        run.count()
    if run.redone:
        raise CaseError(f"stopping lost {run.redone} steps")
    run.torchrun()
    run.end()


CASES = (
    torchrun_undisturbed,
    deepspeed_undisturbed,
    worker_killed,
    second_node_killed,
    first_node_killed,
    save_killed,
    stopped,
)


def main() -> None:
    """Run the reference and every case; print a row of the table for each."""
    out = Path(sys.argv[1]).resolve()
    nodes = [Node(number, *name.split("/")) for number, name in enumerate(sys.argv[2:])]
    (out / "zero2.json").write_text('{"zero_optimization": {"stage": 2}}\n')
    reference = Run(out, "reference", nodes)
    subprocess.run([sys.executable, *reference.command], check=True)
    print(f"{NUM_STEPS} steps, a checkpoint every {SAVE_EVERY}; ZeRO 2, float32")
    print(f"{'case':<60}{'loss difference':>16}{'redone':>8}{'seconds':>9}", flush=True)
    failed = 0
    for case in CASES:
        run = Run(out, case.__name__, nodes)
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
        print(f"{case.__doc__:<60}{result}{time.monotonic() - began:>9.1f}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
