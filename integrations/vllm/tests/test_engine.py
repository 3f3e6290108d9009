"""The real engine against the project's own generation: equal ids, latents within 1e-3."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from checkpoints import DEFAULTS, exact
from compare import Request, check, differences, run, stats
from conftest import engine

from mllm_audio.data.layout import Audio

TEXTS = [
    "a dog barks",
    "rain falls on the roof",
    "music plays softly",
    "the quick brown fox jumps",
    "people talk in the background while a dog barks",
    "the lazy dog",
    "rain",
    "music and rain and music and rain and music",
]
CONFIGS = [
    DEFAULTS,
    exact(0.64),
    replace(DEFAULTS, guidance_scale=1.0),  # of its own: no guidance
    exact(0.32, guidance_scale=4.0, guidance_schedule="annealed"),
    exact(1.28, num_inference_steps=3),
    replace(DEFAULTS, end_threshold=0.3, temperature=0.7),
    exact(0.48, final_inference_steps=2),
    exact(0.16, guidance_weight=1.5),
]


def mixed(reference, count=8, **options):
    """Make requests of different lengths, guidance, steps and durations."""
    return [
        Request(reference.row(TEXTS[n % 8]), CONFIGS[n % 8], 100 + n, 50 + 5 * (n % 8), **options)
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def base(voices, pushed):
    folder, reference = voices()
    with engine(folder) as llm:
        yield llm, reference, pushed


def test_eight_requests_side_by_side_are_what_generate_makes(base):
    llm, reference, pushed = base
    requests = mixed(reference)
    replies = check(llm, reference, requests, pushed)
    opened = [ids.count(reference.special.audio_start) for ids in replies]
    assert sum(opened) > 5 and max(opened) > 1  # spans of their own accord, several in one reply
    assert {request.config.is_guided(4) for request in requests} == {True, False}
    assert stats(llm)["live_states"] == 0


def test_a_request_alone_is_the_same_as_among_others(base):
    llm, reference, pushed = base
    together = run(llm, reference, mixed(reference))
    for request, ids in zip(mixed(reference), together, strict=True):
        assert check(llm, reference, [request], pushed) == [ids]


def test_a_reply_of_two_spans_ends_its_audio_there(base):
    llm, reference, pushed = base
    requests = [
        Request(reference.row(text), exact(0.32), n, 90, spans=2) for n, text in enumerate(TEXTS)
    ]
    replies = check(llm, reference, requests, pushed)
    opened = [ids.count(reference.special.audio_start) for ids in replies]
    assert max(opened) == 2 and opened.count(2) > 1


def test_a_span_cut_short_loses_no_latent(base):
    """Replies end wherever max_tokens falls, in the middle of spans too."""
    llm, reference, pushed = base
    text = next(t for t in TEXTS if _first_span(reference, t) is not None)
    first = _first_span(reference, text)
    requests = [Request(reference.row(text), exact(0.64), 3, first + cut) for cut in range(1, 9)]
    replies = check(llm, reference, requests, pushed)
    assert [ids.count(reference.special.audio) for ids in replies] == list(range(8))


def _first_span(reference, text):
    ids = reference.reply(reference.row(text), exact(0.64), 3, 60).ids
    start = reference.special.audio_start
    return ids.index(start) if start in ids else None


def test_audio_in_the_prompt_is_heard(base):
    """What the user sent predicts nothing, what the assistant said does, and a span goes on."""
    llm, reference, pushed = base
    generator = torch.Generator().manual_seed(5)
    sound = [torch.randn(8, 128, generator=generator) * 2 for _ in range(3)]
    before, after = reference.row("a dog barks"), reference.row("rain")

    def span(latents, learned):
        return Audio(latents, torch.arange(len(latents)), learned=learned, announced=learned)

    rows = [
        [*before, span(sound[0], False), *after],
        [*before, span(sound[0], True), *after],
        [*before, span(sound[1], True), *after, span(sound[2], False), *after],
    ]
    requests = [Request(row, DEFAULTS, 7, 60) for row in rows]
    requests += [
        Request([*before, span(latents, True)], exact(0.64), 9, 40, open_span=True)
        for latents in sound
    ]
    replies = check(llm, reference, requests, pushed)
    assert replies[0] != replies[1]  # who said it matters
    assert all(ids.count(reference.special.audio) >= 8 for ids in replies[3:])


def test_an_interrupted_reply_goes_on_as_if_it_had_not_been(base):
    """The ids and latents said so far, as a prompt, are followed by the rest."""
    llm, reference, pushed = base
    row = reference.row(TEXTS[1])
    whole = reference.reply(row, exact(0.64), 11, 60)
    special = reference.special
    start = whole.ids.index(special.audio_start)
    text = row[-1].__class__(torch.tensor(reference.ids_of(row) + whole.ids[:start]))
    for said in (4, 8, 12):
        latents = torch.stack(whole.latents[:said])
        open_row = [text, Audio(latents, torch.arange(said))]
        request = Request(open_row, exact(0.64), 11, 40, open_span=True)
        (ids,) = check(llm, reference, [request], pushed)
        rest = whole.ids[start + 1 + said :][:40]
        assert ids[: len(rest)] == rest


def test_a_caption_is_what_generate_makes_of_it(base):
    from vllm import SamplingParams

    from mllm_audio.generation.decode import decode
    from mllm_audio_vllm.options import AudioOptions

    llm, reference, pushed = base
    special = reference.special
    rows = [torch.tensor(reference.ids_of(reference.row(text))) for text in TEXTS[:4]]
    for config in (DEFAULTS, exact(0.64), exact(0.32, guidance_scale=1.0)):
        steps = list(decode(reference.model, rows, special, [5, 6, 7, 8], config))
        wanted = torch.stack([step.latents for step in steps], 1)
        lengths = torch.stack([step.active for step in steps]).sum(0).tolist()
        keys = [f"caption-{config.seconds}-{config.guidance_scale}-{n}" for n in range(4)]
        sampling = [
            SamplingParams(
                temperature=0,
                max_tokens=65,
                stop_token_ids=[special.audio_end],
                extra_args=AudioOptions(
                    key=key, generation=config, seed=5 + n, single=True, learned=(True,)
                ).to_extra_args(),
            )
            for n, key in enumerate(keys)
        ]
        prompts = [
            {"prompt_token_ids": [*row.tolist(), special.audio_start], "cache_salt": key}
            for row, key in zip(rows, keys, strict=True)
        ]
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        for n, output in enumerate(outputs):
            ids = list(output.outputs[0].token_ids)
            assert ids == [special.audio] * lengths[n] + [special.audio_end]
            found = pushed.of(keys[n], lengths[n])
            stacked = torch.stack([found[p][0] for p in sorted(found)])
            assert float((stacked - wanted[n, : lengths[n]]).abs().max()) < 1e-3


def test_text_never_holds_a_marker(base):
    """Requests of text alone, sampled hot: every id but the markers comes up."""
    from vllm import SamplingParams

    llm, reference, _ = base
    ids = reference.ids_of(reference.row("a dog barks"))
    sampling = [
        SamplingParams(temperature=2.0, seed=n, max_tokens=400, ignore_eos=True) for n in range(8)
    ]
    outputs = llm.generate([{"prompt_token_ids": ids}] * 8, sampling, use_tqdm=False)
    said = {token for output in outputs for token in output.outputs[0].token_ids}
    assert len(said) > 50 and not said & set(reference.special.all)
    greedy = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    (output,) = llm.generate([{"prompt_token_ids": ids}], [greedy], use_tqdm=False)
    expected = reference.reply(reference.row("a dog barks"), DEFAULTS, 0, 60, spans=0)
    assert list(output.outputs[0].token_ids) == expected.ids


def test_prompts_in_chunks_of_sixteen_tokens(voices, pushed):
    folder, reference = voices()
    with engine(folder, max_num_batched_tokens=16, enable_chunked_prefill=True) as llm:
        requests = mixed(reference)
        assert min(len(request.ids(reference)) for request in requests) > 16
        check(llm, reference, requests, pushed)
        generator = torch.Generator().manual_seed(6)
        latents = torch.randn(24, 128, generator=generator)
        row = [*reference.row(TEXTS[4]), Audio(latents, torch.arange(24)), *reference.row("rain")]
        check(llm, reference, [Request(row, exact(0.32), 3, 50)], pushed)


def test_preempted_requests_come_back_the_same(voices, pushed):
    """Too few blocks for all, and a cache of prefixes, which the salts keep apart."""
    folder, reference = voices()
    options = {"num_gpu_blocks_override": 14, "max_model_len": 256, "enable_prefix_caching": True}
    with engine(folder, **options) as llm:
        requests = [Request(reference.row(TEXTS[n]), exact(1.28), 20 + n, 150) for n in range(8)]
        check(llm, reference, requests, pushed)
        counts = stats(llm)
        assert counts["preempted"] > 0 and counts["live_states"] == 0


def test_without_salts_a_cache_of_prefixes_mixes_requests_up(voices, pushed):
    """Equal ids stand for other latents: why there is a salt, and proof that tests see it."""
    folder, reference = voices()
    options = {"num_gpu_blocks_override": 14, "max_model_len": 256, "enable_prefix_caching": True}
    text = next(t for t in TEXTS if _first_span(reference, t) is not None)

    def requests(salt):
        return [Request(reference.row(text), exact(2.56), 40 + n, 120, salt=salt) for n in range(8)]

    with engine(folder, **options) as llm:
        check(llm, reference, requests(""), pushed)
        mixed_up = requests(None)
        replies = run(llm, reference, mixed_up)
        assert stats(llm)["preempted"] > 0
        found = differences(reference, mixed_up, replies, pushed)
        assert any("latents differ" in line for line in found)


def test_forty_requests_with_asynchronous_scheduling(voices, pushed, monkeypatch):
    """As on GPUs: a step is scheduled before the last one's ids are known; CPUs switch it off."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__

    def forced(cls, config):
        original(cls, config)
        config.scheduler_config.async_scheduling = True

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(forced))
    folder, reference = voices()
    options = {"num_gpu_blocks_override": 20, "max_model_len": 256, "max_num_batched_tokens": 64}
    with engine(folder, **options) as llm:
        assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling
        check(llm, reference, mixed(reference, 40), pushed)
        counts = stats(llm)
        assert counts["preempted"] > 0 and counts["live_states"] == 0


def test_compiled_by_torch(voices, pushed):
    folder, reference = voices()
    with engine(folder, enforce_eager=False) as llm:
        assert llm.llm_engine.vllm_config.compilation_config.mode.name != "NONE"
        check(llm, reference, mixed(reference), pushed)


def test_shared_by_two_processes(voices, pushed, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # one memory node for both
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder, reference = voices()
    with engine(folder, tensor_parallel_size=2) as llm:
        check(llm, reference, mixed(reference), pushed)
        live = [counts["live_states"] for counts in llm.collective_rpc("audio_stats")]
        assert live == [0, 0]


@pytest.mark.parametrize(
    ("family", "head"),
    [("gpt2", "ddpm"), ("mistral", "flow"), ("qwen2", "flow"), ("qwen3", "ddpm")],
)
def test_every_family(voices, pushed, family, head):
    folder, reference = voices(family, head)
    with engine(folder) as llm:
        replies = check(llm, reference, mixed(reference), pushed)
        assert sum(ids.count(reference.special.audio) for ids in replies) > 20


def test_without_guidance_there_is_one_cache(voices, pushed):
    folder, reference = voices()
    plain = {"mllm_audio": {"guidance": False}}
    with engine(folder, additional_config=plain) as llm:
        requests = [
            Request(reference.row(text), exact(0.32, guidance_scale=1.0), n, 60)
            for n, text in enumerate(TEXTS)
        ]
        check(llm, reference, requests, pushed)
