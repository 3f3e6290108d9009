#!/usr/bin/env bash
# A voice for a language model that has none, start to finish.
#
#   scripts/add_voice_to_gpt2.sh DATA [frozen|lora|full] [OUT]
#
# A small GPT-2 is pre-trained on Python's own documentation and on chats such as "say seven" ->
# "Sure: that was seven."; it learns from DATA to answer with the spoken word inside: "Sure: <audio>
# that was seven." DATA holds the recordings of the Free Spoken Digit Dataset (CC BY-SA 4.0) and a
# captions.jsonl with a row {audio, caption, split, label, speaker} for each. 200 answers are judged
# by a classifier trained on the recordings only, and the text by its perplexity beside the base's.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:?type scripts/add_voice_to_gpt2.sh DATA [frozen|lora|full] [OUT]}
mode=${2:-frozen}
out=${3:-runs/voice}
case $mode in
  frozen) flag=() ;;
  lora | full) flag=("--$mode") ;;
  *) echo "error: found mode '$mode', expected frozen, lora or full" >&2; exit 2 ;;
esac
make --quiet .venv/dev
export PATH="$PWD/.venv/bin:$PATH"

mkdir -p "$out"
[ -d "$out/base" ] || python scripts/pretrain_gpt2.py --out "$out/base"
python scripts/say_conversations.py "$data/captions.jsonl" --out "$out/say.jsonl"
mllm-audio prepare "$out/say.jsonl" --out "$out/data" --max-seconds 1.28
mllm-audio add-voice "$out/base" --preset voice_digits --data "$out/data" --out "$out/$mode" \
  ${flag[@]+"${flag[@]}"} --replay "$out/base/replay.jsonl" --held-out-text "$out/base/held_out.jsonl"
python scripts/say_generate.py "$out/$mode" --recordings "$data" --out "$out/judge-$mode"
python scripts/digits_judge.py --recordings "$data" --generated "$out/judge-$mode" \
  --out "$out/judge-$mode/report.json"
