"""Put a checkpoint on the hub: which files, what of them stays at home, and one-line errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from mllm_audio.card import audio_config, is_hub_id, model_card, public_name
from mllm_audio.config import read_json
from mllm_audio.folder import ADAPTER_FILE, is_adapter

BELONGS = (  # patterns of the names at the top of a folder that make up a checkpoint
    "config.json",
    "generation_config.json",
    "audio_adapter.json",
    "audio_generation.json",
    "adapter_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "text_drift.json",
)
# Files with keys that transformers, PEFT or we fill with the path something was loaded from.
MAY_HOLD_PATHS = ("config.json", "audio_adapter.json", "adapter_config.json")
PATH_KEYS = ("base", "base_model_name_or_path", "_name_or_path")


def push_to_hub(
    folder: Path | str,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    card: str | None = None,
) -> str:
    """Upload a checkpoint, adapter or run folder to the hub, in one commit.

    Only the files of the checkpoint go up, with a README.md; those an earlier push left there and
    this one lacks are deleted. Local paths in them are cut to their last component. The folder
    stays as it is.

    Args:
        folder: what `save_pretrained`, `save_adapter` or `mllm-audio train` wrote.
        repo_id: OWNER/NAME, or NAME among your own; made if absent.
        private: visibility of a new repository; None is your account's default.
        token: of the hub; None is that of `hf auth login`.
        revision: branch to commit to, made if absent; None is the main one.
        commit_message: first line of the commit.
        card: text of README.md, by default `model_card(folder, repo_id)`.

    Returns:
        The address of the repository.

    Raises:
        ValueError: if the folder is no checkpoint, nobody else could load it, you are not logged
            in, or a repository asked to be private exists and is public.
        OSError: if the hub refuses or cannot be reached.
    """
    token = token or get_token()
    if token is None:
        raise ValueError("found no token of the Hugging Face hub; type: hf auth login")
    api = HfApi(token=token)
    full_id = _full_id(api, repo_id)
    folder = Path(folder)
    files = checkpoint_files(folder) | {
        "README.md": (model_card(folder, full_id) if card is None else card).encode()
    }
    with _one_line(repo_id):
        url = api.create_repo(full_id, private=private, exist_ok=True)
        there = api.model_info(full_id)
        if private and not there.private:
            raise ValueError(
                f"{full_id} exists and is public, expected a private one; make it private in its "
                "settings on the hub, or type another name"
            )
        if revision is not None:
            api.create_branch(full_id, branch=revision, exist_ok=True)
            there = api.model_info(full_id, revision=revision)
        names = [file.rfilename for file in there.siblings or []]
        api.create_commit(
            full_id,
            [
                *(CommitOperationAdd(name, content) for name, content in files.items()),
                *(CommitOperationDelete(n) for n in names if _belongs(n) and n not in files),
            ],
            commit_message=commit_message or "Upload voice",
            revision=revision,
        )
    return str(url)


def _full_id(api: HfApi, repo_id: str) -> str:
    """Put your own name before one without an owner.

    Raises:
        ValueError: if no repository can have this name.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"{repo_id!r} cannot be a repository of the hub; expected OWNER/NAME, of letters, "
            "digits and single '-', '_' and '.'"
        ) from error
    if "/" in repo_id:
        return repo_id
    with _one_line(repo_id):
        return f"{api.whoami()['name']}/{repo_id}"


def checkpoint_files(folder: Path) -> dict[str, Path | bytes]:
    """Map the names of a checkpoint's files to the files, or to contents without local paths.

    Raises:
        ValueError: if the folder is no checkpoint, or needs an audio tokenizer that only this
            machine has.
    """
    audio = audio_config(folder)
    source = audio.tokenizer.partition(":")[2]
    if source and not is_hub_id(source):
        raise ValueError(
            f"{folder} needs audio tokenizer {audio.tokenizer}, a local folder that nobody else "
            "has; write the hub id of the same weights instead, in the `audio` section of "
            f"{folder / (ADAPTER_FILE if is_adapter(folder) else 'config.json')}"
        )
    encoders = (audio.conditioner or "").partition(":")[2]
    sources = [part.partition("=")[2] for part in encoders.split(",") if part]
    if local := [source for source in sources if not is_hub_id(source)]:
        raise ValueError(
            f"{folder} is prompted by {', '.join(local)}, local folders that nobody else has; "
            "write the hub ids of the same weights instead, in `conditioner` of the `audio` "
            f"section of {folder / 'config.json'}"
        )
    files: dict[str, Path | bytes] = {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_file() and _belongs(path.name)
    }
    if not any(name.endswith(".safetensors") for name in files):
        raise ValueError(f"found no weights (*.safetensors) in {folder}; restore it, or save again")
    for name in files.keys() & set(MAY_HOLD_PATHS):
        values = read_json(folder / name, "restore the folder")
        paths = {k: public_name(values[k]) for k in PATH_KEYS if isinstance(values.get(k), str)}
        files[name] = (json.dumps({**values, **paths}, indent=2, sort_keys=True) + "\n").encode()
    return files


def _belongs(name: str) -> bool:
    """Tell whether a file of this name is part of a checkpoint."""
    return "/" not in name and any(fnmatch(name, pattern) for pattern in BELONGS)


@contextmanager
def _one_line(repo_id: str) -> Iterator[None]:
    """Turn what the hub's library raises into one line that says what to type.

    Raises:
        ValueError: with the message it had.
        OSError: for everything else.
    """
    try:
        yield
    except HfHubHTTPError as error:
        reason = f"{error.response.status_code}: {_flat(error.server_message or error)}"
        if error.response.status_code in (401, 403):
            raise OSError(
                f"the hub does not let you write to {repo_id} ({reason}); "
                "type  hf auth login  with a token that may, or another name"
            ) from error
        raise OSError(f"the hub refused {repo_id} ({reason})") from error
    except ValueError as error:
        raise ValueError(_flat(error)) from error
    except Exception as error:  # network errors are those of whatever HTTP library is below
        raise OSError(
            f"cannot reach the hub for {repo_id} ({type(error).__name__}: {_flat(error)}); check "
            "the network and run the same command again"
        ) from error


def _flat(message: object) -> str:
    return " ".join(str(message).split())
