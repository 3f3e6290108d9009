"""Steps captured as a graph: latents are those of steps one by one.

A recorder stands in for a CUDA graph: it writes down every operator of a step and repeats them on
the same tensors, with the numbers that were passed when it was recorded. So whatever depends on the
number of a step but by what tensors hold goes wrong here as it would in a graph.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import test_parallel as parallel
import torch
from test_backbone import add_voice
from test_generation import force_end, run
from test_graph import CAPTIONS, Waits
from torch.utils._python_dispatch import TorchDispatchMode

from mllm_audio.data.dataset import prompt_ids
from mllm_audio.generation import graph
from mllm_audio.generation.decode import GenerationConfig, audio_span, decode
from mllm_audio.generation.precision import cast
from mllm_audio.generation.rows import Rows
from mllm_audio.text import SpecialIds

CONFIG = GenerationConfig(num_inference_steps=3, guidance_scale=3.0, seconds=0.64)  # 16 latents


def tensors(values):
    """List the tensors among arguments or results."""
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, (list, tuple)):
        return [tensor for value in values for tensor in tensors(value)]
    return []


class Recorder(TorchDispatchMode):
    """A recorded function; `replay` repeats its operators in place."""

    def __init__(self):
        super().__init__()
        self.calls, self.replays = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def capture(self, step):
        assert not self.calls
        with self:
            step()
        return self.replay

    def replay(self):
        """The recording was the first run: there is nothing to do for it."""
        self.replays += 1
        if self.replays == 1:
            return
        for func, args, kwargs, recorded in self.calls:
            read = {t.untyped_storage().data_ptr() for t in tensors([args, list(kwargs.values())])}
            for old, new in zip(tensors(recorded), tensors(func(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() not in read and old.numel():  # no view
                    old.copy_(new)


@pytest.fixture
def recorders(monkeypatch):
    """Capture with a recorder wherever a graph may be made; list them."""
    made = []

    def capture_on(device):
        made.append(Recorder())
        return made[-1].capture

    monkeypatch.setattr(graph, "capture_on", capture_on)
    return made


def replays(recorders):
    return sum(recorder.replays for recorder in recorders)


@pytest.mark.parametrize("tokens_per_step", [1, 2, 3, 4])
def test_every_latent_is_the_one_drawn_without_a_cache(
    make_model, text_tokenizer, special, family, tokens_per_step, recorders, monkeypatch
):
    if tokens_per_step == 1:
        model = make_model(family)
        found, _ = run(model, text_tokenizer, special, CAPTIONS, [7, 8], CONFIG)
        assert replays(recorders) == 15  # the first is run
        monkeypatch.setattr(graph, "capture_on", lambda device: None)
        expected, _ = run(model, text_tokenizer, special, CAPTIONS, [7, 8], CONFIG)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        return
    parallel.check_against_reference(make_model(family), text_tokenizer, special, tokens_per_step)
    assert replays(recorders) == {2: 6, 3: 3, 4: 2}[tokens_per_step]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m_sde"])
def test_with_the_noise_that_samplers_add_on_the_way(
    make_model, text_tokenizer, special, sampler, recorders, monkeypatch
):
    model = make_model("gpt2", "ddpm")
    eta = 0.5 if sampler == "ddim" else 0.0
    config = replace(CONFIG, sampler=sampler, eta=eta, num_inference_steps=5, tokens_per_step=4)
    found, _ = run(model, text_tokenizer, special, CAPTIONS, [1, 2], config)
    assert replays(recorders) == 2
    monkeypatch.setattr(graph, "capture_on", lambda device: None)
    expected, _ = run(model, text_tokenizer, special, CAPTIONS, [1, 2], config)
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma2", "gemma3", "gpt_neox"])
def test_backbones_of_other_families_and_sliding_windows(base, name, recorders):
    parallel.test_backbones_of_other_families_and_sliding_windows(base, name)
    assert replays(recorders) == 2


@pytest.mark.parametrize("tokens_per_step", [1, 3, 4])
@pytest.mark.parametrize("ends_at", [4, 12, 16])
def test_what_follows_a_span_sees_all_of_it(
    make_model, text_tokenizer, special, tokens_per_step, ends_at, recorders
):
    parallel.test_what_follows_a_span_sees_all_of_it(
        make_model, text_tokenizer, special, tokens_per_step, ends_at
    )
    assert replays(recorders) > 0 or ends_at == 4


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_in_narrow_types_with_and_without_guidance(
    make_model, text_tokenizer, special, dtype, scale, recorders, monkeypatch
):
    model = make_model()
    cast(model, dtype)
    config = replace(CONFIG, guidance_scale=scale, guidance_schedule="constant", tokens_per_step=4)
    found, _ = run(model, text_tokenizer, special, CAPTIONS, [1, 2], config)
    assert replays(recorders) == 2
    monkeypatch.setattr(graph, "capture_on", lambda device: None)
    expected, _ = run(model, text_tokenizer, special, CAPTIONS, [1, 2], config)
    assert float((found - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("tokens_per_step", [1, 4])
def test_a_captured_step_reads_nothing_back_and_copies_nothing_over(
    make_model, text_tokenizer, special, base, name, tokens_per_step, monkeypatch
):
    if name in ("gpt2", "llama"):
        model = make_model(name, "ddpm")
    else:
        model = add_voice(base(name)).eval()
        text_tokenizer = model.text_tokenizer
        special = SpecialIds.of(text_tokenizer)
    found = []

    def capture(step):
        def watched():
            with Waits() as waits:
                step()
            assert waits.count > 100
            found.append(waits.found)

        return watched

    monkeypatch.setattr(graph, "capture_on", lambda device: capture)
    prompts = [prompt_ids(text_tokenizer, caption) for caption in CAPTIONS]
    config = replace(CONFIG, tokens_per_step=tokens_per_step)
    assert len(list(decode(model, prompts, special, [0, 1], config))) == 16
    assert found == [[]] * (15 if tokens_per_step == 1 else 2)


def test_a_step_that_cannot_be_captured_is_run(make_model, text_tokenizer, special, monkeypatch):
    expected, _ = run(make_model(), text_tokenizer, special, CAPTIONS, [1, 2], CONFIG)

    def capture(step):
        """Fail as torch does: what ends a capture fails as well, and hides the reason."""
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        finally:
            raise RuntimeError("failed due to a previous error during capture")

    monkeypatch.setattr(graph, "_failed", set())
    monkeypatch.setattr(graph, "capture_on", lambda device: capture)
    with pytest.warns(UserWarning, match=r"capturing\), so .* MLLM_AUDIO_CUDA_GRAPH=0"):
        found, _ = run(make_model(), text_tokenizer, special, CAPTIONS, [1, 2], CONFIG)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert graph._failed == {torch.device("cpu")}


@pytest.mark.parametrize("num_taken", [1, 4, 7])
def test_a_span_that_is_left_half_way_leaves_rows_to_go_on_from(
    make_model, text_tokenizer, special, num_taken, recorders, monkeypatch
):
    states = []
    for capture_on in (graph.capture_on, lambda device: None):
        monkeypatch.setattr(graph, "capture_on", capture_on)
        model, ids = make_model(), prompt_ids(text_tokenizer, CAPTIONS[0])
        with torch.inference_mode():
            embeds = model.embed_text(ids[None]).repeat(2, 1, 1)
            positions = torch.arange(len(ids)).repeat(2, 1)
            mask = torch.ones_like(positions, dtype=torch.bool)
            rows = Rows.begin(model, special, True, embeds, positions, mask)
            rows.feed_id(special.audio_start)
            steps = audio_span(rows, [3], CONFIG, 16)
            for _ in range(num_taken):
                latents = next(steps).latents[:, None]
            steps.close()
            assert rows.slots is None
            if not states:  # with a graph, the latent that came last has been fed
                assert replays(recorders) == num_taken - 1
            else:
                rows.feed_latents(latents, num_taken - 1, range(num_taken, num_taken + 1))
            rows.feed_id(special.audio_end)
        states.append((rows.hidden, rows.last_position))
    assert states[0][1] == states[1][1]
    torch.testing.assert_close(states[0][0], states[1][0], rtol=1e-4, atol=1e-4)


def test_none_is_made_where_it_does_not_pay_or_steps_differ(
    make_model, text_tokenizer, special, recorders
):
    model = make_model()
    force_end(model, -99.0)
    for changes in (
        {"final_inference_steps": 2},
        {"tokens_per_step": 5},
        {"seconds": 0.16, "tokens_per_step": 2},
    ):
        run(model, text_tokenizer, special, CAPTIONS, [1, 2], replace(CONFIG, **changes))
    assert replays(recorders) == 0


def test_they_are_made_on_cuda_unless_switched_off(monkeypatch):
    cuda = torch.device("cuda")
    assert graph.capture_on(cuda).func is graph._cuda_graph
    assert graph.capture_on(torch.device("cpu")) is None
    with graph.without_graphs():
        assert graph.capture_on(cuda) is None
    assert graph.capture_on(cuda) is not None
    monkeypatch.setattr(graph, "_failed", {cuda})
    assert graph.capture_on(cuda) is None
    monkeypatch.setattr(graph, "_failed", set())
    assert graph.capture_on(cuda) is not None
    monkeypatch.setenv(graph.SWITCH, "0")
    assert graph.capture_on(cuda) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens_per_step", [1, 4])
@pytest.mark.parametrize("head", ["flow", "ddpm"])
def test_on_a_gpu(make_model, text_tokenizer, special, family, head, tokens_per_step):
    model = make_model(family, head).cuda()
    config = replace(CONFIG, tokens_per_step=tokens_per_step)
    with graph.without_graphs():
        expected, _ = run(model, text_tokenizer, special, CAPTIONS, [1, 2], config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, _ = run(model, text_tokenizer, special, CAPTIONS, [1, 2], config)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
