"""vLLM's workers with a voice: they choose the adapter of their model runner."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mllm_audio_vllm.runner_v1 import AudioRunnerV1


class AudioWorker:
    """Mixed into vLLM's worker."""

    model_runner: Any
    num_preempted = 0

    def init_device(self: Any) -> None:
        """Make the runner, and mix the adapter into it; the V2 runner asks the model instead."""
        super().init_device()  # type: ignore[misc]
        runner = self.model_runner
        if not self.use_v2_model_runner:
            runner.__class__ = type(
                f"Audio{type(runner).__name__}", (AudioRunnerV1, type(runner)), {}
            )

    def execute_model(self: Any, scheduler_output: Any) -> Any:
        """Run a step."""
        self.num_preempted += len(scheduler_output.preempted_req_ids or ())
        keeper = getattr(self._audio_model, "audio_state", None)
        if keeper is not None:
            keeper.forget(scheduler_output.finished_req_ids)
        return super().execute_model(scheduler_output)  # type: ignore[misc]

    @property
    def _audio_model(self) -> Any:
        return getattr(self.model_runner, "model", None)

    def audio_stats(self: Any) -> dict[str, int]:
        """Count requests whose state is held, and what happened since the start."""
        model = self._audio_model
        keeper = getattr(model, "audio_state", None) or self.model_runner
        return {
            "live_states": len(keeper.audio_states),
            "steps": model.num_steps,
            "latents": model.decoder.num_drawn,
            "stored_latents": model.decoder.num_stored,
            "preempted": self.num_preempted,
            "runner": 2 if self.use_v2_model_runner else 1,
        }


def __getattr__(name: str) -> type:
    """Make the worker of a platform when vLLM asks for it: each imports what the other lacks."""
    places = {
        "AudioCPUWorker": ("vllm.v1.worker.cpu_worker", "CPUWorker"),
        "AudioGPUWorker": ("vllm.v1.worker.gpu_worker", "Worker"),
    }
    if name not in places:
        raise AttributeError(f"module {__name__} has no attribute {name!r}")
    module, base_name = places[name]
    base = getattr(import_module(module), base_name)
    made = type(name, (AudioWorker, base), {"__module__": __name__})
    globals()[name] = made
    return made
