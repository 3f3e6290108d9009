"""`AudioLanguageModel`: a Hugging Face causal LM plus `AudioModality`."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, Cache, PreTrainedModel

from mllm_audio import backbone as backbones
from mllm_audio.config import from_dict, read_json, to_dict
from mllm_audio.files import write_atomic
from mllm_audio.modality import AudioConfig, AudioModality
from mllm_audio.types import Batch, Losses

ARCHITECTURE = "AudioLanguageModel"
PREFIX = "audio."  # of every tensor that is not the backbone's
MAX_SHARD_SIZE = "5GB"  # of one safetensors file


def default_device() -> torch.device:
    """Pick the first CUDA device, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class AudioLanguageModel(nn.Module):
    """A generalised causal LM over text ids and continuous audio latents.

    The paper's AudioNTP and AudioMNTP are this class; which one is decided by the batch.
    """

    def __init__(self, backbone: PreTrainedModel, audio_config: AudioConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.audio = AudioModality(audio_config, backbone.config.hidden_size)

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.audio.latent_mean.device

    def embed(self, batch: Batch) -> Tensor:
        """Embed an interleaved batch; return (B, T, H)."""
        embeds = self.backbone.get_input_embeddings()(batch.input_ids)  # (B, T, H)
        hidden = self.embed_null_prompt(batch.is_prompt)
        replaced = (batch.is_prompt & batch.unconditional[:, None])[..., None]  # (B, T, 1)
        embeds = torch.where(replaced, hidden.to(embeds.dtype), embeds)
        latents = self.audio.embed(batch.latents, batch.content_positions)  # (M, H)
        embeds = embeds.masked_scatter(batch.is_audio[..., None], latents.to(embeds.dtype))
        targets = self.audio.embed_targets(batch.target_positions)  # (P, H)
        added = torch.zeros_like(embeds).masked_scatter(
            batch.predicts[..., None], targets.to(embeds.dtype)
        )
        return embeds + added

    def embed_null_prompt(self, is_prompt: Tensor) -> Tensor:
        """Lay the null prompt over (B, T) prompt elements; return (B, T, H).

        The k-th prompt element of a row takes the k-th vector; a single vector is broadcast.
        """
        null = self.audio.null_prompt
        index = (is_prompt.long().cumsum(dim=1) - 1).clamp(0, len(null) - 1)  # (B, T)
        return null[index]

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> Losses:
        """Compute the training losses of a batch.

        Every parameter of the audio modality takes part in every step, also when the batch holds
        no audio, so that data-parallel ranks never wait for each other's gradients.
        """
        hidden_states = backbones.run(self.backbone, self.embed(batch), batch.position_ids)
        predicted = hidden_states[batch.predicts]  # (P, H)
        has_latent = ~batch.target_is_end  # (P,)
        if not bool(has_latent.any()):
            return self._no_audio(hidden_states)
        per_latent = self.audio.loss(
            predicted[has_latent], batch.target_latents[has_latent], generator
        )
        end = self.audio.end_loss(predicted, batch.target_is_end, batch.end_weight).mean()
        audio = per_latent.mean()
        total = audio + self.audio.config.end_loss_weight * end
        return Losses(
            total=total, audio=audio.detach(), end=end.detach(), per_latent=per_latent.detach()
        )

    def _no_audio(self, hidden_states: Tensor) -> Losses:
        """Touch every parameter with weight zero: the loss of a batch without audio."""
        touched = sum(
            (parameter.sum() for parameter in self.audio.parameters()), hidden_states.sum()
        )
        zero = 0.0 * touched
        detached = zero.detach()
        return Losses(total=zero, audio=detached, end=detached, per_latent=detached.new_zeros(0))

    def step(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        cache: Cache,
    ) -> Tensor:
        """Extend the cache by (R, T, H) embeddings; return the last element's (R, H) state."""
        states = backbones.run(self.backbone, inputs_embeds, position_ids, attention_mask, cache)
        return states[:, -1]

    def save_pretrained(
        self, folder: Path | str, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Write `config.json` and safetensors shards that `from_pretrained` reads.

        The folder is the backbone's own checkpoint, tensor names unchanged, plus `audio.*`:
        `AutoModelForCausalLM.from_pretrained(folder)` loads the text side.

        Args:
            folder: made if absent.
            state_dict: weights to write instead of this model's, e.g. an average.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        values = state_dict if state_dict is not None else self.state_dict()
        tied = tied_names(self.backbone)
        tensors = {
            name.removeprefix("backbone."): value.detach().contiguous()
            for name, value in values.items()
            if name not in tied
        }
        config = self.backbone.config.to_dict()
        config |= {"architectures": [ARCHITECTURE], "audio": to_dict(self.audio.config)}
        # Written beside and moved over: a reader, or a kill, finds the old weights or the new.
        with TemporaryDirectory(dir=folder, prefix=".saving-") as beside:
            try:
                save_torch_state_dict(tensors, beside, max_shard_size=MAX_SHARD_SIZE)
            except (OSError, SafetensorError) as error:
                raise OSError(f"cannot write the model to {folder}: {error}") from error
            for path in sorted(Path(beside).iterdir()):
                path.replace(folder / path.name)
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        write_atomic(folder / "config.json", text.encode())

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> AudioLanguageModel:
        """Load what `save_pretrained` wrote, strictly.

        Raises:
            ValueError: if the folder is not such a checkpoint, or tensors are missing, unknown
                or of another shape.
        """
        folder = Path(folder)
        config_path = folder / "config.json"
        if not config_path.is_file():
            begun = (folder / "run.json").is_file()
            expected = (
                "its training has not saved yet; wait for train.save_every steps"
                if begun
                else "expected a folder that `mllm-audio train` wrote"
            )
            raise ValueError(f"found no config.json in {folder}: {expected}")
        values = read_json(config_path, "train again, or restore the folder")
        if "audio" not in values:
            raise ValueError(
                f"{config_path} has no `audio` section: a text-only checkpoint, not a voice"
            )
        audio_config = from_dict(AudioConfig, values["audio"], str(config_path))
        hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model = cls(backbones.from_hf_config(hf_config), audio_config)
        model.load_tensors(read_tensors(folder), str(folder))
        return model.eval()

    def load_tensors(self, tensors: dict[str, Tensor], where: str) -> None:
        """Load checkpoint names (`audio.*` and the backbone's own) strictly."""
        renamed = {
            name if name.startswith(PREFIX) else f"backbone.{name}": value
            for name, value in tensors.items()
        }
        expected = {
            k: v for k, v in self.state_dict().items() if k not in tied_names(self.backbone)
        }
        missing, unknown = (
            sorted(expected.keys() - renamed.keys()),
            sorted(renamed.keys() - expected.keys()),
        )
        if missing or unknown:
            raise ValueError(
                f"{where} does not fit its own config.json: {len(missing)} tensors missing "
                f"{missing[:3]}, {len(unknown)} unknown {unknown[:3]}"
            )
        for name, value in expected.items():
            if value.shape != renamed[name].shape:
                raise ValueError(
                    f"{where}: {name} is {tuple(renamed[name].shape)}, "
                    f"config.json says {tuple(value.shape)}"
                )
        self.load_state_dict(renamed, strict=False)


def tied_names(backbone: PreTrainedModel) -> set[str]:
    """Name the state-dict entries that share another entry's storage, as `backbone.*`."""
    seen: dict[int, str] = {}
    tied = set()
    for name, value in backbone.state_dict(keep_vars=True).items():
        if id(value) in seen:
            tied.add(f"backbone.{name}")
        seen.setdefault(id(value), name)
    return tied


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read every safetensors shard of a checkpoint folder."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        values = read_json(index, "restore the folder")
        files = sorted(set(values["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    tensors: dict[str, Tensor] = {}
    for name in files:
        path = folder / name
        if not path.is_file():
            raise ValueError(f"found no {name} in {folder}: the checkpoint is incomplete")
        try:
            tensors |= load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error})") from error
    return tensors
