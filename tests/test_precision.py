"""Weights in bfloat16 and int8: what is converted, and what is drawn with it."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner
from test_generation import CONFIG, run

from mllm_audio.backbone import blocks
from mllm_audio.benchmarks.subject import load_subject
from mllm_audio.cli import cli
from mllm_audio.generation import precision
from mllm_audio.generation.precision import DTYPES, cast
from mllm_audio.generation.voice import Voice
from mllm_audio.int8 import Int8Linear
from mllm_audio.tokenizers import DCTTokenizer


@pytest.mark.parametrize("tokens_per_step", [1, 4])
@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 0.1), ("int8", 0.1)])
def test_latents_stay_near_those_of_float32(
    make_model, text_tokenizer, special, family, dtype, error, tokens_per_step
):
    config = CONFIG.__class__(num_inference_steps=3, seconds=0.16, tokens_per_step=tokens_per_step)
    model = make_model(family)
    full, _ = run(model, text_tokenizer, special, ["a low beep"], [7], config)
    cast(model, dtype)
    found, _ = run(model, text_tokenizer, special, ["a low beep"], [7], config)
    assert found.dtype == torch.float32
    assert 0 < float((found - full).norm() / full.norm()) < error


def test_int8_holds_the_matrices_of_blocks_and_head_and_no_others(make_model, family):
    model = make_model(family)
    text_ids = torch.arange(8)[None]
    before = model.text_logits(model.embed_text(text_ids))
    cast(model, "int8")
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(Int8Linear) > 8
    inside = [m for m in blocks(model.backbone).modules() if isinstance(m, Int8Linear)]
    assert len(inside) == 4 * 2 if family == "gpt2" else len(inside) == 7 * 2
    assert all(m.weight.dtype == torch.int8 for m in inside)
    assert torch.equal(before, model.text_logits(model.embed_text(text_ids)))  # tables as before


def test_columns_of_gpt2s_weights_lie_together_and_are_saved_as_before(make_model, tmp_path):
    model = make_model("gpt2")
    cast(model, "bfloat16")
    weight = model.backbone.transformer.h[0].mlp.c_fc.weight
    assert weight.t().is_contiguous() and not weight.is_contiguous()
    plain = torch.nn.functional.linear(torch.ones(3, weight.shape[0]).bfloat16(), weight.t())
    assert torch.equal(plain, torch.ones(3, weight.shape[0]).bfloat16() @ weight.contiguous())
    model.save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path).backbone.transformer.h[0].mlp.c_fc.weight
    assert torch.equal(saved.to(weight.dtype), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bf16", [True, False])
def test_latents_are_decoded_in_bfloat16_where_the_machine_computes_in_it(
    monkeypatch, dtype, has_bf16
):
    monkeypatch.setattr(precision, "has_bf16", lambda device_type: has_bf16)
    tokenizer, asked = DCTTokenizer(), []
    monkeypatch.setattr(tokenizer, "decode_in", asked.append)
    precision.cast_decoder(tokenizer, dtype, torch.device("cpu"))
    assert asked == ([torch.bfloat16] if has_bf16 and dtype != "float32" else [])


def test_the_type_is_refused_in_one_line(make_model):
    with pytest.raises(ValueError, match="unknown dtype 'int4'; did you mean 'int8'"):
        cast(make_model(), "int4")
    audiomar = load_subject("audiomar_base_small", None).voice.model
    with pytest.raises(ValueError, match="AudioMAR decodes in float32; leave it out"):
        cast(audiomar, "int8")


def test_bench_counts_the_parameters_that_there_were(tmp_path):
    options = ["--preset", "tiny", "--seconds", "0.16", "--repetitions", "1"]
    counts = []
    for dtype in ("float32", "int8"):
        result = CliRunner().invoke(cli, ["bench", "generate", *options, "--dtype", dtype])
        assert result.exit_code == 0, result.output
        counts.append(result.output.partition("model     ")[2].partition(" ")[0])
    assert counts[0] == counts[1] and len(counts[0]) > 5


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_folder_is_loaded_and_speaks_in_every_type(tmp_path, dtype):
    folder, out = tmp_path / "run", tmp_path / "sound.wav"
    load_subject("tiny", None).voice.save(folder)
    voice = Voice.load(folder, dtype=dtype)
    assert voice.defaults.num_inference_steps
    options = ["--seconds", "0.32", "--num-inference-steps", "2", "--dtype", dtype]
    result = CliRunner().invoke(cli, ["generate", str(folder), "a", "--out", str(out), *options])
    assert result.exit_code == 0, result.output
    assert out.stat().st_size > 1000
    wrong = [*options[:-1], "int4"]
    result = CliRunner().invoke(cli, ["generate", str(folder), "a", "--out", str(out), *wrong])
    assert result.exit_code and "unknown dtype 'int4'" in str(result.output) + str(result.exception)
