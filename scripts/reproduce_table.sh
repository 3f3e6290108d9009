#!/usr/bin/env bash
# A table of the paper at its scale, start to finish: manifests, latents, training, sounds, scores.
#
#   scripts/reproduce_table.sh TABLE [OUT] [ARGUMENTS OF mllm-audio reproduce]
#
# TABLE is table1, table3, table4, table5, table6 or table8. What it starts from stands in
# environment variables:
#
#   AUDIOCAPS  folder with train.csv, val.csv, test.csv and the clips in clips/
#   WAVCAPS    folder with the json files and the clips of WavCaps; optional
#   WAVCAPS_EXCLUDE  list of its ids to leave out; optional, but WavCaps holds test clips of
#              AudioCaps: WavCaps' own blacklist_exclude_test_ac.json names them
#   IDS        file of the evaluation clips' ids, 964 in the paper; optional, else all of test.csv
#   AUDIOLDM   folder or hub id of the VAE and vocoder    [cvssp/audioldm-s-full-v2, CC BY-NC-SA]
#   CLAP, T5   folders or hub ids of the text encoders    [laion/larger_clap_general, google/flan-t5-large]
#   MAR_BASE, MAR_LARGE  checkpoint-last.pth of github.com/LTH14/mar: mar_base, mar_large
#   PANNS, VGGISH, CLAP_PT  Cnn14_16k_mAP=0.438.pth, vggish-10086976.pth,
#              music_speech_audioset_epoch_15_esc_89.98.pt: what measures. The .pt needs
#              laion-clap, torchvision and torchaudio; a ClapModel's folder needs none of them, but
#              the paper's value of CLAP is of the .pt
#   LAUNCHER   e.g. "torchrun --nproc_per_node 8"; empty trains in one process
#
# Each step keeps what is finished, so the same command continues. Which of table 1's rows are large
# decides the checkpoint they start from: those are run with MAR_LARGE.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
table=${1:?type scripts/reproduce_table.sh TABLE [OUT]}
out=${2:-runs/$table}
shift $(($# < 2 ? $# : 2))
case $table in
  table1 | table3 | table4 | table5 | table6 | table8) ;;
  *) echo "error: found '$table', expected table1, table3, table4, table5, table6 or table8" >&2; exit 2 ;;
esac
: "${AUDIOCAPS:?set AUDIOCAPS to the folder of train.csv, val.csv, test.csv and clips/}"
: "${MAR_BASE:?set MAR_BASE to checkpoint-last.pth of mar_base}"
: "${PANNS:?set PANNS to Cnn14_16k_mAP=0.438.pth}"
: "${VGGISH:?set VGGISH to vggish-10086976.pth}"
: "${CLAP_PT:?set CLAP_PT to music_speech_audioset_epoch_15_esc_89.98.pt}"
for name in AUDIOCAPS MAR_BASE PANNS VGGISH CLAP_PT MAR_LARGE IDS WAVCAPS WAVCAPS_EXCLUDE; do
  path=${!name:-}
  if [ -n "$path" ] && [ ! -e "$path" ]; then
    echo "error: found nothing at $name=$path; check the path" >&2
    exit 2
  fi
done
make --quiet -C "$root" .venv/dev
export PATH="$root/.venv/bin:$PATH"
if [ -f "$CLAP_PT" ] && ! why=$(python -c "import laion_clap" 2>&1); then
  echo "error: CLAP_PT=$CLAP_PT needs laion-clap (${why##*$'\n'}); type $root/.venv/bin/pip install" \
    "laion-clap torchvision torchaudio, or set CLAP_PT to a ClapModel's folder" >&2
  exit 2
fi

data=$out/data manifests=$out/manifests
mllm-audio import audiocaps "$AUDIOCAPS" --audio "$AUDIOCAPS/clips" --out "$manifests/audiocaps" \
  ${IDS:+--ids "$IDS"}
train=$manifests/audiocaps/manifest.jsonl
if [ -n "${WAVCAPS:-}" ]; then
  mllm-audio import wavcaps "$WAVCAPS" --audio "$WAVCAPS" --out "$manifests/wavcaps" \
    ${WAVCAPS_EXCLUDE:+--exclude "$WAVCAPS_EXCLUDE"}
  python "$root/scripts/join_manifests.py" "$manifests/all.jsonl" "$train" "$manifests/wavcaps/manifest.jsonl"
  train=$manifests/all.jsonl
fi
mllm-audio prepare "$train" --out "$data" --pad --crop random \
  --tokenizer "audioldm:${AUDIOLDM:-cvssp/audioldm-s-full-v2}" \
  --conditioner "clap_t5:clap=${CLAP:-laion/larger_clap_general},t5=${T5:-google/flan-t5-large}"

run() {
  mllm-audio reproduce "$table" --scale paper --data "$data" --out "$out" \
    --captions "$manifests/audiocaps/manifest.jsonl" \
    --reference "$manifests/audiocaps/manifest.jsonl" \
    --panns "$PANNS" --vggish "$VGGISH" --clap "$CLAP_PT" --launcher "${LAUNCHER:-}" "$@"
}
if [ "$table" = table1 ]; then
  run --init-from "$MAR_BASE" --rows ntp,base,base6 "$@"
  : "${MAR_LARGE:?set MAR_LARGE to checkpoint-last.pth of mar_large for the last row of table 1}"
  run --init-from "$MAR_LARGE" --rows large "$@"
else
  run --init-from "$MAR_BASE" "$@"
fi
