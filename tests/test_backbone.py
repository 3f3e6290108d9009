"""Trained decoders of every family: a voice is added and nothing else changes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import BASES, SIZES, write_base
from transformers import AutoModelForCausalLM

from mllm_audio import backbone as backbones
from mllm_audio.adapter import MODES, AdaptConfig
from mllm_audio.data.layout import Audio, Text, collate
from mllm_audio.generation.cache import buffered_cache
from mllm_audio.heads.base import HeadConfig
from mllm_audio.modality import AudioConfig
from mllm_audio.model import AudioLanguageModel
from mllm_audio.text import SPECIAL_TOKENS, SpecialIds

AUDIO = AudioConfig(max_tokens=16, head=HeadConfig(name="flow", width=32, num_blocks=1))


@pytest.fixture(params=sorted(BASES))
def name(request):
    return request.param


def add_voice(folder, mode="frozen", audio=AUDIO):
    torch.manual_seed(1)
    return AudioLanguageModel.from_backbone(folder, audio, AdaptConfig(mode=mode, lora_rank=4))


def base_logits(folder, input_ids):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    with torch.no_grad():
        return model(input_ids).logits


@torch.no_grad()
def voice_logits(model, input_ids):
    positions = torch.arange(input_ids.shape[1]).expand(len(input_ids), -1)
    hidden = backbones.run(model.backbone, model.embed_text(input_ids), positions)
    return model.text_logits(hidden)


def assert_same_text(logits, expected, model):
    """Compare the columns of every id but the special ones, to the last bit."""
    text = torch.ones(expected.shape[-1], dtype=torch.bool)
    text[[i for i in SpecialIds.of(model.text_tokenizer).all if i < len(text)]] = False
    assert int(text.sum()) >= 250
    assert torch.equal(logits[..., : len(text)][..., text], expected[..., text])


def some_ids(rows=2, length=24):
    return torch.randint(5, 250, (rows, length), generator=torch.Generator().manual_seed(0))


def mixed_rows(lengths=(8, 12, 4), keep=2):
    """Rows of text, a span the user sent, text, two spans that are said, and text."""
    generator = torch.Generator().manual_seed(3)

    def words(count, learned):
        ids = torch.randint(5, 250, (count,), generator=generator)
        return Text(ids, torch.full((count,), learned))

    def span(count, learned):
        kept = torch.arange(count)[:: keep if learned else 1]
        return Audio(torch.randn(count, 128, generator=generator), kept, learned, learned)

    first, second, third = lengths
    return [
        [words(3, False), span(third, False), words(2, True), span(first, True), words(3, True)],
        [words(4, False), span(second, True), span(third, True), words(2, True)],
        [words(6, True)],
    ]


@pytest.mark.parametrize("mode", MODES)
def test_text_logits_are_bit_identical_to_the_base_model(base, name, mode):
    model = add_voice(base(name), mode)
    ids = some_ids()
    assert_same_text(voice_logits(model, ids), base_logits(base(name), ids), model)


def test_only_the_special_tokens_and_audio_modules_are_new(base, name, tmp_path):
    model = add_voice(base(name), "full")
    before = AutoModelForCausalLM.from_pretrained(base(name)).state_dict()
    after = model.backbone.state_dict()
    assert after.keys() == before.keys()
    special = SpecialIds.of(model.text_tokenizer).all
    for key, value in before.items():
        own = torch.ones(len(value), dtype=torch.bool)
        if after[key].shape != value.shape or len(value) == model.backbone.config.vocab_size:
            own[[i for i in special if i < len(value)]] = False
        assert torch.equal(after[key][: len(value)][own], value[own]), key
    added = set(model.text_tokenizer.get_vocab()) - set(
        transformers.AutoTokenizer.from_pretrained(base(name)).get_vocab()
    )
    assert added == set(SPECIAL_TOKENS)


@pytest.mark.parametrize("mode", ["frozen", "full"])
def test_a_checkpoint_keeps_names_and_logits_for_transformers(base, name, mode, tmp_path):
    model = add_voice(base(name), mode)
    if mode == "frozen":  # as training does; untrained rows are those of the table already
        with torch.no_grad():
            for rows in model.special_rows.parameters():
                rows.add_(torch.randn_like(rows))
    ids = some_ids()
    ids[:, ::7] = torch.tensor(SpecialIds.of(model.text_tokenizer).all)
    expected = voice_logits(model, ids)
    model.save_pretrained(tmp_path)
    text = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    with torch.no_grad():
        logits = text(ids).logits
    assert_same_text(logits, expected, model)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)  # special tokens too
    loaded = AudioLanguageModel.from_pretrained(tmp_path)
    assert torch.equal(voice_logits(loaded, ids), logits)
    for key, value in model.audio.state_dict().items():
        assert torch.equal(loaded.audio.state_dict()[key], value), key
    assert SpecialIds.of(loaded.text_tokenizer) == SpecialIds.of(model.text_tokenizer)


@torch.no_grad()
def test_packed_rows_equal_separate_rows(base, name):
    model = add_voice(base(name))
    special = SpecialIds.of(model.text_tokenizer)
    rows = mixed_rows()
    padded = collate(rows, "abc", special, masking_ratio=0.5)
    packed = collate(rows, "abc", special, masking_ratio=0.5, pack_tokens=512)
    assert len(padded.input_ids) == 3
    assert len(packed.input_ids) == 1
    assert int(packed.position_ids.max()) < 64  # positions start again with each row
    first, second = (model(batch, torch.Generator().manual_seed(0)) for batch in (padded, packed))
    torch.testing.assert_close(first.per_latent, second.per_latent, rtol=1e-5, atol=1e-5)
    for loss in ("total", "text", "audio", "end"):
        torch.testing.assert_close(
            getattr(first, loss), getattr(second, loss), rtol=1e-5, atol=1e-5
        )


@torch.no_grad()
def test_cached_steps_equal_the_full_forward_beyond_the_window(base, name):
    model = add_voice(base(name))
    special = SpecialIds.of(model.text_tokenizer)
    batch = collate([mixed_rows(keep=1)[0]], "a", special)
    embeds = model.embed(batch)
    full = backbones.run(model.backbone, embeds, batch.position_ids)
    cache = buffered_cache(model.backbone.config)
    length = embeds.shape[1]
    mask = torch.ones(1, length, dtype=torch.bool)
    for index in range(length):
        step = model.step(
            embeds[:, index : index + 1],
            batch.position_ids[:, index : index + 1],
            mask[:, : index + 1],
            cache,
        )
        if batch.input_ids[0, index]:  # not the padding behind the row
            torch.testing.assert_close(step[:, 0], full[:, index], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_a_sliding_window_counts_the_positions_of_dropped_latents(base, family):
    """A latent looks as far back in training as it does when the whole clip is generated."""
    model = add_voice(base(family))
    special = SpecialIds.of(model.text_tokenizer)
    text = Text(torch.arange(5, 9))
    latents = torch.randn(16, 128)
    # Of latents 0 and 15 the second stands 15 positions behind the first, out of the window of 12.
    row = [text, Audio(latents, torch.tensor([0, 15]))]
    moved = latents.clone()
    moved[0] += 3.0
    other = [text, Audio(moved, torch.tensor([0, 15]))]
    first, second = (
        backbones.run(
            model.backbone,
            model.embed(collate([r], "a", special)),
            collate([r], "a", special).position_ids,
        )
        for r in (row, other)
    )
    changed = not torch.equal(first[0, 6], second[0, 6])
    assert changed == (family != "mistral")  # the others have layers without a window


def test_every_mode_trains_what_it_says_and_nothing_else(base):
    for mode in MODES:
        model = add_voice(base("llama"), mode)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        special = SpecialIds.of(model.text_tokenizer)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        model.train()
        for _ in range(2):
            optimizer.zero_grad()
            loss = model(collate(mixed_rows(), "abc", special, unconditional=[0, 1, 0])).total
            loss.backward()
            assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
            optimizer.step()
        changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        kinds = {k.split(".")[0] if ".lora_" not in k else "lora" for k in changed}
        moves = {"frozen": {"special_rows"}, "lora": {"special_rows", "lora"}}
        assert kinds == {"audio"} | moves.get(mode, {"backbone"})
        if mode == "frozen":
            ids = some_ids()
            expected = base_logits(base("llama"), ids)
            assert_same_text(voice_logits(model.eval(), ids), expected, model)


@pytest.mark.parametrize("mode", ["frozen", "lora"])
@pytest.mark.parametrize("rows", ["text only", "audio only"])
def test_every_trained_parameter_has_a_gradient_whatever_the_batch_holds(base, mode, rows):
    model = add_voice(base("llama"), mode).train()
    special = SpecialIds.of(model.text_tokenizer)
    first, _, text = mixed_rows()
    unannounced = [Text(torch.arange(5, 9)), replace(first[3], announced=False)]
    row = [text if rows == "text only" else unannounced]
    losses = model(collate(row, "a", special))
    losses.total.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert bool(losses.text) == (rows == "text only")
    assert bool(losses.audio) == (rows == "audio only")


def test_dropout_is_off_in_a_frozen_backbone_and_on_in_others(base):
    assert not add_voice(base("gpt2"), "frozen").train().backbone.training
    assert add_voice(base("gpt2"), "lora").train().backbone.training


def train_a_little(model, steps=8):
    special = SpecialIds.of(model.text_tokenizer)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        model(collate(mixed_rows(), "abc", special)).total.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def audio_of(model):
    special = SpecialIds.of(model.text_tokenizer)
    batch = collate([mixed_rows(keep=1)[0]], "a", special)
    hidden = backbones.run(model.backbone, model.embed(batch), batch.position_ids)
    return hidden[batch.predicts], model.text_logits(hidden)


@pytest.mark.parametrize("mode", ["frozen", "lora"])
@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma3"])
def test_an_adapter_folder_is_small_and_loading_it_changes_the_audio(base, mode, family, tmp_path):
    untrained = add_voice(base(family), mode)
    start, _ = audio_of(untrained)
    model = train_a_little(untrained)
    states, logits = audio_of(model)
    assert not torch.allclose(states, start, atol=1e-2)
    model.save_adapter(tmp_path)
    weights = {path.name for path in tmp_path.glob("*.safetensors")}
    lora = {"adapter_model.safetensors"} if mode == "lora" else set()
    assert weights == {"audio.safetensors"} | lora
    loaded = AudioLanguageModel.from_pretrained(tmp_path)
    assert not any(".lora_" in key for key in loaded.state_dict())  # merged
    merged_states, merged_logits = audio_of(loaded)
    torch.testing.assert_close(merged_states, states, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged_logits, logits, rtol=1e-4, atol=1e-4)
    loaded.save_pretrained(tmp_path / "merged")
    again, _ = audio_of(AudioLanguageModel.from_pretrained(tmp_path / "merged"))
    assert torch.equal(again, merged_states)


def test_peft_reads_the_lora_layers_of_an_adapter(base, tmp_path):
    from peft import PeftModel

    model = train_a_little(add_voice(base("llama"), "lora"))
    model.save_adapter(tmp_path)
    text = AutoModelForCausalLM.from_pretrained(base("llama"), attn_implementation="sdpa")
    peft_model = PeftModel.from_pretrained(text, str(tmp_path)).eval()
    ids = some_ids()
    with torch.no_grad():
        logits = peft_model(ids).logits
        voiced = voice_logits(model, ids)[..., : logits.shape[-1]]
        torch.testing.assert_close(logits, voiced, rtol=1e-4, atol=1e-4)


def test_lora_targets_that_name_nothing_are_refused_with_the_names_there_are(base):
    adapt = AdaptConfig(mode="lora", lora_targets=("nope",))
    with pytest.raises(ValueError, match=r"adapt.lora_targets=.*nope.* found .*q_proj"):
        AudioLanguageModel.from_backbone(base("llama"), AUDIO, adapt)


def test_a_causality_check_catches_a_decoder_that_sees_the_future(base, monkeypatch):
    from mllm_audio import pretrained

    model = AutoModelForCausalLM.from_pretrained(base("llama"), attn_implementation="sdpa").eval()
    run = backbones.run

    def blurred(backbone, embeds, positions):
        return run(backbone, embeds + embeds.mean(dim=1, keepdim=True), positions)

    monkeypatch.setattr(pretrained, "run", blurred)
    with pytest.raises(ValueError, match="attends to future tokens: an encoder"):
        pretrained.check_decoder(model, "x")


def test_a_bfloat16_backbone_keeps_its_precision_and_float32_audio(base):
    model = AudioLanguageModel.from_backbone(
        base("llama"), AUDIO, AdaptConfig(mode="lora", lora_rank=2), dtype=torch.bfloat16
    )
    assert model.backbone.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model.train()
    model(collate(mixed_rows(), "abc", SpecialIds.of(model.text_tokenizer))).total.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_an_adapter_beside_another_base_is_refused(base, tmp_path):
    add_voice(base("gpt2")).save_adapter(tmp_path / "adapter")
    other = write_base(tmp_path / "other", "gpt2", seed=5)
    with pytest.raises(
        ValueError, match=r"found .*other with .*: another base model; name the one"
    ):
        AudioLanguageModel.from_pretrained(tmp_path / "adapter", base=str(other))
    gone = tmp_path / "gone"
    with pytest.raises(ValueError, match=r"needs its base model, --base if it moved: found no fol"):
        AudioLanguageModel.from_pretrained(tmp_path / "adapter", base=str(gone))


def test_damaged_bases_and_adapters_are_refused_in_one_line(base, tmp_path):
    folder = shutil.copytree(base("gpt2"), tmp_path / "base")
    (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="found no text tokenizer at") as error:
        add_voice(folder)
    assert "\n" not in str(error.value)
    (tmp_path / "tokenizer.json").rename(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").rename(tmp_path / "kept.json")
    (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="found no text tokenizer at"):  # an empty one is made up
        add_voice(folder)
    (tmp_path / "kept.json").rename(folder / "tokenizer_config.json")
    (tmp_path / "tokenizer.json").rename(folder / "tokenizer.json")
    add_voice(folder).save_adapter(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is a voice already"):
        add_voice(tmp_path / "adapter")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"cannot load .*base: ") as error:
        add_voice(folder)
    assert "\n" not in str(error.value)
    weights = tmp_path / "adapter/audio.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:5000])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        AudioLanguageModel.from_pretrained(tmp_path / "adapter", base=str(base("gpt2")))
    weights.write_bytes(whole)
    path = tmp_path / "adapter/audio_adapter.json"
    values = json.loads(path.read_text())
    values["audio"]["max_tokens"] = 32
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"audio.content_positions.weight is \(16, 32\)"):
        AudioLanguageModel.from_pretrained(tmp_path / "adapter", base=str(base("gpt2")))


def test_a_checkpoint_with_missing_weights_is_refused(base, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(base("llama"), tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    with pytest.raises(ValueError, match=r"lacks 1 weights of a llama .*layers\.1\.mlp\.up_proj"):
        add_voice(folder)
    assert capsys.readouterr().err == ""  # the message is all there is


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "BertConfig",
            {"num_attention_heads": 4},
            r"is an encoder \(bert\)",
        ),
        ("T5Config", {"d_model": 32, "num_heads": 4}, r"is an encoder-decoder \(t5\)"),
        ("BloomConfig", {"n_head": 4}, r"\(bloom\) has no max_position_embeddings"),
        ("ViTConfig", {}, r"\(vit\) is not a causal language model"),
        (
            "GPTJConfig",
            {"n_head": 4, "rotary_dim": 4},
            r"cannot load .*scaled_dot_product_attention",
        ),
    ],
)
def test_what_is_no_decoder_is_refused(base, kind, options, message, tmp_path):
    config = getattr(transformers, kind)(
        **{"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2} | options
    )
    config.save_pretrained(tmp_path)
    if kind in ("BertConfig", "GPTJConfig"):
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        add_voice(tmp_path)
    assert "\n" not in str(error.value)


def test_audio_longer_than_the_learned_positions_is_refused(base):
    with pytest.raises(ValueError, match=r"audio.max_tokens=256 .* max_position_embeddings=128"):
        add_voice(base("gpt2"), audio=AudioConfig())
    model = add_voice(base("gpt2"))
    special = SpecialIds.of(model.text_tokenizer)
    row = [Text(torch.arange(5, 125)), Audio(torch.randn(16, 128), torch.tensor([15]))]
    with pytest.raises(ValueError, match=r"sequence of \d+ .* max_position_embeddings=128"):
        model(collate([row, row], "ab", special))


def test_the_last_save_into_a_folder_is_what_is_loaded(base, tmp_path, monkeypatch):
    model = add_voice(base("gpt2"), "lora")
    model.save_adapter(tmp_path / "run")
    merged = AudioLanguageModel.from_pretrained(tmp_path / "run")
    with torch.no_grad():
        merged.audio.null_prompt.fill_(7.0)
    merged.save_pretrained(tmp_path / "run")
    loaded = AudioLanguageModel.from_pretrained(tmp_path / "run")
    assert bool((loaded.audio.null_prompt == 7.0).all())
    with pytest.raises(ValueError, match="holds a standalone checkpoint; save the adapter else"):
        model.save_adapter(tmp_path / "run")
    with pytest.raises(ValueError, match="stands alone, it has no base model; leave --base out"):
        AudioLanguageModel.from_pretrained(tmp_path / "run", base="elsewhere")


def test_a_kill_between_the_parts_of_an_adapter_leaves_none(base, tmp_path, monkeypatch):
    from mllm_audio import folder

    model = add_voice(base("gpt2"), "lora")
    model.save_adapter(tmp_path)
    write = folder.write_tensors

    def killed(tensors, where, name):
        if name == folder.LORA_WEIGHTS:
            raise KeyboardInterrupt
        write(tensors, where, name)

    monkeypatch.setattr(folder, "write_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        model.save_adapter(tmp_path)
    with pytest.raises(ValueError, match=r"found no config\.json"):
        AudioLanguageModel.from_pretrained(tmp_path)


def test_a_tokenizer_that_knows_a_special_token_is_refused(base, tmp_path):
    folder = shutil.copytree(base("gpt2"), tmp_path / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|audio|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    with pytest.raises(
        ValueError, match=r"already has <\|audio\|>, which mllm-audio gives another"
    ):
        add_voice(folder)


def test_a_voice_is_not_given_twice(base, tmp_path):
    add_voice(base("gpt2"), "full").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="already has a voice"):
        add_voice(tmp_path)


def test_sharded_checkpoints_are_read_and_written(base, tmp_path, monkeypatch):
    from mllm_audio import weights

    model = add_voice(base("llama"), "full")
    monkeypatch.setattr(weights, "MAX_SHARD_SIZE", "40KB")
    (tmp_path / "model.safetensors").write_bytes(b"of an earlier save")
    model.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert not (tmp_path / "model.safetensors").exists()
    loaded = AudioLanguageModel.from_pretrained(tmp_path)
    ids = some_ids()
    assert torch.equal(voice_logits(loaded, ids), voice_logits(model, ids))
    text = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    with torch.no_grad():
        assert torch.equal(text(ids).logits, voice_logits(model, ids))
    monkeypatch.undo()
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    assert torch.equal(
        voice_logits(AudioLanguageModel.from_pretrained(tmp_path), ids), voice_logits(model, ids)
    )


def test_context_noise_keeps_the_variance_and_is_off_at_generation(base):
    model = add_voice(base("gpt2"), audio=replace(AUDIO, context_noise=0.8))
    latents, positions = torch.randn(4096, 128), torch.zeros(4096, dtype=torch.long)
    model.eval()
    assert torch.equal(model.audio.embed(latents, positions), model.audio.embed(latents, positions))
    model.train()
    noisy = model.audio.embed(latents, positions)
    assert not torch.equal(noisy, model.audio.embed(latents, positions))
    disturbed = model.audio.disturb(latents)
    assert float(disturbed.std()) == pytest.approx(1.0, abs=0.01)
    # E[sqrt(1 - level^2)] for levels uniform in [0, 0.8] is 0.8898.
    assert float((disturbed * latents).mean()) == pytest.approx(0.8898, abs=0.01)
    assert SIZES["hidden_size"] == noisy.shape[1]
