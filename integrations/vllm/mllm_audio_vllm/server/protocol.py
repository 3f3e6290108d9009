"""What clients send: every field known, every size bounded, every refusal one line."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from mllm_audio.generation.decode import GenerationConfig
from mllm_audio.generation.text import TextConfig
from mllm_audio_vllm.server.errors import RequestError
from mllm_audio_vllm.server.wire import WHOLE, Wire, configured, shown

MAX_MESSAGES = 256
MAX_PARTS = 64  # of a message
MAX_SOUNDS = 32  # recordings, and references to earlier answers, in a request
MAX_CHARACTERS = 200_000  # of all text in a request
MAX_SOUND = 16 * 2**20  # base64 characters of a recording
MAX_CAPTION = 4096  # characters
MAX_STOPS = 16
MAX_TOKENS = 10_000_000  # what `TextConfig` takes; the context ends a reply long before

Name = Annotated[str, Field(max_length=256), WHOLE]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
TokenCount = Annotated[int, Field(ge=1, le=MAX_TOKENS)]


class TextContent(Wire):
    """A stretch of text."""

    type: Literal["text"]
    text: Annotated[str, WHOLE]


class Sound(Wire):
    """A recording."""

    data: Annotated[str, Field(min_length=1, max_length=MAX_SOUND)]  # base64
    format: Literal["wav", "flac"]


class SoundContent(Wire):
    """A recording within a message."""

    type: Literal["input_audio"]
    input_audio: Sound


class AnswerId(Wire):
    """A reference to an earlier answer."""

    id: Annotated[str, Field(min_length=1, max_length=128), WHOLE]


Part = Annotated[TextContent | SoundContent, Field(discriminator="type")]


class ChatMessage(Wire):
    """What one speaker says in one turn."""

    role: Annotated[str, Field(min_length=1, max_length=32), WHOLE]
    content: Annotated[list[Part], Field(max_length=MAX_PARTS, default_factory=list)]
    audio: AnswerId | None = None  # all that an earlier answer held
    unsupported = ("function_call", "tool_calls", "refusal")

    @field_validator("content", mode="before")
    @classmethod
    def to_parts(cls, value: Any) -> Any:
        """Take text, or nothing, as parts too."""
        if isinstance(value, str):
            return [{"type": "text", "text": value}] if value else []
        if not isinstance(value, list):
            raise ValueError(f"found {shown(value)}, expected text or a list of parts")
        return value

    @model_validator(mode="after")
    def check_content(self) -> Self:
        """Refuse references to answers where they cannot stand."""
        if self.audio is not None and self.role != "assistant":
            raise ValueError(
                f"audio.id is in a message of {shown(self.role)}, expected the assistant's; a "
                "recording goes into content, as a part of type input_audio"
            )
        if self.audio is not None and self.content:
            raise ValueError("audio.id stands for the whole earlier answer; leave content out")
        if self.audio is None and "content" not in self.model_fields_set:
            raise ValueError("content is missing, expected text or a list of parts")
        return self


class AnswerAudio(Wire):
    """The sound that is asked for."""

    format: Literal["wav", "flac", "pcm16"] | None = None  # None: wav, or pcm16 in a stream
    voice: Name | None = None  # for other servers: ours have one


class StreamOptions(Wire):
    """What a stream tells."""

    include_usage: bool = False


class SoundOptions(Wire):
    """Fields of `GenerationConfig`, which checks their ranges; null where it takes None."""

    keeps_null = frozenset(f.name for f in fields(GenerationConfig) if f.default is None)
    guidance_scale: float | None = None
    guidance_weight: float | None = None
    guidance_schedule: Name | None = None
    num_inference_steps: int | None = None
    final_inference_steps: int | None = None
    sampler: Name | None = None
    eta: float | None = None
    temperature: float | None = None
    seconds: float | None = None
    min_seconds: float | None = None
    max_seconds: float | None = None
    end_threshold: float | None = None

    def to_config(self, defaults: GenerationConfig) -> GenerationConfig:
        """Override the defaults of a model.

        Raises:
            RequestError: if a value is out of range.
        """
        given = self.model_fields_set & SoundOptions.model_fields.keys()
        changes = {name: getattr(self, name) for name in given}
        if "guidance_scale" in changes:
            if changes.get("guidance_weight") is not None:
                line = "guidance_scale and guidance_weight are both given; leave one out"
                raise RequestError(400, line, "mllm_audio")
            changes["guidance_weight"] = None  # which would go first
        return configured(replace, defaults, param="mllm_audio", **changes)


class ReplyOptions(SoundOptions):
    """How a reply is made, beyond OpenAI's fields."""

    max_audio_spans: int | None = None
    repetition_penalty: float = 1.0
    continue_final_message: bool = False


class ChatRequest(Wire):
    """The body of POST /v1/chat/completions, where it asks for audio."""

    model: Name | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    modalities: Annotated[list[Literal["text", "audio"]], Field(max_length=2)]
    audio: AnswerAudio = AnswerAudio()
    stream: bool = False
    stream_options: StreamOptions | None = None
    seed: Seed | None = None
    temperature: float = 1.0  # of the text; 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    max_tokens: TokenCount | None = None
    max_completion_tokens: TokenCount | None = None
    stop: Annotated[list[Name], Field(max_length=MAX_STOPS, default_factory=list)]
    n: int = 1
    user: Name | None = None
    mllm_audio: ReplyOptions = ReplyOptions()
    unsupported = (
        *("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call"),
        *("response_format", "structured_outputs", "logit_bias", "logprobs", "top_logprobs"),
        *("frequency_penalty", "presence_penalty", "min_p", "prediction", "reasoning_effort"),
        *("store", "web_search_options", "stop_token_ids", "min_tokens", "ignore_eos"),
    )

    @field_validator("stop", mode="before")
    @classmethod
    def to_list(cls, value: Any) -> Any:
        """Take one string too."""
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def check_fields(self) -> Self:
        """Refuse fields that do not go together."""
        if self.n != 1:
            raise ValueError(f"n is {self.n}, expected 1 with audio; send more requests")
        if not self.stream and self.stream_options is not None:
            raise ValueError("stream_options is given without stream; add stream=true")
        if self.stream and self.audio.format not in (None, "pcm16"):
            raise ValueError(
                f"audio.format is {self.audio.format!r}, streams hold 'pcm16' alone; ask for it, "
                "or leave stream out"
            )
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ValueError("max_tokens and max_completion_tokens are both given; leave one out")
        parts = [part for message in self.messages for part in message.content]
        texts = [part.text for part in parts if isinstance(part, TextContent)]
        length = sum(map(len, texts))
        if length > MAX_CHARACTERS:
            raise ValueError(f"found {length} characters, expected {MAX_CHARACTERS} at most")
        sounds = len(parts) - len(texts) + sum(m.audio is not None for m in self.messages)
        if sounds > MAX_SOUNDS:
            raise ValueError(f"found {sounds} sounds, expected {MAX_SOUNDS} at most")
        return self

    @property
    def most_tokens(self) -> int | None:
        """How many tokens the reply may have; None: what the context holds."""
        return self.max_tokens or self.max_completion_tokens

    def to_text_config(self) -> TextConfig:
        """Say how the text is chosen.

        Raises:
            RequestError: if a value is out of range.
        """
        return configured(
            TextConfig,
            do_sample=self.temperature != 0,
            temperature=self.temperature or 1.0,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.mllm_audio.repetition_penalty,
            max_new_tokens=self.most_tokens or MAX_TOKENS,
            stop_strings=tuple(self.stop),
            max_audio_spans=self.mllm_audio.max_audio_spans,
        )


class SpeechRequest(Wire):
    """The body of POST /v1/audio/speech."""

    model: Name | None = None
    input: Annotated[str, Field(min_length=1, max_length=MAX_CAPTION), WHOLE]  # the caption
    voice: Name | None = None  # for other servers: ours have one
    response_format: Literal["wav", "flac", "pcm"] = "wav"
    stream_format: Literal["audio"] = "audio"
    speed: float = 1.0
    seed: Seed | None = None
    mllm_audio: SoundOptions = SoundOptions()
    unsupported = ("instructions",)

    @field_validator("speed")
    @classmethod
    def check_speed(cls, value: float) -> float:
        """Refuse what we cannot do."""
        if value != 1:
            raise ValueError(f"found {value:g}, expected 1; ask for mllm_audio.seconds")
        return value
