"""`mllm-audio bench head`: the two ways agree, and figures are what they are called."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from conftest import test_run_config

from mllm_audio import presets
from mllm_audio.benchmarks import head as bench
from mllm_audio.benchmarks import reads
from mllm_audio.benchmarks.report import Report
from mllm_audio.cli import cli
from mllm_audio.heads import adaln_mlp


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Preset `small_ddpm`, and `small_flow` with another head, at the size of unit tests."""
    made = test_run_config()
    for name in ("ddpm", "flow"):
        audio = replace(made.audio, head=replace(made.audio.head, name=name))
        config = replace(made, preset=f"small_{name}", audio=audio)
        monkeypatch.setitem(presets.PRESETS, f"small_{name}", lambda config=config: config)


def run(tmp_path, *options):
    """Run the command; return its report and what it printed."""
    file = tmp_path / "report.json"
    command = ["bench", "head", "--preset", "small_ddpm", "--threads", "1", "--json", str(file)]
    result = CliRunner().invoke(cli, [*command, *map(str, options)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return Report.load(file), result.output


@pytest.mark.parametrize(
    ("dtype", "size", "most"), [("float32", 4, 1e-5), ("bfloat16", 2, 0.05), ("int8", 1, 0.05)]
)
def test_both_ways_draw_the_same_latents(tmp_path, dtype, size, most):
    report, output = run(tmp_path, "--dtype", dtype, "--num-inference-steps", 20)
    figures = report.figures
    assert 0 < figures["error.ratio"] < most
    assert (figures["error.ratio"] > 1e-4) == (dtype != "float32")
    assert figures["speedup.ratio"] == figures["plain.ms"] / figures["ours.ms"]
    assert figures["speedup.cpu_ratio"] == figures["plain.cpu_ms"] / figures["ours.cpu_ms"]
    for name in ("plain", "ours"):
        rate = figures[f"{name}.read_bytes"] / figures[f"{name}.ms"] / 1e6
        assert figures[f"{name}.read_gb_s"] == pytest.approx(rate)
    share = figures["ours.weights_bytes"] / figures["plain.weights_bytes"]
    assert share == size / 4 or (dtype == "int8" and 0.25 < share < 0.65)  # scales, projections
    assert f"{figures['speedup.ratio']:.2f} times that of the plain way" in output
    assert f"error     {figures['error.ratio']:.1e}" in output
    assert report.repetitions == 3 and report.header.settings["num_inference_steps"] == 20


def test_the_error_is_that_of_the_plain_way_not_of_ours(monkeypatch, tmp_path):
    sample = bench.our_sample
    monkeypatch.setattr(bench, "our_sample", lambda *question: 1.01 * sample(*question))
    assert run(tmp_path)[0].figures["error.ratio"] == pytest.approx(0.01, rel=1e-3)


def test_the_plain_way_runs_the_whole_network_on_both_branches_at_every_step():
    head, device = bench._random_head("small_ddpm"), torch.device("cpu")
    rows = []
    linears = [m for m in head.modules() if isinstance(m, torch.nn.Linear)]
    linears.remove(head.network.condition_projection)
    for linear in linears:
        linear.register_forward_hook(lambda _m, _inputs, output: rows.append(len(output)))
    bench.plain_sample(head, bench._question(head, 0, 3, device), 7)
    assert len(rows) == 7 * len(linears)
    assert set(rows) == {1, 6}  # the timestep is one for all rows


@pytest.mark.parametrize(("steps", "batch"), [(20, 1), (20, 4), (20, 40)])
def test_bytes_are_those_of_the_weights_that_are_used(monkeypatch, steps, batch):
    """Counted by what a chain multiplies by, as often as it does."""
    monkeypatch.setattr(adaln_mlp, "MODULATED_ROWS", 64)
    monkeypatch.setattr(reads, "MODULATED_ROWS", 64)
    head, read = bench._random_head("small_ddpm"), []
    for module in head.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm):
            nbytes = sum(p.nbytes for p in module.parameters())
            module.register_forward_hook(lambda *_, nbytes=nbytes: read.append(nbytes))
    question = bench._question(head, 0, batch, torch.device("cpu"))
    for whole, sample in ((True, bench.plain_sample), (False, bench.our_sample)):
        read.clear()
        if whole:
            sample(head, question, steps)
        else:
            with monkeypatch.context() as patch:  # every product through its module, and its hook
                patch.setattr(adaln_mlp, "project", lambda linear, rows: linear(rows))
                sample(head, question, steps)
        plain = bench.plain_bytes(head.network, steps)
        assert sum(read) == (plain if whole else reads.chain_bytes(head.network, steps, 2 * batch))


def test_the_random_head_has_no_layer_at_zero_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second = bench._random_head("small_ddpm"), bench._random_head("small_ddpm")
    assert torch.equal(torch.rand(1), expected)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other) and (one.dim() < 2 or one.any())


def test_a_baseline_of_another_type_is_refused(tmp_path):
    run(tmp_path, "--repetitions", 1)
    file = tmp_path / "before.json"
    (tmp_path / "report.json").rename(file)
    _, output = run(tmp_path, "--repetitions", 1, "--baseline", file)
    assert "now/before" in output
    with pytest.raises(ValueError, match=r"dtype float32 \(here int8\)"):
        run(tmp_path, "--repetitions", 1, "--baseline", file, "--dtype", "int8")


def test_impossible_questions_are_refused():
    with pytest.raises(ValueError, match="unknown dtype 'bf16'; did you mean 'bfloat16'"):
        bench.HeadBenchConfig(dtype="bf16")
    with pytest.raises(ValueError, match="num_inference_steps=1, expected"):
        bench.HeadBenchConfig(num_inference_steps=1)
    with pytest.raises(ValueError, match="'small_flow' has the head 'flow'"):
        bench.bench_head("small_flow", bench.HeadBenchConfig(), 1, print)
