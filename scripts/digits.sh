#!/usr/bin/env bash
# Spoken digits, start to finish: prepare, train, 200 clips, judgement.
#
#   scripts/digits.sh DATA [mntp|ntp] [OUT]
#
# DATA holds the recordings of the Free Spoken Digit Dataset (CC BY-SA 4.0) and a captions.jsonl
# with a row {audio, caption, captions, split, label, speaker} for each. OUT is runs/digits, or
# runs/digits-ntp for next-token prediction. Prepare and train take at most 30 minutes on 2 cores.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:?type scripts/digits.sh DATA [mntp|ntp] [OUT]}
objective=${2:-mntp}
case $objective in
  mntp) out=${3:-runs/digits} overrides=() ;;
  ntp) out=${3:-runs/digits-ntp} overrides=(masking.schedule=ntp) ;;
  *) echo "error: found objective '$objective', expected mntp or ntp" >&2; exit 2 ;;
esac
[ -x .venv/bin/mllm-audio ] || make .venv/dev
export PATH="$PWD/.venv/bin:$PATH"

mllm-audio prepare "$data/captions.jsonl" --out "$out/data" --max-seconds 1.28
mllm-audio train --preset digits --data "$out/data" --out "$out" ${overrides[@]+"${overrides[@]}"}
python scripts/digits_generate.py "$out" --captions "$data/captions.jsonl" --out "$out/judge"
python scripts/digits_judge.py --recordings "$data" --generated "$out/judge" --out "$out/judge/report.json"
