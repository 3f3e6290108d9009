"""Embedders equal the published code, load only their own checkpoints, and hear clips alone."""

from __future__ import annotations

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from tiny_encoders import write_clap
from torch import nn
from transformers import ClapConfig, ClapFeatureExtractor, ClapModel
from transformers.audio_utils import mel_filter_bank

from mllm_audio.conditioners import clap_t5, laion
from mllm_audio.conditioners.torch_file import read_torch_file
from mllm_audio.evaluation import own
from mllm_audio.evaluation.cnn14 import ANALYSES, PannsEmbedder, load_cnn14
from mllm_audio.evaluation.embedders import load_embedder
from mllm_audio.evaluation.own import ClassifierConfig, MelClassifier, OwnEmbedder
from mllm_audio.evaluation.train_own import augment, train_classifier
from mllm_audio.evaluation.vggish import VggishEmbedder, load_vggish, to_examples

PARITY = {"rtol": 1e-5, "atol": 1e-5}


def published_cnn14(arrays, name):
    """The state dict of a narrow Cnn14 in the published layout, filters in closed form."""
    analysis = ANALYSES[{"16k": 512, "32k": 1024}[name]]
    length = analysis.window_length
    turns = torch.outer(torch.arange(length // 2 + 1), torch.arange(length)).double() / length
    angles = 2 * math.pi * turns
    window = torch.hann_window(length, dtype=torch.float64)
    mel = mel_filter_bank(
        length // 2 + 1,
        64,
        50.0,
        8000.0 if name == "16k" else 14_000.0,
        analysis.sample_rate,
        norm="slaney",
        mel_scale="slaney",
    )
    prefix = f"cnn14_{name}/sd/"
    return {
        "spectrogram_extractor.stft.conv_real.weight": (angles.cos() * window)[:, None],
        "spectrogram_extractor.stft.conv_imag.weight": (-angles.sin() * window)[:, None],
        "logmel_extractor.melW": torch.from_numpy(mel),
        **{k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)},
    }


@pytest.fixture(scope="module")
def arrays(fixture_arrays):
    return fixture_arrays("embedders")


@pytest.fixture
def save(tmp_path):
    def write(content, name="weights.pth"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture(params=["panns", "vggish", "clap_hf", "own"])
def embedder(request, arrays, save, tmp_path):
    """Every embedder that needs no extra, tiny."""
    if request.param == "panns":
        weights = {k: v.float() for k, v in published_cnn14(arrays, "16k").items()}
        return PannsEmbedder(save({"model": weights}))
    if request.param == "vggish":
        return VggishEmbedder(save(vggish_weights(arrays)))
    if request.param == "clap_hf":
        return load_embedder(f"clap_hf:{write_hearing_clap(tmp_path / 'clap')}")
    config = ClassifierConfig(labels=("a", "b", "c"), seconds=2.2, num_bands=16)
    own.save_classifier(MelClassifier(config), config, tmp_path / "own")
    return OwnEmbedder(tmp_path / "own")


def write_hearing_clap(folder, **audio):
    """A tiny CLAP whose audio encoder is large enough for 10 s."""
    config = ClapConfig.from_pretrained(write_clap(folder))
    for key, value in {"spec_size": 256, "hidden_size": 32, **audio}.items():
        setattr(config.audio_config, key, value)
    torch.manual_seed(0)
    ClapModel(config).save_pretrained(folder)
    return folder


def vggish_weights(arrays):
    prefix = "vggish/sd/"
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def sound(seconds, rate, seed=0):
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(int(seconds * rate)) / rate
    return 0.3 * torch.sin(2000 * time) + 0.1 * torch.randn(len(time), generator=generator)


@pytest.mark.parametrize("name", ["16k", "32k"])
def test_cnn14_equals_the_published_code(arrays, save, name):
    weights = {k: v.float() for k, v in published_cnn14(arrays, name).items()}
    # As published: beside the weights, the sampler's numpy state.
    sampler = {"indexes": np.arange(5), "pointer": np.int64(3), "rate": np.float64(0.5)}
    model = load_cnn14(save({"iteration": 1, "model": weights, "sampler": sampler}))
    assert model.analysis.sample_rate == {"16k": 16_000, "32k": 32_000}[name]
    with torch.no_grad():
        features, logits = model(arrays["input"][None])
    torch.testing.assert_close(features, arrays[f"cnn14_{name}/features"], **PARITY)
    torch.testing.assert_close(logits, arrays[f"cnn14_{name}/logits"], **PARITY)
    assert (features >= 0).all() and (features > 0).any()


def test_cnn14_of_the_published_size_has_its_features():
    with torch.device("meta"):
        from mllm_audio.evaluation.cnn14 import Cnn14

        model = Cnn14(ANALYSES[512])
    assert model.fc1.weight.shape == (2048, 2048)
    assert model.fc_audioset.weight.shape == (527, 2048)
    assert model.conv_block6.conv2.weight.shape == (2048, 2048, 3, 3)


def test_vggish_equals_the_published_code(arrays, save):
    examples = to_examples(arrays["input"])
    torch.testing.assert_close(examples, arrays["vggish/examples"], **PARITY)
    with torch.no_grad():
        features = load_vggish(save(vggish_weights(arrays)))(examples)
    torch.testing.assert_close(features, arrays["vggish/features"], **PARITY)
    assert (features < 0).any()  # the last ReLU is left out


def test_a_clip_does_not_depend_on_its_batch(embedder):
    rate = embedder.sample_rate
    clips = [sound(2.0, rate, 1), sound(2.7, rate, 2), sound(2.0, rate, 3), sound(11.0, rate, 4)]
    together = embedder.embed(clips)
    for clip, heard in zip(clips, together, strict=True):
        (alone,) = embedder.embed([clip])
        torch.testing.assert_close(heard.features, alone.features, **PARITY)
        assert (heard.logits is None) == (alone.logits is None)
        if heard.logits is not None:
            torch.testing.assert_close(heard.logits, alone.logits, **PARITY)
    assert not torch.allclose(together[0].features, together[2].features, atol=1e-4)


def test_the_same_clip_is_heard_the_same_every_time(embedder):
    clip = sound(10.24, embedder.sample_rate)
    first, second = embedder.embed([clip])[0], embedder.embed([clip])[0]
    assert torch.equal(first.features, second.features)


def test_fingerprints_depend_on_weights(arrays, save):
    weights = vggish_weights(arrays)
    first = VggishEmbedder(save(weights))
    assert VggishEmbedder(save(weights)).fingerprint == first.fingerprint
    weights["features.0.bias"] = weights["features.0.bias"] + 1
    assert VggishEmbedder(save(weights)).fingerprint != first.fingerprint


def test_another_networks_checkpoint_is_refused(arrays, save, tmp_path):
    vggish = vggish_weights(arrays)
    with pytest.raises(ValueError, match=r"embeddings.0.bias.*expected PANNs' Cnn14_16k"):
        load_cnn14(save(vggish))
    panns = {k: v.float() for k, v in published_cnn14(arrays, "16k").items()}
    with pytest.raises(ValueError, match=r"\['model'\].*expected torchvggish"):
        load_vggish(save({"model": panns}))
    with pytest.raises(ValueError, match=r"lacks 1 weights \['fc1.bias'\]"):
        load_cnn14(save({"model": {k: v for k, v in panns.items() if k != "fc1.bias"}}))
    with pytest.raises(ValueError, match=r"has 1 others \['att.weight'\]"):
        load_cnn14(save({"model": {**panns, "att.weight": torch.zeros(1)}}))
    with pytest.raises(ValueError, match=r"embeddings.4.bias is \[5\], not \[128\]"):
        load_vggish(save({**vggish, "embeddings.4.bias": torch.zeros(5)}))
    filters = {"spectrogram_extractor.stft.conv_real.weight": torch.zeros(129, 1, 256)}
    with pytest.raises(ValueError, match="256 samples, expected"):
        load_cnn14(save({"model": {**panns, **filters}}))
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(ValueError, match=r"text\.pth is not a checkpoint"):
        load_vggish(tmp_path / "text.pth")


class Dangerous:
    def __reduce__(self):
        return print, ("code ran",)


def test_code_in_a_checkpoint_is_not_run(save, capsys):
    with pytest.raises(ValueError, match="is not a checkpoint"):
        read_torch_file(save({"model": Dangerous()}), "weights")
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pans:x", "embedder 'pans' is unknown; did you mean 'panns'"),
        ("vggish", "without weights, expected vggish:PATH.*vggish-10086976.pth"),
        ("panns:nowhere.pth", "found nothing at nowhere.pth, expected Cnn14_16k"),
        ("own:tests", "tests holds no config.json; expected a folder of mllm-audio train"),
        ("clap_hf:tests", "tests holds no config.json with weights, expected a folder"),
    ],
)
def test_wrong_specs_are_told(spec, message):
    with pytest.raises(ValueError, match=message):
        load_embedder(spec)


def test_clap_embeds_captions_as_the_conditioner_does(tmp_path):
    folder = write_hearing_clap(tmp_path)
    captions = ["a dog barks", "rain on a tin roof while " * 9]
    embedder = load_embedder(f"clap_hf:{folder}")
    expected = clap_t5.ClapText(str(folder), torch.device("cpu")).embed(captions)
    torch.testing.assert_close(embedder.embed_captions(captions), torch.cat(expected), **PARITY)
    heard = embedder.embed([sound(1.0, 48_000)])[0]
    assert heard.features.shape == (1, 24)
    assert heard.features.norm().item() == pytest.approx(1, rel=1e-5)


def test_clap_hears_the_first_ten_seconds_of_longer_clips(tmp_path):
    embedder = load_embedder(f"clap_hf:{write_hearing_clap(tmp_path)}")
    clip = sound(13.0, 48_000)
    whole, start = embedder.embed([clip, clip[:480_000]])
    assert torch.equal(whole.features, start.features)


def test_a_fusing_clap_is_deterministic(tmp_path):
    """Its extractor calls a random clip long when none is."""
    write_hearing_clap(tmp_path, enable_fusion=True)
    ClapFeatureExtractor(truncation="fusion").save_pretrained(tmp_path)
    embedder = load_embedder(f"clap_hf:{tmp_path}")
    clips = [sound(3.0, 48_000, seed) for seed in range(3)]
    first = torch.cat([heard.features for heard in embedder.embed(clips)])
    for _ in range(3):
        again = torch.cat([heard.features for heard in embedder.embed(clips)])
        assert torch.equal(first, again)


class FakeClap:
    """What laion-clap offers, with a linear layer for a network."""

    def __init__(self, enable_fusion, amodel):
        self.made_with = (enable_fusion, amodel)
        self.model = nn.Module()
        self.model.audio_branch = nn.Module()
        self.model.audio_branch.patch_embed = nn.Module()
        self.model.audio_branch.patch_embed.proj = nn.Linear(1, 128, bias=False)

    def eval(self):
        self.model.eval()

    def get_text_embedding(self, captions):
        assert len(captions) > 1  # the package drops the batch dimension of a single one
        return np.array([[len(caption)] * 512 for caption in captions], np.float32)

    def get_audio_embedding_from_data(self, waveforms):
        return np.array([[len(waveform)] * 512 for waveform in waveforms], np.float32)


@pytest.fixture
def laion_clap(monkeypatch):
    made = []

    def module(**options):
        made.append(FakeClap(**options))
        return made[-1]

    monkeypatch.setitem(sys.modules, "laion_clap", SimpleNamespace(CLAP_Module=module))
    return made


LAION_WEIGHTS = {
    "epoch": np.float64(15),
    "state_dict": {
        "module.audio_branch.patch_embed.proj.weight": torch.ones(128, 1),
        "module.text_branch.embeddings.position_ids": torch.arange(4),
    },
}


def test_laion_checkpoints_load_through_the_extra(laion_clap, save):
    embedder = load_embedder(f"clap_laion:{save(LAION_WEIGHTS, 'clap.pt')}")
    (module,) = laion_clap
    assert module.made_with == (False, "HTSAT-base")
    assert (module.model.audio_branch.patch_embed.proj.weight == 1).all()
    assert embedder.embed_captions(["four"]).shape == (1, 512)
    assert embedder.embed_captions(["a", "bc"])[:, 0].tolist() == [1, 2]
    heard = embedder.embed([torch.zeros(700_000), torch.zeros(5)])
    assert [row.features[0, 0].item() for row in heard] == [480_000, 5]


def test_without_laion_clap_the_extra_is_named(save, monkeypatch):
    monkeypatch.setitem(sys.modules, "laion_clap", None)
    with pytest.raises(ImportError, match=r"pip install mllm-audio\[clap\]"):
        laion.load_laion(save(LAION_WEIGHTS))


def test_other_files_are_no_laion_checkpoint(laion_clap, save):
    with pytest.raises(ValueError, match=r"holds \['weight'\], expected the weights of a CLAP"):
        laion.load_laion(save({"weight": torch.zeros(1)}))
    small = {"audio_branch.patch_embed.proj.weight": torch.ones(64, 1)}
    with pytest.raises(ValueError, match=r"width 64, expected one of \[96, 128\]"):
        laion.load_laion(save(small))
    other = {"audio_branch.patch_embed.proj.weight": torch.ones(96, 1)}
    with pytest.raises(ValueError, match="does not fit laion-clap's HTSAT-tiny"):
        laion.load_laion(save(other))


def write_tones(folder, rows=60, rate=8000, **extra):
    """Low, middle and high tones in noise."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    lines = []
    for index in range(rows):
        label, frequency = [("low", 300), ("mid", 900), ("high", 2500)][index % 3]
        time = np.arange(int(rate * rng.uniform(0.25, 0.35))) / rate
        wave = 0.3 * np.sin(2 * np.pi * frequency * rng.uniform(0.9, 1.1) * time)
        soundfile.write(folder / f"{index}.wav", wave + 0.01 * rng.normal(size=len(time)), rate)
        lines.append(
            {"audio": f"{index}.wav", "caption": f"a {label} tone", "label": label, **extra}
        )
    path = folder / "captions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    """A trained classifier of tones, its report and its manifest."""
    folder = tmp_path_factory.mktemp("tones")
    manifest = write_tones(folder / "clips")
    options = {"sample_rate": 8000, "num_bands": 16, "progress": False}
    report = train_classifier(manifest, folder / "tones", **options)
    return folder / "tones", report, manifest, options


def test_a_classifier_learns_held_out_tones(tones):
    folder, report, _, _ = tones
    assert report.accuracy == 1
    assert report.num_held_out + report.num_trained == 60
    assert report.num_held_out >= 3
    config = json.loads((folder / "config.json").read_text())
    assert config["labels"] == ["high", "low", "mid"]
    assert config["held_out_accuracy"] == 1
    assert 0.3 < config["seconds"] <= 0.35


def test_a_classifier_hears_neither_gain_nor_polarity(tones):
    embedder = OwnEmbedder(tones[0])
    clip = sound(0.3, 8000)
    loud, quiet = embedder.embed([clip, -0.01 * clip])
    torch.testing.assert_close(loud.features, quiet.features, rtol=1e-3, atol=1e-3)


def test_training_is_the_same_from_the_same_seed(tones, tmp_path):
    folder, _, manifest, options = tones
    state = torch.get_rng_state()
    train_classifier(manifest, tmp_path, **options)
    assert torch.equal(state, torch.get_rng_state())
    first, second = own.load_classifier(folder), own.load_classifier(tmp_path)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_augmentation_moves_sound_in_time():
    powers = torch.zeros(200, 50, 16)
    powers[:, 25] = 1.0
    varied = augment(powers, torch.Generator().manual_seed(0))
    places = varied.sum(2).argmax(1).float()
    assert places.min() < 23 and places.max() > 27
    assert (varied.amin((1, 2)) >= 0).all()


def test_broken_classifiers_are_told(tones, tmp_path):
    folder = tones[0]
    for name in (own.CONFIG_FILE, own.WEIGHTS_FILE):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    config = json.loads((tmp_path / own.CONFIG_FILE).read_text())
    for change, message in (
        ({"labels": ["a"]}, r"labels are \['a'\]"),
        ({"seconds": 0}, "seconds is 0"),
        ({"num_bands": 20}, "num_bands is 20, expected a multiple of 16"),
        ({"colour": "red"}, "config.json is not a classifier's"),
        ({"num_bands": 32}, "model.safetensors does not fit config.json"),
    ):
        (tmp_path / own.CONFIG_FILE).write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            own.load_classifier(tmp_path)


def test_recordings_that_cannot_train_are_told(tmp_path):
    manifest = write_tones(tmp_path, rows=6, split="test")
    with pytest.raises(ValueError, match="6 of 6 recordings are held out"):
        train_classifier(manifest, tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match=r"found .*'label'.*expected a row with \['kind'\]"):
        train_classifier(manifest, tmp_path / "out", label="kind", progress=False)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for row in rows:
        row["split"] = "test" if row["label"] == "low" else "train"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="no training row of low"):
        train_classifier(manifest, tmp_path / "out", progress=False)
