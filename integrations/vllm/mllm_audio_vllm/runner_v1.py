"""The adapter of vLLM's V1 model runner.

CPUs have that one, and GPUs with VLLM_USE_V2_MODEL_RUNNER=0.
"""

from __future__ import annotations

from typing import Any

from mllm_audio_vllm.decoding import Row
from mllm_audio_vllm.options import AudioOptions
from mllm_audio_vllm.state import RequestState


class AudioRunnerV1:
    """Mixed into vLLM's runner: keeps requests' audio, and tells the model what each step holds."""

    @property
    def audio_states(self) -> dict[str, RequestState | None]:
        """Give the states by request id; they outlive preemption."""
        states: dict[str, RequestState | None] = self.__dict__.setdefault("_audio_states", {})
        return states

    def _update_states(self: Any, scheduler_output: Any) -> Any:
        states = self.audio_states
        for request_id in scheduler_output.finished_req_ids:
            states.pop(request_id, None)
        deferred = super()._update_states(scheduler_output)  # type: ignore[misc]
        for new in scheduler_output.scheduled_new_reqs:
            if new.req_id not in states:
                options = AudioOptions.from_extra_args(
                    getattr(new.sampling_params, "extra_args", None)
                )
                states[new.req_id] = self.model.state_of(options, new.prompt_token_ids or ())
        for request_id in scheduler_output.scheduled_cached_reqs.resumed_req_ids:
            state = states.get(request_id)
            if state is not None:
                state.truncate(self.requests[request_id].num_tokens)
        return deferred

    def _preprocess(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._preprocess(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        batch, rows, offset = self.input_batch, [], 0
        for number, request_id in enumerate(batch.req_ids):
            count = scheduler_output.num_scheduled_tokens[request_id]
            rows.append(
                Row(
                    state=self.audio_states.get(request_id),
                    start=int(batch.num_computed_tokens_cpu[number]),
                    count=count,
                    offset=offset,
                    samples=not bool(self.discard_request_mask.np[number]),
                )
            )
            offset += count
        self.model.begin_step(rows, self.input_ids.gpu[:offset])
        return prepared
