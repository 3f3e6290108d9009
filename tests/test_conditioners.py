"""Prompts from CLAP and FLAN-T5: embedded, cached by prepare, trained on, generated from."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import sine_manifest
from tiny_encoders import write_clap, write_t5
from transformers import AutoTokenizer, ClapModel, T5EncoderModel

from mllm_audio.cli import main
from mllm_audio.conditioners import load_conditioner
from mllm_audio.conditioners.base import PromptStream, pad
from mllm_audio.data.clips import read_shard
from mllm_audio.data.config import DataConfig
from mllm_audio.data.layout import Prompt
from mllm_audio.data.merge import merge
from mllm_audio.data.prepare import prepare
from mllm_audio.data.prompts import PromptReader
from mllm_audio.data.remote import open_folder
from mllm_audio.data.shards import PROMPTS, read_index
from mllm_audio.data.stream import ClipStream
from mllm_audio.generation.decode import GenerationConfig, decode
from mllm_audio.generation.voice import Voice
from mllm_audio.info import count_components, describe, sketch
from mllm_audio.model import AudioLanguageModel
from mllm_audio.presets import PRESETS, get_preset
from mllm_audio.text import SpecialIds

CAPTION = "a dog barks twice"


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    return write_clap(folder / "clap"), write_t5(folder / "t5")


@pytest.fixture(scope="module")
def spec(encoders):
    return "clap_t5:clap={},t5={}".format(*encoders)


@pytest.fixture(scope="module")
def data(tmp_path_factory, spec):
    folder = tmp_path_factory.mktemp("data")
    manifest = sine_manifest(folder)
    prepare(manifest, folder / "prepared", "dct", conditioner_spec=spec, progress=False)
    return folder / "prepared"


SMALL = [
    "backbone.hidden_size=32",
    "backbone.num_layers=2",
    "backbone.num_heads=2",
    "backbone.max_positions=128",
    "audio.head.width=32",
    "audio.head.num_blocks=1",
    "train.batch_size=4",
    "train.num_steps=3",
    "train.precision=float32",
    "init=random",
]


def test_clap_is_transformers_text_features_and_t5_its_encoder(encoders, spec):
    clap, t5 = encoders
    conditioner = load_conditioner(spec)
    found = [(stream.name, stream.length, stream.dim) for stream in conditioner.streams]
    assert found == [("clap", 1, 24), ("t5", 77, 16)]
    (found_clap, found_t5), (_, longer) = conditioner.embed([CAPTION, CAPTION * 9])
    ids = AutoTokenizer.from_pretrained(clap)(CAPTION, return_tensors="pt")
    with torch.inference_mode():
        expected = ClapModel.from_pretrained(clap).get_text_features(
            input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]
        )
    torch.testing.assert_close(found_clap, expected.pooler_output, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found_clap.norm(), torch.tensor(1.0))
    ids = AutoTokenizer.from_pretrained(t5)(CAPTION, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        alone = T5EncoderModel.from_pretrained(t5)(input_ids=ids).last_hidden_state[0]
    assert found_t5.shape == (len(CAPTION) + 1, 16)  # bytes, and the end
    # The longer neighbour pads this caption in the batch, and does not change it.
    torch.testing.assert_close(found_t5, alone, rtol=1e-4, atol=1e-5)
    assert longer.shape == (77, 16)  # cut


def test_words_are_fixed_vectors_in_their_places():
    conditioner = load_conditioner("words")
    (first,), (again,), (turned,) = conditioner.embed(
        ["A dog, barks!", "a DOG barks", "barks a dog"]
    )
    assert first.shape == (3, 64) and torch.equal(first, again)
    assert not torch.allclose(first, turned)
    # The same word in another place differs by the places' sinusoids alone.
    (one,), (two,) = conditioner.embed(["rain", "dog rain"])
    angle = torch.exp(torch.arange(0, 64, 2) * (-torch.tensor(10_000.0).log() / 64))
    shift = torch.cat([angle.sin(), angle.cos() - 1])
    torch.testing.assert_close(two[1] - one[0], shift, rtol=1e-4, atol=1e-5)
    assert (
        abs(torch.cat([e[0] for e in conditioner.embed([f"w{i}" for i in range(200)])]).std() - 1.2)
        < 0.1
    )
    assert conditioner.embed(["word " * 50])[0][0].shape == (12, 64)
    with pytest.raises(ValueError, match="'words' has no weights, found clap; type just words"):
        load_conditioner("words:clap=x")


def test_padded_clips_are_as_long_as_the_longest_and_end_in_silence(tmp_path):
    manifest = sine_manifest(tmp_path, count=4)
    for name, option in (("short", False), ("full", True)):
        prepare(manifest, tmp_path / name, "dct", max_seconds=1.28, pad=option, progress=False)
    short, full = (read_index(tmp_path / name) for name in ("short", "full"))
    assert "--pad" in full.command(tmp_path) and "--pad" not in short.command(tmp_path)
    clips = [read_shard(tmp_path / name / short.shards[0].file) for name in ("short", "full")]
    assert {clip.num_tokens for clip in clips[1]} == {32}
    for before, after in zip(*clips, strict=True):
        assert before.num_samples == after.num_samples < 1.28 * 16000
        whole = before.num_tokens - 4  # the last column holds the end of the sound
        torch.testing.assert_close(after.latents()[:whole], before.latents()[:whole])
        assert torch.equal(after.latents()[-4:], after.latents()[-8:-4])  # silence
    with pytest.raises(ValueError, match="pad was True, now False"):
        prepare(manifest, tmp_path / "full", "dct", max_seconds=1.28, progress=False)


def test_padding_is_zero_before_the_projection():
    streams = (PromptStream(name="t5", length=4, dim=3),)
    (padded,) = pad([torch.ones(2, 3)], streams)
    assert padded.tolist() == [[1.0] * 3] * 2 + [[0.0] * 3] * 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("clip_t5:clap=x", "conditioner 'clip_t5' is unknown; did you mean 'clap_t5'"),
        ("clap_t5:", "got nothing, expected clap_t5:clap=FOLDER,t5=FOLDER"),
        ("clap_t5:t6=x", "got t6, expected"),
        ("clap_t5:clap", "found 'clap' in conditioner"),
        ("clap_t5:t5=nowhere/here", "nowhere/here cannot be loaded as T5EncoderModel"),
    ],
)
def test_wrong_specs_say_what_to_type(wrong, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        load_conditioner(wrong)


def test_prepare_caches_what_the_conditioner_makes_of_every_wording(data, spec):
    index = read_index(data)
    conditioner = load_conditioner(spec)
    assert index.conditioner.fingerprint == conditioner.fingerprint
    shard = data / index.shards[0].file
    reader = PromptReader(shard.with_suffix(PROMPTS), ["clap", "t5"])
    for clip in read_shard(shard):
        embedded = conditioner.embed(clip.captions)
        for wording, expected in enumerate(embedded):
            found = reader.read(clip.first_caption + wording)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-3)  # float16


def test_prepare_again_embeds_nothing_and_another_conditioner_replaces(
    data, spec, encoders, tmp_path
):
    manifest = data.parent / "manifest.jsonl"
    path = (data / read_index(data).shards[0].file).with_suffix(PROMPTS)
    before = path.stat().st_mtime_ns
    report = prepare(manifest, data, "dct", conditioner_spec=spec, progress=False)
    assert report.already_complete and path.stat().st_mtime_ns == before
    plain = prepare(manifest, data, "dct", progress=False)  # leaves them
    assert plain.already_complete and read_index(data).conditioner is not None
    path.write_bytes(path.read_bytes()[:-1] + b"\0\0")
    assert not prepare(
        manifest, data, "dct", conditioner_spec=spec, progress=False
    ).already_complete
    other = write_t5(tmp_path / "t5", seed=1)
    copy = tmp_path / "copy"
    prepare(manifest, copy, "dct", conditioner_spec=spec, progress=False)
    prepare(manifest, copy, "dct", conditioner_spec=f"clap_t5:t5={other}", progress=False)
    assert [s.name for s in read_index(copy).conditioner.streams] == ["t5"]


def test_merged_parts_have_the_prompts_of_a_single_run(tmp_path, spec):
    manifest = sine_manifest(tmp_path)
    options = {"shard_size": 3, "conditioner_spec": spec, "progress": False}
    prepare(manifest, tmp_path / "one", "dct", **options)
    parts = [tmp_path / f"part{i}" for i in (1, 2)]
    for number, part in enumerate(parts, start=1):
        prepare(manifest, part, "dct", part=number, num_parts=2, **options)
    merge(parts, tmp_path / "merged", progress=False)
    whole, merged = (read_index(tmp_path / name) for name in ("one", "merged"))
    assert merged == whole and whole.shards[1].prompts_sha256
    for shard in whole.shards:
        for suffix in (".safetensors", ".jsonl", PROMPTS):
            first = (tmp_path / "one" / shard.file).with_suffix(suffix)
            assert (
                first.read_bytes()
                == (tmp_path / "merged" / shard.file).with_suffix(suffix).read_bytes()
            )


def run(*arguments) -> None:
    sys.argv = ["mllm-audio", *map(str, arguments)]
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    run("train", "--preset", "audiomntp_base", "--data", data, "--out", out, *SMALL)
    return out


def test_a_papers_preset_trains_and_generates_from_the_command_line(
    trained, spec, tmp_path, capsys
):
    out = tmp_path / "sound.wav"
    arguments = ["--num-inference-steps", "2", "--seconds", "0.32", "--out", out]
    run("generate", trained, CAPTION, *arguments)
    assert out.stat().st_size > 1000
    voice = Voice.load(trained)
    config = voice.model.audio.config
    assert config.conditioner == spec and config.prompt_length == 78
    assert config.prompt_streams == load_conditioner(spec).streams  # widths of the data's
    assert len(voice.text_tokenizer) == 4  # special tokens, no text


def test_another_conditioner_is_refused_and_a_moved_one_found(trained, encoders, tmp_path):
    other = f"clap_t5:clap={encoders[0]},t5={write_t5(tmp_path / 't5', seed=1)}"
    with pytest.raises(ValueError, match="the model was trained on prompts of"):
        _ = Voice.load(trained, conditioner=other).conditioner
    moved = tmp_path / "moved"
    moved.symlink_to(encoders[1])
    same = f"clap_t5:clap={encoders[0]},t5={moved}"
    assert Voice.load(trained, conditioner=same).conditioner.streams


def test_the_prompt_decides_the_sound_and_the_null_prompt_hides_it(trained):
    voice = Voice.load(trained)
    for parameter in voice.model.audio.head.parameters():  # some of which start at zero
        torch.nn.init.normal_(parameter, std=0.2)
    config = GenerationConfig(num_inference_steps=2, seconds=0.32, guidance_scale=1.0)
    first, second = voice.generate_latents([CAPTION, "rain on a roof"], config, [1, 1])
    assert not torch.allclose(first, second)
    alone = voice.generate_latents([CAPTION], config, [1])[0]
    assert (first - alone).norm() < 1e-4 * first.norm()
    prompts = voice.prompts([CAPTION, "rain on a roof"], config)
    # Scale 0 is the unconditional branch; the variance, which is not its own, needs a temperature.
    hidden = replace(config, guidance_scale=0.0, guidance_schedule="constant", temperature=0.0)
    steps = list(decode(voice.model, prompts, SpecialIds.of(voice.text_tokenizer), [1, 1], hidden))
    latents = torch.stack([step.latents for step in steps], 1)
    assert (latents[0] - latents[1]).norm() < 1e-4 * latents[0].norm()


def test_training_batches_and_generation_embed_a_prompt_alike(trained, data):
    voice = Voice.load(trained)
    streams = voice.model.audio.config.prompt_streams
    clips = ClipStream(open_folder(data, DataConfig()), "train", 1, streams)
    cached = Prompt(clips.prompt(0, 0))
    (fresh,) = voice.prompts([clips[0].captions[0]], voice.defaults)
    for a, b in zip(cached.embeddings, fresh.embeddings, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-3)


def test_the_checkpoint_is_the_backbones_own_with_silent_tables(trained):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    tensors = load_file(trained / "model.safetensors")
    assert not tensors["transformer.wte.weight"].any()
    assert not tensors["transformer.wpe.weight"].any()
    text_side = AutoModelForCausalLM.from_pretrained(trained)
    model = AudioLanguageModel.from_pretrained(trained)
    assert model.silent and torch.equal(
        text_side.state_dict()["transformer.h.0.attn.c_attn.weight"],
        model.backbone.state_dict()["transformer.h.0.attn.c_attn.weight"],
    )
    assert "audio.start" in tensors and not model.backbone.transformer.wte.weight.requires_grad


def test_a_model_without_text_does_not_chat(trained, tmp_path, capsys):
    with pytest.raises(ValueError, match="has no text and makes sounds of captions alone"):
        Voice.load(trained).reply([{"role": "user", "content": "hello"}])
    sys.argv = ["mllm-audio", "chat", str(trained), "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and "type mllm-audio generate RUN" in capsys.readouterr().err


def test_clap_alone_takes_its_stream_of_data_with_both(data, tmp_path):
    run("train", "--preset", "prompt_clap", "--data", data, "--out", tmp_path / "run", *SMALL)
    model = AudioLanguageModel.from_pretrained(tmp_path / "run")
    assert [s.name for s in model.audio.config.prompt_streams] == ["clap"]


def test_data_without_prompts_says_what_to_type(tmp_path):
    manifest = sine_manifest(tmp_path)
    prepare(manifest, tmp_path / "data", "dct", progress=False)
    command = ["train", "--preset", "audiomntp_base", "--data", tmp_path / "data"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mllm_audio",
            *map(str, command),
            "--out",
            tmp_path / "run",
            "init=random",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "again with --conditioner clap_t5:clap=FOLDER,t5=FOLDER" in done.stderr
    assert done.stderr.count("\n") == 1


# REFERENCE of the counts: the paper's sizes, part by part, counted by hand.
COUNTS = {
    "audiomntp_base": {
        "backbone.blocks": 170_108_928,
        "audio.latent_proj": 99_072,
        "audio.latent_norm": 1_536,
        "audio.content_positions": 196_608,
        "audio.target_positions": 196_608,
        "audio.start": 768,
        "backbone.final_norm": 1_536,
        "audio.prompt_proj": 1_181_184,
        "audio.null_prompt": 59_904,
        "audio.head": 20_344_064,
        "total": 192_190_208,
    },
    "audiomntp_large": {
        "backbone.blocks": 403_079_168,
        "audio.latent_proj": 132_096,
        "audio.latent_norm": 2_048,
        "audio.content_positions": 262_144,
        "audio.target_positions": 262_144,
        "audio.start": 1_024,
        "backbone.final_norm": 2_048,
        "audio.prompt_proj": 1_574_912,
        "audio.null_prompt": 79_872,
        "audio.head": 56_258_816,
        "total": 461_654_272,
    },
    "audiomntp_large_1024": {"audio.head": 36_356_352, "total": 441_751_808},
    "head_1": {"audio.head": 9_843_968},
    "head_6": {"audio.head": 36_094_208},
    "abl_i": {"total": 192_190_208 - 196_608},
    "prompt_clap": {"audio.prompt_proj": 512 * 768 + 768, "audio.null_prompt": 768},
    "prompt_t5": {"audio.prompt_proj": 1024 * 768 + 768, "audio.null_prompt": 77 * 768},
}


@pytest.mark.parametrize("name", COUNTS)
def test_components_count_what_the_paper_has_to_the_parameter(name):
    found = count_components(sketch(get_preset(name)))
    expected = COUNTS[name]
    assert {part: found[part] for part in expected} == expected
    if len(expected) > 5:
        assert found.keys() == expected.keys()  # no end of audio, no text head
    assert f"{found['total']:,}" in describe(name)


def test_info_says_where_the_papers_numbers_disagree():
    assert "441.75 M" in describe("audiomntp_large") and "462 M" in describe("audiomntp_large")
    assert "192.98 M" in describe("audiomntp_base")


def test_every_row_of_the_tables_is_a_preset_that_differs_in_what_it_says():
    base = get_preset("audiomntp_base")
    for name in ("abl_b", "abl_c", "abl_d", "abl_e", "abl_f", "abl_h", "abl_i", "abl_j", "abl_k"):
        assert replace(get_preset(name), preset=base.preset) != base, name
    assert replace(get_preset("abl_g"), preset=base.preset) == base
    masking = {
        n: (p().masking.schedule, p().masking.hidden, p().masking.next_kept)
        for n, p in PRESETS.items()
    }
    assert masking["audiontp_base"] == ("ntp", "drop", True)
    assert masking["abl_c"] == ("d", "zero", False)
    assert masking["abl_d"] == ("d", "gaussian", False)
    assert masking["abl_e"] == ("d", "drop", False)
    assert masking["abl_f"] == ("c", "zero", False)
    assert masking["abl_h"] == ("d", "drop", True)
    assert masking["audiomar_base"] == ("mar", "own", True)
    assert {n: get_preset(n).init for n in ("audiomntp_base", "abl_b", "abl_j")} == {
        "audiomntp_base": "image_mar", "abl_b": "audiomar", "abl_j": "random",
    }  # fmt: skip
