"""Several latents a step: against decoding without a cache, and what is fed when a span ends."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_backbone import add_voice
from test_generation import force_end, run

from mllm_audio import backbone as backbones
from mllm_audio.data.dataset import prompt_ids
from mllm_audio.data.layout import Audio, Text, collate
from mllm_audio.diffusion.noise import Noise
from mllm_audio.generation.decode import GenerationConfig, audio_span, decode
from mllm_audio.generation.parallel import asked_targets, copies_mask
from mllm_audio.generation.rows import NEXT, Rows
from mllm_audio.heads.base import SamplingConfig
from mllm_audio.text import SpecialIds

CONFIG = GenerationConfig(num_inference_steps=3, guidance_scale=3.0, seconds=0.64)  # 16 latents


def reference(model, special, text, latents, first, index):
    """Run the training layout up to latent `first` - 1, which predicts latent `index`: (2, H).

    Where that is not the next one, a copy of it does; others are asked for the one after it, so
    that what is compared does not see them.
    """
    far = torch.arange(1 + first) % 2 * 2
    far[-1] = 0 if index == first else index - first + 1
    row = [text, Audio(latents, torch.arange(first), far=far, next_kept=False)]
    rows = collate([row, row], ["c", "u"], special, unconditional=[False, True])
    with torch.no_grad():
        hidden = model.hidden_states(rows)
    last = len(text.input_ids) + first + int((far > 0).sum())
    assert rows.predicts[:, last].all() and not rows.predicts[:, last + 1 :].any()
    return hidden[:, last]


def check_against_reference(model, tokenizer, special, tokens_per_step, steps=3):
    config = replace(CONFIG, tokens_per_step=tokens_per_step, num_inference_steps=steps)
    latents, _ = run(model, tokenizer, special, ["a low beep"], [7], config)
    text = Text(prompt_ids(tokenizer, "a low beep"))
    assert latents.shape[1] == 16
    for index in range(16):
        first = index // tokens_per_step * tokens_per_step
        hidden = reference(model, special, text, latents[0], first, index)
        noise = Noise(torch.tensor([7]), torch.tensor([index]), 128)
        scale = 3.0 + (1.0 - 3.0) * index / 15  # annealed to 1: each latent's own
        sampling = SamplingConfig(num_inference_steps=steps, guidance_scale=scale)
        with torch.no_grad():
            expected = model.audio.sample(hidden[:1], hidden[1:], sampling, noise)
        size = float(expected.abs().max())
        assert float((expected - latents[:, index]).abs().max()) <= 1e-4 * size, index


@pytest.mark.parametrize("tokens_per_step", [2, 3, 4, 8, 16])
def test_every_latent_is_the_one_drawn_without_a_cache(
    make_model, text_tokenizer, special, family, tokens_per_step
):
    check_against_reference(make_model(family), text_tokenizer, special, tokens_per_step)


def test_a_ddpm_head_draws_them_too(make_model, text_tokenizer, special):
    check_against_reference(make_model("gpt2", "ddpm"), text_tokenizer, special, 4)


@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma2", "gemma3", "gpt_neox"])
def test_backbones_of_other_families_and_sliding_windows(base, name):
    """The window is 12 positions, the prompt and 16 latents are more."""
    model = add_voice(base(name)).eval()
    with torch.no_grad():
        for parameter in model.audio.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    tokenizer = model.text_tokenizer
    check_against_reference(model, tokenizer, SpecialIds.of(tokenizer), 4)


def test_a_row_in_a_padded_batch_equals_the_row_alone(make_model, text_tokenizer, special):
    model, config = make_model(), replace(CONFIG, tokens_per_step=4)
    captions = ["a low beep", "noise then a low beep", "two high beeps and something unheard of"]
    together, _ = run(model, text_tokenizer, special, captions, [3, 4, 5], config)
    for index, caption in enumerate(captions):
        alone, _ = run(model, text_tokenizer, special, [caption], [3 + index], config)
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens_per_step", [1, 4, 7, 16, 40])
def test_a_step_runs_the_backbone_once_and_keeps_one_element_a_latent(
    make_model, text_tokenizer, special, tokens_per_step, monkeypatch
):
    model, config = make_model(), replace(CONFIG, tokens_per_step=tokens_per_step)
    lengths, step = [], type(model).step

    def counted(self, embeds, positions, mask, cache, count):
        states = step(self, embeds, positions, mask, cache, count)
        lengths.append(cache.get_seq_length() - (count - 1))
        return states

    monkeypatch.setattr(type(model), "step", counted)
    run(model, text_tokenizer, special, ["a low beep"], [0], config)
    prompt = len(prompt_ids(text_tokenizer, "a low beep")) + 1
    assert lengths == [prompt + n for n in range(0, 16, tokens_per_step)]


def test_the_mask_hides_copies_from_each_other_and_padding_from_all():
    padding = torch.tensor([[False, *5 * [True]], 6 * [True]])
    mask = copies_mask(padding, 2, 2, 2).int()  # 2 in the cache, 2 new, 2 copies of the last
    assert mask[1, 0].tolist() == [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 1, 0],
        [1, 1, 1, 0, 0, 1],
    ]
    assert mask[0, 0, :, 0].tolist() == [0, 0, 0, 0]
    later = copies_mask(F.pad(padding, (0, 2), value=True), torch.tensor(2), 2, 2).int()
    assert torch.equal(later, F.pad(mask, (0, 2)))  # free slots are hidden
    first = copies_mask(padding[:1, :5], 0, 4, 1)  # nothing cached: padding sees itself alone
    assert first[0, 0, 0].tolist() == [True, False, False, False, False]
    assert not first[0, 0, 1:, 0].any()


def test_targets_of_a_step_stop_at_the_last_latent_and_then_ask_for_the_end():
    assert asked_targets(0, 8, 12) == range(8)
    assert asked_targets(8, 8, 12) == range(8, 12)
    assert asked_targets(12, 8, 12) == range(12, 13)


@pytest.mark.parametrize("tokens_per_step", [1, 2, 4, 8, 16])
def test_the_end_is_decided_at_columns_inside_a_step_too(
    make_model, text_tokenizer, special, tokens_per_step
):
    model = make_model()
    config = replace(CONFIG, seconds=None, tokens_per_step=tokens_per_step, end_threshold=0.5)
    for fewest, longest, logit, expected in (
        (0.16, 0.64, 99.0, 4),
        (0.48, 0.64, 99.0, 12),
        (0.16, 0.48, -99.0, 12),
    ):
        force_end(model, logit)
        limits = replace(config, min_seconds=fewest, max_seconds=longest)
        latents, _ = run(model, text_tokenizer, special, ["a low beep"], [1], limits)
        assert latents.shape[1] == expected


@pytest.mark.parametrize("tokens_per_step", [1, 3, 4, 8, 16])
@pytest.mark.parametrize("ends_at", [4, 12, 16])
def test_what_follows_a_span_sees_all_of_it(
    make_model, text_tokenizer, special, tokens_per_step, ends_at
):
    """After the end marker the state is that of the whole row in the training layout."""
    model = make_model()
    force_end(model, 99.0 if ends_at < 16 else -99.0)
    config = replace(
        CONFIG,
        seconds=None,
        min_seconds=ends_at * 0.04,
        tokens_per_step=tokens_per_step,
        end_threshold=0.5,
    )
    ids = prompt_ids(text_tokenizer, "a low beep")
    text = Text(ids)
    with torch.inference_mode():
        given = collate([[text, Text(ids)]], "a", special)
        embeds = model.embed(given)[:, : len(ids)].repeat(2, 1, 1)
        positions = given.position_ids[:, : len(ids)].repeat(2, 1)
        mask = torch.ones_like(positions, dtype=torch.bool)
        rows = Rows.begin(model, special, True, embeds, positions, mask)
        rows.feed_id(special.audio_start, asked_targets(0, tokens_per_step, 16))
        steps = list(audio_span(rows, [3], config, 16))
        rows.feed_id(special.audio_end)
        latents = torch.cat([step.latents for step in steps])
        assert len(latents) == ends_at
        row = [text, Audio(latents, torch.arange(ends_at)), Text(ids)]
        full = collate([row], "a", special)
        hidden = backbones.run(model.backbone, model.embed(full), full.position_ids)
    end = int((full.input_ids[0] == special.audio_end).nonzero()[0])
    torch.testing.assert_close(rows.hidden[0, 0], hidden[0, end], rtol=1e-4, atol=1e-4)
    assert rows.last_position == int(full.position_ids[0, end])
    assert rows.cache.get_seq_length() == end + 1


def test_it_is_refused_where_a_model_is_not_told_what_to_predict(
    make_model, text_tokenizer, special
):
    model = make_model(target_positions=False)
    with pytest.raises(ValueError, match=r"tokens_per_step is 4, but .* set it to 1"):
        run(model, text_tokenizer, special, ["a"], [0], replace(CONFIG, tokens_per_step=4))
    run(model, text_tokenizer, special, ["a"], [0], CONFIG)
    with pytest.raises(ValueError, match=r"generation.tokens_per_step=0, expected \[1, 10000\]"):
        replace(CONFIG, tokens_per_step=0)


def test_long_prompts_and_many_steps_outgrow_the_buffers_of_the_cache(make_model, text_tokenizer):
    """Elements written before a buffer is replaced are still there."""
    model = make_model()
    special = SpecialIds.of(text_tokenizer)
    embeds = torch.randn(2, 60, 32)
    positions = torch.arange(60).repeat(2, 1)
    mask = torch.ones(2, 60, dtype=torch.bool)
    with torch.inference_mode():
        rows = Rows.begin(model, special, False, embeds[:, :1], positions[:, :1], mask[:, :1])
        for index in range(1, 60):
            rows.feed(embeds[:, index : index + 1], NEXT)
        expected = backbones.run(model.backbone, embeds, positions)[:, -1:]
        buffer = rows.cache.layers[0]._key_buffer
    torch.testing.assert_close(rows.hidden, expected, rtol=1e-4, atol=1e-4)
    assert rows.cache.layers[0].keys.data_ptr() == buffer.data_ptr()  # a view, not a copy
    assert buffer.shape[-2] >= 60 and math.isfinite(float(rows.hidden.sum()))


def test_decode_stops_feeding_after_the_last_latent(make_model, text_tokenizer, special):
    model = make_model(end_of_audio=False)
    prompts = [prompt_ids(text_tokenizer, "a")]
    steps = list(decode(model, prompts, special, [0], replace(CONFIG, tokens_per_step=16)))
    assert len(steps) == 16
