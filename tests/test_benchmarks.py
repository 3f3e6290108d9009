"""`mllm-audio bench generate|train|decode`: figures add up, code is left as it is, baselines."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from conftest import test_run_config

from mllm_audio import presets
from mllm_audio.benchmarks import (
    decode,
    generate,
    generate_config,
    lengths,
    reads,
    subject,
    timing,
    train,
)
from mllm_audio.benchmarks.baseline import check_comparable, compare, comparison_lines
from mllm_audio.benchmarks.report import Header, Machine, Report
from mllm_audio.benchmarks.session import SessionConfig, run_session
from mllm_audio.cli import cli
from mllm_audio.data.layout import Text
from mllm_audio.diffusion.samplers import SAMPLERS
from mllm_audio.generation import graph
from mllm_audio.generation.precision import cast
from mllm_audio.heads import HEADS
from mllm_audio.heads.base import HeadConfig
from mllm_audio.masking import MaskingConfig, num_kept
from mllm_audio.modality import AudioConfig
from mllm_audio.training.engine import SingleProcessEngine


@pytest.fixture(autouse=True)
def small_tiny(monkeypatch):
    """Preset `tiny`, and `ddpm` with another head, at the size of unit tests."""
    made = replace(test_run_config(), preset="tiny")
    monkeypatch.setitem(presets.PRESETS, "tiny", lambda: made)
    monkeypatch.setitem(presets.PRESETS, "ddpm", lambda: with_ddpm(made))


def with_ddpm(config):
    head = replace(config.audio.head, name="ddpm")
    return replace(config, preset="ddpm", audio=replace(config.audio, head=head))


def bench(tmp_path, *options):
    """Run the command; return its report and what it printed."""
    file = tmp_path / "report.json"
    command = ["bench", *map(str, options), "--json", str(file), "--threads", "1"]
    result = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return Report.load(file), result.output


@pytest.fixture
def tiny_subject():
    return subject.load_subject("tiny", None, seconds=2.56)


# The stopwatch


def test_parts_take_what_the_clock_says_and_the_owner_is_left_as_it_was(monkeypatch):
    class Owner:
        def work(self, seconds, *, fail=False):
            clock[0] += seconds
            if fail:
                raise KeyError("failed")
            return 2 * seconds

    clock, owner = [0.0], Owner()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    watch = timing.Stopwatch(torch.device("cpu"))
    with watch.part("whole"), watch.watching(owner, "work", "part"):
        assert [owner.work(s) for s in (1.0, 4.0, 2.0)] == [2.0, 8.0, 4.0]
        with pytest.raises(KeyError):
            owner.work(100.0, fail=True)
        clock[0] += 0.5
    assert "work" not in vars(owner)
    owner.work(50.0)
    assert watch.laps == {"part": [1.0, 4.0, 2.0], "whole": [107.5]}
    assert (watch.total("part"), watch.typical("part"), watch.calls("part")) == (7.0, 2.0, 3)
    assert (watch.total("none"), watch.typical("none"), watch.calls("none")) == (0, 0, 0)


def test_middle_is_the_median_repetition_whole():
    cpu = torch.device("cpu")
    watches = [timing.Stopwatch(cpu, {"a": [a], "b": [b]}) for a, b in ((9, 1), (1, 2), (1, 3))]
    assert timing.middle(watches, "a", "b") is watches[2]
    assert timing.middle(watches[:2], "a", "b") is watches[0]
    assert timing.middle(watches, "b") is watches[1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux forgets the peak")
def test_peak_memory_is_that_since_it_was_forgotten():
    cpu = torch.device("cpu")
    big = torch.ones(64 * 2**20)  # 256 MiB
    del big
    high = timing.peak_memory(cpu)
    timing.forget_peak(cpu)
    low = timing.peak_memory(cpu)
    assert high - low > 200 * 2**20
    held = torch.ones(32 * 2**20)  # 128 MiB
    assert timing.peak_memory(cpu) - low > 100 * 2**20
    del held


def test_threads_are_those_asked_for_and_then_as_before():
    before = torch.get_num_threads()
    with subject.num_threads(before + 1) as count:
        assert count == before + 1 == torch.get_num_threads()
    assert torch.get_num_threads() == before
    with subject.num_threads(None) as count:
        assert count == before


# Generating


@pytest.mark.parametrize("preset", ["tiny", "ddpm"])
def test_parts_of_generating_add_up_to_its_whole(tmp_path, preset):
    report, output = bench(
        tmp_path, "generate", "--preset", preset, "--seconds", 0.96, "--num-inference-steps", 4
    )
    figures = report.figures
    assert figures["head.calls"] == 24  # 6 columns of 4: longer than the preset's 0.64 s
    assert figures["backbone.calls"] == 23  # what follows the last latent is not asked for
    assert figures["prompt.calls"] == 1
    model = ("prompt", "backbone", "head", "other")
    assert sum(figures[f"{p}.seconds"] for p in model) == pytest.approx(figures["span.seconds"])
    assert figures["span.seconds"] + figures["decode.seconds"] == pytest.approx(figures["seconds"])
    assert all(figures[f"{part}.seconds"] > 0 for part in (*model, "decode"))
    assert figures["rtf"] == pytest.approx(figures["seconds"] / 0.96)
    assert figures["audio_seconds_per_second"] == pytest.approx(1 / figures["rtf"])
    assert figures["latents_per_second"] == pytest.approx(24 / figures["span.seconds"])
    assert figures["peak.bytes"] > 50 * 2**20
    assert figures["guidance.share"] < 1
    assert f"rtf       {figures['rtf']:.3f}" in output and "random weights" in output
    assert report.header.settings["dtype"] == "float32" and report.header.settings["threads"] == 1


def test_guidance_is_half_where_rows_cost_alike(tiny_subject, monkeypatch):
    voice, clock = tiny_subject.voice, [0.0]

    def cost(module, inputs, output):
        clock[0] += len(output) if torch.is_tensor(output) else len(output.last_hidden_state)

    voice.model.audio.head.network.register_forward_hook(cost)
    voice.model.backbone.base_model.register_forward_hook(cost)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    guided = replace(voice.defaults, seconds=0.64, num_inference_steps=3, guidance_scale=3.0)
    figures = generate._guidance_figures(generate.Task(voice, guided, 2))
    shares = ("guidance.share", "guidance.backbone_share", "guidance.head_share")
    assert figures == dict.fromkeys(shares, 0.5)
    report = generate._clip_figures(generate.Task(voice, guided, 2), tiny_subject, 1)
    assert report["head.ms"] == 1e3 * 3 * 2 * 2 and report["head.seconds"] == 16 * 12
    assert report["backbone.seconds"] == 15 * 4 and report["other.seconds"] == 0


def test_a_batch_makes_as_many_clips(tmp_path):
    report, _ = bench(
        tmp_path, "generate", "--preset", "tiny", "--seconds", 0.64, "--batch-size", 3,
        "--guidance-scale", 1, "--repetitions", 1, "--num-inference-steps", 2,
    )  # fmt: skip
    figures = report.figures
    assert figures["audio_seconds_per_second"] == pytest.approx(3 / figures["rtf"])
    assert figures["head.calls"] == 16
    assert "guidance.share" not in figures


def test_more_head_calls_take_longer(tmp_path):
    options = ("generate", "--preset", "tiny", "--seconds", 0.64)
    few, many = (
        bench(tmp_path, *options, "--num-inference-steps", steps)[0].figures["head.ms"]
        for steps in (2, 60)
    )
    assert many > 5 * few


def test_watching_changes_no_latent_and_ends(tiny_subject):
    voice = tiny_subject.voice
    task = generate.Task(voice, replace(voice.defaults, seconds=0.32), 2)
    plain = task.latents()
    watch = timing.Stopwatch(torch.device("cpu"))
    with task.watched(watch):
        watched = task.latents()
    assert torch.equal(plain, watched) and plain.shape == (2, 8, 128)
    assert watch.calls("head") == 8
    assert "step" not in vars(voice.model) and "sample" not in vars(voice.model.audio)
    assert torch.equal(task.latents(columns=1), plain[:, :4])


def test_random_heads_have_no_matrix_of_zeros(tiny_subject):
    head = tiny_subject.voice.model.audio.head
    assert all(bool(p.any()) for p in head.parameters() if p.dim() == 2)


def test_bfloat16_holds_backbone_and_head_and_leaves_the_rest(tmp_path, tiny_subject):
    model = tiny_subject.voice.model
    cast(model, "bfloat16")
    assert {p.dtype for p in model.backbone.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.audio.head.parameters()} == {torch.bfloat16}
    assert model.audio.latent_proj.weight.dtype == torch.float32
    report, _ = bench(
        tmp_path, "generate", "--preset", "tiny", "--seconds", 0.32, "--dtype", "bfloat16"
    )
    assert report.header.settings["dtype"] == "bfloat16" and report.figures["rtf"] > 0


def sized(name="ddpm", **audio):
    """Give what `resolve` reads of a model with the head `name`."""
    config = AudioConfig(head=HeadConfig(name=name), **audio)
    return SimpleNamespace(audio=SimpleNamespace(config=config))


def test_fast_settings_are_there_for_every_head_and_give_way_to_what_is_typed():
    assert generate_config.FAST.keys() == HEADS.keys()
    defaults = presets.get_preset("audiomntp_base").generation
    config = generate_config.GenerateConfig
    for head, fast in generate_config.FAST.items():
        assert fast.sampler is None or fast.sampler in SAMPLERS
        resolved = config(fast=True).resolve(defaults, sized(head))
        assert resolved.num_inference_steps == fast.num_inference_steps < 100
        assert resolved.tokens_per_step == 4
    typed = config(
        fast=True, num_inference_steps=3, sampler="ddpm", guidance_scale=2.0, tokens_per_step=2
    ).resolve(replace(defaults, guidance_weight=6.0), sized())
    assert (typed.num_inference_steps, typed.sampler) == (3, "ddpm")
    assert (typed.guidance_scale, typed.guidance_weight) == (2.0, None)
    assert typed.tokens_per_step == 2
    untold = config(fast=True).resolve(defaults, sized(target_positions=False))
    assert untold.tokens_per_step == 1  # such a model cannot
    plain = config().resolve(defaults, sized())
    assert plain == replace(defaults, seconds=10.24)


def test_fast_runs_the_backbone_and_the_head_once_a_column(tmp_path):
    options = ("generate", "--preset", "tiny", "--seconds", 0.64, "--repetitions", 1)
    report, _ = bench(tmp_path, *options, "--fast")
    assert report.header.settings["tokens_per_step"] == 4
    calls = {part: report.figures[f"{part}.calls"] for part in ("prompt", "backbone", "head")}
    assert calls == {"prompt": 1, "backbone": 3, "head": 4}
    typed, _ = bench(tmp_path, *options, "--fast", "--tokens-per-step", 8)
    assert typed.figures["head.calls"] == 2


def test_settings_list_what_is_typed_and_what_is_not_default(tiny_subject):
    config = generate_config.GenerateConfig(fast=True, guidance_scale=3.0)
    resolved = config.resolve(tiny_subject.voice.defaults, tiny_subject.voice.model)
    settings = generate_config.listed_settings(tiny_subject, config, resolved, 1)
    assert settings["guidance_scale"] == 3.0 and settings["num_inference_steps"] == 8
    assert settings["temperature"] == 0.7  # the preset's; GenerationConfig has 1
    assert "decoding_steps" not in settings and "end_threshold" not in settings


def test_audiomar_is_measured_in_passes(tmp_path):
    report, _ = bench(
        tmp_path, "generate", "--preset", "audiomar_base_small", "--seconds", 0.32,
        "--num-inference-steps", 2, "--repetitions", 1,
    )  # fmt: skip
    assert report.figures["head.calls"] == report.figures["backbone.calls"] == 8  # one per latent
    assert report.header.settings["decoding_steps"] == 64


def test_a_run_is_measured_with_its_own_settings(tmp_path):
    folder = tmp_path / "run"
    voice = subject.load_subject("tiny", None).voice
    replace(voice, defaults=replace(voice.defaults, num_inference_steps=3)).save(folder)
    report, output = bench(tmp_path, "generate", folder, "--seconds", 0.48, "--repetitions", 1)
    settings = report.header.settings
    assert settings["model"] == str(folder) and settings["num_inference_steps"] == 3
    assert "trained weights" in output and report.figures["head.calls"] == 12
    with pytest.raises(ValueError, match=r"asked for 2.0 s, this model makes at most 0.64 s"):
        bench(tmp_path, "generate", folder, "--seconds", 2)


# Lengths


def test_what_is_fed_at_once_is_what_is_fed_latent_by_latent(tiny_subject):
    voice = tiny_subject.voice
    part, per_column = subject.prompt_part(voice), 4
    latents = torch.randn(9, 128, generator=lengths.seeded("benchmark latents"))
    with torch.inference_mode():
        begun = lengths._rows(voice, part, 2, per_column, True)
        for index in range(per_column, 2 * per_column):
            begun.feed_latents(latents[index].expand(2, 1, -1), index, range(index + 1, index + 2))
        at_once = lengths._rows(voice, part, 2, 2 * per_column, True)
    assert isinstance(part, Text) and at_once.hidden.shape[0] == 4
    assert torch.equal(begun.positions, at_once.positions)
    torch.testing.assert_close(begun.hidden, at_once.hidden, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(at_once.hidden[:2], at_once.hidden[2:])  # twins without the prompt


def test_lengths_read_the_blocks_and_a_cache_of_every_element(tmp_path):
    report, output = bench(
        tmp_path, "generate", "--preset", "tiny", "--seconds", 0.32, "--lengths", "1.6,4.8",
        "--num-inference-steps", 2, "--repetitions", 1,
    )  # fmt: skip
    figures = report.figures
    more = figures["length.4.8.read_bytes"] - figures["length.1.6.read_bytes"]
    # 80 latents more in both twins: keys and values of 2 layers, 32 wide, float32.
    assert more == 80 * 2 * 2 * 2 * 32 * 4
    assert all(figures[f"length.{s}.{p}_ms"] > 0 for s in (1.6, 4.8) for p in ("backbone", "head"))
    assert re.search(r"4\.8 s +[\d.]+ +[\d.]+ +[\d.]+x +\d+ MiB +1\.\d\dx", output)


def test_a_preset_is_lengthened_only_where_it_is_too_short():
    config = presets.get_preset("tiny")
    assert subject.lengthened(config, 0.64) == config == subject.lengthened(config, None)
    longer = subject.lengthened(config, 1.5)  # 10 columns
    assert longer.audio.max_tokens == 40 and longer.backbone.max_positions >= 40 + 96
    base = subject.lengthened(presets.get_preset("audiomntp_base"), 120)
    assert base.audio.max_tokens == 3000 and base.backbone.max_positions >= 3000 + 78 + 2


# Training


def test_parts_of_a_step_add_up_and_tokens_are_counted(tmp_path):
    report, output = bench(
        tmp_path, "train", "--preset", "tiny", "--ratios", "0,0.5", "--batch-size", 2
    )
    figures = report.figures
    for dtype in ("float32", "bfloat16"):
        own = {k.removeprefix(f"{dtype}."): v for k, v in figures.items() if k.startswith(dtype)}
        parts = [own[f"{part}.seconds"] for part in train.PARTS]
        assert sum(parts) == pytest.approx(own["step.seconds"]) and min(parts) > 0
        assert own["latents_per_second"] == pytest.approx(2 * 16 / own["step.seconds"])  # r = 0
        both = own["elements_per_second"] + own["latents_per_second"]
        assert own["tokens_per_second"] == pytest.approx(both)
        # 2 rows of 16 or 8 latents; the caption and both markers stay.
        assert own["ratio.0.elements"] - own["ratio.0.5.elements"] == 2 * 8
        assert own["ratio.0.flops"] > own["ratio.0.5.flops"] > 0.5 * own["ratio.0.flops"]
    ratio = figures["bfloat16.tokens_per_second"] / figures["float32.tokens_per_second"]
    assert figures["bfloat16.speedup"] == pytest.approx(ratio)
    assert re.search(r"0\.5 +[\d.]+ +[\d.]+ +0\.500 +0\.\d+ +0\.\d+", output)


def test_batches_are_masked_at_the_ratio_that_is_asked_for(tiny_subject):
    preset = presets.get_preset("audiomntp_base")
    assert train.mean_ratio(preset.masking) == pytest.approx(0.58, abs=0.03)  # of schedule C
    assert train.mean_ratio(MaskingConfig(schedule="uniform", scale=0.5)) == pytest.approx(0.25)
    tiny = presets.get_preset("tiny")
    masked = replace(tiny, masking=MaskingConfig(schedule="c"))
    for ratio in (0.0, 0.3, 0.75):
        batch = train.build_batch(tiny_subject, masked, ratio, 3)
        assert batch.masking_ratio == ratio
        assert batch.counts.rows == 3
        assert batch.counts.latents == 3 * num_kept(tiny.audio.max_tokens, ratio)


def test_audiomar_trains_without_flops(tmp_path):
    report, _ = bench(
        tmp_path, "train", "--preset", "audiomar_base_small", "--batch-size", 1,
        "--dtypes", "float32", "--repetitions", 1,
    )  # fmt: skip
    assert report.figures["float32.tokens_per_second"] > 0
    assert not any("flops" in name or "bfloat16" in name for name in report.figures)


def test_a_step_that_is_not_finite_is_no_figure(tiny_subject, monkeypatch):
    model, preset = tiny_subject.voice.model.train(), presets.get_preset("tiny")
    engine = SingleProcessEngine(model, preset.train)
    batch = train.build_batch(tiny_subject, preset, 0.0, 1)
    with torch.no_grad():
        model.audio.latent_proj.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="step 0 gave loss nan"):
        train._steps(engine, batch, 1)


# Decoding


def test_dct_decoding_is_whole_and_streamed(tmp_path):
    report, output = bench(
        tmp_path, "decode", "--tokenizer", "dct", "--seconds", 1.5, "--stream", "--batch-size", 2
    )
    figures = report.figures
    assert figures["seconds"] == figures["other.seconds"] > 0
    assert figures["rtf"] == pytest.approx(figures["seconds"] / 1.6)  # whole columns
    assert figures["audio_seconds_per_second"] == pytest.approx(2 / figures["rtf"])
    assert figures["stream.first_columns"] == 2  # it looks one ahead
    assert 0 < figures["stream.first_ms"] < 1e3 * figures["stream.seconds"]
    assert "first sound after 2 columns" in output


@pytest.fixture
def small_audioldm(monkeypatch):
    pytest.importorskip("diffusers")
    sizes = {"block_out_channels": (4, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    monkeypatch.setattr(decode, "VAE", {**decode.VAE, **sizes})
    monkeypatch.setattr(decode, "VOCODER", {**decode.VOCODER, "upsample_initial_channel": 64})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vae_and_vocoder_are_told_apart(tmp_path, small_audioldm, dtype):
    report, output = bench(
        tmp_path, "decode", "--tokenizer", "audioldm-random", "--seconds", 0.64, "--dtype", dtype
    )
    figures = report.figures
    assert figures["vae.calls"] == figures["vocoder.calls"] == 1
    parts = [figures[f"{part}.seconds"] for part in ("vae", "vocoder", "other")]
    assert min(parts) > 0 and sum(parts) == pytest.approx(figures["seconds"])
    assert "vocoder" in output
    assert 0 < figures.get("error", 0.01) < 0.1 and ("error" in figures) == (dtype == "bfloat16")


def test_generating_through_audioldm_tells_its_networks_apart(tmp_path, small_audioldm):
    report, _ = bench(
        tmp_path, "generate", "--preset", "tiny", "--tokenizer", "audioldm-random",
        "--seconds", 0.64, "--batch-size", 2, "--num-inference-steps", 2, "--repetitions", 1,
    )  # fmt: skip
    figures = report.figures
    assert figures["vae.calls"] == figures["vocoder.calls"] == 2  # clip by clip, as `generate`
    parts = [figures[f"{part}.seconds"] for part in ("span", "vae", "vocoder", "decode")]
    assert sum(parts) == pytest.approx(figures["seconds"])
    assert report.header.settings["tokenizer"].startswith("audioldm ")


def test_random_audioldm_has_the_published_sizes():
    pytest.importorskip("diffusers")
    with torch.device("meta"):
        tokenizer = decode.load("audioldm-random")
    counts = [sum(p.numel() for p in m.parameters()) for m in (tokenizer._vae, tokenizer._vocoder)]
    assert counts == [55_376_873, 55_264_897]
    assert (tokenizer.latent_dim, tokenizer.tokens_per_column) == (128, 4)


def test_random_audioldm_leaves_the_random_state_alone(small_audioldm):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = decode.load("audioldm-random")
    assert torch.equal(torch.rand(1), expected)
    latents = decode.random_latents(first, 0.32, 1)
    assert torch.equal(first.decode(latents), decode.load("audioldm-random").decode(latents))


# Reports and baselines


def made_report(figures=None, machine="box", benchmark="generate", **settings):
    return Report(
        header=Header(
            benchmark=benchmark,
            settings={"dtype": "float32", "lengths": [], **settings},
            machine=Machine(
                name=machine,
                device="cpu",
                instructions="AVX2",
                torch_version="2",
                mllm_audio_version="1",
            ),
        ),
        repetitions=3,
        figures=figures or {"rtf": 2.0, "head.ms": 8.0, "idle": 0.0, "old": 1.0},
    )


def test_reports_survive_json(tmp_path):
    report = made_report()
    report.save(tmp_path / "a.json")
    assert Report.load(tmp_path / "a.json") == report
    values = json.loads((tmp_path / "a.json").read_text())
    assert values["header"]["machine"]["name"] == "box" and values["figures"]["rtf"] == 2.0


def test_ratios_are_now_over_before(tmp_path):
    now = made_report({"rtf": 1.0, "head.ms": 12.0, "idle": 0.0, "new": 3.0})
    assert compare(made_report(), now) == {"rtf": 0.5, "head.ms": 1.5}
    lines = comparison_lines(made_report(), now, tmp_path / "b.json")
    assert lines[0].split()[-3:] == ["before", "now", "now/before"]
    assert lines[1].split() == ["rtf", "2", "1", "0.500"]
    assert lines[-1] == "in one of them alone: new, old"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"machine": "laptop"}, "machine box, cpu (here laptop, cpu)"),
        ({"dtype": "bfloat16"}, "dtype float32 (here bfloat16)"),
        ({"threads": 2}, "threads None (here 2)"),
        ({"machine": "laptop", "dtype": "bfloat16"}, "laptop, cpu); dtype float32 (here"),
    ],
)
def test_baselines_of_other_machines_and_settings_are_refused(tmp_path, other, message):
    header, file = made_report(**other).header, tmp_path / "b.json"
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        check_comparable(made_report(), header, file, any_machine=False)
    assert "--any-machine" in str(error.value) and "\n" not in str(error.value)
    check_comparable(made_report(), header, file, any_machine=True)
    check_comparable(made_report(), made_report(lengths=()).header, file, any_machine=False)


def test_a_baseline_of_another_benchmark_is_refused_in_any_case(tmp_path):
    header = made_report(benchmark="train").header
    with pytest.raises(ValueError, match="is of `bench generate`, expected one of `bench train`"):
        check_comparable(made_report(), header, tmp_path / "b.json", any_machine=True)


def test_the_command_compares_with_what_it_wrote_and_refuses_before_it_measures(tmp_path):
    options = ("decode", "--seconds", "0.32", "--repetitions", "1")
    report, _ = bench(tmp_path, *options)
    earlier = tmp_path / "earlier.json"
    report.save(earlier)
    _, output = bench(tmp_path, *options, "--baseline", earlier)
    assert f"against {earlier}" in output and re.search(r"^rtf +[\d.e-]+ +[\d.e-]+ ", output, re.M)
    with pytest.raises(ValueError, match=r"seconds 0\.32 \(here 0\.48\)"):
        bench(tmp_path, "decode", "--seconds", "0.48", "--baseline", earlier)
    bench(tmp_path, "decode", "--seconds", "0.48", "--baseline", earlier, "--any-machine")


def test_nothing_is_measured_where_the_report_cannot_go(tmp_path):
    config = SessionConfig(json_file=tmp_path / "none" / "a.json")
    with pytest.raises(ValueError, match="there is no folder"):
        run_session(lambda threads, check: pytest.fail("measured"), config, print)


# Messages


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["generate"], "found neither, expected a --preset NAME or a RUN folder"),
        (["generate", "RUN", "--preset", "tiny"], "found both --preset tiny and the run RUN"),
        (["generate", "--preset", "tinny"], "unknown preset 'tinny'"),
        (["generate", "--preset", "voice"], "name a RUN that add-voice wrote"),
        (["generate", "--preset", "tiny", "--dtype", "bf16"], "unknown dtype 'bf16'"),
        (["generate", "--preset", "tiny", "--sampler", "dpm"], "unknown sampler 'dpm'"),
        (["generate", "--preset", "ddpm", "--sampler", "euler"], "sampler is 'euler', which head"),
        (["generate", "--preset", "tiny", "--seconds", "0"], "bench.seconds=0.0"),
        (["generate", "--preset", "tiny", "--lengths", "10,0.5"], "found lengths (10.0, 0.5)"),
        (["generate", "--preset", "tiny", "--tokenizer", "opus"], "tokenizer 'opus' is unknown"),
        (
            ["generate", "--preset", "audiomar_base_small", "--dtype", "bfloat16"],
            "AudioMAR decodes in float32; leave it out",
        ),
        (["train", "--preset", "voice"], "preset 'voice' takes the size"),
        (["train", "--preset", "tiny", "--dtypes", "fp8"], "unknown dtype 'fp8'"),
        (["train", "--preset", "tiny", "--dtypes", "float32,float32"], "expected each once"),
        (["train", "--preset", "tiny", "--ratios", "0,1"], "found ratios (0.0, 1.0)"),
        (["train", "--preset", "abl_c_small", "--ratios", "0,0.5"], "masking.hidden=zero"),
        (["decode", "--dtype", "bfloat16"], "tokenizer 'dct' decodes in float32"),
        (["decode", "--dtype", "half"], "unknown dtype 'half'"),
        (["decode", "--baseline", "none.json"], "name a file that --json of"),
    ],
)
def test_mistakes_are_one_line_that_says_what_to_type(options, message):
    result = CliRunner().invoke(cli, ["bench", *options, "--threads", "1"])
    assert isinstance(result.exception, ValueError), result.output
    assert message in str(result.exception) and "\n" not in str(result.exception)


@pytest.mark.parametrize(
    "values", [{"figures": {}}, {"header": 1, "repetitions": 1, "figures": {}}]
)
def test_a_file_that_is_no_report_is_refused(tmp_path, values):
    (tmp_path / "a.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"a\.json"):
        Report.load(tmp_path / "a.json")


def test_audiomar_has_no_lengths():
    voice = subject.load_subject("audiomar_base_small", None).voice
    with pytest.raises(ValueError, match="which has no cache; leave --lengths out"):
        lengths.length_figures(voice, subject.prompt_part(voice), voice.defaults, 1, [1.0])


def test_a_tokenizer_that_makes_other_latents_is_refused(monkeypatch):
    other = SimpleNamespace(latent_dim=64, tokens_per_column=4)
    own = subject.load
    monkeypatch.setattr(subject, "load", lambda spec: other if spec == "narrow" else own(spec))
    with pytest.raises(ValueError, match="tokenizer narrow has latent_dim 64, tiny has 128"):
        subject.load_subject("tiny", None, tokenizer="narrow")


def test_the_process_prints_one_line_and_exits_with_2(tmp_path):
    command = [sys.executable, "-m", "mllm_audio", "bench", "train", "--preset", "tin"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 2 and result.stdout == ""
    assert (
        result.stderr.startswith("error: unknown preset 'tin'") and result.stderr.count("\n") == 1
    )


def test_where_steps_are_graphs_parts_are_timed_without_and_clips_with_one(tmp_path, monkeypatch):
    steps = []

    def capture_on(device):
        return (lambda step: steps.append(step) or step) if graph._allowed.get() else None

    for module in (graph, generate):
        monkeypatch.setattr(module, "capture_on", capture_on)
    report, output = bench(
        tmp_path, "generate", "--preset", "tiny", "--seconds", 0.96, "--repetitions", 1
    )
    assert len(steps) == 3  # two to warm up, and one whole clip
    assert "without a graph" in output
    figures = report.figures
    assert figures["seconds"] == pytest.approx(figures["span.seconds"] + figures["decode.seconds"])
    assert figures["watched.seconds"] != figures["seconds"]
    assert figures["backbone.seconds"] > 0


@pytest.mark.parametrize("gpu", [None, "NVIDIA H200"])
def test_what_decoding_reads_and_its_floor(tiny_subject, gpu, monkeypatch):
    model = tiny_subject.voice.model
    config = replace(tiny_subject.voice.defaults, num_inference_steps=5, tokens_per_step=4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu or "unknown")
    found = reads.Reads.of(model, config, rows=3, num_tokens=16)
    width = model.backbone.config.hidden_size
    layers = model.backbone.config.num_hidden_layers
    matrices = layers * (12 * width**2 + 13 * width)  # GPT-2's block, biases and norms included
    branches = 2 if config.is_guided(16) else 1
    assert found.step == 4 * (matrices + 2 * layers * width * 8 * 3 * branches)
    assert found.chain == reads.chain_bytes(model.audio.head.network, 5, 12 * branches)
    parts = {"backbone.ms": 2.0, "backbone.calls": 4, "head.ms": 4.0, "head.calls": 4}
    figures = found.figures({**parts, "span.seconds": 0.5}, torch.device("cuda"))
    assert figures["backbone.read_gb_s"] == pytest.approx(found.step / 1e9 / 2e-3)
    assert ("floor.seconds" in figures) == (gpu is not None)
    if gpu is not None:
        seconds = 4 * (found.step + found.chain) / 4.8e12
        assert figures["floor.seconds"] == pytest.approx(seconds)
        assert figures["floor.ratio"] == pytest.approx(0.5 / seconds)
        assert "times as long" in reads.read_lines(figures)[1]
