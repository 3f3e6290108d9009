"""The plugin that vLLM's API server asks for its extra paths."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import fields
from typing import Any

from fastapi import FastAPI

from mllm_audio.listening.server import is_loopback
from mllm_audio_vllm import ARCHITECTURE, KEY
from mllm_audio_vllm.server.bounds import Bounds
from mllm_audio_vllm.server.routes import Holder, mount


class ServerPlugin:
    """Text and audio on vLLM's own app; see `vllm.plugins.endpoint_plugins`."""

    name = "mllm_audio_server"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self.holder = Holder()

    def attach_router(self, app: FastAPI) -> None:
        """Add our paths; the engine comes later."""
        mount(app, self.holder, bounds_of(app.state.args))

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Take the engine.

        Raises:
            ValueError: if there are several API servers, or the model has no voice.
        """
        from mllm_audio_vllm.server.engine import VllmEngine

        if engine_client is None:
            return
        if getattr(args, "api_server_count", None) not in (None, 1):
            raise ValueError(
                f"found --api-server-count {args.api_server_count}, expected 1: latents are sent "
                "to one process; leave it out"
            )
        config = engine_client.vllm_config
        if config.model_config.architecture != ARCHITECTURE:
            raise ValueError(
                f"{config.model_config.model} has no voice; take mllm_audio_server out of "
                "VLLM_PLUGINS to serve it"
            )
        name = (args.served_model_name or [args.model])[0]
        self.holder.engine = VllmEngine(engine_client, config, name)


def bounds_of(args: Namespace) -> Bounds:
    """Read the bounds on requests from vLLM's arguments: its host, and our section.

    Raises:
        ValueError: if one is out of range.
    """
    additional = args.additional_config if isinstance(args.additional_config, dict) else {}
    section = additional.get(KEY, {})
    names = {field.name for field in fields(Bounds)}
    bounds = {name: value for name, value in section.items() if name in names}
    is_local = is_loopback(args.host or "") and not section.get("allow_remote", False)
    return Bounds(**{"is_local": is_local, **bounds})


def make_plugin() -> ServerPlugin:
    """Make the plugin; the entry point of group `vllm.endpoint_plugins`."""
    return ServerPlugin()
