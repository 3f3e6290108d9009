"""Nothing in a span waits for the device: no value is read back, no tensor is copied there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_backbone import add_voice
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from mllm_audio.data.dataset import prompt_ids
from mllm_audio.generation.decode import GenerationConfig, decode
from mllm_audio.text import SpecialIds

CONFIG = GenerationConfig(num_inference_steps=3, guidance_scale=3.0, seconds=0.64)  # 16 latents
CAPTIONS = ["a low beep", "two high beeps and something unheard of"]
# Operators whose result, or its shape, the host must wait for.
READS = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "nonzero_numpy",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
}


class Waits(TorchDispatchMode):
    """Record the operators that make the host wait for a device, or copy to it."""

    def __init__(self):
        super().__init__()
        self.found, self.count = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += 1
        name = func.overloadpacket.__name__
        devices = {x.device for x in [*args, result] if isinstance(x, torch.Tensor)}
        by_mask = name.startswith(("index", "_index_put")) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8)
            for index in (args[1] if isinstance(args[1], (list, tuple)) else [])
        )
        by_count = name == "repeat_interleave" and "Tensor" in func._overloadname
        made = name in ("lift_fresh", "lift_fresh_copy")  # torch.tensor(values)
        if name in READS or by_mask or by_count or made or len(devices) > 1:
            self.found.append(str(func))
        return result


def waits_after_the_first_latent(model, special, prompts, config):
    steps = decode(model, prompts, special, range(len(prompts)), config)
    with pytest.MonkeyPatch.context() as patch:
        # As the prompt is fed, transformers reads whether it is padded; from meta it cannot.
        if model.device.type == "meta":
            patch.setattr(masking_utils, "fast_all", lambda mask: False)
        next(steps)
    with Waits() as waits:
        assert len(list(steps)) == 15
    assert waits.count > 100
    return waits.found


def test_the_recorder_finds_every_kind():
    values, mask = torch.ones(3), torch.tensor([True, False, True])
    for wait in (
        lambda: bool(mask.all()),
        lambda: values[0].item(),
        lambda: values[mask],
        lambda: mask.nonzero(),
        lambda: torch.tensor([1.0]),
        lambda: values.to("meta"),
        lambda: values.masked_select(mask),
        lambda: torch.equal(values, values),
        lambda: values.repeat_interleave(torch.ones(3, dtype=torch.long)),
        lambda: values.unique(),
    ):
        with torch.inference_mode(), Waits() as waits:
            wait()
        assert waits.found


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("tokens_per_step", [1, 3])
@pytest.mark.parametrize(("head", "captions"), [("ddpm", CAPTIONS[:1]), ("flow", CAPTIONS)])
def test_no_value_is_read_back_or_copied_over_inside_a_span(
    make_model, text_tokenizer, special, family, head, captions, tokens_per_step, device
):
    """On the meta device there are no values: what would read one fails."""
    model = make_model(family, head).to(device)
    prompts = [prompt_ids(text_tokenizer, caption) for caption in captions]
    config = replace(CONFIG, tokens_per_step=tokens_per_step)
    assert waits_after_the_first_latent(model, special, prompts, config) == []


@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma3"])
def test_nor_in_other_families_and_behind_sliding_windows(base, name):
    model = add_voice(base(name)).eval()
    tokenizer = model.text_tokenizer
    prompts = [prompt_ids(tokenizer, caption) for caption in CAPTIONS]
    for tokens_per_step in (1, 4):
        config = replace(CONFIG, tokens_per_step=tokens_per_step)
        found = waits_after_the_first_latent(model, SpecialIds.of(tokenizer), prompts, config)
        assert found == []


@pytest.mark.parametrize("settings", [{"sampler": "heun"}, {"final_inference_steps": 2}])
def test_nor_by_a_sampler_or_where_later_latents_need_fewer_steps(
    make_model, text_tokenizer, special, settings
):
    prompts = [prompt_ids(text_tokenizer, CAPTIONS[0])]
    config = replace(CONFIG, **settings)
    assert waits_after_the_first_latent(make_model(), special, prompts, config) == []
