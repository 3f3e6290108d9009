#!/usr/bin/env bash
# Serve a checkpoint, environment included.
#
#   scripts/serve.sh RUN [OPTIONS OF mllm-audio serve] [-- OPTIONS OF vLLM]
set -euo pipefail
[ $# -gt 0 ] || { echo "error: found no RUN, type scripts/serve.sh RUN [OPTIONS]" >&2; exit 2; }
venv=$("$(dirname "$0")/vllm_environment.sh")
exec "$venv/bin/mllm-audio" serve "$@"
