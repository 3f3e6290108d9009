#!/usr/bin/env bash
# Prepare one corpus on many machines: a SLURM job array, then one job that joins the parts.
#
#   job=$(sbatch --parsable --array=1-16 scripts/prepare_slurm.sh MANIFEST OUT [prepare options])
#   sbatch --dependency="afterok:$job" scripts/prepare_slurm.sh --merge OUT
#
# Task i of n writes OUT.parts/i-of-n; the second job joins these folders in OUT, which holds the
# very bytes that one machine would have written. Number the tasks from 1 without gaps. What was
# killed or requeued continues when the same commands are typed again: finished parts stay. Once OUT
# is complete, OUT.parts can be deleted. Submit from an environment that has `mllm-audio`, to a
# file system that all nodes see; sbatch options such as --partition and --time go before the script.
#
# Without SLURM, the same on one machine, or anywhere else that numbers its tasks (AWS Batch counts
# AWS_BATCH_JOB_ARRAY_INDEX from 0, Kubernetes JOB_COMPLETION_INDEX from 0, Ray any list of tasks):
#
#   export SLURM_ARRAY_TASK_COUNT=4
#   for i in 1 2 3 4; do SLURM_ARRAY_TASK_ID=$i scripts/prepare_slurm.sh MANIFEST OUT; done
#   scripts/prepare_slurm.sh --merge OUT
#
# or by the commands that this script types:
#
#   mllm-audio prepare MANIFEST --out OUT.parts/i-of-n --shard i/n
#   mllm-audio prepare --merge OUT.parts/* --out OUT
#
#SBATCH --job-name=prepare
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
set -euo pipefail
usage="type scripts/prepare_slurm.sh MANIFEST OUT [prepare options], or --merge OUT"
manifest=${1:?$usage}
out=${2:?$usage}
out=${out%/}
shift 2

if [ "$manifest" = --merge ]; then
  exec mllm-audio prepare --merge "$out.parts"/* --out "$out" "$@"
fi
task=${SLURM_ARRAY_TASK_ID:?found no job array, expected sbatch --array=1-n}
count=${SLURM_ARRAY_TASK_COUNT:?found no job array, expected sbatch --array=1-n}
exec mllm-audio prepare "$manifest" --out "$out.parts/$task-of-$count" --shard "$task/$count" \
  --num-workers "${SLURM_CPUS_PER_TASK:-1}" "$@"
