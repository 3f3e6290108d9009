"""declare-lab/tango2 to the folder that `pipelines.load_tango2` reads.

The release is a pickle per module. UNet and FLAN-T5 come out of it unchanged; its VAE and vocoder
are those of AudioLDM-S (Tango was trained on `audioldm-s-full`, github.com/declare-lab/tango,
train.py), which cvssp/audioldm holds in diffusers' form, so they are compared and taken from there.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from mllm_audio.config import read_json
from mllm_audio.weights import read_tensors, write_tensors

DIFFUSERS_WEIGHTS, WEIGHTS = "diffusion_pytorch_model.safetensors", "model.safetensors"
# github.com/declare-lab/tango, configs/diffusion_model_config.json: where it is not one of
# diffusers' defaults.
UNET_CONFIG: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "in_channels": 8,
    "out_channels": 8,
    "sample_size": [32, 2],
    "upcast_attention": True,
    "use_linear_projection": True,
}
# The schedule of Stable Diffusion 2.1, which Tango names, as the diffusers 0.18 that it pins runs
# it: its timesteps have no offset.
SCHEDULER_CONFIG: dict[str, Any] = {
    "_class_name": "DDPMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "steps_offset": 0,
    "timestep_spacing": "leading",
    "variance_type": "fixed_small",
}
# Tensors that are called alike in both forms: file, prefix in the pickle, names.
SAME = (
    ("vae", DIFFUSERS_WEIGHTS, "", ("encoder.conv_in.weight", "decoder.conv_out.weight")),
    ("vocoder", WEIGHTS, "vocoder.", ("conv_pre.bias", "conv_post.bias")),
)


def convert_tango2(checkpoint: Path, audioldm: Path, flan_t5: Path, out: Path) -> None:
    """Write Tango 2 as folders of safetensors; the UNet last, so that a whole folder has one.

    Args:
        checkpoint: a copy of declare-lab/tango2.
        audioldm: a copy of cvssp/audioldm.
        flan_t5: a copy of google/flan-t5-large; its tokenizer and configuration are used.
        out: of the result.

    Raises:
        ValueError: if a file is missing or holds other tensors, or VAE or vocoder are not Tango's.
    """
    _check_same(checkpoint, audioldm)
    parts = _split(_unpickle(checkpoint / "pytorch_model_main.bin"))
    text_config = read_json(flan_t5 / "config.json", "--flan-t5 is a copy of google/flan-t5-large")
    config = read_json(checkpoint / "main_config.json", "copy declare-lab/tango2 as a whole")
    unet_path = checkpoint / str(config.get("unet_model_config_path"))  # not in the release
    unet_config = read_json(unet_path, "mend it") if unet_path.is_file() else UNET_CONFIG
    _write_json(out / "scheduler/scheduler_config.json", SCHEDULER_CONFIG)
    AutoTokenizer.from_pretrained(flan_t5, local_files_only=True).save_pretrained(out / "tokenizer")
    for part in ("vae", "vocoder"):
        shutil.copytree(audioldm / part, out / part, dirs_exist_ok=True)
    _write_json(out / "text_encoder/config.json", text_config)
    write_tensors(parts["text_encoder"], out / "text_encoder", WEIGHTS)
    _write_json(out / "unet/config.json", unet_config)
    write_tensors(parts["unet"], out / "unet", DIFFUSERS_WEIGHTS)


def _check_same(checkpoint: Path, audioldm: Path) -> None:
    """Compare what VAE and vocoder call alike in Tango's pickle and in AudioLDM's folder."""
    theirs = _unpickle(checkpoint / "pytorch_model_vae.bin")
    scale = read_json(checkpoint / "vae_config.json", "copy declare-lab/tango2 as a whole").get(
        "scale_factor"
    )
    found = read_json(audioldm / "vae/config.json", "--audioldm is a copy of cvssp/audioldm").get(
        "scaling_factor"
    )
    if not isinstance(scale, float) or not isinstance(found, float) or abs(scale - found) > 1e-4:
        raise ValueError(
            f"Tango's VAE scales by {scale}, that of {audioldm} by {found}; expected cvssp/audioldm"
        )
    for part, file, prefix, names in SAME:
        ours = read_tensors(audioldm / part, file)
        for name in names:
            one, other = theirs.get(prefix + name), ours.get(name)
            if one is None or other is None or one.shape != other.shape:
                raise ValueError(f"{part}: {name} is not in both; expected cvssp/audioldm")
            if not torch.allclose(one.float(), other.float(), atol=1e-6):
                raise ValueError(f"{part}: {name} differs from Tango's; expected cvssp/audioldm")


def _split(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Sort tensors by module."""
    parts: dict[str, dict[str, Tensor]] = {"unet": {}, "text_encoder": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        if part not in parts:
            raise ValueError(f"found the tensor {name}, expected {' and '.join(parts)} of Tango 2")
        parts[part][rest] = value
    # Tied to `shared`, which safetensors would refuse to write twice.
    parts["text_encoder"].pop("encoder.embed_tokens.weight", None)
    return parts


def _unpickle(path: Path) -> dict[str, Tensor]:
    """Read tensors, and nothing but tensors, from a pickle."""
    if not path.is_file():
        raise ValueError(f"found no {path.name} in {path.parent}; copy declare-lab/tango2 whole")
    tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return tensors


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n")
