"""AudioMAR is MAR in float32; its batches, decoding orders, folders, and that it learns."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from mllm_audio.audiomar import AudioMAR, AudioMARConfig, decode_order
from mllm_audio.audiomar.decode import ORDERS, cosine_sizes, even_sizes
from mllm_audio.backbone import BackboneConfig
from mllm_audio.conditioners.base import PromptStream
from mllm_audio.data.config import DataConfig
from mllm_audio.data.dataset import InMemory, TrainingData
from mllm_audio.data.layout import Audio, Prompt, Text, collate
from mllm_audio.diffusion.noise import Noise
from mllm_audio.generation.decode import GenerationConfig
from mllm_audio.heads.base import HeadConfig, SamplingConfig
from mllm_audio.interop import audiomar_from_mar
from mllm_audio.masking import MaskingConfig, sample_ratio
from mllm_audio.modality import AudioConfig, AudioModality
from mllm_audio.text import SpecialIds, wordless_tokenizer
from mllm_audio.training.checkpoint import read_weights
from mllm_audio.training.config import TrainConfig
from mllm_audio.training.engine import SingleProcessEngine
from mllm_audio.training.log import read_log
from mllm_audio.training.optim import OptimConfig, learning_rate
from mllm_audio.training.trainer import do_step, train

SPECIAL = SpecialIds.of(wordless_tokenizer())
SIZES = AudioMARConfig(hidden_size=32, encoder_layers=2, decoder_layers=2, num_heads=2, dropout=0.0)
AUDIO = AudioConfig(
    latent_dim=4,
    max_tokens=16,
    end_of_audio=False,
    prompt_streams=(
        PromptStream(name="clap", length=1, dim=5),
        PromptStream(name="t5", length=2, dim=3),
    ),
    null_prompt_length=3,
    head=HeadConfig(name="flow", width=32, num_blocks=1, batch_multiplier=1),
)
PLAIN = GenerationConfig(num_inference_steps=3, guidance_scale=1, guidance_schedule="constant")


def make(sizes=SIZES, audio=AUDIO):
    """Build a model in which nothing is zero by its initialisation."""
    torch.manual_seed(0)
    model = AudioMAR(sizes, audio)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.audio.set_statistics(torch.full((4,), 0.5), torch.linspace(0.5, 2.0, 4))
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return make()


def prompts_of(rows, seed=0, streams=AUDIO.prompt_streams):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, s.length, s.dim, generator=generator) for s in streams)


def batch_of(latents, kept, prompts, unconditional=None):
    """Collate rows of a prompt and a place per latent."""
    rows = [
        [Prompt(tuple(stream[row] for stream in prompts)), Audio(x, k, own=True)]
        for row, (x, k) in enumerate(zip(latents, kept, strict=True))
    ]
    names = [str(row) for row in range(len(rows))]
    return collate(rows, names, SPECIAL, unconditional=unconditional, end_of_audio=False)


# Parity with MAR (commit fe470ac), tests/fixtures/mar_tiny.npz.


@pytest.fixture(scope="module")
def mar(fixture_arrays):
    """A tiny MAR as an AudioMAR, its arrays, and where tokens are known."""
    arrays = fixture_arrays("mar_tiny")
    audio = replace(
        AUDIO,
        latent_dim=16,
        null_prompt_length=1,
        prompt_streams=(PromptStream(name="class", length=6, dim=5),),
        head=HeadConfig(width=32, num_blocks=1),
    )
    model = AudioMAR(SIZES, audio)
    state = {k.removeprefix("sd/"): v for k, v in arrays.items() if k.startswith("sd/")}
    model.load_state_dict(audiomar_from_mar(state))  # strict: it holds every tensor
    labels = torch.eye(5)[arrays["labels"]][:, None].expand(-1, 6, -1)  # (2, 6, 5)
    return model.eval(), arrays, arrays["mask"] == 0, labels


def test_parity_of_encoder_and_decoder(mar):
    model, arrays, is_known, labels = mar
    prompts = model.embed_prompts([labels], torch.zeros(2, 6, dtype=torch.bool))
    latents = arrays["tokens"][is_known]
    encoded = model.encode(prompts, latents, is_known)
    torch.testing.assert_close(encoded.view(2, 11, 32), arrays["enc"], rtol=1e-5, atol=3e-6)
    error = (encoded.view(2, 11, 32) - arrays["enc"]).abs().max() / arrays["enc"].abs().max()
    print(f"\nencoder of a whole tiny MAR {float(error.detach()):.1e}", end="")
    states = model.hidden_states(prompts, latents, is_known)
    states = states + model.audio.embed_targets(torch.arange(16))
    torch.testing.assert_close(states, arrays["z"], rtol=1e-5, atol=3e-6)
    error = (states - arrays["z"]).abs().max() / arrays["z"].abs().max()
    print(f"\ndecoder of a whole tiny MAR {float(error.detach()):.1e}", end="")


def test_a_batch_scores_masked_latents_under_mars_states(mar):
    model, arrays, is_known, labels = mar
    kept = [row.nonzero()[:, 0] for row in is_known]
    losses = model(batch_of(arrays["tokens"], kept, [labels]), torch.Generator().manual_seed(1))
    expected = model.audio.loss(
        arrays["z"][~is_known], arrays["tokens"][~is_known], torch.Generator().manual_seed(1)
    )
    torch.testing.assert_close(losses.per_latent, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses.total, expected.mean(), rtol=1e-5, atol=1e-5)


def test_a_mar_that_lacks_a_tensor_is_refused(mar):
    state = {k.removeprefix("sd/"): v for k, v in mar[1].items() if k.startswith("sd/")}
    del state["mask_token"]
    with pytest.raises(ValueError, match=r"MAR does not fit: missing \['mask_token'\]"):
        audiomar_from_mar(state)


def test_parameters_are_as_many_as_mars():
    """MAR-Base on 256 tokens of 128 with a head of 3 x 1024 and a buffer of 78."""
    streams = (
        PromptStream(name="clap", length=1, dim=512),
        PromptStream(name="t5", length=77, dim=1024),
    )
    audio = AudioConfig(end_of_audio=False, prompt_streams=streams)
    with torch.device("meta"):
        model = AudioMAR(AudioMARConfig.like(BackboneConfig()), audio)
    counts = {}
    for name, parameter in model.named_parameters():
        part = ".".join(name.split(".")[: 2 if name.startswith("audio.") else 1])
        counts[part] = counts.get(part, 0) + parameter.numel()
    prompts = counts.pop("audio.prompt_proj")
    assert counts == {
        "audio.null_prompt": 768,
        "prompt_positions": 78 * 768,
        "audio.content_positions": 256512 - 78 * 768,
        "mask_token": 768,
        "decoder_positions": 256512,
        "audio.target_positions": 196608,
        "audio.latent_proj": 99072,
        "audio.latent_norm": 1536,
        "encoder_blocks": 85054464,
        "encoder_norm": 1536,
        "decoder_embed": 590592,
        "decoder_blocks": 85054464,
        "decoder_norm": 1536,
        "audio.head": 20344064,
    }
    assert sum(counts.values()) == 192626432 - 768000  # without MAR's 1000 classes
    assert prompts == 1181184  # the paper's two projections


# The batch.


def test_a_shorter_clip_is_not_changed_by_padding(model, monkeypatch):
    latents = [torch.randn(16, 4), torch.randn(7, 4), torch.randn(12, 4)]
    kept = [torch.tensor([1, 4, 5, 15]), torch.tensor([0]), torch.tensor([2, 3])]
    prompts = prompts_of(3)
    monkeypatch.setattr(AudioModality, "loss", lambda self, states, latents, generator: states)
    together = model(batch_of(latents, kept, prompts)).per_latent
    alone = [
        model(batch_of([x], [k], [p[row : row + 1] for p in prompts])).per_latent
        for row, (x, k) in enumerate(zip(latents, kept, strict=True))
    ]
    assert [len(states) for states in alone] == [12, 6, 10]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_states_look_both_ways_and_at_nothing_masked(model):
    prompts = model.embed_prompts(prompts_of(1), torch.zeros(1, 3, dtype=torch.bool))
    is_known = torch.zeros(1, 16, dtype=torch.bool)
    is_known[0, [2, 9]] = True
    latents = torch.randn(2, 4)
    states = model.hidden_states(prompts, latents, is_known)
    later = latents + torch.tensor([[0.0], [1.0]])
    moved = model.hidden_states(prompts, later, is_known) - states  # (1, 16, H)
    assert (moved.abs().amax(dim=-1) > 1e-4).all()


def test_the_null_prompt_takes_the_place_of_every_prompt(model):
    latents, kept = torch.randn(2, 16, 4), [torch.arange(5)] * 2
    latents[1] = latents[0]
    losses = [
        model(
            batch_of(latents, kept, prompts_of(2, seed), unconditional=[True, False]),
            torch.Generator().manual_seed(0),
        ).per_latent.view(2, -1)
        for seed in (0, 1)
    ]
    torch.testing.assert_close(losses[0][0], losses[1][0])
    assert not torch.allclose(losses[0][1], losses[1][1])


@pytest.mark.parametrize("num_kept", [16, 4, 0], ids=["nothing masked", "some", "nothing known"])
def test_every_parameter_takes_part_in_every_step(num_kept):
    model = make().train()
    kept = [torch.arange(num_kept)] * 2
    batch = batch_of(torch.randn(2, 16, 4), kept, prompts_of(2), unconditional=[True, False])
    losses = model(batch)
    losses.total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert len(losses.per_latent) == batch.counts.latents == 2 * (16 - num_kept)


def test_parts_of_a_step_add_up_to_its_loss(model):
    latents, kept, prompts = torch.randn(2, 16, 4), [torch.arange(6)] * 2, prompts_of(2)
    whole = batch_of(latents, kept, prompts)
    parts = [
        batch_of(latents[i : i + 1], kept[:1], [p[i : i + 1] for p in prompts]) for i in (0, 1)
    ]
    total = 0.0
    for part in parts:
        losses = model(part, torch.Generator().manual_seed(0), whole.counts)
        total += losses.total.item()
        assert losses.total.item() == pytest.approx(losses.per_latent.sum().item() / 20, rel=1e-5)
    assert total > 0


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for twice in (False, True):
        model = make(replace(SIZES, dropout=0.1)).train()
        if twice:
            model.gradient_checkpointing_enable()
        batch = batch_of(torch.ones(2, 16, 4), [torch.arange(6), torch.arange(3)], prompts_of(2))
        torch.manual_seed(3)
        model(batch, torch.Generator().manual_seed(0)).total.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients)


def test_rows_of_other_layouts_are_refused(model):
    latents, prompts = torch.randn(16, 4), [Prompt(tuple(p[0] for p in prompts_of(1)))]
    kept = torch.arange(16)
    own = Audio(latents, kept[:3], own=True)
    packed = collate([[*prompts, own]], ["0"], SPECIAL, end_of_audio=False, pack_tokens=64)
    with pytest.raises(ValueError, match=r"packed rows.* set data\.pack_tokens=none"):
        model(packed)
    wordy = collate([[Text(torch.tensor([3, 3, 3])), own]], ["0"], SPECIAL, end_of_audio=False)
    with pytest.raises(ValueError, match=r"found 0 prompt embeddings .* expected 3"):
        model(wordy)
    causal = collate([[*prompts, Audio(latents, kept)]], ["0"], SPECIAL, end_of_audio=False)
    with pytest.raises(ValueError, match=r"set masking\.hidden=own"):
        model(causal)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_streams": ()}, "audio.prompt_streams is empty"),
        ({"end_of_audio": True}, "audio.end_of_audio=True, .* set audio.end_of_audio=false"),
        ({"target_positions": False}, "set audio.target_positions=true"),
    ],
)
def test_audio_settings_without_a_use_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        AudioMAR(SIZES, replace(AUDIO, **changes))


def test_sizes_follow_a_decoders():
    backbone = BackboneConfig(hidden_size=64, num_layers=6, num_heads=2, dropout=0.2)
    assert AudioMARConfig.like(backbone) == AudioMARConfig(
        hidden_size=64, encoder_layers=3, decoder_layers=3, num_heads=2, dropout=0.2
    )
    with pytest.raises(ValueError, match=r"num_layers=5.*set backbone.num_layers=6"):
        AudioMARConfig.like(replace(backbone, num_layers=5))
    with pytest.raises(ValueError, match="hidden_size=64 is not a multiple of num_heads=5"):
        AudioMARConfig(hidden_size=64, num_heads=5)


# Decoding.

# What MAR's `sample_tokens` decodes in each of 64 steps over 256 tokens: its formulas, in numpy.
MAR_256_64 = [1] * 13 + [2, 3, 2, 2, 3, 3, 3, 3, 3, 3, 4, 3, 4, 4, 4, 4, 4, 4, 4, 5, 5, 4]
MAR_256_64 += [
    5,
    5,
    5,
    5,
    5,
    6,
    5,
    5,
    6,
    5,
    6,
    6,
    6,
    5,
    6,
    6,
    6,
    6,
    6,
    6,
    7,
    6,
    6,
    6,
    6,
    7,
    6,
    6,
    6,
]


def test_random_order_takes_mars_cosine_counts():
    assert cosine_sizes(256, 64) == MAR_256_64
    assert cosine_sizes(16, 8) == [1, 1, 1, 2, 3, 2, 3, 3]
    for passes in (1, 2, 100, 255, 256):
        assert sum(cosine_sizes(256, passes)) == 256
        assert min(cosine_sizes(256, passes)) >= 1 and len(cosine_sizes(256, passes)) == passes


def test_causal_order_takes_as_many_in_each_pass():
    assert even_sizes(256, 64) == [4] * 64
    assert even_sizes(256, 256) == [1] * 256
    assert even_sizes(10, 4) == [2, 3, 2, 3]


def test_random_orders_are_permutations_by_the_seed_alone():
    order, _ = ORDERS["random"]
    orders = order(torch.arange(2000), 16)  # (2000, 16)
    assert torch.equal(orders.sort(dim=1).values, torch.arange(16).expand(2000, -1))
    assert torch.equal(orders[[7, 3]], order(torch.tensor([7, 3]), 16))
    first = orders[:, 0].bincount(minlength=16) / 2000
    assert (first - 1 / 16).abs().max() < 5 * (15 / 256 / 2000) ** 0.5  # five deviations


def record_places(model, monkeypatch):
    """Record what each pass draws: the seeds and places of its rows."""
    passes = []
    sample = model.audio.sample

    def recording(states, uncond, config, noise):
        passes.append((states, uncond, config, noise))
        return sample(states, uncond, config, noise)

    monkeypatch.setattr(model.audio, "sample", recording)
    return passes


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_passes", [1, 5, 16, 64])
def test_every_latent_is_decoded_once(model, monkeypatch, order, num_passes):
    passes, known, original = record_places(model, monkeypatch), [], AudioMAR.hidden_states

    def recording(self, prompts, latents, is_known):
        known.append(is_known.sum(dim=1).tolist())
        return original(self, prompts, latents, is_known)

    monkeypatch.setattr(AudioMAR, "hidden_states", recording)
    config = replace(PLAIN, decoding_order=order, decoding_steps=num_passes)
    sizes = []
    latents = decode_order(model, prompts_of(2), [5, 6], config, on_pass=sizes.append)
    assert latents.shape == (2, 16, 4) and latents.isfinite().all()
    assert len(passes) == len(sizes) == min(num_passes, 16)
    assert sizes == ORDERS[order][1](16, min(num_passes, 16))
    assert known == [[sum(sizes[:number])] * 2 for number in range(len(sizes))]
    for seed in (5, 6):
        places = torch.cat([noise.position[noise.seeds == seed] for *_, noise in passes])
        assert places.sort().values.tolist() == list(range(16))


def test_causal_order_decodes_as_the_places_stand(model, monkeypatch):
    passes = record_places(model, monkeypatch)
    decode_order(model, prompts_of(1), [5], replace(PLAIN, decoding_order="causal"))
    assert [noise.position.tolist() for *_, noise in passes] == [[place] for place in range(16)]


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("order", ORDERS)
def test_batch_equals_single(model, order, scale):
    config = replace(PLAIN, decoding_order=order, decoding_steps=6, guidance_scale=scale)
    prompts, seeds = prompts_of(3), [11, 12, 13]
    together = decode_order(model, prompts, seeds, config)
    for row, seed in enumerate(seeds):
        single = decode_order(model, [p[row : row + 1] for p in prompts], [seed], config)
        torch.testing.assert_close(together[row], single[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(together, decode_order(model, prompts, seeds, config))
    other = decode_order(model, prompts, [99, 12, 13], config)
    assert not torch.allclose(together[0], other[0], atol=0.1)


def test_each_pass_sees_what_was_decoded_and_nothing_else(model):
    """Decoding by hand: full passes over the places, the latent of one place taken from each."""
    config = replace(PLAIN, decoding_order="causal", decoding_steps=16, temperature=0.0)
    prompts = prompts_of(1)
    found = decode_order(model, prompts, [5], config, num_tokens=8)
    assert found.shape == (1, 8, 4)
    for place in range(8):
        batch = batch_of(found, [torch.arange(place)], prompts)
        embeds = model.embed_prompts(batch.prompts, torch.zeros(1, 3, dtype=torch.bool))
        is_known = (torch.arange(8) < place)[None]
        states = model.hidden_states(embeds, found[0, :place], is_known)[:, place]
        states = states + model.audio.embed_targets(torch.tensor([place]))
        sampling = SamplingConfig(num_inference_steps=3, temperature=0.0)
        noise = Noise(torch.tensor([5]), torch.tensor([place]), 4)
        with torch.no_grad():
            expected = model.audio.sample(states, None, sampling, noise)
        torch.testing.assert_close(found[:, place], expected, rtol=1e-4, atol=1e-4)


def test_guidance_1_never_runs_the_unconditional_branch(model, monkeypatch):
    rows = []
    original = AudioMAR.hidden_states

    def counting(self, prompts, *rest):
        rows.append(len(prompts))
        return original(self, prompts, *rest)

    monkeypatch.setattr(AudioMAR, "hidden_states", counting)
    config = replace(PLAIN, decoding_steps=4)
    decode_order(model, prompts_of(3), [1, 2, 3], config)
    assert rows == [3] * 4
    rows.clear()
    decode_order(model, prompts_of(3), [1, 2, 3], replace(config, guidance_scale=2))
    assert rows == [6] * 4
    rows.clear()  # eq. 5 ends at 1
    annealed = replace(config, guidance_scale=7, guidance_schedule="annealed")
    decode_order(model, prompts_of(3), [1, 2, 3], annealed)
    assert rows == [6] * 3 + [3]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [5, 5, 5, 5]),
        ("linear", [2, 3, 4, 5]),  # 1 + (s - 1) * share decoded
        ("annealed", [5 - 4 * done / 15 for done in (3, 7, 11, 15)]),  # eq. 5
    ],
)
def test_guidance_follows_its_schedule(model, monkeypatch, schedule, expected):
    passes = record_places(model, monkeypatch)
    config = replace(
        PLAIN,
        decoding_order="causal",
        decoding_steps=4,
        guidance_scale=5,
        guidance_schedule=schedule,
    )
    decode_order(model, prompts_of(1), [0], config)
    found = [sampling.guidance_scale for _, _, sampling, _ in passes]
    assert found == pytest.approx(expected)


def test_guidance_moves_away_from_the_null_prompt(model, monkeypatch):
    passes = record_places(model, monkeypatch)
    config = replace(PLAIN, decoding_steps=1, guidance_scale=3)
    prompts = prompts_of(2)
    decode_order(model, prompts, [1, 2], config)
    ((cond, uncond, _, _),) = passes
    is_known = torch.zeros(2, 16, dtype=torch.bool)
    for states, null in ((cond, False), (uncond, True)):
        embeds = model.embed_prompts(prompts, torch.full((2, 3), null))
        expected = model.hidden_states(embeds, torch.zeros(0, 4), is_known)  # (2, 16, H)
        order = ORDERS["random"][0](torch.tensor([1, 2]), 16)  # (2, 16)
        expected = expected + model.audio.embed_targets(torch.arange(16))
        expected = torch.stack([row[places] for row, places in zip(expected, order, strict=True)])
        torch.testing.assert_close(states, expected.flatten(0, 1), rtol=1e-4, atol=1e-5)


def test_a_clip_longer_than_the_model_makes_is_refused(model):
    with pytest.raises(ValueError, match="asked for 17 latents, this model makes 1 to 16"):
        decode_order(model, prompts_of(1), [0], PLAIN, num_tokens=17)


# Folders.


def test_a_saved_model_decodes_the_same_latents(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["AudioMAR"] and config["model_type"] == "audiomar"
    loaded = AudioMAR.from_pretrained(tmp_path)
    assert loaded.config == model.config and loaded.audio.config == model.audio.config
    found, expected = (decode_order(m, prompts_of(2), [1, 2], PLAIN) for m in (loaded, model))
    assert torch.equal(found, expected)


def test_other_weights_can_be_saved(model, tmp_path):
    average = {name: value + 1 for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, average)
    loaded = AudioMAR.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in average.items())


def test_folders_that_do_not_fit_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"found no config\.json"):
        AudioMAR.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "hidden_size": 64}))
    with pytest.raises(ValueError, match=r"is \(.*32\), its configuration says \(.*64\)"):
        AudioMAR.from_pretrained(tmp_path)
    path.write_text(json.dumps({**values, "encoder_layers": 1}))
    with pytest.raises(ValueError, match=r"12 unknown \['encoder_blocks\.1"):
        AudioMAR.from_pretrained(tmp_path)
    path.write_text(json.dumps({**values, "architectures": ["AudioLanguageModel"]}))
    with pytest.raises(ValueError, match=r"holds \['AudioLanguageModel'\], expected an AudioMAR"):
        AudioMAR.from_pretrained(tmp_path)


# Training, by the loop that trains decoders.


class Clips(InMemory):
    """Prompts and latents that have nothing to do with each other."""

    def __len__(self):
        return 8

    def length(self, index):
        return 19

    def name(self, index):
        return f"clip {index}"

    def row(self, index, generator):
        latents = torch.randn(
            16 - 4 * (index % 2), 4, generator=torch.Generator().manual_seed(index)
        )
        embeddings = tuple(stream[0] for stream in prompts_of(1, index))
        return [Prompt(embeddings), Audio(latents, torch.arange(len(latents)))]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_loop_trains_resumes_and_exports(tmp_path, precision):
    data = TrainingData(
        source=Clips(),
        special=SPECIAL,
        masking=MaskingConfig(schedule="mar", hidden="own"),
        config=DataConfig(unconditional_share=0.5),
        batch_size=4,
        micro_batch_size=2,
        seed=0,
        end_of_audio=False,
    )

    def run(folder, num_steps):
        folder.mkdir(exist_ok=True)
        config = TrainConfig(
            num_steps=num_steps,
            log_every=1,
            validate_every=2,
            save_every=2,
            precision=precision,
            batch_size=4,
            micro_batch_size=2,
        )
        model = make(replace(SIZES, dropout=0.1))

        def export(checkpoint):
            model.save_pretrained(tmp_path / "voice", read_weights(checkpoint))

        train(SingleProcessEngine(model, config), data, data, config, folder, export)
        return [r for r in read_log(folder) if "train/audio_loss" in r]

    whole = run(tmp_path / "whole", 4)
    expected = AudioMAR.from_pretrained(tmp_path / "voice").state_dict()
    run(tmp_path / "parts", 2)
    parts = run(tmp_path / "parts", 4)
    found = AudioMAR.from_pretrained(tmp_path / "voice").state_dict()
    losses = [[r["train/audio_loss"] for r in log] for log in (whole, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert any("validation/audio_loss" in r for r in read_log(tmp_path / "parts"))


PATTERNS = torch.randn(3, 8, 2, generator=torch.Generator().manual_seed(0))  # of three captions


def toy_batch(size, generator):
    """Draw clips that are their caption's pattern, moved as a whole by a standard normal."""
    ratio = sample_ratio(MaskingConfig(schedule="uniform"), generator)
    captions = torch.randint(3, (size,), generator=generator)
    latents = PATTERNS[captions] + torch.randn(size, 1, 2, generator=generator)  # (B, 8, 2)
    num_kept = 8 - math.ceil(8 * ratio)  # none at times, as in the first pass
    kept = [torch.randperm(8, generator=generator)[:num_kept].sort().values for _ in range(size)]
    unconditional = (torch.rand(size, generator=generator) < 0.1).tolist()
    return batch_of(latents, kept, [toy_prompts(captions)], unconditional)


def toy_prompts(captions):
    return torch.eye(3)[captions][:, None].expand(-1, 2, -1)  # (B, 2, 3)


def test_it_learns_what_follows_from_captions_and_what_from_other_latents():
    """Latents of one pass are independent given the caption; those of eight move together."""
    audio = AudioConfig(
        latent_dim=2,
        max_tokens=8,
        end_of_audio=False,
        prompt_streams=(PromptStream(name="caption", length=2, dim=3),),
        position_init_std=1.0,
        head=HeadConfig(name="flow", width=64, num_blocks=2),
    )
    torch.manual_seed(0)
    sizes = replace(SIZES, encoder_layers=1, decoder_layers=1, num_heads=4)
    model = AudioMAR(sizes, audio)
    model.audio.set_statistics(torch.zeros(2), torch.full((2,), 2**0.5))
    optim = OptimConfig(lr=5e-3, schedule="cosine", warmup_steps=20, max_grad_norm=1.0)
    config = TrainConfig(num_steps=400, precision="float32", ema_decay=0.97, optim=optim)
    engine, generator = SingleProcessEngine(model, config), torch.Generator().manual_seed(1)
    losses = []
    for step in range(config.num_steps):
        batch = toy_batch(32, generator)
        lr = learning_rate(optim, step, step / config.num_steps)
        losses.append(do_step(engine, [batch], batch.counts, lr, step, config).audio)
    assert sum(losses[:20]) / 20 > 1.5  # a velocity's variance, untrained
    assert sum(losses[-50:]) / 50 < 0.5
    captions = torch.arange(3).repeat_interleave(100)
    for order in ORDERS:
        for passes, moved, apart in ((1, (0.25, 0.45), (0.75, 1.0)), (8, (0.7, 1.3), (0.0, 0.35))):
            options = {"decoding_order": order, "decoding_steps": passes, "num_inference_steps": 20}
            with engine.ema.applied():
                latents = decode_order(
                    model.eval(), [toy_prompts(captions)], range(300), replace(PLAIN, **options)
                )
            rest = latents - PATTERNS[captions]  # (300, 8, 2)
            assert rest.view(3, 100, 8, 2).mean(dim=1).abs().mean() < 0.3
            whole = rest.mean(dim=1, keepdim=True)  # (300, 1, 2), of deviation 1, or 1 / sqrt(8)
            assert moved[0] < whole.std() < moved[1], (order, passes)
            assert apart[0] < (rest - whole).std() < apart[1], (order, passes)
