"""vLLM's own app, with our paths on it and a fake engine behind them, in a thread."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import openai
import uvicorn
from fake_engine import FakeEngine
from prometheus_client import CollectorRegistry

from mllm_audio_vllm.server.bounds import Bounds
from mllm_audio_vllm.server.routes import Holder, mount

KEY = "a-key"


@dataclass
class Core:
    """Stands for vLLM's chat: says what it was given."""

    requests: list[Any] = field(default_factory=list)

    async def create_chat_completion(self, request, raw_request):
        from vllm.entrypoints.openai.chat_completion.protocol import (
            ChatCompletionResponse,
            ChatCompletionResponseChoice,
            ChatMessage,
        )
        from vllm.entrypoints.serve.engine.protocol import UsageInfo

        self.requests.append((request, dict(raw_request.headers)))
        if request.stream:
            return self.stream()
        message = ChatMessage(role="assistant", content="core")
        choice = ChatCompletionResponseChoice(index=0, message=message)
        return ChatCompletionResponse(model="fake", choices=[choice], usage=UsageInfo())

    async def stream(self):
        yield 'data: {"object": "chat.completion.chunk", "choices": []}\n\n'
        yield "data: [DONE]\n\n"


@dataclass
class Running:
    """A server that runs."""

    url: str
    engine: FakeEngine
    core: Core
    holder: Holder
    key: str

    def client(self, **options) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=self.key or "none", max_retries=0, **options
        )

    def wait_until(self, holds, seconds=5.0) -> None:
        """Wait for what another thread does; fail if it does not come."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.005)

    def wait_until_idle(self) -> None:
        """Check that nothing of any request is left behind."""
        self.wait_until(lambda: self.engine.open == 0, 2.0)


def build(holder: Holder, bounds: Bounds, core: Core, registry, key: str):
    """Build vLLM's app as its server does, our plugin in place of those that are installed."""
    from vllm import plugins
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Plugin:
        name, required_tasks = "fake", ("generate",)

        def attach_router(self, app):
            mount(app, holder, bounds, registry)

    arguments = ["--model", "fake", "--allowed-origins", "[]", *(["--api-key", key] if key else [])]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    loaded, plugins.load_endpoint_plugins = plugins.load_endpoint_plugins, lambda _: [Plugin()]
    try:
        app = build_app(args, ("generate",))
    finally:
        plugins.load_endpoint_plugins = loaded
    app.state.log_stats = False
    app.state.openai_serving_chat = core
    return app


@contextmanager
def serve(engine=None, bounds=None, *, registry=None, key="", is_loaded=True):
    """Run a server on a free port; at the end nothing may be left behind."""
    engine, core = engine or FakeEngine(), Core()
    holder = Holder(engine if is_loaded else None)
    app = build(holder, bounds or Bounds(), core, registry or CollectorRegistry(), key)
    config = uvicorn.Config(app, port=0, log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    running = Running(f"http://127.0.0.1:{port}", engine, core, holder, key)
    try:
        yield running
        running.wait_until_idle()
    finally:
        server.should_exit = True
        thread.join(10)
    assert not thread.is_alive()
