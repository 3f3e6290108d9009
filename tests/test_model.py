"""`AudioLanguageModel`: MNTP as generalised NTP, causality, checkpoints."""

from __future__ import annotations

import itertools
import json
import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from mllm_audio import backbone as backbones
from mllm_audio.data.dataset import prompt_ids, seeded
from mllm_audio.data.layout import Audio, Text, collate
from mllm_audio.masking import end_weights, sample_kept_positions
from mllm_audio.model import AudioLanguageModel
from mllm_audio.types import Batch


def clip_rows(tokenizer, ratio=0.0, lengths=(8, 4, 12)):
    generator = torch.Generator().manual_seed(0)
    captions = ["a low beep", "two high beeps", "noise then a low beep"]
    return [
        [
            Text(prompt_ids(tokenizer, caption)),
            Audio(
                torch.randn(n, 128, generator=generator), sample_kept_positions(n, ratio, generator)
            ),
        ]
        for caption, n in zip(captions, lengths, strict=True)
    ]


def plain_ntp_batch(tokenizer, special, rows) -> Batch:
    """Next-token prediction written out by hand, without any masking code."""
    width = max(len(text.input_ids) + 1 + len(audio.latents) for text, audio in rows)
    width += -width % 8  # as collate pads
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    positions = torch.zeros_like(ids)
    is_audio, predicts = (torch.zeros(len(rows), width, dtype=torch.bool) for _ in range(2))
    for b, (text, audio) in enumerate(rows):
        length, n = len(text.input_ids), len(audio.latents)
        ids[b, : length + 1 + n] = torch.tensor(
            [*text.input_ids.tolist(), special.audio_start, *[special.audio] * n]
        )
        positions[b, : length + 1 + n] = torch.arange(length + 1 + n)
        predicts[b, length : length + 1 + n] = True
        is_audio[b, length + 1 : length + 1 + n] = True
    zero = torch.zeros(1, 128)
    return Batch(
        input_ids=ids,
        position_ids=positions,
        is_null=torch.zeros_like(is_audio),
        is_audio=is_audio,
        predicts=predicts,
        text_labels=torch.full_like(ids, -100),
        segment_ids=None,
        latents=torch.cat([a.latents for _, a in rows]),
        content_positions=torch.cat([torch.arange(len(a.latents)) for _, a in rows]),
        target_positions=torch.cat([torch.arange(len(a.latents) + 1) for _, a in rows]),
        target_latents=torch.cat([torch.cat([a.latents, zero]) for _, a in rows]),
        target_is_end=torch.cat(
            [torch.arange(len(a.latents) + 1) == len(a.latents) for _, a in rows]
        ),
        end_weight=torch.ones(sum(len(a.latents) + 1 for _, a in rows)),
        masking_ratio=0.0,
        names=("a", "b", "c"),
        num_elements=0,
    )


@pytest.mark.parametrize("head", ["ddpm", "flow"])
def test_mntp_at_ratio_zero_is_ntp_to_the_last_bit(
    make_model, text_tokenizer, special, family, head
):
    model = make_model(family, head)
    rows = clip_rows(text_tokenizer, ratio=0.0)
    masked = collate(rows, ["a", "b", "c"], special, masking_ratio=0.0)
    plain = plain_ntp_batch(text_tokenizer, special, rows)
    first = model(masked, seeded("noise"))
    second = model(plain, seeded("noise"))
    assert torch.equal(first.total, second.total)
    assert torch.equal(first.per_latent, second.per_latent)
    first.total.backward()
    gradients = [p.grad.clone() for p in model.audio.parameters()]
    model.zero_grad()
    second.total.backward()
    assert all(
        torch.equal(p.grad, g) for p, g in zip(model.audio.parameters(), gradients, strict=True)
    )


def test_masked_rows_keep_gaps_in_every_position(text_tokenizer, special):
    kept = torch.tensor([1, 4, 6])
    text = Text(prompt_ids(text_tokenizer, "a low beep"))
    batch = collate([[text, Audio(torch.randn(8, 128), kept)]], ["a"], special, masking_ratio=0.6)
    length = len(text.input_ids)
    assert batch.content_positions.tolist() == [1, 4, 6]
    assert batch.target_positions.tolist() == [1, 4, 6, 8]  # the end stands at N
    assert batch.target_is_end.tolist() == [False, False, False, True]
    expected = [*range(length + 1), length + 2, length + 5, length + 7]
    assert batch.position_ids[0, : len(expected)].tolist() == expected
    without_end = collate(
        [[text, Audio(torch.randn(8, 128), kept)]], ["a"], special, end_of_audio=False
    )
    assert without_end.target_positions.tolist() == [1, 4, 6]
    assert int(without_end.predicts.sum()) == 3


def test_text_after_audio_continues_behind_the_end_token(text_tokenizer, special):
    text = Text(prompt_ids(text_tokenizer, "a low beep"))
    audio = Audio(torch.randn(8, 128), torch.tensor([0, 5]))
    batch = collate([[text, audio, text]], ["a"], special)
    length = len(text.input_ids)
    assert batch.input_ids[0, length + 3] == special.audio_end
    positions = batch.position_ids[0].tolist()
    assert positions[length + 3] == length + 1 + 8
    assert positions[length + 4 : 2 * length + 4] == list(range(length + 10, 2 * length + 10))


@torch.no_grad()
def states(model, batch):
    return backbones.run(model.backbone, model.embed(batch), batch.position_ids)


def test_attention_crosses_the_gaps_of_dropped_tokens(make_model, text_tokenizer, special, family):
    # transformers takes a gap in position ids for a new packed sequence when it gets no mask.
    model = make_model(family)
    rows = clip_rows(text_tokenizer, ratio=0.5)
    batch = collate(rows, ["a", "b", "c"], special)
    other = [[Text(rows[0][0].input_ids.flip(0)), rows[0][1]], *rows[1:]]
    changed = collate(other, ["a", "b", "c"], special)
    last = int(batch.predicts[0].nonzero()[-1])
    assert not torch.equal(states(model, batch)[0, last], states(model, changed)[0, last])


def test_no_future_token_changes_a_past_output(make_model, text_tokenizer, special, family):
    model = make_model(family)
    rows = clip_rows(text_tokenizer, ratio=0.5)
    batch = collate(rows, ["a", "b", "c"], special)
    latents = rows[0][1].latents.clone()
    latents[rows[0][1].kept[-1]] += 5.0
    changed = collate(
        [[rows[0][0], Audio(latents, rows[0][1].kept)], *rows[1:]], ["a", "b", "c"], special
    )
    last = int(batch.predicts[0].nonzero()[-1])
    before, after = states(model, batch)[0], states(model, changed)[0]
    assert torch.equal(before[:last], after[:last])
    assert not torch.equal(before[last], after[last])


def test_padding_and_neighbours_do_not_change_a_row(make_model, text_tokenizer, special, family):
    model = make_model(family)
    rows = clip_rows(text_tokenizer, ratio=0.3)
    together = states(model, collate(rows, ["a", "b", "c"], special))
    for index, row in enumerate(rows):
        alone = states(model, collate([row], ["x"], special))[0]
        end = len(row[0].input_ids) + 1 + len(row[1].kept)
        torch.testing.assert_close(together[index, :end], alone[:end], rtol=1e-5, atol=1e-5)


def test_the_unconditional_branch_forgets_the_prompt_and_nothing_else(
    make_model, text_tokenizer, special
):
    model = make_model()
    rows = clip_rows(text_tokenizer)
    same_length = [[Text(rows[0][0].input_ids.flip(0)), rows[0][1]]]
    options = {"unconditional": [True]}
    first = states(model, collate(rows[:1], ["a"], special, **options))
    second = states(model, collate(same_length, ["a"], special, **options))
    assert torch.equal(first, second)
    conditional = states(model, collate(rows[:1], ["a"], special))
    last = int(collate(rows[:1], ["a"], special).predicts[0].nonzero()[-1])
    assert not torch.equal(first[:, last], conditional[:, last])


def test_the_attention_kernel_of_training_is_the_same_function(
    make_model, text_tokenizer, special, family
):
    model = make_model(family)
    batch = collate(clip_rows(text_tokenizer, ratio=0.3), ["a", "b", "c"], special)
    with torch.autocast("cpu", torch.bfloat16):
        plain = backbones.run(model.backbone, model.embed(batch), batch.position_ids).detach()
        fused = states(model, batch)  # without gradients the fused kernel runs
    torch.testing.assert_close(plain, fused, rtol=0.03, atol=0.03)  # bf16 keeps 8 bits


def test_null_prompt_of_several_vectors_is_laid_in_order(make_model, text_tokenizer, special):
    model = make_model(null_prompt_length=3)
    rows = clip_rows(text_tokenizer)
    batch = collate(rows, "abc", special, unconditional=[False, True, True])
    embeds, null = model.embed(batch), model.audio.null_prompt
    length = len(rows[2][0].input_ids)
    assert length > 3
    assert torch.equal(embeds[2, :3], null)
    assert torch.equal(embeds[2, length - 1], null[2])  # the last vector stands for the rest
    assert torch.equal(embeds[1, :2], null[:2])
    assert not torch.equal(embeds[0, 0], null[0])


@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.8])
def test_end_weights_make_the_odds_those_of_the_unmasked_sequence(ratio):
    """Half the clips end after 8 latents, half after 12: unmasked, P(end at 8 | 7 kept) is 1/2."""
    generator = torch.Generator().manual_seed(0)
    ends, weights = [], []
    for index in range(30_000):
        length = 8 if index % 2 else 12
        kept = sample_kept_positions(length, ratio, generator)
        follows = [*kept.tolist()[1:], length]
        if 7 in kept and follows[kept.tolist().index(7)] == 8:
            at = kept.tolist().index(7)
            ends.append(float(length == 8))
            ones = torch.ones(len(kept) + 1, dtype=torch.long)
            weights.append(float(end_weights(length, kept, ratio, ones)[1 + at]))
    ends, weights = torch.tensor(ends), torch.tensor(weights)
    optimum = float((weights * ends).sum() / weights.sum())  # of the weighted cross-entropy
    assert optimum == pytest.approx(0.5, abs=0.04)
    assert float(ends.mean()) > optimum + 0.05


@pytest.mark.parametrize("distance", [1, 2, 3])
def test_end_weights_are_ratios_of_probabilities_counted_over_all_subsets(distance):
    num_tokens, ratio = 7, 0.55
    for count in (1, 3, 7):
        subsets = [
            (-1, *s, num_tokens) for s in itertools.combinations(range(num_tokens), count)
        ]  # the start, what is kept, the end
        distances = torch.full((count + 1,), distance)
        for subset in subsets[::5]:
            weights = end_weights(num_tokens, torch.tensor(subset[1:-1]), ratio, distances)
            for index, weight in enumerate(weights.tolist()):
                if index + distance > count + 1 or (index, distance) == (0, 1):
                    assert weight == 1
                    continue
                first, second = subset[index], subset[index + distance]
                pairs = (zip(s, s[distance:], strict=False) for s in subsets)
                same = sum((first, second) in found for found in map(list, pairs))
                gap = second - first
                between = math.comb(gap - 1, distance - 1)  # which of them are kept
                sure = 1 if first == -1 else 1 - ratio  # the start is always there
                independent = between * sure * (1 - ratio) ** distance * ratio ** (gap - distance)
                assert weight == pytest.approx(independent / (same / len(subsets)), rel=1e-5)
    assert end_weights(5, torch.arange(5), 0.0, torch.ones(6)).tolist() == [1.0] * 6


def test_end_loss_is_the_weighted_cross_entropy(make_model):
    model = make_model()
    hidden, is_end = torch.randn(6, 32), torch.tensor([True, False] * 3)
    weight = torch.rand(6)
    plain = model.audio.end_loss(hidden, is_end, torch.ones(6))
    torch.testing.assert_close(model.audio.end_loss(hidden, is_end, weight), plain * weight)


def test_every_audio_parameter_has_a_gradient_with_and_without_audio(
    make_model, text_tokenizer, special
):
    model = make_model()
    model(
        collate(clip_rows(text_tokenizer), "abc", special, unconditional=[True, False, False])
    ).total.backward()
    assert all(p.grad is not None for p in model.audio.parameters())
    model.zero_grad()
    text_only = collate([[Text(prompt_ids(text_tokenizer, "a low beep"))]], ["t"], special)
    losses = model(text_only)
    losses.total.backward()
    assert float(losses.total.detach()) == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in model.audio.parameters())


def test_checkpoint_round_trip_is_exact_and_the_text_side_loads_alone(
    make_model, text_tokenizer, special, family, tmp_path
):
    model = make_model(family)
    model.save_pretrained(tmp_path)
    loaded = AudioLanguageModel.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    text = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = prompt_ids(text_tokenizer, "noise then a low beep")[None]
    with torch.no_grad():
        assert torch.equal(text(ids).logits, model.backbone(ids).logits)


def test_damaged_checkpoints_are_refused_in_one_line(make_model, tmp_path):
    from safetensors.torch import load_file, save_file

    with pytest.raises(
        ValueError, match=f"found no config.json in {re.escape(str(tmp_path))}: expected a folder"
    ):
        AudioLanguageModel.from_pretrained(tmp_path)
    make_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if k != "audio.null_prompt"}, weights)
    with pytest.raises(ValueError, match=r"1 tensors missing \['audio.null_prompt'\], 0 unknown"):
        AudioLanguageModel.from_pretrained(tmp_path)
    save_file(tensors | {"audio.null_prompt": torch.zeros(2, 32)}, weights)
    with pytest.raises(
        ValueError, match=r"audio.null_prompt is \(2, 32\), its configuration says \(1, 32\)"
    ):
        AudioLanguageModel.from_pretrained(tmp_path)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        AudioLanguageModel.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"found no model\.safetensors"):
        AudioLanguageModel.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["audio"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no `audio` section"):
        AudioLanguageModel.from_pretrained(tmp_path)


def test_constant_channels_get_a_floor_and_useless_statistics_are_refused(make_model):
    model = make_model()
    std = torch.ones(128)
    std[5] = 0.0
    model.audio.set_statistics(torch.zeros(128), std)
    assert float(model.audio.latent_std[5]) == pytest.approx(1e-3)
    with pytest.raises(ValueError, match="latent std must be finite and not all zero"):
        model.audio.set_statistics(torch.zeros(128), torch.zeros(128))


def test_channel_weight_follows_the_energy_and_averages_to_one(make_model):
    assert make_model(channel_weight_exponent=0.0).audio.channel_weight() is None
    model = make_model(channel_weight_exponent=0.5)
    weight = model.audio.channel_weight()
    assert float(weight.mean()) == pytest.approx(1.0)
    assert bool((weight.diff() >= 0).all())  # the std rises from 0.5 to 2
    assert float(weight[-1] / weight[0]) == pytest.approx(2.0, rel=1e-3)  # (2 / 0.5) ** 0.5
