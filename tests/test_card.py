"""The model card and the upload: true to the folder, no local path, and nothing else of it.

The hub is a small HTTP server in this process; `huggingface_hub` itself talks to it.
"""

import base64
import json
import subprocess
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest
import torch
from conftest import test_run_config
from huggingface_hub import ModelCard, constants

import mllm_audio
from mllm_audio.adapter import AdaptConfig
from mllm_audio.backbone import build_backbone
from mllm_audio.build import count_parameters
from mllm_audio.card import AUDIO_TOKENIZERS, code_version, is_hub_id, model_card
from mllm_audio.config import to_dict
from mllm_audio.evaluation.perplexity import Perplexity, TextDrift
from mllm_audio.hub import checkpoint_files, push_to_hub
from mllm_audio.model import AudioLanguageModel
from mllm_audio.presets import get_preset
from mllm_audio.tokenizers import TOKENIZERS

REPO = "someone/beeps"


def put(path: Path, values) -> None:
    path.write_text(json.dumps(values))


def change(path: Path, section: str | None, **values) -> None:
    """Set values of a JSON file, in a section of it or at its top."""
    content = json.loads(path.read_text())
    (content[section] if section else content).update(values)
    put(path, content)


@pytest.fixture
def checkpoint(make_model, text_tokenizer, tmp_path):
    """What `save_pretrained` writes, and nothing of a run."""
    folder = tmp_path / "home" / "voice"
    make_model().save_pretrained(folder)
    text_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(checkpoint):
    """The same with everything that a training run leaves beside it."""
    values = to_dict(test_run_config())
    values |= {
        "data_sha256": "ab" * 32,
        "replay_sha256": "cd" * 32,
        "data_manifest": str(checkpoint.parent / "beeps.jsonl"),
        "data_counts": {"train": 1200, "validation": 34},
    }
    put(checkpoint / "run.json", values)
    records = [
        {"step": 100, "validation/audio_loss": 0.75, "validation/end_loss": 0.5},
        {"step": 200, "validation/audio_loss": 0.625, "validation/end_loss": 0.25},
        {"step": 210, "train/audio_loss": 0.111},
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (checkpoint / "log.jsonl").write_text(lines + '{"step": 300, "validation/audio_lo')
    before, after = Perplexity(value=20.0, num_tokens=5000), Perplexity(value=21.0, num_tokens=5000)
    TextDrift(base=before, voice=after).write(checkpoint)
    for name in ("checkpoints/step-00000200/state.safetensors", "tensorboard/events", ".lock"):
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_bytes(b"x")
    (checkpoint / "README.md").write_text("left by another library")
    return checkpoint


@pytest.fixture
def make_adapter(base, tmp_path):
    """Save a LoRA adapter of a tiny base model that was loaded from `told`."""

    def make(told: str) -> Path:
        audio = test_run_config().audio
        model = AudioLanguageModel.from_backbone(base(), audio, AdaptConfig(mode="lora"))
        model.origin = replace(model.origin, base=told)
        model.lora.base_model_name_or_path = told
        model.save_adapter(tmp_path / "adapter")
        return tmp_path / "adapter"

    return make


def test_front_matter_parses_back(run):
    data = ModelCard(model_card(run, REPO, license="apache-2.0")).data.to_dict()
    assert data == {
        "library_name": "mllm-audio",
        "license": "apache-2.0",
        "pipeline_tag": "text-to-audio",
        "tags": ["text-to-audio", "audio", "mllm-audio"],
    }


def test_the_card_of_a_run_states_what_its_files_hold(run, make_model):
    card = model_card(run, REPO)
    num_parameters = sum(p.numel() for p in make_model().parameters())
    for row in (
        "| backbone | gpt2 |",
        f"| parameters | {num_parameters:,} |",
        "| longest clip | 0.64 s, 16 latents |",
        "| audio tokenizer | `dct` |",
        "| licence of its weights | none needed, it has no weights |",
        "| sample rate | 16,000 Hz |",
        "| preset | tiny |",
        "| data | beeps.jsonl: 1,200 train, 34 validation clips |",
        f"| SHA-256 of the data | `{'ab' * 32}` |",
        f"| SHA-256 of the replay | `{'cd' * 32}` |",
        "| validation at step 200 | audio_loss 0.625, end_loss 0.25 |",
        "| text | held-out text perplexity 21.00, base model 20.00 (+5.0 %) over 5,000 tokens |",
        f"| card written by | mllm-audio {code_version()} |",
    ):
        assert row + "\n" in card
    assert "# beeps\n" in card
    assert f'Voice.load(snapshot_download("{REPO}"))' in card
    assert f'AutoModelForCausalLM.from_pretrained("{REPO}")' in card
    assert str(run.parent) not in card


def test_a_fact_that_no_file_states_is_not_in_the_card(checkpoint):
    card = model_card(checkpoint, REPO)
    absent = ("base model", "trained", "preset", "data", "validation", "| text |", "fingerprint")
    assert [word for word in absent if f"| {word}" in card] == []
    assert "license" not in card
    assert "non-commercial" not in card


def test_a_manifest_without_counts_is_named_alone(run):
    change(run / "run.json", None, data_counts={})
    assert "| data | beeps.jsonl |\n" in model_card(run)


def test_the_usage_is_python_that_finds_its_names(checkpoint):
    code = model_card(checkpoint, REPO).split("```python\n")[1].split("```")[0]
    for line in code.splitlines():
        if line.startswith("from"):
            exec(line)
    compile(code, "card", "exec")


def test_an_adapter_names_its_base_on_the_hub(make_adapter, base):
    folder = make_adapter("gpt2")
    card = model_card(folder, REPO)
    data = ModelCard(card).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("gpt2", "adapter")
    assert "lora" in data["tags"]
    assert "| base model | [gpt2](https://huggingface.co/gpt2) |" in card
    assert "| trained | audio modules and LoRA layers, beside a base model" in card
    audio = test_run_config().audio
    model = AudioLanguageModel.from_backbone(base(), audio, AdaptConfig(mode="lora"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"| parameters | {trained:,} beside the base model's |" in card
    assert "AutoModelForCausalLM" not in card


def test_a_base_in_a_local_folder_is_no_base_of_the_hub(make_adapter, tmp_path):
    card = model_card(make_adapter(str(tmp_path / "home" / "my-llama")), REPO)
    assert "base_model" not in ModelCard(card).data.to_dict()
    assert "| base model | `my-llama`, a local folder |" in card
    assert 'snapshot_download("someone/beeps"), base="FOLDER_OF_THE_BASE_MODEL")' in card
    assert str(tmp_path) not in card


def test_a_full_run_takes_base_and_mode_from_its_configuration(run):
    change(run / "run.json", None, base="org/llama", adapt={"mode": "full"})
    card = model_card(run, REPO)
    data = ModelCard(card).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("org/llama", "finetune")
    assert "| trained | audio modules and the whole base model |" in card
    change(run / "run.json", None, base=None)
    assert "| trained |" not in model_card(run, REPO)  # from random weights: the mode says nothing


def test_weights_under_a_non_commercial_licence_are_announced(checkpoint):
    change(
        checkpoint / "config.json",
        "audio",
        tokenizer="audioldm:cvssp/audioldm-s-full-v2",
        tokenizer_fingerprint="feed",
    )
    card = model_card(checkpoint, REPO)
    assert "| audio tokenizer | `audioldm:cvssp/audioldm-s-full-v2`, fingerprint `feed` |" in card
    assert "| licence of its weights | CC-BY-NC-SA-4.0 |" in card
    assert "Sounds made with them are for non-commercial use." in card
    change(checkpoint / "config.json", "audio", tokenizer="audioldm:/data/vae")
    assert "`audioldm:vae`" in model_card(checkpoint, REPO)


def test_every_audio_tokenizer_states_the_licence_of_its_weights():
    assert AUDIO_TOKENIZERS.keys() == TOKENIZERS.keys()
    licences = {name: kind.weights_license for name, kind in AUDIO_TOKENIZERS.items()}
    assert licences == {"dct": "", "audioldm": "CC-BY-NC-SA-4.0"}


def test_a_folder_without_a_voice_has_no_card(tmp_path):
    with pytest.raises(ValueError, match=r"found no config.json in .*: expected a folder"):
        model_card(tmp_path)


def test_damaged_weights_are_named(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"model.safetensors is damaged \(.*restore it"):
        model_card(checkpoint)


def test_hub_ids_are_told_from_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    assert is_hub_id("gpt2")
    assert is_hub_id("meta-llama/Llama-3.2-1B")
    local = ("runs/mine", "/data/gpt2", "./gpt2", "~/gpt2", "a/b/c", "C:\\models\\gpt2", "")
    assert [name for name in local if is_hub_id(name)] == []


def test_the_commit_is_that_of_the_packages_own_checkout(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *words],
            cwd=tmp_path, check=True, capture_output=True,
        )  # fmt: skip

    package = tmp_path / "env" / "mllm_audio"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    monkeypatch.setattr(mllm_audio, "__file__", str(package / "__init__.py"))
    assert code_version() == mllm_audio.__version__  # the commit of another project is not ours
    monkeypatch.setattr(mllm_audio, "__file__", str(tmp_path / "env" / "__init__.py"))
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout.strip()
    assert code_version() == f"{mllm_audio.__version__}, commit {head}"
    (package / "__init__.py").write_text("changed")
    assert code_version() == f"{mllm_audio.__version__}, commit {head}-dirty"


class Hub(ThreadingHTTPServer):
    """Repositories in memory: what creating, listing, branching and committing need."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.private = None  # None: there is no repository
        self.branches = {"main": {".gitattributes": b""}}
        self.commits = []
        self.status = 200  # of creating a repository

    def commit(self, branch, lines):
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.branches[branch][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del self.branches[branch][value["path"]]
            else:
                self.commits.append(value["summary"])


class Answers(BaseHTTPRequestHandler):
    def answer(self, values, status=200):
        body = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path == "/api/whoami-v2":
            return self.answer({"name": "someone"})
        if self.server.private is None:
            return self.answer({"error": "Repository not found"}, 404)
        branch = self.path.partition("/revision/")[2] or "main"
        files = [{"rfilename": name} for name in self.server.branches[branch]]
        return self.answer({"id": REPO, "private": self.server.private, "siblings": files})

    def do_POST(self):
        assert self.headers["Authorization"] == "Bearer hf_word"
        body = self.rfile.read(int(self.headers["Content-Length"]))
        branch = self.path.rpartition("/")[2]
        if self.path == "/api/repos/create":
            if self.server.status != 200:
                return self.answer({"error": "no\nway"}, self.server.status)
            if self.server.private is not None:
                return self.answer({"url": f"{self.server.url}/{REPO}"}, 409)
            self.server.private = json.loads(body).get("visibility") == "private"
            return self.answer({"url": f"{self.server.url}/{REPO}"})
        if self.path == "/api/validate-yaml":
            return self.answer({})
        if "/branch/" in self.path:
            self.server.branches[branch] = dict(self.server.branches["main"])
            return self.answer({})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]
            return self.answer({"files": modes})
        assert "/commit/" in self.path
        self.server.commit(branch, map(json.loads, body.splitlines()))
        return self.answer({"commitUrl": f"{self.server.url}/{REPO}/commit/1", "commitOid": "1"})

    def log_message(self, *words):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_word")
    yield server
    server.shutdown()
    server.server_close()


def test_a_push_uploads_the_checkpoint_and_its_card_and_nothing_else(run, hub):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert push_to_hub(run, REPO) == f"{hub.url}/{REPO}"
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    files = hub.branches["main"]
    assert files.keys() == {
        ".gitattributes",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "text_drift.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert files["README.md"].decode() == model_card(run, REPO)
    assert files["model.safetensors"] == (run / "model.safetensors").read_bytes()
    assert hub.commits == ["Upload voice"]
    assert hub.private is False


@pytest.mark.parametrize("kind", ["checkpoint", "adapter"])
def test_what_was_pushed_loads_as_it_was(kind, checkpoint, make_adapter, base, hub, tmp_path):
    folder = checkpoint if kind == "checkpoint" else make_adapter(str(base()))
    push_to_hub(folder, REPO)
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in hub.branches["main"].items():
        (copy / name).write_bytes(content)
    where = None if kind == "checkpoint" else str(base())
    found = AudioLanguageModel.from_pretrained(copy, where).state_dict()
    expected = AudioLanguageModel.from_pretrained(folder).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_no_uploaded_byte_holds_a_local_path(run, hub, tmp_path, make_adapter):
    change(run / "config.json", None, _name_or_path=str(tmp_path / "home" / "base"))
    push_to_hub(run, REPO)
    assert json.loads(hub.branches["main"]["config.json"])["_name_or_path"] == "base"
    adapter = make_adapter(str(tmp_path / "my-llama"))
    push_to_hub(adapter, REPO, revision="adapter")
    uploaded = hub.branches["adapter"]
    assert json.loads(uploaded["audio_adapter.json"])["base"] == "my-llama"
    assert json.loads(uploaded["adapter_config.json"])["base_model_name_or_path"] == "my-llama"
    contents = [*hub.branches["main"].values(), *uploaded.values()]
    assert [content for content in contents if str(tmp_path).encode() in content] == []


def test_a_second_push_deletes_the_files_that_the_checkpoint_lacks(checkpoint, hub):
    stale = "model.safetensors.index.json"  # it would be read before the new weights
    there = hub.branches["main"]
    there |= {stale: b"{}", "samples.wav": b"x", "onnx/model.safetensors": b"{}"}
    push_to_hub(checkpoint, REPO, commit_message="Again")
    assert stale not in there
    assert there.keys() >= {"samples.wav", "onnx/model.safetensors", "model.safetensors"}
    assert hub.commits == ["Again"]


def test_a_name_without_owner_is_ones_own(checkpoint, hub):
    push_to_hub(checkpoint, "beeps", private=True)
    assert f'snapshot_download("{REPO}")' in hub.branches["main"]["README.md"].decode()
    assert hub.private is True


def test_a_branch_is_made_and_leaves_the_main_one_alone(checkpoint, hub):
    push_to_hub(checkpoint, REPO, revision="draft", card="mine")
    assert hub.branches["draft"]["README.md"] == b"mine"
    assert hub.branches["main"].keys() == {".gitattributes"}


def test_a_private_push_never_goes_to_a_public_repository(checkpoint, hub):
    hub.private = False
    with pytest.raises(ValueError, match="someone/beeps exists and is public, expected a private"):
        push_to_hub(checkpoint, REPO, private=True)
    assert hub.commits == []


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"does not let you write to someone/beeps \(401: no way\); type  hf auth login"),
        (403, r"does not let you write to someone/beeps \(403: no way\); type  hf auth login"),
        (500, r"the hub refused someone/beeps \(500: no way\)"),
    ],
)
def test_what_the_hub_refuses_is_one_line(checkpoint, hub, status, message):
    hub.status = status
    with pytest.raises(OSError, match=message) as failure:
        push_to_hub(checkpoint, REPO)
    assert "\n" not in str(failure.value)


def test_who_is_not_logged_in_is_told_what_to_type(checkpoint, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(checkpoint / "no-token"))
    assert huggingface_hub.get_token() is None
    with pytest.raises(ValueError, match=r"found no token .*; type: hf auth login"):
        push_to_hub(checkpoint, REPO)


def test_a_hub_that_is_not_there_is_one_line(checkpoint, hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match=r"cannot reach the hub for someone/beeps .*; check the net"):
        push_to_hub(checkpoint, REPO)


@pytest.mark.parametrize("name", ["a/b/c", "-a", "a--b", "two words"])
def test_names_that_no_repository_has_are_refused(checkpoint, hub, name):
    with pytest.raises(ValueError, match=rf"'{name}' cannot be a repository .*expected OWNER/NAME"):
        push_to_hub(checkpoint, name)


def test_folders_that_nobody_could_load_are_refused_before_anything_is_made(checkpoint, hub):
    (checkpoint / "model.safetensors").rename(checkpoint / "gone")
    with pytest.raises(ValueError, match=r"found no weights \(\*.safetensors\) in"):
        push_to_hub(checkpoint, REPO)
    (checkpoint / "gone").rename(checkpoint / "model.safetensors")
    change(checkpoint / "config.json", "audio", tokenizer=f"audioldm:{checkpoint.parent}")
    with pytest.raises(ValueError, match=r"needs audio tokenizer audioldm:/.*a local folder"):
        push_to_hub(checkpoint, REPO)
    assert hub.private is None


def test_every_file_of_a_sharded_checkpoint_goes_up(checkpoint):
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        put(checkpoint / name, {})
    names = checkpoint_files(checkpoint).keys()
    assert {"model-00001-of-00002.safetensors", "model.safetensors.index.json"} <= names


def test_a_model_of_prompts_names_its_encoders_and_claims_no_text_side(tmp_path):
    config = get_preset("abl_e_small")
    sizes = replace(config.backbone, hidden_size=32, num_layers=2, num_heads=2)
    audio = replace(config.audio, conditioner="clap_t5:clap=/home/me/clap,t5=google/flan-t5-large")
    model = AudioLanguageModel(build_backbone(sizes, 4), audio)
    model.save_pretrained(tmp_path / "run")
    card = model_card(tmp_path / "run", "me/x")
    assert "| prompted by | `clap_t5`: clap `clap`, t5 `google/flan-t5-large` |" in card
    assert "/home" not in card and "text side" not in card
    assert f"| parameters | {count_parameters(model)['total']:,} |" in card
    with pytest.raises(ValueError, match="is prompted by /home/me/clap, local folders that nobody"):
        checkpoint_files(tmp_path / "run")
    path = tmp_path / "run/config.json"
    values = json.loads(path.read_text())
    values["audio"]["conditioner"] = "clap_t5:clap=laion/clap,t5=google/flan-t5-large"
    path.write_text(json.dumps(values))
    assert "model.safetensors" in checkpoint_files(tmp_path / "run")
