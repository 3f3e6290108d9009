"""Replies of text and sound from vLLM's engine."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllm_audio.config import read_json
from mllm_audio.data.messages import Message
from mllm_audio.folder import GENERATION_FILE as TEXT_GENERATION_FILE
from mllm_audio.folder import read_audio_config
from mllm_audio.generation.decode import GenerationConfig
from mllm_audio.generation.hear import hear
from mllm_audio.generation.interleaved import end_ids
from mllm_audio.generation.parts import load_audio_tokenizer, read_defaults
from mllm_audio.generation.prompts import caption_ids, embed, load_checked
from mllm_audio.generation.room import Room
from mllm_audio.generation.stream import SpanDecoder
from mllm_audio.generation.text import TextConfig
from mllm_audio.pretrained import load_text_tokenizer
from mllm_audio.text import SpecialIds
from mllm_audio.types import AudioChunk
from mllm_audio_vllm.checks import ADDRESS, settings
from mllm_audio_vllm.options import AudioOptions
from mllm_audio_vllm.server.base import Event, Finished
from mllm_audio_vllm.server.limits import check_sampling
from mllm_audio_vllm.server.receiver import Receiver
from mllm_audio_vllm.server.requests import Prepared, prepare_caption, prepare_conversation
from mllm_audio_vllm.server.telling import Sound, Teller


class VllmEngine:
    """`Engine` on vLLM's `EngineClient`; made within a running event loop."""

    def __init__(self, client: Any, vllm_config: Any, model_name: str) -> None:
        """Load everything of the checkpoint but its weights, and begin to receive latents.

        Raises:
            ValueError: if the checkpoint, its tokenizer or its conditioner is not as it was.
        """
        self.client, self.model_name = client, model_name
        folder = Path(vllm_config.model_config.model)
        own = settings(vllm_config)
        self.audio = read_audio_config(folder)
        self.text_tokenizer = load_text_tokenizer(folder)
        self.special = SpecialIds.of(self.text_tokenizer)
        self.tokenizer = load_audio_tokenizer(self.audio, folder)
        self.conditioner = None
        if self.audio.prompt_streams:
            place = own.get("conditioner")
            self.conditioner = load_checked(self.audio, place, torch.device("cpu"))
        self.limit: int = vllm_config.model_config.max_model_len
        self.is_guided = bool(own.get("guidance", True))
        self.sample_rate, self.max_seconds = self.tokenizer.sample_rate, self.audio.max_seconds
        self.frame_rate = self.audio.tokens_per_column / self.audio.column_seconds
        self.chats = not self.audio.prompt_streams
        self.defaults = self._read_defaults(folder)
        self.end_ids = self._read_end_ids(folder) if self.chats else set()
        # One thread decodes, so that sound never takes more than a core from the model.
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="mllm-audio-sound")
        self.receiver = Receiver(os.environ[ADDRESS])

    def _read_defaults(self, folder: Path) -> GenerationConfig:
        defaults = read_defaults(folder)
        if self.is_guided:
            return defaults
        return replace(
            defaults, guidance_scale=1.0, guidance_weight=None, guidance_schedule="constant"
        )

    def _read_end_ids(self, folder: Path) -> set[int]:
        path = folder / TEXT_GENERATION_FILE
        values = read_json(path, "restore the folder") if path.is_file() else {}
        return end_ids(values.get("eos_token_id"), self.text_tokenizer)

    async def reply(
        self,
        messages: Sequence[Message],
        config: GenerationConfig,
        text: TextConfig,
        *,
        seed: int,
        max_tokens: int | None = None,
        continue_final_message: bool = False,
    ) -> AsyncGenerator[Event, None]:
        """Reply to a conversation; see `Engine.reply`."""
        if not self.chats:
            raise ValueError(
                "this model has no text and makes sounds of captions alone; use /v1/audio/speech"
            )
        room = self._room(config)
        prepared = await self._run(
            prepare_conversation,
            messages,
            self.text_tokenizer,
            self.special,
            partial(hear, tokenizer=self.tokenizer, config=self.audio),
            room,
            continue_final_message=continue_final_message,
        )
        most = self.limit - len(prepared.ids)
        options = AudioOptions(
            generation=config,
            seed=seed,
            max_audio_spans=text.max_audio_spans,
            learned=prepared.learned,
            latents=_bytes(prepared.latents),
        )
        sampling = {
            "temperature": text.temperature if text.do_sample else 0.0,
            "top_p": text.top_p,
            "top_k": text.top_k,
            "repetition_penalty": text.repetition_penalty,
            "stop_token_ids": sorted(self.end_ids),
            "max_tokens": most if max_tokens is None else min(max_tokens, most),
        }
        async with aclosing(self._events(prepared, options, sampling, text)) as events:
            async for event in events:
                yield event

    async def speak(
        self, caption: str, config: GenerationConfig, *, seed: int
    ) -> AsyncGenerator[AudioChunk | Finished, None]:
        """Make the sound of a caption; see `Engine.speak`."""
        room = self._room(config)
        prompt = await self._run(self._prompt, caption, config)
        prepared = prepare_caption(prompt, self.special, room)
        options = AudioOptions(
            generation=config,
            seed=seed,
            single=True,
            max_audio_spans=0,
            learned=prepared.learned,
            prompts=tuple(map(_bytes, prepared.prompts)),
        )
        # The step after the longest sound would only close it.
        longest = room.lengths[1]
        sampling = {"stop_token_ids": [self.special.audio_end], "max_tokens": longest}
        async with aclosing(self._events(prepared, options, sampling, TextConfig())) as events:
            async for event in events:
                if isinstance(event, Finished):
                    yield replace(event, reason="stop")
                elif isinstance(event, AudioChunk):
                    yield event

    def _prompt(self, caption: str, config: GenerationConfig) -> Any:
        if self.conditioner is not None:
            return embed(self.conditioner, [caption], self.audio.prompt_streams)[0]
        return caption_ids(self.text_tokenizer, caption, as_request=config.as_request)

    def _room(self, config: GenerationConfig) -> Room:
        """Check what is asked for as far as it does not depend on the conversation."""
        room = Room(self.audio, config, self.limit)
        is_guided = config.is_guided(room.lengths[1])
        if is_guided and not self.is_guided:
            raise ValueError("this server was started without guidance; ask for guidance_scale=1")
        check_sampling(self.audio.head, config, is_guided)
        return room

    async def _events(
        self, prepared: Prepared, options: AudioOptions, sampling: dict[str, Any], text: TextConfig
    ) -> AsyncGenerator[Event, None]:
        """Run a request, and tell its reply."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.sampling_params import RequestOutputKind

        key = uuid.uuid4().hex
        try:
            params = SamplingParams(
                **sampling,
                seed=options.seed % 2**63,
                output_kind=RequestOutputKind.DELTA,
                detokenize=False,
                extra_args=replace(options, key=key).to_extra_args(),
            )
        except VLLMClientError as error:
            raise ValueError(str(error)) from error
        # The salt: equal placeholder ids stand for other latents in every request.
        prompt = {"prompt_token_ids": prepared.ids, "cache_salt": key}
        teller = self._teller(prepared, options.generation, text.stop_strings)
        position, reason = len(prepared.ids), "stop"
        with self.receiver.inbox(key) as inbox:
            outputs = self.client.generate(prompt, params, f"audio-{key}")
            async with aclosing(outputs):
                async for output in outputs:
                    completion = output.outputs[0]
                    ids = list(completion.token_ids)
                    async for event in teller.tell(ids, position, inbox.take):
                        yield event
                    position += len(ids)
                    reason = completion.finish_reason or reason
                    if reason not in ("stop", "length"):
                        raise RuntimeError(f"the engine gave the reply up ({reason})")
                    if teller.stopped:
                        reason = "stop"
                        break
                    if teller.num_chosen >= text.max_new_tokens and not teller.in_audio:
                        reason = "length"
                        break
            async for event in teller.finish():
                yield event
        yield Finished(
            reason=reason,
            prompt_tokens=len(prepared.ids),
            text_tokens=teller.num_text,
            audio_tokens=teller.num_audio,
        )

    def _teller(
        self, prepared: Prepared, config: GenerationConfig, stop_strings: Sequence[str]
    ) -> Teller:
        def new_sound(index: int, given: Tensor) -> Sound:
            decoder = SpanDecoder(self.tokenizer, index, given, config.seconds)
            return Sound(decoder, self.tokenizer.tokens_per_column, self._run)

        return Teller(
            self.special,
            self.text_tokenizer,
            stop_strings,
            new_sound,
            prepared.ids[-1],
            prepared.open_latents,
            torch.zeros(0, self.audio.latent_dim),
        )

    async def _run(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a function in the thread that decodes, away from the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.pool, partial(function, *arguments, **options))

    async def stats(self) -> dict[str, int]:
        """Count what the workers hold; see `Engine.stats`."""
        counts: list[dict[str, int]] = await self.client.collective_rpc("audio_stats")
        return counts[0]


def _bytes(rows: Tensor) -> bytes:
    """Write (K, D) rows as float32."""
    data: bytes = rows.detach().float().cpu().contiguous().numpy().tobytes()
    return data
