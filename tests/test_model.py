"""`AudioLanguageModel`: MNTP as generalised NTP, causality, checkpoints."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from mllm_audio import backbone as backbones
from mllm_audio.data.dataset import Audio, Text, collate, prompt_ids, seeded
from mllm_audio.masking import sample_kept_positions
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
    prompt, is_audio, predicts = (torch.zeros(len(rows), width, dtype=torch.bool) for _ in range(3))
    for b, (text, audio) in enumerate(rows):
        length, n = len(text.input_ids), len(audio.latents)
        ids[b, : length + 1 + n] = torch.tensor(
            [*text.input_ids.tolist(), special.audio_start, *[special.audio] * n]
        )
        positions[b, : length + 1 + n] = torch.arange(length + 1 + n)
        prompt[b, :length] = True
        predicts[b, length : length + 1 + n] = True
        is_audio[b, length + 1 : length + 1 + n] = True
    zero = torch.zeros(1, 128)
    return Batch(
        input_ids=ids,
        position_ids=positions,
        is_prompt=prompt,
        is_audio=is_audio,
        predicts=predicts,
        latents=torch.cat([a.latents for _, a in rows]),
        content_positions=torch.cat([torch.arange(len(a.latents)) for _, a in rows]),
        target_positions=torch.cat([torch.arange(len(a.latents) + 1) for _, a in rows]),
        target_latents=torch.cat([torch.cat([a.latents, zero]) for _, a in rows]),
        target_is_end=torch.cat(
            [torch.arange(len(a.latents) + 1) == len(a.latents) for _, a in rows]
        ),
        unconditional=torch.zeros(len(rows), dtype=torch.bool),
        masking_ratio=0.0,
        names=("a", "b", "c"),
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
    assert torch.equal(first.per_prediction, second.per_prediction)
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


def test_null_prompt_of_several_vectors_is_laid_in_order(make_model):
    model = make_model(null_prompt_length=3)
    is_prompt = torch.tensor([[True, True, True, False], [False, True, True, False]])
    laid = model.embed_null_prompt(is_prompt)
    null = model.audio.null_prompt
    assert torch.equal(laid[0, :3], null)
    assert torch.equal(laid[1, 1:3], null[:2])


def test_end_loss_weight_makes_the_odds_those_of_the_unmasked_sequence(make_model):
    """At distance 1, ends are 1 / (1 - r) too frequent; the weighted optimum must undo it."""
    model = make_model()
    ratio, hazard = 0.6, 1 / 8
    generator = torch.Generator().manual_seed(0)
    is_end = []
    for _ in range(6000):
        length = int(torch.empty(()).geometric_(hazard, generator=generator))
        kept = (torch.rand(length, generator=generator) > ratio).nonzero()[:, 0]
        targets = torch.cat([kept, torch.tensor([length])])
        at_distance_one = (targets[1:] - targets[:-1]) == 1
        is_end.append((targets[1:] == length)[at_distance_one])
    is_end = torch.cat(is_end)
    weight = torch.where(is_end, 1 - ratio, 1.0)
    optimum = float((weight * is_end).sum() / weight.sum())  # of the weighted cross-entropy
    assert float(is_end.float().mean()) > 1.5 * hazard
    assert optimum == pytest.approx(hazard, rel=0.1)
    hidden = torch.randn(len(is_end[:50]), 32)
    weighted = model.audio.end_loss(hidden, is_end[:50], ratio)
    plain = model.audio.end_loss(hidden, is_end[:50], 0.0)
    torch.testing.assert_close(weighted, plain * weight[:50])


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

    with pytest.raises(ValueError, match=f"found no config.json in {re.escape(str(tmp_path))}"):
        AudioLanguageModel.from_pretrained(tmp_path)
    make_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if k != "audio.null_prompt"}, weights)
    with pytest.raises(ValueError, match=r"1 tensors missing \['audio.null_prompt'\], 0 unknown"):
        AudioLanguageModel.from_pretrained(tmp_path)
    save_file(tensors | {"audio.null_prompt": torch.zeros(2, 32)}, weights)
    with pytest.raises(
        ValueError, match=r"audio.null_prompt is \(2, 32\), config.json says \(1, 32\)"
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
    equal = make_model()
    assert equal.audio.config.channel_weight_exponent or equal.audio.channel_weight() is None
    model = make_model(channel_weight_exponent=0.5)
    weight = model.audio.channel_weight()
    assert float(weight.mean()) == pytest.approx(1.0)
    assert bool((weight.diff() >= 0).all())  # the std rises from 0.5 to 2
    assert float(weight[-1] / weight[0]) == pytest.approx(2.0, rel=1e-3)  # (2 / 0.5) ** 0.5
