#!/usr/bin/env bash
# Train on many nodes of a SLURM cluster.
#
#   sbatch --nodes 8 --gpus-per-node 8 scripts/train_slurm.sh --preset base_193m --data DATA \
#     --out RUN --deepspeed configs/deepspeed/zero2.json [section.key=value ...]
#
# What follows the script's name is passed to `mllm-audio train`. Submit from an environment that has
# `mllm-audio[train]`; DATA and RUN are on a file system that all nodes see. Options of sbatch such
# as --partition and --time go before the script's name.
#
# - A process that dies is started again with all others (MAX_RESTARTS times), from the last
#   checkpoint; a node that dies makes SLURM put the job back into the queue (--requeue below).
# - 300 s before the time limit (and on preemption, where the cluster sends the user's signal then)
#   the run saves and puts itself back into the queue. It goes on where it stopped.
# - To stop a run and keep every step:  scancel --signal=TERM JOB  (a bare scancel goes back to the
#   last checkpoint). The same sbatch command resumes it.
# - The exit code is 0 if the training is complete or queued again.
#
#SBATCH --job-name=mllm-audio
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
set -euo pipefail

# Settings, from the environment:
COMMAND=${COMMAND:-train}                    # or add-voice
PROCESSES_PER_NODE=${PROCESSES_PER_NODE:-gpu}  # a number, or one for each GPU of the node
MAX_RESTARTS=${MAX_RESTARTS:-3}              # of all processes after one died, without the queue
JOIN_SECONDS=${JOIN_SECONDS:-600}            # how long nodes wait for each other
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}  # of a process; many for offload to the host
# How long a save may take before what is left is killed; less than --signal allows.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}
# Where nodes have several networks, name the one to use: export NCCL_SOCKET_IFNAME, and
# GLOO_SOCKET_IFNAME for the messages beside gradients.

job=${SLURM_JOB_ID:?found no SLURM job, expected: sbatch --nodes N scripts/train_slurm.sh ...}
PORT=${PORT:-$((20000 + job % 10000))}       # of the first node; jobs on one node need different ones
restart=${SLURM_RESTART_COUNT:-0}
# srun has not inherited this one from sbatch since SLURM 22.05.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
# The processes' store must not die with the agent of a lost node: without this no restart succeeds.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export COMMAND PROCESSES_PER_NODE MAX_RESTARTS JOIN_SECONDS
read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export RENDEZVOUS=$first:$PORT RENDEZVOUS_ID=$job-$restart

echo "job $job, start $((restart + 1)): $SLURM_JOB_NUM_NODES nodes meet at $RENDEZVOUS" >&2
# One agent per node; what differs between nodes is known there only.
# shellcheck disable=SC2016
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c '
  exec torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$PROCESSES_PER_NODE" \
    --max-restarts="$MAX_RESTARTS" --rdzv-backend=c10d --rdzv-endpoint="$RENDEZVOUS" \
    --rdzv-id="$RENDEZVOUS_ID" --local-addr="$SLURMD_NODENAME" \
    --rdzv-conf="join_timeout=$JOIN_SECONDS,is_host=$((SLURM_NODEID == 0))" \
    -m mllm_audio "$COMMAND" "$@"' agent "$@" &
agents=$!

# To the agents, not to srun, which answers SIGTERM with SIGKILL.
trap 'leaving=1; scancel --signal=TERM "$job"' USR1
while kill -0 "$agents" 2>/dev/null; do wait "$agents" || true; done # a signal ends `wait` early
status=0
wait "$agents" || status=$?
if [ "$status" -ne 0 ] && [ -n "${leaving:-}" ]; then
  echo "job $job: stopped before the time limit, back into the queue" >&2
  status=0
  scontrol requeue "$job" || status=$?
fi
exit "$status"
