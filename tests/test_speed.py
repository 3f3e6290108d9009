"""Ways to save memory and time leave the losses as they are."""

from __future__ import annotations

import pytest
import torch
from conftest import test_run_config
from test_training import losses

from mllm_audio.config import override
from mllm_audio.run import train_run

CONFIG = override(
    test_run_config(num_steps=6, log_every=1, precision="float32"),
    ["train.optim.schedule=constant"],
)


@pytest.fixture(scope="module")
def plain(prepared, tmp_path_factory):
    run = tmp_path_factory.mktemp("plain")
    train_run(CONFIG, prepared, run)
    return losses(run)


@pytest.mark.parametrize(
    "setting",
    [
        "train.gradient_checkpointing=true",
        "train.gradient_checkpointing=true train.precision=bf16",
        "data.prefetch_steps=0",
        "train.micro_batch_size=4",
        pytest.param("train.compile=true", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_losses_stay_as_they_are(prepared, tmp_path, plain, setting, family):
    expected = plain
    families = [f"backbone.family={family}"]
    if family == "llama":
        train_run(override(CONFIG, families), prepared, tmp_path / "plain")
        expected = losses(tmp_path / "plain")
    changes = [*families, *setting.split()]
    if "bf16" in setting:
        expected_config = override(CONFIG, [*families, "train.precision=bf16"])
        train_run(expected_config, prepared, tmp_path / "bf16")
        expected = losses(tmp_path / "bf16")
    if "compile" in setting:  # draws its dropout elsewhere
        changes.append("backbone.dropout=0")
        train_run(override(CONFIG, [*families, "backbone.dropout=0"]), prepared, tmp_path / "dry")
        expected = losses(tmp_path / "dry")
    train_run(override(CONFIG, changes), prepared, tmp_path / "changed")
    found = losses(tmp_path / "changed")
    rtol = 1e-2 if "bf16" in setting else 1e-5  # another attention kernel on short rows
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=rtol, atol=1e-6)


def test_checkpointed_blocks_run_twice_a_step(make_model):
    from mllm_audio.backbone import blocks
    from mllm_audio.training.cluster import Cluster
    from mllm_audio.training.config import TrainConfig

    calls: list[int] = []
    for checkpointing, expected in ((False, 1), (True, 2)):
        calls.clear()
        model = make_model()
        Cluster().engine(model, TrainConfig(gradient_checkpointing=checkpointing))
        model.train()
        for block in blocks(model.backbone):
            block.ln_1.register_forward_pre_hook(lambda *_: calls.append(1))
        embeds = torch.randn(1, 8, model.backbone.config.hidden_size, requires_grad=True)
        output = model.backbone.base_model(inputs_embeds=embeds).last_hidden_state
        output.sum().backward()
        assert len(calls) == expected * len(blocks(model.backbone))


def test_a_frozen_backbone_refuses_gradient_checkpointing(base):
    from mllm_audio.modality import AudioConfig
    from mllm_audio.model import AudioLanguageModel
    from mllm_audio.training.cluster import Cluster
    from mllm_audio.training.config import TrainConfig

    model = AudioLanguageModel.from_backbone(base("gpt2"), AudioConfig(max_tokens=16))
    with pytest.raises(ValueError, match="has no effect on a frozen backbone; leave it out"):
        Cluster().engine(model, TrainConfig(gradient_checkpointing=True))


def test_micro_batches_add_up_to_the_gradient_of_the_whole(make_model, prepared):
    """With the noise of each latent fixed, parts weighed by global counts are the whole."""
    from dataclasses import replace

    from mllm_audio.data.captioned import CaptionedClips
    from mllm_audio.data.clips import load_split
    from mllm_audio.data.dataset import DataConfig, TrainingData
    from mllm_audio.masking import MaskingConfig
    from mllm_audio.text import SpecialIds, train_text_tokenizer
    from mllm_audio.types import StepCounts

    model = make_model().eval()

    def noiseless(latents, hidden, *_):
        return (hidden.mean(-1, keepdim=True) - latents).pow(2).mean(-1)

    model.audio.head.loss = noiseless
    clips = load_split(prepared, "train")
    tokenizer = train_text_tokenizer({c for clip in clips for c in clip.captions})
    whole = TrainingData(
        source=CaptionedClips(clips, tokenizer),
        special=SpecialIds.of(tokenizer),
        masking=MaskingConfig(schedule="uniform"),
        config=DataConfig(prefetch_steps=0),
        batch_size=6,
        seed=0,
    )
    (batch,) = next(whole.steps(3))
    parts = next(replace(whole, micro_batch_size=2).steps(3))
    assert len(parts) == 3
    assert len({part.counts.latents for part in parts}) >= 1
    model(batch).total.backward()
    expected = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    counts = sum((part.counts for part in parts), StepCounts())
    assert counts == batch.counts
    for part in parts:
        model(part, None, counts).total.backward()
    for name, value in expected.items():
        found = dict(model.named_parameters())[name].grad
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-6)
