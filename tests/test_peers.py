"""`mllm-audio peer`: tiny random peers in the published layouts, up to files and their timing."""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile
import torch

PEERS = ("audioldm2", "tango2", "stable-audio-open", "audiogen")
CAPTIONS = ["A dog barks", "Rain falls on a tin roof while a train passes"]
HIFIGAN = {
    "model_in_dim": 8,
    "sampling_rate": 16000,
    "upsample_initial_channel": 8,
    "upsample_rates": [2, 2],
    "upsample_kernel_sizes": [4, 4],
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3, 5]],
    "normalize_before": False,
}
T5 = {"vocab_size": 120, "d_model": 16, "d_ff": 16, "d_kv": 8, "num_heads": 2, "num_layers": 1}


def t5_tokenizer():
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyzADR"]
    return T5Tokenizer(vocab=[*pieces, *letters], extra_ids=0, model_max_length=32)


def t5_encoder():
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**T5))


def vae_and_vocoder():
    from diffusers import AutoencoderKL
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    vae = AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=4, norm_num_groups=4,
        block_out_channels=[4, 8], down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, scaling_factor=0.9,
    )  # fmt: skip
    return vae, SpeechT5HifiGan(SpeechT5HifiGanConfig(**HIFIGAN))


def unet(kind, cross_attention_dim):
    return kind(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, sample_size=32,
        in_channels=4, out_channels=4, cross_attention_dim=cross_attention_dim,
        attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def save_audioldm2(folder: Path) -> None:
    from diffusers import (
        AudioLDM2Pipeline,
        AudioLDM2ProjectionModel,
        AudioLDM2UNet2DConditionModel,
        DDIMScheduler,
    )
    from transformers import (
        ClapConfig,
        ClapFeatureExtractor,
        ClapModel,
        GPT2Config,
        GPT2Model,
        RobertaTokenizer,
    )

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    letters = [*"abcdefghijklmnopqrstuvwxyzADRĠ"]
    vocab = {token: number for number, token in enumerate([*special, *letters])}
    text = {
        "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1,
        "vocab_size": 100, "projection_dim": 8, "pad_token_id": 1,
    }  # fmt: skip
    audio = {
        "spec_size": 8, "window_size": 4, "num_mel_bins": 8, "depths": [1, 1], "patch_size": 2,
        "num_attention_heads": [1, 1], "num_hidden_layers": 1, "hidden_size": 16, "patch_stride": 2,
        "patch_embed_input_channels": 4, "projection_dim": 8, "patch_embeds_hidden_size": 8,
    }  # fmt: skip
    language_model = GPT2Model(
        GPT2Config(n_embd=16, n_head=1, n_layer=1, vocab_size=100, n_positions=99)
    )
    language_model.config.max_new_tokens = 8
    vae, vocoder = vae_and_vocoder()
    AudioLDM2Pipeline(
        unet=unet(AudioLDM2UNet2DConditionModel, (16, 16)),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False),
        vae=vae,
        text_encoder=ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=8)),
        text_encoder_2=t5_encoder(),
        tokenizer=RobertaTokenizer(vocab=vocab, merges=[], model_max_length=32),
        tokenizer_2=t5_tokenizer(),
        feature_extractor=ClapFeatureExtractor(hop_length=7900),
        language_model=language_model,
        projection_model=AudioLDM2ProjectionModel(
            text_encoder_dim=8, text_encoder_1_dim=16, langauge_model_dim=16
        ),
        vocoder=vocoder,
    ).save_pretrained(folder)


def save_stable_audio(folder: Path) -> None:
    from diffusers import (
        AutoencoderOobleck,
        CosineDPMSolverMultistepScheduler,
        StableAudioDiTModel,
        StableAudioPipeline,
        StableAudioProjectionModel,
    )

    StableAudioPipeline(
        transformer=StableAudioDiTModel(
            sample_size=64,
            in_channels=3,
            num_layers=1,
            attention_head_dim=4,
            out_channels=3,
            num_attention_heads=2,
            num_key_value_attention_heads=2,
            cross_attention_dim=4,
            time_proj_dim=8,
            global_states_input_dim=8,
            cross_attention_input_dim=4,
        ),
        scheduler=CosineDPMSolverMultistepScheduler(
            solver_order=2,
            prediction_type="v_prediction",
            sigma_data=1.0,
            sigma_schedule="exponential",
        ),
        vae=AutoencoderOobleck(
            encoder_hidden_size=6,
            downsampling_ratios=[4, 8],
            decoder_channels=3,
            decoder_input_channels=3,
            audio_channels=2,
            channel_multiples=[2, 4],
            sampling_rate=1000,
        ),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        projection_model=StableAudioProjectionModel(
            text_encoder_dim=16, conditioning_dim=4, min_value=0, max_value=32
        ),
    ).save_pretrained(folder)


def save_audiogen(folder: Path) -> None:
    from transformers import (
        EncodecConfig,
        MusicgenConfig,
        MusicgenDecoderConfig,
        MusicgenForConditionalGeneration,
        T5Config,
    )

    config = MusicgenConfig(
        text_encoder=T5Config(**T5).to_dict(),
        audio_encoder=EncodecConfig(
            sampling_rate=16000, num_filters=4, upsampling_ratios=[8, 5, 4, 2], hidden_size=8,
            codebook_size=32, codebook_dim=8, target_bandwidths=[1.0], num_lstm_layers=1,
            use_causal_conv=False,
        ).to_dict(),
        decoder=MusicgenDecoderConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16,
            num_codebooks=4, max_position_embeddings=64, pad_token_id=32, bos_token_id=32,
        ).to_dict(),
    )  # fmt: skip
    model = MusicgenForConditionalGeneration(config)
    for layer in model.audio_encoder.quantizer.layers:  # zeros, unless loaded
        layer.codebook.embed.normal_()
    model.generation_config.decoder_start_token_id = 32
    model.generation_config.pad_token_id = 32
    model.save_pretrained(folder)
    t5_tokenizer().save_pretrained(folder)


def save_tango2(folder: Path) -> None:
    from diffusers import DDPMScheduler, UNet2DConditionModel

    vae, vocoder = vae_and_vocoder()
    parts = {
        "scheduler": DDPMScheduler(
            beta_schedule="scaled_linear", clip_sample=False, prediction_type="v_prediction"
        ),
        "text_encoder": t5_encoder(),
        "tokenizer": t5_tokenizer(),
        "unet": unet(UNet2DConditionModel, 16),
        "vae": vae,
        "vocoder": vocoder,
    }
    for name, part in parts.items():
        part.save_pretrained(folder / name)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Save each peer, tiny and random."""
    folder = tmp_path_factory.mktemp("peers")
    savers = (save_audioldm2, save_tango2, save_stable_audio, save_audiogen)
    for name, save in zip(PEERS, savers, strict=True):
        torch.manual_seed(0)
        save(folder / name)
    return folder


@pytest.fixture
def run(capsys, monkeypatch):
    """Type a command; return the exit code, its output and its last line of errors."""
    from mllm_audio.cli import main

    def type_in(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mllm-audio", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr()
        return int(stopped.value.code or 0), said.out, (said.err.strip().splitlines() or [""])[-1]

    return type_in


@pytest.fixture
def captions(tmp_path):
    path = tmp_path / "captions.jsonl"
    rows = [
        {"audio": "clips/Yabc.def.flac", "caption": CAPTIONS[0]},
        {"id": "second", "caption": CAPTIONS[1]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SECONDS = {"audioldm2": 0.06, "tango2": 0.1, "stable-audio-open": 0.2, "audiogen": 0.2}


def arguments(peer: str, model: Path, captions: Path, out: Path, *more: object) -> list[object]:
    steps = [] if peer == "audiogen" else ["--steps", 2]
    return ["peer", peer, captions, "--out", out, "--model", model, "--seconds", SECONDS[peer],
            "--device", "cpu", *steps, *more]  # fmt: skip


@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_writes_clips_captions_and_timing(run, models, captions, tmp_path, peer):
    out, seconds = tmp_path / "out", SECONDS[peer]
    code, said, error = run(
        *arguments(peer, models / peer, captions, out, "--batch-size", 2, "--seed", 5)
    )
    assert code == 0, error
    rate = 1000 if peer == "stable-audio-open" else 16000
    for name in ("Yabc.def.wav", "second.wav"):
        waveform, sample_rate = soundfile.read(tmp_path / "out" / name)
        assert sample_rate == rate
        assert waveform.shape == (round(seconds * rate),)
        assert abs(waveform).max() > 0
    rows = [json.loads(line) for line in (tmp_path / "out/captions.jsonl").read_text().splitlines()]
    assert rows == [
        {"audio": "Yabc.def.wav", "caption": CAPTIONS[0], "seed": 5},
        {"audio": "second.wav", "caption": CAPTIONS[1], "seed": 6},
    ]
    timing = json.loads((tmp_path / "out/timing.json").read_text())
    expected = {"peer": peer, "device": "cpu", "dtype": "float32", "batch_size": 2, "seed": 5}
    assert {key: timing[key] for key in expected} == expected
    assert timing["num_inference_steps"] == (None if peer == "audiogen" else 2)
    assert timing["threads"] == torch.get_num_threads()
    assert len(timing["fingerprint"]) == 16
    for clip in timing["clips"]:
        assert clip["audio_seconds"] == pytest.approx(seconds)
        assert clip["rtf"] == pytest.approx(clip["wall_seconds"] / seconds)
        assert clip["batch_size"] == 2
    wall = sum(clip["wall_seconds"] for clip in timing["clips"])
    assert timing["rtf"] == pytest.approx(wall / (2 * seconds))
    assert f"2 clips in {tmp_path / 'out'}, RTF" in said


@pytest.mark.parametrize("peer", PEERS)
def test_a_seed_decides_the_sound(run, models, captions, tmp_path, peer):
    for name, seed in (("one", 0), ("same", 0), ("other", 9)):
        out = tmp_path / name
        code, _, error = run(*arguments(peer, models / peer, captions, out, "--seed", seed))
        assert code == 0, error
    one, same, other = (
        (tmp_path / n / "second.wav").read_bytes() for n in ("one", "same", "other")
    )
    assert one == same != other


@pytest.mark.parametrize("peer", ["tango2", "stable-audio-open"])
def test_a_clip_does_not_depend_on_its_batch(run, models, captions, tmp_path, peer):
    for size in (1, 2):
        out = tmp_path / str(size)
        run(*arguments(peer, models / peer, captions, out, "--batch-size", size))
    for name in ("Yabc.def.wav", "second.wav"):
        one, two = (soundfile.read(tmp_path / size / name, dtype="int16")[0] for size in "12")
        assert abs(one.astype(int) - two).max() <= 2  # of 32768


def test_resumed_equals_uninterrupted(run, models, tmp_path, monkeypatch):
    from mllm_audio import wav

    captions, out = tmp_path / "captions.txt", tmp_path / "out"
    captions.write_text("A dog\n\nRain\nA train passes\n")
    more = ["--batch-size", 2]
    run(*arguments("audiogen", models / "audiogen", captions, tmp_path / "whole", *more))
    write, written = wav.write, []

    def stop(path, *rest):
        if path.name == "002.wav" and not written:
            written.append(path)
            raise KeyboardInterrupt
        write(path, *rest)

    monkeypatch.setattr(wav, "write", stop)
    typed = arguments("audiogen", models / "audiogen", captions, out, *more)
    assert run(*typed)[0] == 130
    first = json.loads((out / "timing.json").read_text())["clips"]
    assert [clip["audio"] for clip in first] == ["000.wav", "001.wav"]
    assert run(*typed)[0] == 0
    timing = json.loads((out / "timing.json").read_text())
    assert timing["clips"][:2] == first
    assert [clip["batch_size"] for clip in timing["clips"]] == [2, 2, 1]
    for number in range(3):
        file = f"00{number}.wav"
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


class Peer:
    """A peer that is slow once."""

    sample_rate, max_seconds = 1000, 1.0

    def __init__(self):
        self.calls = []

    def generate(self, captions, *, seconds, seeds, **options):
        self.calls.append((list(captions), list(seeds), options))
        time.sleep(0.5 if len(self.calls) == 1 else 0)
        return torch.ones(len(captions), round(seconds * self.sample_rate))


def test_the_first_batch_is_repeated_and_only_then_timed(tmp_path, captions, monkeypatch):
    from mllm_audio.peers.run import PEERS, PeerConfig, run_peer

    peer, model = Peer(), tmp_path / "model"
    model.mkdir()
    entry = replace(PEERS["tango2"], load=lambda *_: peer)
    monkeypatch.setitem(PEERS, "tango2", entry)
    config = PeerConfig(seconds=1.0, seed=3)
    report = run_peer("tango2", captions, tmp_path / "out", model, config)
    published = {"num_inference_steps": 200, "guidance_scale": 3.0}
    first, second = ([CAPTIONS[0]], [3], published), ([CAPTIONS[1]], [4], published)
    assert peer.calls == [first, first, second]
    assert report.rtf < 0.2
    run_peer("tango2", captions, tmp_path / "out", model, config)
    assert len(peer.calls) == 3
    (tmp_path / "out/second.wav").unlink()
    run_peer("tango2", captions, tmp_path / "out", model, config)
    assert peer.calls[3:] == [second, second]


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_tango2_recovers_latents_from_their_exact_velocity(guidance_scale):
    """A network that knows x0 gives v = sqrt(a) eps - sqrt(1 - a) x0; DDPM must end at x0."""
    from diffusers import DDPMScheduler

    from mllm_audio.peers.tango2 import Tango2

    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear", clip_sample=False, prediction_type="v_prediction"
    )
    clean = torch.randn(2, 4, 256, 4, generator=torch.Generator().manual_seed(0))
    rows = []

    def unet(latents, timestep, encoder_hidden_states, encoder_attention_mask):
        rows.append(len(latents))
        assert len(encoder_hidden_states) == len(encoder_attention_mask) == len(latents)
        alpha = scheduler.alphas_cumprod[timestep]
        velocity = (alpha.sqrt() * latents[-2:] - clean) / (1 - alpha).sqrt()
        # Errors of both branches that guidance cancels: 1 - s + s (s - 1) / s = 0.
        null, conditional = velocity + 1, velocity + (guidance_scale - 1) / guidance_scale
        both = torch.cat([null, conditional]) if len(latents) == 4 else velocity
        return SimpleNamespace(sample=both)

    unet.config = SimpleNamespace(in_channels=4)
    unet.device, unet.dtype = torch.device("cpu"), torch.float32
    vae = SimpleNamespace(
        config=SimpleNamespace(block_out_channels=[4, 8], scaling_factor=0.5),
        dtype=torch.float32,
        decode=lambda latents: SimpleNamespace(sample=latents.flatten(1)[:, None]),
    )

    def vocoder(values):
        return values

    vocoder.config = SimpleNamespace(upsample_rates=[2, 4], model_in_dim=8, sampling_rate=4096)
    peer = Tango2(t5_tokenizer(), t5_encoder(), unet, vae, vocoder, scheduler)
    assert peer.max_seconds == 1.0
    waveforms = peer.generate(
        CAPTIONS, seconds=1.0, num_inference_steps=7, guidance_scale=guidance_scale, seeds=[1, 2]
    )
    torch.testing.assert_close(waveforms, clean.flatten(1)[:, :4096] / 0.5, rtol=1e-4, atol=1e-4)
    assert rows == [2 if guidance_scale == 1 else 4] * 7


def release(folder: Path, tango: Path) -> tuple[Path, Path, Path]:
    """Take a converted Tango 2 apart, into the forms that its three sources are published in."""
    from safetensors.torch import load_file

    (folder / "tango2").mkdir(parents=True)
    weights = {
        part: load_file(next((tango / part).glob("*.safetensors")))
        for part in ("unet", "text_encoder", "vae", "vocoder")
    }
    main = {f"{part}.{name}": value for part in ("unet", "text_encoder")
            for name, value in weights[part].items()}  # fmt: skip
    main["text_encoder.encoder.embed_tokens.weight"] = main["text_encoder.shared.weight"]
    vae = weights["vae"] | {f"vocoder.{name}": v for name, v in weights["vocoder"].items()}
    torch.save(main, folder / "tango2/pytorch_model_main.bin")
    torch.save(vae, folder / "tango2/pytorch_model_vae.bin")
    (folder / "tango2/vae_config.json").write_text('{"scale_factor": 0.9}')
    (folder / "tango2/main_config.json").write_text('{"unet_model_config_path": "unet.json"}')
    (folder / "tango2/unet.json").write_text((tango / "unet/config.json").read_text())
    for source, part in (("audioldm", "vae"), ("audioldm", "vocoder"), ("", "text_encoder")):
        target = folder / source / part
        target.parent.mkdir(exist_ok=True)
        shutil.copytree(tango / part, target)
    t5_tokenizer().save_pretrained(folder / "text_encoder")
    return folder / "tango2", folder / "audioldm", folder / "text_encoder"


def test_a_converted_tango2_sounds_as_before(run, models, captions, tmp_path):
    checkpoint, audioldm, flan_t5 = release(tmp_path / "release", models / "tango2")
    sources = ["--audioldm", audioldm, "--flan-t5", flan_t5]
    code, _, error = run(
        "peer", "convert-tango2", checkpoint, *sources, "--out", tmp_path / "model"
    )
    assert code == 0, error
    converted = json.loads((tmp_path / "model/scheduler/scheduler_config.json").read_text())
    scheduler = models / "tango2/scheduler/scheduler_config.json"
    scheduler_before = scheduler.read_text()
    scheduler.write_text(json.dumps(converted))
    for name, model in (("before", models / "tango2"), ("after", tmp_path / "model")):
        code, _, error = run(*arguments("tango2", model, captions, tmp_path / name))
        assert code == 0, error
    scheduler.write_text(scheduler_before)
    for file in ("Yabc.def.wav", "second.wav"):
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "after" / file).read_bytes()


def test_the_release_of_tango2_has_the_unet_of_its_paper():
    from diffusers import UNet2DConditionModel

    from mllm_audio.peers.convert_tango2 import UNET_CONFIG

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNET_CONFIG)
    assert round(sum(p.numel() for p in unet.parameters()) / 1e6) == 866  # Ghosal et al. 2023, 3.2


def test_other_weights_than_tangos_are_refused(run, models, tmp_path):
    checkpoint, audioldm, flan_t5 = release(tmp_path / "release", models / "tango2")

    def convert() -> str:
        sources = ["--audioldm", audioldm, "--flan-t5", flan_t5, "--out", tmp_path / "model"]
        code, _, error = run("peer", "convert-tango2", checkpoint, *sources)
        assert code == 2
        return error

    tensors = torch.load(checkpoint / "pytorch_model_vae.bin", weights_only=True)
    changed = {**tensors, "decoder.conv_out.weight": tensors["decoder.conv_out.weight"] + 1}
    torch.save(changed, checkpoint / "pytorch_model_vae.bin")
    assert "vae: decoder.conv_out.weight differs from Tango's" in convert()
    del changed["decoder.conv_out.weight"]
    torch.save(changed, checkpoint / "pytorch_model_vae.bin")
    assert "decoder.conv_out.weight is not in both" in convert()
    (checkpoint / "vae_config.json").write_text('{"scale_factor": 0.41}')
    assert "Tango's VAE scales by 0.41" in convert()
    (checkpoint / "vae_config.json").write_text('{"scale_factor": 0.9}')
    torch.save(tensors, checkpoint / "pytorch_model_vae.bin")
    torch.save({"group_in.weight": torch.ones(1)}, checkpoint / "pytorch_model_main.bin")
    assert "found the tensor group_in.weight" in convert()
    (checkpoint / "pytorch_model_main.bin").unlink()
    assert "found no pytorch_model_main.bin" in convert()


def audiogen_release(folder: Path, arrays: dict[str, torch.Tensor]) -> tuple[Path, Path]:
    """Write what audiocraft exports, from its own tiny model, and a T5 that fits it."""
    files = {"lm/": "state_dict.bin", "codec/": "compression_state_dict.bin"}
    for part, file in files.items():
        state = {k.removeprefix(part): v for k, v in arrays.items() if k.startswith(part)}
        torch.save({"best_state": state, "xp.cfg": "device: cpu", "exported": True}, folder / file)
    t5_encoder().save_pretrained(folder / "t5")
    t5_tokenizer().save_pretrained(folder / "t5")
    return folder, folder / "t5"


def test_a_converted_audiogen_equals_audiocraft(run, captions, fixture_arrays, tmp_path):
    arrays = fixture_arrays("audiogen_small")
    checkpoint, t5 = audiogen_release(tmp_path, arrays)
    out = tmp_path / "model"
    code, _, error = run("peer", "convert-audiogen", checkpoint, "--t5", t5, "--out", out)
    assert code == 0, error
    from transformers import MusicgenForConditionalGeneration

    model = MusicgenForConditionalGeneration.from_pretrained(out).eval()
    sequence, codes = arrays["sequence"], arrays["codes"]  # (B, K, T)
    with torch.no_grad():
        audio = model.audio_encoder.decode(codes[None], audio_scales=[None]).audio_values
        states = model.enc_to_dec_proj(arrays["states"])
        logits = model.decoder(
            input_ids=sequence.flatten(0, 1), encoder_hidden_states=states
        ).logits
    torch.testing.assert_close(audio, arrays["waveform"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        logits.view(*sequence.shape, -1), arrays["logits"], rtol=1e-5, atol=1e-5
    )
    code, _, error = run(*arguments("audiogen", out, captions, tmp_path / "out"))
    assert code == 0, error


def test_what_is_no_audiogen_is_refused(run, fixture_arrays, tmp_path):
    arrays = fixture_arrays("audiogen_small")
    checkpoint, t5 = audiogen_release(tmp_path, arrays)

    def convert() -> str:
        code, _, error = run(
            "peer", "convert-audiogen", checkpoint, "--t5", t5, "--out", tmp_path / "model"
        )
        assert code == 2
        return error

    audiogen_release(tmp_path, {**arrays, "lm/emb.0.bias": torch.ones(1)})
    assert "1 unknown ['model.decoder.embed_tokens.0.bias']" in convert()
    name = "codec/encoder.model.13.lstm.bias_hh_l1"
    audiogen_release(tmp_path, {key: value for key, value in arrays.items() if key != name})
    assert "1 tensors missing ['encoder.layers.13.lstm.bias_hh_l1']" in convert()
    projection = "lm/condition_provider.conditioners.description.output_proj.weight"
    audiogen_release(tmp_path, {**arrays, projection: torch.ones(128, 8)})
    assert "weight is (128, 8), its configuration says (128, 16)" in convert()
    torch.save({"pretrained": "facebook/encodec_32khz"}, checkpoint / "state_dict.bin")
    assert "holds ['pretrained'], expected best_state" in convert()
    (checkpoint / "state_dict.bin").unlink()
    assert "found no state_dict.bin" in convert()


@pytest.mark.parametrize(
    ("peer", "part", "file"),
    [
        ("audioldm2", "vae", "diffusion_pytorch_model"),
        ("audioldm2", "text_encoder_2", "model"),
        ("tango2", "unet", "diffusion_pytorch_model"),
        ("stable-audio-open", "transformer", "diffusion_pytorch_model"),
        ("audiogen", ".", "model"),
    ],
)
def test_pickled_weights_are_refused(run, models, captions, tmp_path, peer, part, file):
    from safetensors.torch import load_file

    model = tmp_path / "model"
    shutil.copytree(models / peer, model)
    safe = model / part / f"{file}.safetensors"
    pickled = file.replace("model", "pytorch_model") if file == "model" else file
    torch.save(load_file(safe), model / part / f"{pickled}.bin")
    safe.unlink()
    code, _, error = run(*arguments(peer, model, captions, tmp_path / "out"))
    assert code == 2
    assert f"{file}.safetensors" in error
    assert not list((tmp_path / "out").glob("*.wav"))


@pytest.mark.parametrize(("peer", "part"), [("tango2", "unet"), ("audiogen", ".")])
def test_incomplete_weights_are_refused(run, models, captions, tmp_path, peer, part):
    from safetensors.torch import load_file, save_file

    shutil.copytree(models / peer, tmp_path / "model")
    (file,) = (tmp_path / "model" / part).glob("*.safetensors")
    tensors = load_file(file)
    name = max(name for name in tensors if name.endswith("conv_in.weight") or "fc1" in name)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    code, _, error = run(*arguments(peer, tmp_path / "model", captions, tmp_path / "out"))
    assert code == 2
    assert "lacks 1 weights of a" in error
    assert name in error


def test_mistakes(run, models, captions, tmp_path):
    bad = {
        "same.jsonl": '{"audio": "a/x.wav", "caption": "a"}\n{"id": "x", "caption": "b"}\n',
        "slash.jsonl": '{"id": "a/b", "caption": "a"}\n',
        "mute.jsonl": '{"caption": " "}\n',
        "list.jsonl": '["a dog"]\n',
        "broken.jsonl": "{\n",
        "empty.txt": "\n",
    }
    for name, text in bad.items():
        (tmp_path / name).write_text(text)
    done, tango = tmp_path / "done", models / "tango2"
    assert run(*arguments("tango2", tango, captions, done))[0] == 0
    cases = [
        ("tango2", tango, "same.jsonl", [], "same.jsonl:2: a second row named 'x'"),
        ("tango2", tango, "slash.jsonl", [], "id is 'a/b', expected what can name a file"),
        ("tango2", tango, "mute.jsonl", [], "mute.jsonl:1: caption is ' ', expected text"),
        ("tango2", tango, "list.jsonl", [], "expected a JSON object"),
        ("tango2", tango, "broken.jsonl", [], "broken.jsonl:1: broken JSON"),
        ("tango2", tango, "empty.txt", [], "empty.txt has no rows"),
        ("tango2", tango, "gone.txt", [], "gone.txt is not a file"),
        ("tango2", tango, "done", [], "expected .jsonl or .csv"),
        ("tango2", tmp_path / "gone", captions, [], "gone is not a folder"),
        ("tango2", models / "audiogen", captions, [], "audiogen has no folder scheduler"),
        ("tango2", tango, captions, ["--seconds", 11], "asked for 11 s, tango2 makes 0.128 s"),
        ("tango2", tango, captions, ["--seconds", -1], "found -1 seconds"),
        ("tango2", tango, captions, ["--device", "tpu9"], "tpu9"),
        ("tango2", tango, captions, ["--dtype", "int8"], "unknown dtype 'int8'; known: float32"),
        ("audioldm2", tango, captions, [], "expected a folder of diffusers' AudioLDM2Pipeline"),
        ("stable-audio-open", models / "audioldm2", captions, [],
         "holds 'AudioLDM2Pipeline', expected a StableAudioPipeline"),
        ("audiogen", models / "audiogen", captions, ["--steps", 3], "leave out --steps"),
        ("audiogen", tango / "text_encoder", captions, [], "holds 't5', expected 'musicgen'"),
    ]  # fmt: skip
    for peer, model, path, more, message in cases:
        out = tmp_path / "out"
        code, _, error = run(*arguments(peer, model, tmp_path / path, out, *more))
        assert code == 2
        assert message in error
        assert not list(out.glob("*.wav"))
    for more, message in (
        (["--seed", 3], "holds clips with seed 0, found 3"),
        (["--guidance-scale", 1], "holds clips with guidance_scale 3.0, found 1.0"),
    ):
        _, _, error = run(*arguments("tango2", tango, captions, done, *more))
        assert message in error
    captions.write_text('{"caption": "another"}\n')
    _, _, error = run(*arguments("tango2", tango, captions, done))
    assert "holds clips with captions_sha256" in error


def test_a_cuda_device_that_is_not_there_is_refused(run, models, captions, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    typed = arguments("tango2", models / "tango2", captions, tmp_path / "out", "--device", "cuda:1")
    code, _, error = run(*typed)
    assert code == 2
    assert "--device cuda:1: this machine has no CUDA device" in error


def test_without_diffusers_a_peer_says_what_to_install(run, captions, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for name in ("run", "pipelines"):
        monkeypatch.delitem(sys.modules, f"mllm_audio.peers.{name}", raising=False)
    _, _, error = run(*arguments("tango2", tmp_path, captions, tmp_path / "out"))
    assert "pip install 'mllm-audio[peers]'" in error


def test_the_command_line_names_every_peer():
    from mllm_audio.cli.peer import PEERS as COMMANDS
    from mllm_audio.peers.pipelines import PEERS as PIPELINES

    assert COMMANDS.keys() == PIPELINES.keys()
