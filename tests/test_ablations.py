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
from mllm_audio.masking import MaskingConfig, sample_distances
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

    def make(end_of_audio: bool = False, **masking):
        data = TrainingData(
            source=CaptionedClips(clips, text_tokenizer),
            special=special,
            masking=MaskingConfig(**masking),
            config=DataConfig(unconditional_share=0.0),
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
def test_targets_at_a_distance_are_drawn_evenly_and_end_with_the_clip(build, masking, end):
    make, latents, _ = build
    batch = make(end_of_audio=end, max_distance=3, far_share=1.0, **masking)
    num, content = latents.shape[1], batch.content_positions.view(4, -1)
    kept_only, found, done = masking.get("next_kept", True), [], 0
    for row in range(4):
        places = [-1, *content[row].tolist()]
        ahead = [*places[1:], num] if kept_only else list(range(num + 1))
        start = int(batch.is_audio[row].nonzero()[0]) - 1
        predicts = batch.predicts[row, start : start + len(places)]
        for place, is_asked in zip(places, predicts.tolist(), strict=True):
            if not is_asked:  # beyond the end, or the end of a model without one
                assert len([p for p in ahead if p > place]) <= 3
                continue
            target = int(batch.target_positions[done])
            found.append(1 + [p for p in ahead if p > place].index(target))
            assert bool(batch.target_is_end[done]) == (target == num) and (end or target < num)
            if target < num:
                assert torch.equal(batch.target_latents[done], latents[row, target])
            done += 1
    assert done == len(batch.target_positions)
    counts = torch.tensor(found).bincount(minlength=4)[1:]
    assert len(counts) == 3 and counts.min() > 0.2 * counts.sum(), counts


def test_most_elements_predict_the_next_one_beside_far_targets():
    config = MaskingConfig(max_distance=4)
    drawn = sample_distances(config, 40_000, torch.Generator().manual_seed(0))
    shares = drawn.bincount(minlength=5)[1:] / len(drawn)
    expected = torch.tensor([0.75 + 0.25 / 4, *[0.25 / 4] * 3])
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.01)
    assert sample_distances(MaskingConfig(), 9, torch.Generator()).tolist() == [1] * 9


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
