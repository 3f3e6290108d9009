"""Decoding: the cache, batches, noise, guidance, durations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mllm_audio import backbone as backbones
from mllm_audio.data.dataset import prompt_ids
from mllm_audio.data.layout import Audio, Text, collate
from mllm_audio.diffusion.noise import Noise
from mllm_audio.generation.decode import GenerationConfig, decode, token_limits
from mllm_audio.heads.base import SamplingConfig

CONFIG = GenerationConfig(
    num_inference_steps=3, guidance_scale=2.0, guidance_schedule="constant", seconds=0.48
)


def run(model, tokenizer, special, captions, seeds, config=CONFIG):
    prompts = [prompt_ids(tokenizer, caption) for caption in captions]
    steps = list(decode(model, prompts, special, seeds, config))
    return torch.stack([step.latents for step in steps], dim=1), steps


@pytest.mark.parametrize("head", ["ddpm", "flow"])
def test_cached_decoding_equals_full_recomputation(
    make_model, text_tokenizer, special, family, head
):
    model = make_model(family, head)
    latents, _ = run(model, text_tokenizer, special, ["noise then a low beep"], [7])
    text = Text(prompt_ids(text_tokenizer, "noise then a low beep"))
    for index in range(latents.shape[1]):
        # The training layout of everything sampled so far; its last element predicts `index`.
        # Position `index` itself is in the row: causal attention hides it from the state before.
        row = [text, Audio(latents[0], torch.arange(index + 1))]
        rows = collate([row, row], ["c", "u"], special, unconditional=[False, True])
        with torch.no_grad():
            hidden = backbones.run(model.backbone, model.embed(rows), rows.position_ids)
            hidden = hidden[:, len(text.input_ids) + index]
            noise = Noise(torch.tensor([7]), torch.tensor([index]), 128)
            sampling = SamplingConfig(num_inference_steps=3, guidance_scale=2.0)
            expected = model.audio.sample(hidden[:1], hidden[1:], sampling, noise)
        scale = float(expected.abs().max())
        assert float((expected - latents[:, index]).abs().max()) <= 1e-4 * scale


def test_a_row_in_a_batch_equals_the_row_alone(make_model, text_tokenizer, special, family):
    model = make_model(family)
    captions = ["a low beep", "noise then a low beep", "two high beeps and something unheard of"]
    together, _ = run(model, text_tokenizer, special, captions, [3, 4, 5])
    for index, caption in enumerate(captions):
        alone, _ = run(model, text_tokenizer, special, [caption], [3 + index])
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-4, atol=1e-4)


def test_seeds_decide_and_repeat(make_model, text_tokenizer, special):
    model = make_model()
    first, _ = run(model, text_tokenizer, special, ["a low beep"], [1])
    again, _ = run(model, text_tokenizer, special, ["a low beep"], [1])
    other, _ = run(model, text_tokenizer, special, ["a low beep"], [2])
    assert torch.equal(first, again)
    assert float((first - other).abs().max()) > 0.1


def test_guidance_scale_one_ignores_the_unconditional_branch(make_model, text_tokenizer, special):
    model = make_model()
    config = replace(CONFIG, guidance_scale=1.0)
    before, _ = run(model, text_tokenizer, special, ["a low beep"], [1], config)
    guided, _ = run(model, text_tokenizer, special, ["a low beep"], [1])
    with torch.no_grad():
        model.audio.null_prompt.add_(1.0)
    after, _ = run(model, text_tokenizer, special, ["a low beep"], [1], config)
    changed, _ = run(model, text_tokenizer, special, ["a low beep"], [1])
    assert torch.equal(before, after)
    assert not torch.equal(guided, changed)


def test_both_guidance_conventions_and_their_schedules():
    mar = GenerationConfig(guidance_scale=7.0, guidance_schedule="annealed")
    assert [mar.scale_at(i, 5) for i in (0, 2, 4)] == [7.0, 4.0, 1.0]
    paper = GenerationConfig(guidance_weight=7.0, guidance_schedule="annealed")
    assert [paper.scale_at(i, 5) for i in (0, 2, 4)] == [8.0, 5.0, 2.0]  # s = 1 + w
    constant = GenerationConfig(guidance_weight=2.0, guidance_schedule="constant")
    assert {constant.scale_at(i, 5) for i in range(5)} == {3.0}
    rising = GenerationConfig(guidance_scale=7.0, guidance_schedule="linear")  # MAR's
    assert [rising.scale_at(i, 4) for i in range(4)] == [2.5, 4.0, 5.5, 7.0]
    by_weight = GenerationConfig(guidance_weight=6.0, guidance_schedule="linear")
    assert [by_weight.scale_at(i, 4) for i in range(4)] == [2.5, 4.0, 5.5, 7.0]


def force_end(model, logit: float) -> None:
    with torch.no_grad():
        model.audio.end_of_audio.weight.zero_()
        model.audio.end_of_audio.bias.fill_(logit)


def test_the_end_is_decided_at_whole_columns_between_the_guards(
    make_model, text_tokenizer, special
):
    model = make_model()
    config = replace(CONFIG, seconds=None, min_seconds=0.32)
    force_end(model, 50.0)
    latents, _ = run(model, text_tokenizer, special, ["a low beep"], [0], config)
    assert latents.shape[1] == 8  # two columns of four
    force_end(model, -50.0)
    latents, _ = run(model, text_tokenizer, special, ["a low beep"], [0], config)
    assert latents.shape[1] == model.audio.config.max_tokens
    capped = replace(config, max_seconds=0.48)
    latents, _ = run(model, text_tokenizer, special, ["a low beep"], [0], capped)
    assert latents.shape[1] == 12


def test_sampled_ends_follow_their_probability_and_the_seed_alone(make_model):
    model = make_model()
    force_end(model, -1.0)  # probability 0.269
    seeds = torch.arange(4000)
    noise = Noise(seeds, torch.full_like(seeds, 8), 128)
    hidden = torch.zeros(4000, 32)
    ends = model.audio.ends(hidden, noise)
    assert float(ends.float().mean()) == pytest.approx(0.269, abs=0.03)
    single = Noise(seeds[17:18], torch.tensor([8]), 128)
    assert bool(model.audio.ends(hidden[:1], single)) == bool(ends[17])
    assert not bool(model.audio.ends(hidden, noise, threshold=0.5).any())


def test_rows_that_end_early_are_marked_inactive(make_model, text_tokenizer, special):
    model = make_model()
    force_end(model, 0.0)  # a coin at each column
    config = replace(CONFIG, seconds=None)
    captions, seeds = ["a low beep"] * 6, list(range(6))
    _, steps = run(model, text_tokenizer, special, captions, seeds, config)
    lengths = torch.stack([step.active for step in steps]).sum(dim=0)
    assert len(set(lengths.tolist())) > 1
    assert bool((lengths % 4 == 0).all())
    _, alone = run(model, text_tokenizer, special, captions[:1], seeds[3:4], config)
    assert len(alone) == int(lengths[3])


def test_durations_round_up_to_columns_and_too_long_is_refused(make_model):
    model = make_model()
    assert token_limits(model.audio.config, replace(CONFIG, seconds=0.17)) == (8, 8)
    assert token_limits(model.audio.config, replace(CONFIG, seconds=0.64)) == (16, 16)
    assert token_limits(model.audio.config, replace(CONFIG, seconds=None, min_seconds=0.0)) == (
        4,
        16,
    )
    with pytest.raises(ValueError, match=r"asked for 0.7 s, this model makes at most 0.64 s"):
        token_limits(model.audio.config, replace(CONFIG, seconds=0.7))


def test_a_caption_longer_than_the_model_has_room_for_is_refused(
    make_model, text_tokenizer, special
):
    model = make_model()
    with pytest.raises(ValueError, match=r"caption has \d+ text tokens, the model has room for 51"):
        run(model, text_tokenizer, special, ["xyz " * 40], [0])


def test_paper_models_without_an_end_output_make_every_token(make_model, text_tokenizer, special):
    model = make_model(end_of_audio=False)
    latents, _ = run(
        model, text_tokenizer, special, ["a low beep"], [0], replace(CONFIG, seconds=None)
    )
    assert latents.shape[1] == model.audio.config.max_tokens
    assert len(model.audio.target_positions.weight) == model.audio.config.max_tokens
