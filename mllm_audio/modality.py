"""`AudioModality`: every audio parameter, and the one seam training and inference share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm_audio.conditioners.base import PromptStream
from mllm_audio.config import check_range
from mllm_audio.diffusion.noise import Noise, uniform
from mllm_audio.heads import build_head
from mllm_audio.heads.base import HeadConfig, SamplingConfig


@dataclass(frozen=True, kw_only=True)
class AudioConfig:
    """What the audio modality is built from; saved as the `audio` section of `config.json`."""

    tokenizer: str = "dct"  # spec for tokenizers.load_tokenizer: a name, or name:folder
    tokenizer_fingerprint: str = (
        ""  # of the tokenizer that made the training latents; "" before training
    )
    latent_dim: int = 128  # D
    tokens_per_column: int = 4  # latents that share one time column
    column_seconds: float = 0.16  # duration of one time column
    max_tokens: int = 256  # N, the longest clip: 64 columns of 4 are 10.24 s
    end_of_audio: bool = (
        True  # predict where a clip ends; the paper's models always make max_tokens
    )
    end_loss_weight: float = 0.1  # of the end-of-audio cross-entropy beside the head's loss
    text_loss_weight: float = 1.0  # of the cross-entropy of text that a model says
    # Variance-preserving noise on latents that are heard, in training only: up to this share of
    # their standard deviation, so that a model bears with its own errors over long clips.
    context_noise: float = 0.0
    null_prompt_length: int = 1  # vectors of the null prompt; 1 is broadcast over any text
    # Spec for conditioners.load_conditioner, whose embeddings are the prompt; None: captions are
    # text ids of the language model.
    conditioner: str | None = None
    conditioner_fingerprint: str = ""  # of the one that made the training prompts; "" before
    prompt_streams: tuple[PromptStream, ...] = ()  # what it makes of a caption; () without one
    target_positions: bool = True  # tell which position is predicted; the paper's ablation I: no
    channel_weight_exponent: float = (
        0.0  # loss weight of a channel = its std to this power; 0 = the paper
    )
    # The head was trained on guided predictions and knows no unconditional branch.
    guidance_distilled: bool = False
    # Of content and target positions, beside latents embedded with deviation 1 (beside a trained
    # backbone, that of its text embeddings); larger learns them sooner.
    position_init_std: float = 0.02
    head: HeadConfig = field(default_factory=HeadConfig)

    def __post_init__(self) -> None:
        """Check counts and that the longest clip is whole columns."""
        counts = ("latent_dim", "tokens_per_column", "max_tokens", "null_prompt_length")
        check_range("audio", self, 1, 10_000_000, *counts)
        check_range("audio", self, 0, 1000, "column_seconds", "position_init_std", open_low=True)
        check_range("audio", self, 0, 1000, "end_loss_weight", "text_loss_weight")
        check_range("audio", self, 0, 1, "context_noise")
        check_range("audio", self, 0, 10, "channel_weight_exponent")
        if self.max_tokens % self.tokens_per_column:
            raise ValueError(
                f"audio.max_tokens={self.max_tokens} is not a multiple of "
                f"audio.tokens_per_column={self.tokens_per_column}"
            )
        if self.prompt_streams and self.null_prompt_length not in (1, self.prompt_length):
            raise ValueError(
                f"audio.null_prompt_length={self.null_prompt_length}, expected 1 or the "
                f"{self.prompt_length} elements of the prompt"
            )

    @property
    def prompt_length(self) -> int:
        """Sequence elements that the conditioner's embeddings take; 0 without one."""
        return sum(stream.length for stream in self.prompt_streams)

    @property
    def max_seconds(self) -> float:
        """Duration of the longest clip."""
        return self.max_tokens / self.tokens_per_column * self.column_seconds


ROW_BLOCK = 128  # training pads rows to a multiple: a CPU kernel is compiled for every new shape


def pad_rows(rows: Tensor) -> Tensor:
    """Pad (P, ...) with zero rows to a multiple of `ROW_BLOCK`."""
    return F.pad(rows, (0, 0, 0, -len(rows) % ROW_BLOCK))


class AudioModality(nn.Module):
    """Continuous audio tokens for a language model of width H.

    Everything outside sees latents as the tokenizer made them: normalisation happens here.
    Paper section 3.2 (embedding), 3.1 (head); names of the parts follow REFERENCE tables of the
    paper: latents -> H with LayerNorm, content and target positions, null ("fake") prompt, head.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: AudioConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        num_targets = config.max_tokens + int(config.end_of_audio)
        self.latent_proj = nn.Linear(config.latent_dim, hidden_size)
        self.latent_norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.content_positions = nn.Embedding(config.max_tokens, hidden_size)
        self.target_positions = (
            nn.Embedding(num_targets, hidden_size) if config.target_positions else None
        )
        self.prompt_proj = nn.ModuleDict(
            {stream.name: nn.Linear(stream.dim, hidden_size) for stream in config.prompt_streams}
        )
        # Without text ids nothing else embeds the start of the audio, the paper's BOS.
        self.start = nn.Parameter(torch.empty(hidden_size)) if config.prompt_streams else None
        self.null_prompt = nn.Parameter(torch.empty(config.null_prompt_length, hidden_size))
        self.end_of_audio = nn.Linear(hidden_size, 1) if config.end_of_audio else None
        self.head = build_head(config.head, config.latent_dim, hidden_size)
        self.register_buffer("latent_mean", torch.zeros(config.latent_dim))
        self.register_buffer("latent_std", torch.ones(config.latent_dim))
        self._initialise()

    def _initialise(self) -> None:
        """Follow MAR: xavier-uniform linears with zero bias, N(0, 0.02) positions."""
        for linear in (self.latent_proj, *self._projections):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        for embedding in self._positions:
            nn.init.normal_(embedding.weight, std=self.config.position_init_std)
        nn.init.normal_(self.null_prompt, std=0.02)
        if self.start is not None:
            nn.init.normal_(self.start, std=0.02)
        if self.end_of_audio is not None:
            nn.init.zeros_(self.end_of_audio.weight)
            nn.init.zeros_(self.end_of_audio.bias)

    @property
    def _projections(self) -> list[nn.Linear]:
        """List the projections of the prompt's streams."""
        return [module for module in self.prompt_proj.values() if isinstance(module, nn.Linear)]

    @property
    def _positions(self) -> list[nn.Embedding]:
        """List the position tables there are."""
        tables = (self.content_positions, self.target_positions)
        return [table for table in tables if table is not None]

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set the per-channel mean and std, both (D,), of the training latents.

        A channel that hardly varies in the training data is floored at a thousandth of the
        loudest, so that a clip where it does vary stays in range.
        """
        if not bool(std.isfinite().all()) or not float(std.max()) > 0:
            raise ValueError(
                f"latent std must be finite and not all zero, found {std.tolist()[:4]} ..."
            )
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std.clamp_min(1e-3 * float(std.max())))

    def normalise(self, latents: Tensor) -> Tensor:
        """Bring (M, D) tokenizer latents to zero mean and unit variance, float32."""
        latents = latents.float().reshape(-1, self.config.latent_dim)  # a batch of text has (0, 0)
        return (latents - self.latent_mean) / self.latent_std

    def channel_weight(self) -> Tensor | None:
        """Weigh the loss per channel, (D,) with mean 1, or None for the paper's equal weights.

        DCT coefficients differ in energy by 300x, and the ear follows the energy; the clamp
        keeps the faintest channels in the loss and the loudest from being all of it.
        """
        if self.config.channel_weight_exponent == 0:
            return None
        relative = self.latent_std / self.latent_std.mean()
        weight = relative.pow(self.config.channel_weight_exponent).clamp(0.1, 4.0)
        return weight / weight.mean()

    def embed(self, latents: Tensor, content_positions: Tensor) -> Tensor:
        """Embed (M, D) latents that stand at (M,) content positions; return (M, H)."""
        rows = self.normalise(latents)
        if self.training:
            rows = pad_rows(self.disturb(rows))
        embeds = self.latent_norm(self.latent_proj(rows))[: len(latents)]
        return embeds + self.content_positions(content_positions)

    def disturb(self, latents: Tensor) -> Tensor:
        """Mix noise into (M, D) normalised latents, their variance kept.

        Each takes a noise level of its own, uniform up to `context_noise`.
        """
        if self.config.context_noise == 0:
            return latents
        level = self.config.context_noise * torch.rand(len(latents), 1, device=latents.device)
        return (1 - level**2).sqrt() * latents + level * torch.randn_like(latents)

    @torch.no_grad()
    def match_scale(self, std: float) -> None:
        """Start untrained embeddings at the deviation of a trained backbone's text embeddings."""
        self.latent_norm.weight.fill_(std)
        for embedding in self._positions:
            embedding.weight.mul_(std)

    def embed_targets(self, target_positions: Tensor) -> Tensor:
        """Embed (P,) target positions; the (P, H) result is added to the elements that predict."""
        if self.target_positions is None:
            return self.null_prompt.new_zeros(len(target_positions), self.null_prompt.shape[1])
        embeds: Tensor = self.target_positions(target_positions)
        return embeds

    def embed_prompts(self, prompts: Sequence[Tensor]) -> Tensor:
        """Project the conditioner's streams, each (B, L_s, D_s); return (B, L, H).

        One linear layer per encoder, as in the paper; the streams stand behind one another.
        """
        projected = [
            projection(prompt.to(projection.weight.dtype))
            for projection, prompt in zip(self._projections, prompts, strict=True)
        ]
        return torch.cat(projected, dim=1)

    def loss(
        self, hidden_states: Tensor, latents: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Score (P, D) target latents under (P, H) hidden states; return (P,) float32."""
        targets = pad_rows(self.normalise(latents))
        losses = self.head.loss(targets, pad_rows(hidden_states), self.channel_weight(), generator)
        return losses[: len(latents)]

    def end_loss(self, hidden_states: Tensor, is_end: Tensor, weight: Tensor) -> Tensor:
        """Cross-entropy of "the target is the end" over (P, H) hidden states; return (P,).

        `weight` is (P,), see `masking.end_weights`.
        """
        if self.end_of_audio is None:
            return hidden_states.new_zeros(len(is_end))
        logits = self.end_of_audio(hidden_states)[:, 0].float()  # (P,)
        return F.binary_cross_entropy_with_logits(logits, is_end.float(), weight, reduction="none")

    def ends(self, hidden_states: Tensor, noise: Noise, threshold: float | None = None) -> Tensor:
        """Decide for (R, H) hidden states whether audio ends here; return (R,) bool.

        `threshold` on the probability, or None to sample it; sampling is a pure function of the
        row's seed and position.
        """
        if self.end_of_audio is None:
            return torch.zeros(len(hidden_states), dtype=torch.bool, device=hidden_states.device)
        probability = torch.sigmoid(self.end_of_audio(hidden_states)[:, 0].float())
        if threshold is not None:
            return probability > threshold
        return (
            uniform(noise.seeds, noise.position, -1) < probability
        )  # -1: no sampling step uses it

    def sample(
        self, hidden_states: Tensor, uncond: Tensor | None, config: SamplingConfig, noise: Noise
    ) -> Tensor:
        """Draw the next latent of (R, H) rows; return (R, D) float32 as the tokenizer makes them.

        `uncond` is the (R, H) hidden state of the unconditional branch, None without guidance.
        """
        latents = self.head.sample(hidden_states, uncond, config, noise)
        return latents * self.latent_std + self.latent_mean
