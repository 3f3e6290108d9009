"""`Voice`: a trained checkpoint folder ready to speak."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mllm_audio.audiomar import AudioMAR, decode_order
from mllm_audio.conditioners import Conditioner
from mllm_audio.config import to_dict
from mllm_audio.data.layout import Audio, Prompt, stacked
from mllm_audio.data.messages import AudioPart, Message, TextPart, as_messages, render, to_row
from mllm_audio.generation.decode import GenerationConfig, decode, token_limits
from mllm_audio.generation.hear import hear
from mllm_audio.generation.interleaved import Reply, join
from mllm_audio.generation.parts import GENERATION_FILE, load_audio_tokenizer, read_defaults
from mllm_audio.generation.precision import cast, cast_decoder
from mllm_audio.generation.prompts import caption_ids, embed, load_checked
from mllm_audio.generation.stream import SpanDecoder, tell_audio, tell_whole_spans
from mllm_audio.generation.text import TextConfig
from mllm_audio.model import AudioLanguageModel, default_device
from mllm_audio.models import Model, load_model
from mllm_audio.text import SpecialIds
from mllm_audio.tokenizers.base import AS_RECOMMENDED, AudioTokenizer, StreamConfig
from mllm_audio.types import AudioChunk, Clip, TextDelta


@dataclass(frozen=True)
class Voice:
    """A model with the two tokenizers it was trained with."""

    model: Model
    text_tokenizer: PreTrainedTokenizerBase
    audio_tokenizer: AudioTokenizer
    defaults: GenerationConfig
    conditioner_spec: str | None = None  # where the conditioner is now, if it moved

    @classmethod
    def load(
        cls,
        folder: Path | str,
        base: str | None = None,
        *,
        merge: bool = True,
        conditioner: str | None = None,
        dtype: str = "float32",
    ) -> Voice:
        """Load a folder that `mllm-audio train`, `add-voice` or `save` wrote.

        Args:
            folder: a checkpoint, or an adapter, which is merged into its base model.
            base: where an adapter's base model is now, if it moved.
            merge: false leaves an adapter beside its base model.
            conditioner: spec of the conditioner, if its folders moved.
            dtype: of the weights to decode with, see `precision.cast` and `cast_decoder`.

        Raises:
            ValueError: if the folder is no such checkpoint, or its audio tokenizer is not the one
                the model was trained with.
        """
        folder = Path(folder)
        model, text_tokenizer = load_model(folder, base, merge=merge)
        cast(model.to(default_device()), dtype)
        audio_tokenizer = load_audio_tokenizer(model.audio.config, folder)
        cast_decoder(audio_tokenizer, dtype, model.device)
        defaults = read_defaults(folder)
        return cls(model, text_tokenizer, audio_tokenizer, defaults, conditioner)

    @property
    def decoder(self) -> AudioLanguageModel:
        """Give the model where it is known to be causal."""
        assert isinstance(self.model, AudioLanguageModel)
        return self.model

    def check_has_text(self) -> None:
        """Raise ValueError for a model that is prompted by embeddings alone: it cannot converse."""
        if self.model.audio.config.prompt_streams:
            raise ValueError(
                "the model has no text and makes sounds of captions alone; type  mllm-audio "
                'generate RUN "CAPTION", or give a language model a voice with add-voice'
            )

    @cached_property
    def conditioner(self) -> Conditioner:
        """Load what embeds captions, at the first caption.

        Raises:
            ValueError: if it is not the one that the model was trained with.
        """
        return load_checked(self.model.audio.config, self.conditioner_spec, self.model.device)

    def save(self, folder: Path | str, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write a checkpoint, or an adapter while the backbone stands still; see `model.py`."""
        folder = Path(folder)
        model = self.model
        adapter = isinstance(model, AudioLanguageModel) and model.special_rows is not None
        save = self.decoder.save_adapter if adapter else model.save_pretrained
        save(folder, state_dict)
        self.text_tokenizer.save_pretrained(folder)
        text = json.dumps(to_dict(self.defaults), indent=2) + "\n"
        (folder / GENERATION_FILE).write_text(text)

    def generate(
        self,
        captions: Sequence[str],
        config: GenerationConfig | None = None,
        *,
        seed: int = 0,
        batch_size: int = 32,
        on_step: Callable[[int], None] | None = None,
    ) -> list[Clip]:
        """Generate one clip per caption.

        Clip i uses seed `seed + i` and does not depend on `batch_size` or the other captions.

        Args:
            captions: descriptions of the sounds.
            config: overrides the checkpoint's defaults; use `replace(voice.defaults, ...)`.
            seed: of the first caption.
            batch_size: captions decoded together.
            on_step: called with the number of latents after each step.

        Raises:
            ValueError: for an empty caption, or a duration the model cannot make.
        """
        config = config or self.defaults
        clips: list[Clip] = []
        for start in range(0, len(captions), batch_size):
            chunk = captions[start : start + batch_size]
            seeds = [seed + start + i for i in range(len(chunk))]
            latents = self.generate_latents(chunk, config, seeds, on_step)
            clips += [self.to_clip(row, config) for row in latents]
        return clips

    def generate_latents(
        self,
        captions: Sequence[str],
        config: GenerationConfig,
        seeds: Sequence[int],
        on_step: Callable[[int], None] | None = None,
    ) -> list[Tensor]:
        """Generate the latents of one batch of captions, each (N, D)."""
        prompts = self.prompts(captions, config)
        if isinstance(self.model, AudioMAR):
            _, longest = token_limits(self.model.audio.config, config)
            streams = stacked([prompt for prompt in prompts if isinstance(prompt, Prompt)])
            done = on_step and (lambda size: on_step(size * len(captions)))
            return list(decode_order(self.model, streams, seeds, config, longest, done))
        special = SpecialIds.of(self.text_tokenizer)
        steps = []
        for step in decode(self.decoder, prompts, special, seeds, config):
            steps.append(step)
            if on_step:
                on_step(len(captions))
        latents = torch.stack([step.latents for step in steps], dim=1)  # (R, N, D)
        lengths = torch.stack([step.active for step in steps]).sum(dim=0)  # (R,)
        return [row[:length] for row, length in zip(latents, lengths.tolist(), strict=True)]

    def prompts(
        self, captions: Sequence[str], config: GenerationConfig
    ) -> Sequence[Tensor | Prompt]:
        """Make prompts of captions: embedded, or text ids, each (L,)."""
        streams = self.model.audio.config.prompt_streams
        if not streams:
            return [
                caption_ids(self.text_tokenizer, c, as_request=config.as_request) for c in captions
            ]
        return embed(self.conditioner, captions, streams)

    def to_clip(self, latents: Tensor, config: GenerationConfig) -> Clip:
        """Decode (N, D) latents to sound, cut to the duration asked for."""
        with torch.inference_mode():
            waveform = self.audio_tokenizer.decode(latents[None].cpu())[0]  # (S,)
        if config.seconds is not None:
            waveform = waveform[: round(config.seconds * self.audio_tokenizer.sample_rate)]
        return Clip(waveform, self.audio_tokenizer.sample_rate)

    def generate_interleaved(
        self,
        messages: Sequence[Message] | Sequence[dict[str, Any]],
        config: GenerationConfig | None = None,
        text: TextConfig | None = None,
        *,
        seed: int = 0,
        continue_final_message: bool = False,
        stream_audio: bool | StreamConfig = False,
    ) -> Iterator[TextDelta | AudioChunk]:
        """Reply to a conversation with text, and with audio wherever the model opens a span.

        Text comes as it is chosen, audio by the span; all of it is a function of the arguments.

        Args:
            messages: `Message`s, or the same in Hugging Face's form, see `parse_messages`. Audio is
                a path, a `Clip`, or (N, D) latents.
            config: of each span; overrides the checkpoint's defaults.
            text: how text is chosen.
            seed: of the text and the sound.
            continue_final_message: go on with the last message, the assistant's. Where it ends in
                audio the recording itself goes on: its chunk holds the new sound alone, while
                durations in `config` count all of it. No chunk comes where nothing is added.
            stream_audio: give audio in chunks while its span is generated, of this size.

        Raises:
            ValueError: at once, if the messages cannot be written or heard, or leave no room for a
                reply.
        """
        self.check_has_text()
        config = config or self.defaults
        pieces = render(
            as_messages(messages, "the conversation"),
            self.text_tokenizer,
            add_generation_prompt=not continue_final_message,
            continue_final_message=continue_final_message,
        )
        row = to_row(pieces, self.hear)
        reply = Reply(
            model=self.decoder,
            text_tokenizer=self.text_tokenizer,
            row=row,
            config=config,
            text=text or TextConfig(),
            seed=seed,
            open_span=continue_final_message and isinstance(row[-1], Audio),
        )
        events, tokenizer = reply.events(), self.audio_tokenizer
        if not stream_audio:
            return tell_whole_spans(events, tokenizer, partial(self.to_clip, config=config))
        streaming = stream_audio if isinstance(stream_audio, StreamConfig) else AS_RECOMMENDED
        return tell_audio(events, tokenizer, config.seconds, streaming)

    def reply(
        self,
        messages: Sequence[Message] | Sequence[dict[str, Any]],
        config: GenerationConfig | None = None,
        text: TextConfig | None = None,
        *,
        seed: int = 0,
        continue_final_message: bool = False,
    ) -> Message:
        """Reply as `generate_interleaved` does, the events joined to a message for the history.

        Its audio is latents. With `continue_final_message` it is the last message, completed.
        """
        parsed = as_messages(messages, "the conversation")
        given: list[TextPart | AudioPart] = []  # what is continued, its audio as latents
        if continue_final_message:
            *head, last = parsed
            given = [
                AudioPart(self.hear(part.audio)) if isinstance(part, AudioPart) else part
                for part in last.parts
                if part != TextPart("")
            ]
            parsed = (*head, replace(last, parts=tuple(given)))
        events = self.generate_interleaved(
            parsed, config, text, seed=seed, continue_final_message=continue_final_message
        )
        open_span = bool(given) and isinstance(given[-1], AudioPart)
        return Message("assistant", join(events, given, open_span=open_span))

    def hear(self, audio: Any) -> Tensor:
        """Encode a path, a `Clip` or latents for a message; see `hear`."""
        return hear(audio, self.audio_tokenizer, self.model.audio.config)

    def stream(
        self,
        caption: str,
        config: GenerationConfig | None = None,
        *,
        seed: int = 0,
        streaming: StreamConfig = AS_RECOMMENDED,
    ) -> Iterator[AudioChunk]:
        """Generate the clip of a caption, and give its sound while it is generated.

        With the `dct` tokenizer it is the clip of `generate`, bit for bit; others come near it.

        Args:
            caption: description of the sound.
            config: overrides the checkpoint's defaults.
            seed: of the noise.
            streaming: size of chunks, and how many columns wait for later ones.

        Raises:
            ValueError: as `generate`; and for AudioMAR, which decodes in no order of time.
        """
        if isinstance(self.model, AudioMAR):
            raise ValueError("AudioMAR decodes in no order of time; use generate")
        config = config or self.defaults
        prompts, special = self.prompts([caption], config), SpecialIds.of(self.text_tokenizer)
        decoder = SpanDecoder(self.audio_tokenizer, seconds=config.seconds, config=streaming)
        steps = decode(self.decoder, prompts, special, [seed], config)
        yield from filter(None, (decoder.push(step.latents.cpu()) for step in steps))
        yield from filter(None, [decoder.finish()])
