#!/usr/bin/env bash
# Train on the hosts of a file, over ssh.
#
#   scripts/train_hostfile.sh HOSTFILE --preset base_193m --data DATA --out RUN \
#     --deepspeed configs/deepspeed/zero2.json [section.key=value ...]
#
# HOSTFILE has a line "HOST slots=N" for each host, N the processes (GPUs) there; the first host must
# be reachable by that name from the others. What follows is passed to `mllm-audio train`. This
# folder, the Python environment, DATA and RUN are at the same paths on all hosts, and ssh asks for
# no password.
#
# A process that dies is started again with all others, from the last checkpoint. Ctrl-C saves and
# stops. If a host is lost, all stop; the same command resumes. The exit code is 0 if all are done.
#
# DeepSpeed's own launcher reads the same file, but starts nothing again (it needs pdsh; without ssh,
# add --no_ssh --node_rank I --master_addr FIRST_HOST and type it on every host):
#
#   deepspeed --hostfile HOSTFILE --module mllm_audio train --preset base_193m --data DATA ...
set -euo pipefail

# Settings, from the environment, where variables named NCCL_*, GLOO_*, TORCH_* and HF_HUB_OFFLINE
# are passed on too:
COMMAND=${COMMAND:-train}                    # or add-voice
PORT=${PORT:-29400}                          # of the first host
MAX_RESTARTS=${MAX_RESTARTS:-3}              # of all processes after one died
JOIN_SECONDS=${JOIN_SECONDS:-600}            # how long hosts wait for each other
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}  # of a process; many for offload to the host
# How long a save may take before what is left is killed.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}

hostfile=${1:?type scripts/train_hostfile.sh HOSTFILE --preset NAME --data DATA --out RUN ...}
shift
hosts=() slots=()
while read -r host slot _; do
  case $host in "" | "#"*) continue ;; esac
  case $slot in slots=[1-9]*) ;; *)
    echo "error: found '$host $slot' in $hostfile, expected '$host slots=N'" >&2
    exit 2
    ;;
  esac
  hosts+=("$host") slots+=("${slot#slots=}")
done <"$hostfile"
[ ${#hosts[@]} -gt 0 ] || { echo "error: found no host in $hostfile, expected 'HOST slots=N'" >&2; exit 2; }

# The processes' store must not die with the agent of a lost node: without this no restart succeeds.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
mapfile -t variables < <(env | grep -E '^(NCCL_|GLOO_|TORCH_|OMP_NUM_THREADS=|HF_HUB_OFFLINE=)')
python=$(command -v python)
id=$(date +%s)-$$
connect() { ssh -o BatchMode=yes -o ServerAliveInterval=15 "$@"; }

agents=()
for i in "${!hosts[@]}"; do
  agent=("$python" -m torch.distributed.run --rdzv-id="$id" --local-addr="${hosts[i]}"
    --nnodes="${#hosts[@]}" --nproc-per-node="${slots[i]}" --max-restarts="$MAX_RESTARTS"
    --rdzv-backend=c10d --rdzv-endpoint="${hosts[0]}:$PORT"
    --rdzv-conf="join_timeout=$JOIN_SECONDS,is_host=$((i == 0))" -m mllm_audio "$COMMAND" "$@")
  connect "${hosts[i]}" "cd $(printf %q "$PWD") && exec env $(printf '%q ' "${variables[@]}" "${agent[@]}")" &
  agents+=($!)
done

stop() { # ask every agent once to save and end; it is found by the start of its command line
  [ -z "${stopping:-}" ] || return 0
  stopping=1
  for host in "${hosts[@]}"; do
    connect "$host" "pkill -TERM -f '^$python -m torch.distributed.run --rdzv-id=$id --local-addr=$host '" || true
  done
}
trap : INT TERM # they end `wait -n`
while [ -n "$(jobs -pr)" ]; do wait -n || stop; done # one is lost, so the others wait for nothing
status=0
for agent in "${agents[@]}"; do wait "$agent" || status=$?; done
exit "$status"
