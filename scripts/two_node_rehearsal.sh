#!/usr/bin/env bash
# Rehearse on one machine what happens to a training run on two nodes: kill processes, nodes, saves.
#
#   scripts/two_node_rehearsal.sh [OUT]
#
# Two network namespaces, joined by a virtual cable, are the nodes. A small model is trained on one
# process, then across both nodes with ZeRO 2 while this or that is killed; rehearsal_cases.py says
# what, and compares the losses. Everything is kept in OUT (runs/rehearsal). The exit code is 0 if
# every case ends on the reference curve, 1 if not, 77 where namespaces cannot be made: that needs
# root and `ip`. Type it in an environment that has `mllm-audio[train]`; no GPU is used.
set -euo pipefail
scripts=$(cd "$(dirname "$0")" && pwd)
out=${1:-runs/rehearsal}
skip() { echo "skipped: $1" >&2; exit 77; }
[ "$(id -u)" -eq 0 ] || skip "network namespaces need root"
command -v ip >/dev/null || skip "network namespaces need the command ip (iproute2)"
[ ! -e "$out" ] || { echo "error: found $out; delete it, or type another folder" >&2; exit 2; }

# Named by this process, so that rehearsals do not meet; names of devices have at most 15 characters.
nodes=("rehearsal-$$-0" "rehearsal-$$-1")
clean_up() {
  [ -z "${cases:-}" ] || kill "$cases" 2>/dev/null || true
  for node in "${nodes[@]}"; do
    ip netns pids "$node" 2>/dev/null | xargs -r kill -9 || true
    ip netns del "$node" 2>/dev/null || true
  done
}
trap clean_up EXIT
trap 'exit 130' INT TERM HUP
ip netns add "${nodes[0]}" || skip "ip cannot make network namespaces here"
ip netns add "${nodes[1]}"
ip link add "rh$$a" netns "${nodes[0]}" type veth peer name "rh$$b" netns "${nodes[1]}"
devices=("rh$$a" "rh$$b")
for i in 0 1; do
  ip -n "${nodes[i]}" addr add "10.77.0.$((i + 1))/24" dev "${devices[i]}"
  ip -n "${nodes[i]}" link set "${devices[i]}" up
  ip -n "${nodes[i]}" link set lo up
done

export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=
# The processes' store must not die with the agent of a lost node: without this no restart succeeds.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
mkdir -p "$out"
python - "$out/sounds" <<'PYTHON'
import sys
from pathlib import Path

from mllm_audio.data.soundscapes import write_soundscapes

write_soundscapes(Path(sys.argv[1]), num_train=64, num_held_out=1)
PYTHON
python -m mllm_audio prepare "$out/sounds/manifest.jsonl" --out "$out/data" --max-seconds 2.56 \
  --num-workers 0
python "$scripts/rehearsal_cases.py" "$out" "${nodes[0]}/${devices[0]}" "${nodes[1]}/${devices[1]}" &
cases=$!
wait "$cases" # in the background, so that a signal is answered at once
