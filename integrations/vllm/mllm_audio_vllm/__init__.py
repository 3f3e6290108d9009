"""Serves mllm-audio models on stock vLLM, out of tree.

`register` runs in every process of vLLM; it imports no model, so that it costs nothing where
another model is served.
"""

from __future__ import annotations

ARCHITECTURE = "AudioLanguageModel"  # in the config.json of every mllm-audio checkpoint
KEY = "mllm_audio"  # of our options in a request's extra_args, and in vLLM's additional_config


def register() -> None:
    """Make our checkpoints known to vLLM; the entry point of group `vllm.general_plugins`.

    Raises:
        RuntimeError: if this vLLM is not the version that the package is made for.
    """
    from mllm_audio_vllm.versions import check_vllm

    check_vllm()
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from mllm_audio_vllm.checks import AudioConfigHook

    if ARCHITECTURE not in MODELS_CONFIG_MAP:
        ModelRegistry.register_model(ARCHITECTURE, f"mllm_audio_vllm.model:{ARCHITECTURE}")
        MODELS_CONFIG_MAP[ARCHITECTURE] = AudioConfigHook
