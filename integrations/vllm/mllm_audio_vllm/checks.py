"""What cannot be served, said when the engine starts."""

from __future__ import annotations

import atexit
import os
from typing import TYPE_CHECKING, Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from mllm_audio_vllm import KEY

if TYPE_CHECKING:
    from vllm.config import VllmConfig

BACKBONES = {  # model_type of a checkpoint: vLLM's own model of that family
    "gpt2": "vllm.model_executor.models.gpt2:GPT2LMHeadModel",
    "llama": "vllm.model_executor.models.llama:LlamaForCausalLM",
    "mistral": "vllm.model_executor.models.mistral:MistralForCausalLM",
    "qwen2": "vllm.model_executor.models.qwen2:Qwen2ForCausalLM",
    "qwen3": "vllm.model_executor.models.qwen3:Qwen3ForCausalLM",
}
# Where workers push latents; an environment variable, so that it is no part of the hash under
# which vLLM keeps compiled graphs.
ADDRESS = "MLLM_AUDIO_LATENTS"


def settings(vllm_config: VllmConfig) -> dict[str, Any]:
    """Read our section of vLLM's --additional-config."""
    additional = vllm_config.additional_config
    section = additional.get(KEY, {}) if isinstance(additional, dict) else {}
    return dict(section)


class AudioConfigHook(VerifyAndUpdateConfig):
    """Checks an engine's configuration and picks our worker; vLLM calls it for our models."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse what is not supported.

        Raises:
            ValueError: with what was found and what to do.
        """
        check(vllm_config)
        parallel = vllm_config.parallel_config
        if parallel.worker_cls == "auto":
            from vllm.platforms import current_platform

            kind = "AudioCPUWorker" if current_platform.is_cpu() else "AudioGPUWorker"
            parallel.worker_cls = f"mllm_audio_vllm.worker.{kind}"
        if ADDRESS not in os.environ:
            from mllm_audio_vllm import frames

            os.environ[ADDRESS] = frames.new_address()
            atexit.register(frames.remove, os.environ[ADDRESS])


def check(vllm_config: VllmConfig) -> None:
    """Refuse a configuration that would start and then go wrong, or not start without a word."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    config = model.hf_config
    if not getattr(config, "audio", None):
        raise ValueError(
            f"config.json of {model.model} has no `audio` section: no voice to serve; type  "
            f"mllm-audio add-voice {model.model} --out DIR  first"
        )
    if config.model_type not in BACKBONES:
        raise ValueError(
            f"{model.model} has a backbone of type {config.model_type!r}, expected one of "
            f"{', '.join(BACKBONES)}; generate with  mllm-audio generate  instead"
        )
    refused = {
        "pipeline parallelism (--pipeline-parallel-size)": parallel.pipeline_parallel_size > 1,
        "data parallelism (--data-parallel-size)": parallel.data_parallel_size > 1,
        "context parallelism (--decode-context-parallel-size)": (
            parallel.decode_context_parallel_size > 1
        ),
        "speculative decoding (--speculative-config)": vllm_config.speculative_config is not None,
        "LoRA (--enable-lora)": vllm_config.lora_config is not None,
        "prompt embeddings (--enable-prompt-embeds)": model.enable_prompt_embeds,
        "a KV connector (--kv-transfer-config)": vllm_config.kv_transfer_config is not None,
        "the ray executor": parallel.distributed_executor_backend == "ray",
    }
    for what, is_asked_for in refused.items():
        if is_asked_for:
            raise ValueError(
                f"found {what}, which models with a voice do not support; leave it out"
            )
    if parallel.worker_cls != "auto":
        raise ValueError(
            f"found --worker-cls {parallel.worker_cls}, expected none: models with a voice bring "
            "their own; leave it out"
        )
