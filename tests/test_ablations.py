"""The systems of the paper's ablations: what stands where a latent is masked, what is predicted."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from conftest import sine_manifest

from mllm_audio.cli import main
from mllm_audio.data.captioned import CaptionedClips
from mllm_audio.data.clips import load_split
from mllm_audio.data.config import DataConfig
from mllm_audio.data.dataset import TrainingData
from mllm_audio.data.prepare import prepare
from mllm_audio.generation.voice import Voice
from mllm_audio.masking import MaskingConfig, sample_far
from mllm_audio.modality import AudioConfig, AudioModality
from mllm_audio.presets import get_preset
from mllm_audio.presets.config import RunConfig

FIXED = {"schedule": "fixed", "scale": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    manifest = sine_manifest(folder)
    options = {"max_seconds": 1.28, "pad": True, "conditioner_spec": "words", "progress": False}
    prepare(manifest, folder / "data", "dct", **options)
    return folder / "data"


@pytest.fixture
def build(folder, text_tokenizer, special):
    clips = load_split(folder, "train", verify=False)
    mean, std = torch.linspace(-1, 1, 128), torch.linspace(1, 2, 128)

    def make(end_of_audio: bool = False, pack_tokens: int | None = None, **masking):
        data = TrainingData(
            source=CaptionedClips(clips, text_tokenizer),
            special=special,
            masking=MaskingConfig(**masking),
            config=DataConfig(unconditional_share=0.0, pack_tokens=pack_tokens),
            batch_size=4,
            seed=3,
            end_of_audio=end_of_audio,
            statistics=(mean, std),
        )
        return data.batch([0, 1, 2, 3], epoch=0, step=0)

    latents = torch.cat([clip.latents() for clip in clips[:4]]).reshape(4, -1, 128)
    return make, latents, mean


def test_zeros_stand_at_masked_places_and_the_next_latents_are_predicted(build):
    make, latents, mean = build
    batch = make(hidden="zero", next_kept=False, **FIXED)
    heard = batch.latents.view_as(latents)
    masked = (heard == mean).all(-1)  # (B, N): zero once normalised
    assert masked.sum(1).tolist() == [latents.shape[1] // 2] * 4
    assert torch.equal(heard[~masked], latents[~masked])
    assert torch.equal(batch.target_latents.view_as(latents), latents)  # of all places
    assert batch.target_positions.view(4, -1).tolist() == [list(range(latents.shape[1]))] * 4
    assert not torch.equal(masked[0], masked[1])  # masks of their own


def test_gaussian_noise_has_the_latents_statistics_and_belongs_to_its_row(build):
    make, latents, mean = build
    batch = make(hidden="gaussian", next_kept=False, **FIXED)
    zeros = make(hidden="zero", next_kept=False, **FIXED)
    masked = (zeros.latents.view_as(latents) == mean).all(-1)
    noise = batch.latents.view_as(latents)
    assert torch.equal(noise[~masked], latents[~masked])
    normal = (noise[masked] - mean) / torch.linspace(1, 2, 128)
    assert abs(normal.mean()) < 0.05 and abs(normal.std() - 1) < 0.05
    again = make(hidden="gaussian", next_kept=False, **FIXED)
    assert torch.equal(again.latents, batch.latents)


@pytest.mark.parametrize("end", [False, True])
def test_dropped_latents_are_predicted_by_the_immediate_one_before(build, end):
    make, latents, _ = build
    batch = make(end_of_audio=end, hidden="drop", next_kept=False, **FIXED)
    num = latents.shape[1]
    content = batch.content_positions.view(4, -1)
    for row in range(4):
        own = batch.is_audio[row].sum()
        places = content[row].tolist()
        expected = [0, *(place + 1 for place in places if place + 1 < num or end)]
        first = int(batch.predicts[:row].sum())
        count = int(batch.predicts[row].sum())
        assert batch.target_positions[first : first + count].tolist() == expected
        assert own == len(places) == num // 2
        found = batch.target_latents[first : first + count]
        for place, latent in zip(expected, found, strict=True):
            assert torch.equal(latent, latents[row, place] if place < num else torch.zeros(128))
    assert torch.equal(batch.end_weight, torch.ones_like(batch.end_weight))
    assert torch.equal(batch.target_is_end, batch.target_positions == num)


def test_without_masking_every_variant_is_next_token_prediction(build):
    make, _, _ = build
    plain = make(schedule="ntp")
    for hidden in ("zero", "gaussian", "drop"):
        batch = make(schedule="ntp", hidden=hidden, next_kept=False)
        for name in ("input_ids", "position_ids", "latents", "target_latents", "target_positions"):
            assert torch.equal(getattr(batch, name), getattr(plain, name)), (hidden, name)


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("masking", [{"schedule": "ntp"}, FIXED, {**FIXED, "next_kept": False}])
def test_copies_predict_targets_at_a_distance_that_end_with_the_clip(build, masking, end):
    make, latents, _ = build
    plain = make(end_of_audio=end, **masking)
    batch = make(end_of_audio=end, max_distance=3, far_share=1.0, **masking)
    assert batch.has_copies and not plain.has_copies
    num = latents.shape[1]
    kept_only, found, done, elements = masking.get("next_kept", True), [], 0, 0
    for row in range(4):
        content = plain.content_positions[plain.is_audio.nonzero()[:, 0] == row].tolist()
        places = [-1, *content]
        ahead = [*content, num] if kept_only else list(range(num + 1))
        start = int(batch.is_audio[row].nonzero()[0]) - 2  # the start is there twice
        assert torch.equal(batch.input_ids[row, :start], plain.input_ids[row, :start])
        for index, place in enumerate(places):
            at = start + 2 * index  # of the original, with its copy behind it
            position = int(plain.position_ids[row, start + index])
            assert batch.position_ids[row, at : at + 2].tolist() == [position] * 2
            assert batch.input_ids[row, at] == batch.input_ids[row, at + 1]
            if place >= 0:
                assert torch.equal(
                    batch.latents[elements : elements + 2], latents[row, [place] * 2]
                )
                assert batch.content_positions[elements : elements + 2].tolist() == [place] * 2
                elements += 2
            for copy in range(2):
                if not batch.predicts[row, at + copy]:  # beyond the end
                    assert len([p for p in ahead if p > place]) <= (3 if copy else 1)
                    continue
                target = int(batch.target_positions[done])
                distance = 1 + [p for p in ahead if p > place].index(target)
                assert (distance == 1) == (copy == 0)
                found.append(distance)
                assert bool(batch.target_is_end[done]) == (target == num) and (end or target < num)
                if target < num:
                    assert torch.equal(batch.target_latents[done], latents[row, target])
                done += 1
    assert done == len(batch.target_positions) and elements == len(batch.latents)
    counts = torch.tensor(found).bincount(minlength=4)[2:]
    assert len(counts) == 2 and counts.min() > 0.3 * counts.sum(), counts


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("pack_tokens", [None, 200])
def test_nothing_but_themselves_sees_copies(make_model, build, family, pack_tokens):
    """What is no copy has the state, and the weight of its target, that it has without any."""
    make, _, _ = build
    model = make_model(family, max_tokens=32)
    states, weights = [], []
    for changes in ({}, {"max_distance": 4, "far_share": 0.6}):
        batch = make(pack_tokens=pack_tokens, **FIXED, **changes)
        is_copy = torch.zeros_like(batch.is_audio)
        is_copy[:, 1:] = batch.position_ids[:, 1:] == batch.position_ids[:, :-1]
        if pack_tokens is not None:
            is_copy[:, 1:] &= batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]
        with torch.no_grad():
            states.append(model.hidden_states(batch)[batch.predicts & ~is_copy])
        weights.append(batch.end_weight[~is_copy[batch.predicts]])
    assert int(is_copy[batch.is_audio].sum()) > 10
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weights[1], weights[0])


def test_a_share_of_the_elements_has_a_copy():
    config = MaskingConfig(max_distance=4, far_share=0.25)
    drawn = sample_far(config, 40_000, torch.Generator().manual_seed(0))
    shares = drawn.bincount(minlength=5) / len(drawn)
    expected = torch.tensor([0.75, 0.0, *[0.25 / 3] * 3])
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.01)
    assert sample_far(MaskingConfig(), 9, torch.Generator()) is None


def test_audiomar_predicts_masked_latents_at_their_own_places(build):
    make, latents, _ = build
    batch = make(hidden="own", schedule="fixed", scale=0.75)
    num = latents.shape[1]
    assert batch.is_audio.sum() == 4 * num // 4 and batch.predicts.sum() == 4 * num * 3 // 4
    assert not (batch.is_audio & batch.predicts).any()
    rows = batch.predicts.nonzero()[:, 0]
    for row, place, latent in zip(rows, batch.target_positions, batch.target_latents, strict=True):
        assert torch.equal(latent, latents[row, place])
    every = make(hidden="own", schedule="fixed", scale=1.0)  # as in the first pass of decoding
    assert not every.is_audio.any() and every.predicts.sum() == 4 * num


def test_without_target_positions_nothing_is_added_and_no_table_is_kept():
    config = AudioConfig(target_positions=False, end_of_audio=False)
    audio = AudioModality(config, 16)
    assert not audio.embed_targets(torch.arange(5)).any()
    assert not [name for name, _ in audio.named_parameters() if "target" in name]


@pytest.mark.parametrize(
    ("masking", "message"),
    [
        ({"hidden": "zeros"}, "unknown masking.hidden 'zeros'; did you mean 'zero'"),
        ({"hidden": "zero"}, "set masking.next_kept=false"),
        ({"hidden": "own", "max_distance": 4}, "masking.max_distance=4, but with .* leave it at 1"),
        ({"max_distance": 0}, "masking.max_distance=0, expected"),
    ],
)
def test_masking_that_makes_no_sense_is_refused(masking, message):
    with pytest.raises(ValueError, match=message):
        MaskingConfig(**masking)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "audiomr"}, "unknown architecture 'audiomr'; did you mean 'audiomar'"),
        ({"architecture": "audiomar"}, "AudioMAR, and it alone, predicts masked latents"),
        ({"init": "mar"}, "unknown init 'mar'; known: random, image_mar, audiomar"),
        ({"init_from": "x.pth"}, "needs init=image_mar or audiomar"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(RunConfig(preset="x"), **changes)


def run(*arguments) -> None:
    sys.argv = ["mllm-audio", *map(str, arguments)]
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0


SIZE = [
    "backbone.hidden_size=32",
    "backbone.num_heads=2",
    "backbone.num_layers=2",
    "audio.head.width=32",
    "train.batch_size=4",
    "train.num_steps=2",
    "train.precision=float32",
]
SYSTEMS = ["audiontp_base", *(f"abl_{letter}" for letter in "cdefghijk"), "head_1", "head_6"]


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_trains_and_speaks_at_small_scale(folder, tmp_path, name):
    out = tmp_path / "run"
    run("train", "--preset", f"{name}_small", "--data", folder, "--out", out, *SIZE)
    voice = Voice.load(out)
    config = replace(voice.defaults, num_inference_steps=2, decoding_steps=4)
    latents = voice.generate_latents(["a low beep"] * 2, config, [1, 1])
    assert [row.shape for row in latents] == [(32, 128)] * 2
    assert torch.equal(latents[0], latents[1])
    masking, expected = get_preset(f"{name}_small").masking, get_preset(name).masking
    assert masking == expected


def test_ablation_b_starts_from_a_trained_audiomar(folder, tmp_path, capsys):
    for name, extra in (
        ("audiomar_base", []),
        ("abl_b", [f"init_from={tmp_path / 'audiomar_base'}"]),
    ):
        command = ["train", "--preset", f"{name}_small", "--data", folder]
        run(*command, "--out", tmp_path / name, *SIZE, *extra)
    assert "loaded" in capsys.readouterr().out
    mar, ntp = (Voice.load(tmp_path / name).model for name in ("audiomar_base", "abl_b"))
    # Two steps at a warm-up's learning rate leave the weights close to where they started.
    for block, layer in zip(ntp.backbone.transformer.h, mar.blocks, strict=True):
        torch.testing.assert_close(
            block.mlp.c_fc.weight.T, layer.mlp.fc1.weight, rtol=0.05, atol=0.01
        )


def test_a_preset_that_starts_from_weights_says_which_file_it_wants(folder, tmp_path, capsys):
    for name, message in (("abl_b", "init_from=RUN, of --preset audiomar_base"),):
        command = ["train", "--preset", f"{name}_small", "--data", folder, "--out", tmp_path / name]
        sys.argv = ["mllm-audio", *map(str, command)]
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_table_5_is_refused_at_small_scale():
    with pytest.raises(ValueError, match="reproduce table 5 with --scale paper"):
        get_preset("prompt_clap_small")
