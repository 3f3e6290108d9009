"""CLAP, the embedder behind `clap_hf` and `clap_laion`: captions and clips in one space.

Wu et al. 2023 (arXiv:2211.06687). Both packages hear a random 10 s of longer clips; here it is
always the first 10 s, and clips count as short, so that a score is the same every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mllm_audio.conditioners.laion import MAX_SAMPLES, SAMPLE_RATE, load_laion
from mllm_audio.evaluation.base import ClipFeatures, Source
from mllm_audio.evaluation.checkpoints import device_of, files_sha256
from mllm_audio.files import file_sha256
from mllm_audio.quiet import quiet

BATCH_SIZE = 64  # captions embedded at once
MAX_TOKENS = 77  # of a caption, as LAION's package cuts it
EXPECTED = "a folder of a transformers ClapModel such as laion/larger_clap_music_and_speech"


class HfClapEmbedder:
    """`transformers.ClapModel`, from a folder on this machine."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel

        weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
        if not (folder / "config.json").is_file() or not weights:
            raise ValueError(f"{folder} holds no config.json with weights, expected {EXPECTED}")
        with quiet(is_local=True):
            try:
                model, report = ClapModel.from_pretrained(
                    folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
                )
                self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
                self.extractor = ClapFeatureExtractor.from_pretrained(folder, local_files_only=True)
            except (OSError, ValueError, RuntimeError, KeyError) as error:
                reason = str(error).strip().splitlines()[0]
                raise ValueError(f"cannot load {folder} ({reason}), expected {EXPECTED}") from error
        if missing := sorted(report["missing_keys"]):
            raise ValueError(
                f"{folder} lacks {len(missing)} weights, e.g. {missing[0]}; expected {EXPECTED}"
            )
        self.model = model.eval().to(device)
        self.name = "clap_hf"
        self.sample_rate = SAMPLE_RATE
        self.source = Source(path=folder, sha256=files_sha256([folder / "config.json", *weights]))
        self.fingerprint = f"clap_hf-{self.source.sha256}"

    @torch.inference_mode()
    def embed(self, waveforms: Sequence[Tensor]) -> list[ClipFeatures]:
        """Hear the first 10 s of (S,) waveforms: (1, E) features each."""
        heard = [waveform[:MAX_SAMPLES].double().numpy() for waveform in waveforms]
        inputs = self.extractor(heard, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        features = self.model.get_audio_features(
            input_features=inputs["input_features"].float().to(device_of(self.model)),
            # The extractor of a fusing model calls a random clip long where none is.
            is_longer=torch.zeros(len(heard), 1, dtype=torch.bool, device=device_of(self.model)),
        ).pooler_output
        return [ClipFeatures(row[None]) for row in features.float().cpu().clone()]

    @torch.inference_mode()
    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Embed captions: (n, E)."""
        config = self.model.config.text_config
        # RoBERTa counts positions from behind its padding id.
        limit = min(MAX_TOKENS, config.max_position_embeddings - (config.pad_token_id or 0) - 1)
        rows = []
        for start in range(0, len(captions), BATCH_SIZE):
            inputs = self.tokenizer(
                list(captions[start : start + BATCH_SIZE]),
                padding=True,
                truncation=True,
                max_length=limit,
                return_tensors="pt",
            ).to(device_of(self.model))
            output = self.model.get_text_features(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
            )
            rows.append(output.pooler_output.float().cpu())
        return torch.cat(rows).clone()


class LaionClapEmbedder:
    """LAION's own checkpoint, through the extra laion-clap."""

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        del device  # the package takes the first GPU, if there is one
        self._model = load_laion(path)
        self.name = "clap_laion"
        self.sample_rate = SAMPLE_RATE
        self.source = Source(path=path, sha256=file_sha256(path))
        self.fingerprint = f"clap_laion-{self.source.sha256}"

    def embed(self, waveforms: Sequence[Tensor]) -> list[ClipFeatures]:
        """Hear the first 10 s of (S,) waveforms: (1, 512) features each."""
        return [ClipFeatures(row[None].clone()) for row in self._model.embed_audio(waveforms)]

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Embed captions: (n, 512)."""
        batches = range(0, len(captions), BATCH_SIZE)
        return torch.cat(
            [self._model.embed_text(captions[start : start + BATCH_SIZE]) for start in batches]
        )
