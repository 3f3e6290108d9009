"""The adapter of vLLM's V2 model runner, which asks the model who keeps its requests' state."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from mllm_audio_vllm.decoding import Row
from mllm_audio_vllm.options import AudioOptions
from mllm_audio_vllm.state import RequestState


class AudioModelState(DefaultModelState):
    """Keeps requests' audio, and tells the model what each step holds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.audio_states: dict[str, RequestState | None] = {}  # outlive preemption
        self.model.audio_state = self

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Take a request that is new, or that comes back after a preemption."""
        super().add_request(req_index, new_req_data)
        request_id = new_req_data.req_id
        if request_id not in self.audio_states:
            options = AudioOptions.from_extra_args(
                getattr(new_req_data.sampling_params, "extra_args", None)
            )
            prompt_ids = new_req_data.prompt_token_ids or ()
            self.audio_states[request_id] = self.model.state_of(options, prompt_ids)
            return
        state = self.audio_states[request_id]
        if state is not None:
            state.truncate(len(new_req_data.prefill_token_ids))

    def forget(self, request_ids: Any) -> None:
        """Free requests that have finished; `remove_request` is called for preempted ones too."""
        for request_id in request_ids:
            self.audio_states.pop(request_id, None)

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> Any:
        """Tell the model what the step holds."""
        prepared = super().prepare_inputs(input_batch, req_states)
        if not self.audio_states.keys() >= set(input_batch.req_ids):  # a rehearsal of the engine's
            return prepared
        rows, offset = [], 0
        for number, request_id in enumerate(input_batch.req_ids):
            count = int(input_batch.num_scheduled_tokens[number])
            start = int(input_batch.num_computed_tokens_np[number])
            rows.append(
                Row(
                    state=self.audio_states[request_id],
                    start=start,
                    count=count,
                    offset=offset,
                    samples=start + count >= int(input_batch.prefill_len_np[number]),
                )
            )
            offset += count
        self.model.begin_step(rows, input_batch.input_ids[:offset])
        return prepared
