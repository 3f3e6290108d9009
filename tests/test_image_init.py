"""MAR's image weights, or a trained AudioMAR's, as the start of a decoder or an AudioMAR."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import test_run_config
from safetensors.torch import save_file

from mllm_audio.audiomar import AudioMAR, AudioMARConfig
from mllm_audio.backbone import BackboneConfig, build_backbone
from mllm_audio.build import build_model
from mllm_audio.conditioners.base import PromptStream
from mllm_audio.heads.base import HeadConfig
from mllm_audio.interop import load_audiomar_blocks, load_image_mar
from mllm_audio.modality import AudioConfig
from mllm_audio.model import AudioLanguageModel

WIDTH, HEADS = 32, 4
ATOL = 1e-5
BACKBONE = BackboneConfig(
    hidden_size=WIDTH, num_layers=4, num_heads=HEADS, max_positions=64, dropout=0.0
)
AUDIO = AudioConfig(
    latent_dim=4,
    max_tokens=16,
    end_of_audio=False,
    prompt_streams=(PromptStream(name="clap", length=2, dim=5),),
    head=HeadConfig(width=32, num_blocks=1),
)
BLOCK = {  # of timm, width W: (out, in) of linear layers
    "norm1.weight": (WIDTH,),
    "norm1.bias": (WIDTH,),
    "attn.qkv.weight": (3 * WIDTH, WIDTH),
    "attn.qkv.bias": (3 * WIDTH,),
    "attn.proj.weight": (WIDTH, WIDTH),
    "attn.proj.bias": (WIDTH,),
    "norm2.weight": (WIDTH,),
    "norm2.bias": (WIDTH,),
    "mlp.fc1.weight": (4 * WIDTH, WIDTH),
    "mlp.fc1.bias": (4 * WIDTH,),
    "mlp.fc2.weight": (WIDTH, 4 * WIDTH),
    "mlp.fc2.bias": (WIDTH,),
}
NUM_BLOCK = sum(torch.Size(shape).numel() for shape in BLOCK.values())


def mar_state(encoder=2, decoder=2, seed=0):
    """Draw the state of a MAR with this many blocks, and some of what is around them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        f"{stack}.{number}.{name}": shape
        for stack, count in (("encoder_blocks", encoder), ("decoder_blocks", decoder))
        for number in range(count)
        for name, shape in BLOCK.items()
    }
    shapes |= {"class_emb.weight": (10, WIDTH), "mask_token": (1, 1, WIDTH)}
    shapes |= {"diffloss.net.cond_embed.bias": (WIDTH,), "encoder_norm.weight": (WIDTH,)}
    return {
        name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        for name, shape in shapes.items()
    }


def save_released(path, state, averaged=None):
    """Write a checkpoint with what MAR's training script puts into it."""
    args = argparse.Namespace(model="mar_base", lr=1e-4, output_dir="./out", epochs=400)
    torch.save(
        {
            "model": state,
            "model_ema": averaged,
            "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
            "epoch": 399,
            "scaler": {"scale": 65536.0},
            "args": args,
        },
        path,
    )
    return path


def decoder(backbone=BACKBONE):
    return AudioLanguageModel(build_backbone(backbone, vocab_size=4), AUDIO).eval()


def audiomar(num_layers=4):
    return AudioMAR(AudioMARConfig.like(replace(BACKBONE, num_layers=num_layers)), AUDIO).eval()


def timm(state, prefix, hidden, causal):
    """Compute a timm block, written out."""
    at = {name: state[prefix + name] for name in BLOCK}
    width = hidden.shape[-1:]
    rows = F.layer_norm(hidden, width, at["norm1.weight"], at["norm1.bias"], 1e-6)
    qkv = rows @ at["attn.qkv.weight"].T + at["attn.qkv.bias"]
    query, key, value = (
        part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in qkv.chunk(3, -1)
    )
    scores = query @ key.transpose(-1, -2) / (width[0] / HEADS) ** 0.5
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    hidden = hidden + mixed @ at["attn.proj.weight"].T + at["attn.proj.bias"]
    rows = F.layer_norm(hidden, width, at["norm2.weight"], at["norm2.bias"], 1e-6)
    inner = F.gelu(rows @ at["mlp.fc1.weight"].T + at["mlp.fc1.bias"])
    return hidden + inner @ at["mlp.fc2.weight"].T + at["mlp.fc2.bias"]


def run_timm(state, hidden, causal, stacks=("encoder_blocks", "decoder_blocks")):
    for prefix in [f"{stack}.{number}." for stack in stacks for number in range(2)]:
        hidden = timm(state, prefix, hidden, causal)
    return hidden


def states_before_final_norm(model, inputs):
    """Run a decoder's blocks as its forward pass does; its final norm is taken off."""
    model.backbone.base_model.ln_f = torch.nn.Identity()
    with torch.no_grad():
        return model.backbone.base_model(inputs_embeds=inputs).last_hidden_state


def test_the_timm_block_written_out_is_timms(fixture_arrays):
    arrays = fixture_arrays("timm_block_small")
    state = {k.removeprefix("sd/"): v for k, v in arrays.items() if k.startswith("sd/")}
    for causal, name in ((True, "causal"), (False, "bidir")):
        output = arrays["x"]
        for number in (0, 1):
            output = timm(state, f"{number}.", output, causal)
            expected = arrays[f"{name}_block{number}"]
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=ATOL)


def test_image_weights_make_the_blocks_of_a_decoder(tmp_path):
    """Encoder blocks, then decoder blocks, made causal; averaged weights are preferred."""
    averaged = mar_state(seed=1)
    path = save_released(tmp_path / "checkpoint-last.pth", mar_state(), averaged)
    model = decoder()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    report = load_image_mar(model, path)
    untouched = {k: v for k, v in model.state_dict().items() if ".h." not in k}
    assert all(torch.equal(value, before[name]) for name, value in untouched.items())
    assert sum(report.loaded.values()) == 4 * NUM_BLOCK and len(report.loaded) == 4 * 12
    own = {name for name, _ in model.named_parameters()}
    silent = {f"backbone.{name}" for name in model.silent}
    assert report.loaded.keys() | report.new.keys() == own - silent
    assert report.unused == {
        "class_emb.weight": 320,
        "mask_token": 32,
        "diffloss.net.cond_embed.bias": 32,
        "encoder_norm.weight": 32,
    }
    inputs = torch.randn(2, 9, WIDTH)
    expected = run_timm(averaged, inputs, causal=True)
    found = states_before_final_norm(model, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=ATOL)


def test_image_weights_make_encoder_and_decoder_of_an_audiomar(tmp_path):
    state = mar_state()
    model = audiomar()
    report = load_image_mar(model, save_released(tmp_path / "mar.pth", state))
    hidden = torch.randn(2, 9, WIDTH)
    for stack, own in (
        ("encoder_blocks", model.encoder_blocks),
        ("decoder_blocks", model.decoder_blocks),
    ):
        expected = run_timm(state, hidden, causal=False, stacks=[stack])
        torch.testing.assert_close(own(hidden, None), expected, rtol=1e-5, atol=ATOL)
    assert set(report.loaded) == {name for name in state if "_blocks." in name}


def test_a_report_sums_up_by_parts(tmp_path):
    path = save_released(tmp_path / "mar.pth", mar_state(), mar_state())
    lines = str(load_image_mar(audiomar(), path)).splitlines()
    assert lines[0] == f"loaded 48 tensors, {4 * NUM_BLOCK:,} parameters, from {path} (model_ema)"
    assert lines[1].startswith("new: mask_token 32, audio.null_prompt 32, audio.latent_proj 160, ")
    assert lines[2] == "unused: class_emb 320, mask_token 32, diffloss 32, encoder_norm 32"


def test_safetensors_and_bare_states_are_read_too(tmp_path):
    state, inputs = mar_state(), torch.randn(1, 5, WIDTH)
    save_file(state, tmp_path / "mar.safetensors")
    torch.save(state, tmp_path / "bare.pth")
    expected = run_timm(state, inputs, causal=True)
    for name in ("mar.safetensors", "bare.pth"):
        model = decoder()
        assert load_image_mar(model, tmp_path / name).source == str(tmp_path / name)
        found = states_before_final_norm(model, inputs)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=ATOL)


def test_blocks_of_a_trained_audiomar_make_a_decoder(tmp_path):
    """Ablation B: the folder of one system starts another."""
    source = audiomar()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    source.save_pretrained(tmp_path)
    model = decoder()
    report = load_audiomar_blocks(model, tmp_path)
    inputs = torch.randn(2, 9, WIDTH)
    expected = run_timm(source.state_dict(), inputs, causal=True)
    found = states_before_final_norm(model, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=ATOL)
    assert sum(report.loaded.values()) == 4 * NUM_BLOCK


def test_other_numbers_of_blocks_are_refused(tmp_path):
    path = save_released(tmp_path / "mar.pth", mar_state(encoder=1, decoder=2))
    message = r"holds 1 \+ 2 blocks, the model has 4; .*set backbone\.num_layers=3"
    with pytest.raises(ValueError, match=message):
        load_image_mar(decoder(), path)
    with pytest.raises(ValueError, match=r"holds 1 \+ 2 blocks, the model has 2 \+ 2;"):
        load_image_mar(audiomar(), path)
    path = save_released(tmp_path / "mar.pth", mar_state(encoder=1, decoder=3))
    with pytest.raises(ValueError, match=r"holds 1 \+ 3 blocks, the model has 2 \+ 2;"):
        load_image_mar(audiomar(), path)


@pytest.mark.parametrize("make", [decoder, audiomar])
def test_another_width_is_refused_and_leaves_the_model(tmp_path, make):
    state = mar_state()
    last = "decoder_blocks.1.mlp.fc2.weight"
    state[last] = state[last][:16]
    state["decoder_blocks.1.norm1.weight"] = state["decoder_blocks.1.norm1.weight"][:16]
    path, model = save_released(tmp_path / "mar.pth", state), make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    message = (
        r"of decoder_blocks\.1 is \(16,\), the model's is \(32,\); set backbone.hidden_size=16"
    )
    with pytest.raises(ValueError, match=message):
        load_image_mar(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_missing_block_is_refused(tmp_path):
    state = {k: v for k, v in mar_state(encoder=3, decoder=1).items() if ".1." not in k}
    path = save_released(tmp_path / "mar.pth", state)
    with pytest.raises(ValueError, match=r"'encoder_blocks\.1\.' does not fit: missing"):
        load_image_mar(decoder(), path)


def test_blocks_of_another_kind_are_refused(tmp_path):
    path = save_released(tmp_path / "mar.pth", mar_state())
    with pytest.raises(ValueError, match=r"'model_type': 'llama'.*set backbone\.family=gpt2"):
        load_image_mar(decoder(replace(BACKBONE, family="llama")), path)
    model = decoder()
    model.backbone.config.activation_function = "gelu_new"
    with pytest.raises(ValueError, match="'activation_function': 'gelu_new'"):
        load_image_mar(model, path)


def test_a_model_prompted_by_text_keeps_its_words(tmp_path):
    """Tables of text ids are new, not silent, where there is text."""
    config = replace(test_run_config(), backbone=BACKBONE)
    model = build_model(config, vocab_size=300)
    report = load_image_mar(model, save_released(tmp_path / "mar.pth", mar_state()))
    assert report.new["backbone.transformer.wte.weight"] == 300 * WIDTH


def test_files_that_are_no_checkpoint_are_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"found no file .*none\.pth, expected checkpoint-last"):
        load_image_mar(decoder(), tmp_path / "none.pth")
    path = tmp_path / "mar.pth"
    path.write_bytes(b"<html>404</html>")
    with pytest.raises(ValueError, match=r"mar\.pth is no MAR checkpoint \(") as refused:
        load_image_mar(decoder(), path)
    assert "\n" not in str(refused.value)
    whole = save_released(path, mar_state()).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"mar\.pth is no MAR checkpoint \("):
        load_image_mar(decoder(), path)
    torch.save({"model": {"weight": torch.ones(1)}}, path)
    with pytest.raises(ValueError, match=r"\(model\) holds no encoder_blocks and decoder_blocks"):
        load_image_mar(decoder(), path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="holds list, expected MAR's weights by name"):
        load_image_mar(decoder(), path)


def test_a_checkpoint_runs_no_code(tmp_path):
    class Surprise:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"model": mar_state(), "args": Surprise()}, tmp_path / "mar.pth")
    with pytest.raises(ValueError, match="is no MAR checkpoint"):
        load_image_mar(decoder(), tmp_path / "mar.pth")


def test_folders_without_an_audiomar_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json cannot be read .*; expected the folder"):
        load_audiomar_blocks(decoder(), tmp_path)
    decoder().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds \['AudioLanguageModel'\], no AudioMAR"):
        load_audiomar_blocks(decoder(), tmp_path)
