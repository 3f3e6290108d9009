"""Formulas of what training costs a GPU: memory by ZeRO stage, activations, messages.

Psi is the number of parameters, all of them trained, N the number of GPUs, and e the bytes of a
value: 2 in bf16, 4 in float32. What GPUs hold beside this is left to a margin (`plan.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from mllm_audio.backbone import FAMILIES, BackboneConfig
from mllm_audio.heads.adaln_mlp import NUM_SINUSOIDS
from mllm_audio.presets import RunConfig

STAGES = ("0", "1", "2", "3", "3_offload")  # of ZeRO, as in configs/deepspeed
# stage3_max_live_parameters: ZeRO 3 may keep as many gathered, which is all of a smaller model.
LIVE_PARAMETERS = 1_000_000_000


@dataclass(frozen=True)
class StateBytes:
    """Bytes that one GPU, and the host for it, hold of a model and its optimizer."""

    weights: float
    gradients: float
    optimizer: float  # float32 masters beside other weights, Adam's moments, averages
    host: float = 0.0


def state_bytes(parameters: int, stage: str, gpus: int, precision: str) -> StateBytes:
    """Count what a GPU holds of the model when gradients are complete.

    Adam's two moments and the average (EMA) are float32, 12 bytes a parameter; from stage 1 on
    DeepSpeed keeps a float32 master of 4 more, in either precision. Per parameter, N GPUs:

                  weights          gradients        optimizer
                  bf16  float32    bf16  float32
        stage 0   4+2   4          4     4          12     bf16: autocast, which caches its copies
        stage 1   2     4          2+4   4          16/N   gradients as computed, and their sum
        stage 2   2     4          4/N   4/N        16/N
        stage 3   2/N   4/N        4/N   4/N        16/N   and what is gathered, at most all weights

    3_offload leaves the gathered weights on the GPU and the rest in host memory. ZeRO 3 gathers no
    more than `LIVE_PARAMETERS`. Adam's step counts and DeepSpeed's padding are left out.
    """
    is_bf16, share = precision == "bf16", parameters / gpus
    size = 2 if is_bf16 else 4  # of a weight from stage 1 on
    gathered = size * min(parameters, LIVE_PARAMETERS)
    if stage == "0":
        return StateBytes((6 if is_bf16 else 4) * parameters, 4 * parameters, 12 * parameters)
    if stage == "1":
        gradients = (6 if is_bf16 else 4) * parameters
        return StateBytes(size * parameters, gradients, 16 * share)
    if stage == "2":
        return StateBytes(size * parameters, 4 * share, 16 * share)
    if stage == "3":
        return StateBytes(size * share + gathered, 4 * share, 16 * share)
    return StateBytes(gathered, 0, 0, host=(size + 4 + 16) * share)


def sent_bytes(parameters: int, stage: str, gpus: int, micro_batches: int, precision: str) -> float:
    """Count what a GPU sends in an optimizer step of `micro_batches` per GPU.

    On a ring, gathering or scattering Psi values of b bytes makes each GPU send (N - 1) / N Psi b,
    and summing them everywhere twice that. In units of (N - 1) / N Psi b, b = 2 in bf16 (but 4 at
    stage 0, whose gradients are float32) and A micro-batches per GPU:

        stage 0  2        gradients are summed once
        stage 1  2 + 1    and each GPU's weights gathered
        stage 2  2 A + 1  gradients are summed after every micro-batch
        stage 3  3 A      weights gathered forward and backward, gradients scattered, at most

    Stages 1 and 2 of the ZeRO paper scatter gradients, at half the volume; DeepSpeed sums whole
    buckets (`use_multi_rank_bucket_allreduce`). Averages are not communicated. Offloading sends as
    much as stage 3, and the host's link carries 2 Psi / N b more per step and micro-batch.
    """
    size = 2 if precision == "bf16" and stage != "0" else 4
    units = {"0": 2, "1": 3, "2": 2 * micro_batches + 1}.get(stage, 3 * micro_batches)
    return units * (gpus - 1) / gpus * parameters * size


def block_bytes(config: BackboneConfig, precision: str) -> float:
    """Count what a block keeps of one element for its backward pass, without attention matrices.

    Autocast computes norms in float32, so what they see takes 4 bytes in either precision:

        gpt2   H (2 x 4 + 14 e) + 2 H: the norms' inputs; their outputs, queries, keys, values and
               attention's result (6); the MLP's hidden layer on both sides of its activation (8);
               two dropout masks of a byte
        llama  H (2 (4 + 2 e) + 4 e) + 4 I e: the norms' inputs, normalised and scaled; queries,
               keys, values and result; gate, its activation, up and their product, each I wide
    """
    size, width = (2 if precision == "bf16" else 4), config.hidden_size
    if config.family == "llama":
        intermediate = FAMILIES["llama"](config, 1).intermediate_size
        return width * (2 * (4 + 2 * size) + 4 * size) + 4 * intermediate * size
    return width * (2 * 4 + 14 * size + 2 * (config.dropout > 0))


def head_bytes(config: RunConfig, precision: str) -> float:
    """Count what the head keeps of one predicted latent for its backward pass.

    For each of its noise draws, with n blocks of width W:

        8 W (n + 1) + e W (8 n + 6) + e (256 + D) + 4 D k

    a block's norm (2), modulation (4), and MLP (4); the output's norm and modulation; the timestep;
    the noisy latent; and k = 14 float32 values per channel of the variational bound, 1 with flow.
    """
    head, dim = config.audio.head, config.audio.latent_dim
    size, blocks = (2 if precision == "bf16" else 4), head.num_blocks
    per_channel = 14 if head.name == "ddpm" else 1
    draw = (
        8 * head.width * (blocks + 1)
        + size * head.width * (8 * blocks + 6)
        + size * (NUM_SINUSOIDS + dim)
        + 4 * dim * per_channel
    )
    return head.batch_multiplier * draw


def activation_bytes(
    config: RunConfig, elements: float, latents: float, checkpointing: bool
) -> float:
    """Count what a micro-batch keeps for its backward pass.

    L blocks keep `block_bytes` of each element; with gradient checkpointing their inputs, e H, and
    one block's whole. Beside them stand 3 x 4 H per element (embeddings, and the final states in
    float32), `head_bytes` and 3 x 4 H per predicted latent. Captions are not learned: no logits.
    """
    assert config.backbone is not None
    precision, width = config.train.precision, config.backbone.hidden_size
    block, layers = block_bytes(config.backbone, precision), config.backbone.num_layers
    size = 2 if precision == "bf16" else 4
    blocks = layers * size * width + block if checkpointing else layers * block
    return (blocks + 12 * width) * elements + (head_bytes(config, precision) + 12 * width) * latents
