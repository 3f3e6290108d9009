"""A key-value cache that is written in place: a step costs what it reads, not what it copies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

SPARE = 64  # elements that a new buffer has room for beside what it must hold


@dataclass
class Slots:
    """Which of a number of slots that does not change are written, as tensors on the device."""

    start: Tensor  # () int64, the first that is free
    written: Tensor | None = None  # (n,) int64, those of the elements that are fed now

    @classmethod
    def after(cls, length: int, device: torch.device) -> Slots:
        """Begin behind `length` elements."""
        return cls(torch.full((), length, device=device))

    def take(self, count: int) -> Tensor:
        """Choose the next `count` slots to be written; return them."""
        self.written = self.start + torch.arange(count, device=self.start.device)
        return self.written


class BufferedLayer(DynamicLayer):
    """Keys and values of one attention layer, each (R', heads, T, channels) of a larger buffer.

    transformers' own layers copy all of it for every element. A buffer that is full is copied into
    one twice as long, so that elements cost the same however many there are. Sliding-window layers
    keep everything as well: the mask hides what lies outside.

    With `slots` the buffer has its final size and is all that is read, so that every step runs the
    same kernels on the same memory; the mask hides what is not written yet.
    """

    slots: Slots | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (R', heads, T, channels) and return all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
            self._key_buffer, self._value_buffer = self.keys, self.values
        if self.slots is not None:
            assert self.slots.written is not None
            self.keys.index_copy_(-2, self.slots.written, key_states)
            self.values.index_copy_(-2, self.slots.written, value_states)
            return self.keys, self.values
        self._key_buffer, self.keys = _appended(self._key_buffer, self.keys, key_states)
        self._value_buffer, self.values = _appended(self._value_buffer, self.values, value_states)
        return self.keys, self.values

    def fix(self, slots: Slots, capacity: int) -> None:
        """Write into `slots` from now on, of `capacity` in all; those that are free hold zeros."""
        free = (0, 0, 0, capacity - self.keys.shape[-2])
        self.keys, self.values = F.pad(self.keys, free), F.pad(self.values, free)
        self.slots = slots

    def unfix(self, length: int) -> None:
        """Hold the first `length` elements and append to them, as before `fix`."""
        self._key_buffer, self._value_buffer = self.keys, self.values
        self.keys, self.values = self.keys[..., :length, :], self.values[..., :length, :]
        self.slots = None


def _appended(buffer: Tensor, held: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Write `new` behind what is held; return the buffer, perhaps another, and all it holds."""
    length = held.shape[-2] + new.shape[-2]
    if length > buffer.shape[-2]:
        shape = (*new.shape[:-2], 2 * length + SPARE, new.shape[-1])
        buffer = new.new_empty(shape)
        buffer[..., : held.shape[-2], :] = held
    buffer[..., held.shape[-2] : length, :] = new
    return buffer, buffer[..., :length, :]


def buffered_cache(config: PretrainedConfig) -> DynamicCache:
    """Make the cache of a backbone; layers that are no plain attention keep their own kind."""
    cache = DynamicCache(config=config)
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        return cache  # whose masks transformers must make
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    cache.layers = [BufferedLayer() if type(layer) in kinds else layer for layer in cache.layers]
    return cache


def holds_all(cache: DynamicCache) -> bool:
    """Tell whether every layer keeps all elements, so that a ready mask fits all of them."""
    return len(fixable(cache)) == len(cache.layers)


def fixable(cache: DynamicCache) -> list[BufferedLayer]:
    """List the layers of a cache that `holds_all`."""
    return [layer for layer in cache.layers if isinstance(layer, BufferedLayer)]


def forget(cache: DynamicCache, count: int) -> None:
    """Remove the last `count` elements.

    Raises:
        ValueError: if a layer of the backbone cannot.
    """
    for layer in cache.layers:
        if not isinstance(layer, BufferedLayer):
            raise ValueError(
                f"the backbone keeps a {type(layer).__name__}, which cannot forget; set "
                "tokens_per_step to 1"
            )
        layer.keys = layer.keys[..., :-count, :]
        layer.values = layer.values[..., :-count, :]
