"""The same step on DeepSpeed ZeRO, on any number of processes: the only import of deepspeed.

ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054) shares out what an optimizer keeps. Each process
owns fragments of the float32 master weights; averages and Adam's moments live beside them.
"""

from __future__ import annotations

import fcntl
import io
import logging
import math
import os
import shutil
import socket
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.cpp_extension import get_default_build_root

from mllm_audio.models import Model
from mllm_audio.training.checkpoint import Shard
from mllm_audio.training.config import TrainConfig
from mllm_audio.training.distributed import World
from mllm_audio.training.ema import EMA
from mllm_audio.training.engine import (
    StepResult,
    autocast,
    named_shards,
    sow,
    stack_losses,
)
from mllm_audio.training.fragments import find_fragments, publish
from mllm_audio.training.optim import build_optimizer, parameter_groups
from mllm_audio.training.zero_config import offloads_optimizer, uses_bf16
from mllm_audio.types import Batch, Losses, StepCounts

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@cache
def _deepspeed() -> Any:
    """Import deepspeed, and keep what it prints at every turn off the terminal."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns of having chosen that
    # DeepSpeed compiles with ninja, which stands beside this Python, in the PATH or not; another
    # one of the system would compile everything anew.
    tools = str(Path(sys.executable).parent)
    if tools not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = tools + os.pathsep + os.environ.get("PATH", "")
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(
            "--deepspeed needs deepspeed; type: pip install 'mllm-audio[train]'"
        ) from error
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    # `Losses` is none it knows: its hooks hold on to the loss that `_Scored` returns.
    logger.addFilter(lambda record: "unknown inputs or outputs type" not in record.getMessage())
    # Its own use of torch.distributed, at every step.
    warnings.filterwarnings("ignore", message=".*deprecated.*", category=FutureWarning)
    return deepspeed


def join_world(timeout_seconds: float, offload: bool = False) -> World:
    """Meet the other processes that `torchrun` or `deepspeed` started; alone without them.

    Args:
        timeout_seconds: how long to wait for an answer from another process.
        offload: the optimizer will run in host memory.

    Raises:
        ValueError: if deepspeed is not installed, or a launcher is not one of these two.
        RuntimeError: if the others cannot be reached.
    """
    deepspeed = _deepspeed()
    missing = [name for name in LAUNCHED if name not in os.environ]
    if missing and len(missing) < len(LAUNCHED):
        raise ValueError(
            f"found no {', '.join(missing)} in the environment, which torchrun and deepspeed set; "
            "start the processes with one of them"
        )
    if missing:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": port}
        os.environ |= {k: str(v) for k, v in alone.items()} | {"MASTER_ADDR": "127.0.0.1"}
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        local, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= found:
            raise ValueError(
                f"found {found} GPUs for process {local + 1} of this node; type --nproc_per_node "
                f"{found} or less"
            )
        torch.cuda.set_device(local)
    _compile(["ShareMemCommBuilder"] * (not has_gpu) + ["CPUAdamBuilder"] * offload)
    timeout = timedelta(seconds=timeout_seconds)
    with redirect_stdout(io.StringIO()):
        deepspeed.init_distributed("nccl" if has_gpu else "gloo", timeout=timeout, verbose=False)
    group = dist.new_group(backend="gloo", timeout=timeout)
    return World(dist.get_rank(), dist.get_world_size(), group)


def _compile(builders: list[str]) -> None:
    """Compile extensions of DeepSpeed, if that is not done yet, one process of a machine at a time.

    A process that is killed while it compiles leaves a lock of torch's behind, for which others
    would wait for ever; under a lock of our own it can be taken away.
    """
    from deepspeed.accelerator import get_accelerator

    compiler = os.environ.get("CXX", "c++")
    if builders and shutil.which(compiler) is None:
        raise ValueError(f"--deepspeed compiles with {compiler}, found none; install g++")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    with (root / "mllm-audio.lock").open("w") as lock, redirect_stdout(io.StringIO()):
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name in builders:
            builder = get_accelerator().create_op_builder(name)
            for left in root.glob(f"**/{builder.name}/lock"):
                left.unlink()
            if not any(root.glob(f"**/{builder.name}.so")):
                print(f"compiling {builder.name}, about a minute, in {root}", file=sys.stderr)
            builder.load(verbose=False)


def leave_world() -> None:
    """End the conversation with the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


class _Scored(nn.Module):
    """The model as DeepSpeed calls it: autocast inside, its loss first."""

    def __init__(self, model: Model, precision: str) -> None:
        super().__init__()
        self.model = model
        self.precision = precision

    def forward(
        self, batch: Batch, generator: torch.Generator, counts: StepCounts | None
    ) -> tuple[Tensor, Losses]:
        with autocast(self.model, self.model.device, self.precision):
            losses: Losses = self.model(batch, generator, counts)
        return losses.total, losses


def _register_loose_parameters(scored: _Scored) -> None:
    """Tell ZeRO 3 of parameters whose modules are no step of the forward pass themselves.

    They are gathered for all of it. ZeRO finds the backward pass by tensors that a module returns,
    as `_Scored` does.
    """
    zero = _deepspeed().zero
    for module in scored.modules():
        if type(module).forward is nn.Module.forward:  # not defined: only its methods are used
            for parameter in module.parameters(recurse=False):
                zero.register_external_parameter(scored, parameter)


class ZeroEngine:
    """Forward, backward, clip, AdamW and EMA, shared out among processes.

    Attributes:
        fragments: what this process keeps, by parameter.
        stage: of ZeRO, 0 to 3.
    """

    def __init__(
        self,
        model: Model,
        config: TrainConfig,
        zero: dict[str, Any],
        world: World,
    ) -> None:
        self.model = model
        self.config = config
        self.world = world
        self.stage: int = zero.get("zero_optimization", {}).get("stage", 0)
        self.rows = config.rows_at_once(world.size)
        self.num_micro_batches = config.batch_size // self.rows
        settings = {
            "steps_per_print": 10**9,
            **zero,
            "train_micro_batch_size_per_gpu": self.rows,
            "gradient_accumulation_steps": self.num_micro_batches // world.size,
            "gradient_clipping": config.optim.max_grad_norm,
            "zero_allow_untested_optimizer": True,
        }
        scored = _Scored(model, config.precision)
        if self.stage == 3:
            _register_loose_parameters(scored)
        kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with redirect_stdout(io.StringIO()):
            self.engine: Any = _deepspeed().initialize(
                model=scored,
                optimizer=self._optimizer(offloads_optimizer(zero)),
                config=settings,
            )[0]
        if uses_bf16(zero):  # DeepSpeed rounds tables and statistics too
            for name, buffer in model.named_buffers():
                buffer.data = kept[name].to(buffer.device)
        self.optimizer: torch.optim.Optimizer = self.engine.basic_optimizer
        self.fragments = find_fragments(model, self.engine.optimizer, self.stage, world.rank)
        masters = {name: fragment.master.values for name, fragment in self.fragments.items()}
        self.ema = EMA(masters, config.ema_decay, self._publish)

    @property
    def replicated(self) -> bool:
        """Tell whether every process keeps all of the masters."""
        return self.stage == 0

    def _optimizer(self, on_host: bool) -> torch.optim.Optimizer:
        if not on_host:
            return build_optimizer(self.model, self.config.optim)
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optim = self.config.optim
        groups = parameter_groups(self.model, optim)
        adam: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, lr=optim.lr, betas=optim.betas)
        return adam

    def _publish(self) -> None:
        publish(self.engine.optimizer, self.stage)

    def losses(
        self, batch: Batch, generator: torch.Generator, counts: StepCounts | None = None
    ) -> Losses:
        """Run the model; every process must call this as often."""
        total, losses = self.engine(batch.to(self.model.device), generator, counts)
        return replace(losses, total=total)  # DeepSpeed hooks into what is returned as a tensor

    def train_step(
        self, batches: Sequence[Batch], counts: StepCounts, lr: float, step: int
    ) -> StepResult:
        """Do optimizer step `step`; a non-finite loss leaves weights and averages untouched."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_share"]
        parts = []
        reported, grad_norm = [0.0] * 4, math.nan
        for index, batch in enumerate(batches):
            number = index * self.world.size + self.world.rank
            generator = sow(self.config.seed, step, number, self.model.device)
            losses = self.losses(batch, generator, counts)
            # DeepSpeed averages over micro-batches and processes; these are parts of one mean.
            self.engine.backward(losses.total * self.num_micro_batches)
            parts.append(losses)
            if index + 1 == len(batches):
                reported = self.world.sum(stack_losses(parts).tolist())
                if not math.isfinite(reported[0]):
                    return StepResult.of(reported, math.nan)
                if self.stage == 0:  # DeepSpeed tells none
                    gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
                    grad_norm = float(torch.nn.utils.get_total_norm(gradients))
                    if not math.isfinite(grad_norm):
                        return StepResult.of(reported, grad_norm)
            self.engine.step()
        if self.stage > 0:
            grad_norm = float(self.engine.get_global_grad_norm())
        result = StepResult.of(reported, grad_norm)
        if result.is_finite:
            self.ema.update(step)
        return result

    def shards(self) -> dict[str, Shard]:
        """List the owned fragments of masters, averages and moments."""
        masters = {name: fragment.master for name, fragment in self.fragments.items()}
        moments = {name: f.moments(self.optimizer) for name, f in self.fragments.items()}
        return named_shards(masters, self.ema, moments)

    def continue_from(self, step: int) -> None:
        """Tell Adam how many steps its moments have seen, and the model its new weights."""
        for state in self.optimizer.state.values():
            if isinstance(state["step"], Tensor):
                state["step"].fill_(step)
            else:
                state["step"] = step
        self._publish()
