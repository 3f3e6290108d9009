"""POST /v1/audio/speech: the sound of a caption, sent as it comes."""

from __future__ import annotations

from contextlib import aclosing

from mllm_audio.types import AudioChunk
from mllm_audio_vllm.server.answering import Sender, told
from mllm_audio_vllm.server.base import Engine
from mllm_audio_vllm.server.encode import CONTENT_TYPES, new_encoder
from mllm_audio_vllm.server.errors import RequestError
from mllm_audio_vllm.server.metrics import Record
from mllm_audio_vllm.server.protocol import SpeechRequest


async def speak(
    request: SpeechRequest, seed: int, engine: Engine, record: Record, sender: Sender
) -> None:
    """Answer a request.

    Raises:
        RequestError: if it cannot be answered, or the model makes no sound.
    """
    config = request.mllm_audio.to_config(engine.defaults)
    seconds, rate = config.seconds, engine.sample_rate
    num_samples = None if seconds is None else round(seconds * rate)
    encoder = new_encoder(request.response_format, rate, num_samples)
    source = engine.speak(request.input, config, seed=seed)
    async with aclosing(told(source, record)) as events:
        async for event in events:
            if not isinstance(event, AudioChunk) or not len(event.waveform):
                continue
            if not sender.started:
                headers = {"X-Sample-Rate": str(rate)}
                await sender.start(CONTENT_TYPES[request.response_format], headers)
            await sender.write(encoder.push(event.waveform))
    if not sender.started:
        raise RequestError(500, "the model made no sound of this caption; try another seed")
    await sender.write(encoder.finish())
    await sender.end()
