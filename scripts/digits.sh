#!/usr/bin/env bash
# Spoken digits, start to finish: prepare, train, 200 clips, judgement.
#
#   scripts/digits.sh DATA [mntp|ntp|mntp-c] [OUT]
#
# DATA holds the recordings of the Free Spoken Digit Dataset (CC BY-SA 4.0) and a captions.jsonl
# with a row {audio, caption, captions, split, label, speaker} for each. The objective is
# masked next-token prediction with ratios uniform in [0, 0.5] (the preset), next-token prediction,
# or masking with the paper's schedule C. Prepare and train take 13 minutes on 2 cores.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:?type scripts/digits.sh DATA [mntp|ntp|mntp-c] [OUT]}
objective=${2:-mntp}
case $objective in
  mntp) out=${3:-runs/digits} overrides=(masking.schedule=uniform masking.scale=0.5) ;;
  ntp) out=${3:-runs/digits-ntp} overrides=(masking.schedule=ntp) ;;
  mntp-c) out=${3:-runs/digits-mntp-c} overrides=(masking.schedule=c) ;;
  *) echo "error: found objective '$objective', expected mntp, ntp or mntp-c" >&2; exit 2 ;;
esac
make --quiet .venv/dev
export PATH="$PWD/.venv/bin:$PATH"

mllm-audio prepare "$data/captions.jsonl" --out "$out/data" --max-seconds 1.28
mllm-audio train --preset digits --data "$out/data" --out "$out" "${overrides[@]}"
python scripts/digits_generate.py "$out" --captions "$data/captions.jsonl" --out "$out/judge"
python scripts/digits_judge.py --recordings "$data" --generated "$out/judge" --out "$out/judge/report.json"
