"""Generate 200 spoken digits, every speaker with every digit, for a judge to listen to.

    python scripts/digits_generate.py RUN --captions DATA/captions.jsonl --out DIR

Writes DIR/wav/*.wav, DIR/captions.jsonl with rows {audio, caption, label, speaker}, and
DIR/spectrograms.png: recordings in odd columns, generated clips of the same digit by the same
speaker in even ones.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mllm_audio import wav
from mllm_audio.evaluation.report import side_by_side
from mllm_audio.generation.voice import Voice
from mllm_audio.generation.write import generate_to_files
from mllm_audio.types import Clip


def main() -> None:
    """Generate the clips of every (speaker, digit) in turn until there are `--count`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a trained digits run")
    parser.add_argument(
        "--captions", type=Path, required=True, help="names the speakers and digits"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    recorded = [json.loads(line) for line in arguments.captions.read_text().splitlines()]
    speakers = sorted({row["speaker"] for row in recorded})
    digits = sorted({row["label"] for row in recorded})
    pairs = [(speaker, digit) for speaker in speakers for digit in digits]
    rows = []
    for index in range(arguments.count):
        speaker, digit = pairs[index % len(pairs)]
        rows.append(
            {
                "audio": f"wav/{index:03}_{digit}_{speaker}.wav",
                "caption": f"{speaker} says {digit}",
                "label": digit,
                "speaker": speaker,
            }
        )
    voice = Voice.load(arguments.run)
    paths = [arguments.out / row["audio"] for row in rows]
    (arguments.out / "wav").mkdir(parents=True, exist_ok=True)
    captions = [row["caption"] for row in rows]
    generate_to_files(voice, captions, paths, voice.defaults, arguments.seed, batch_size=50)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (arguments.out / "captions.jsonl").write_text(text)
    sheet = []
    for row in rows[:60:7][:8]:
        same = (r for r in recorded if (r["label"], r["speaker"]) == (row["label"], row["speaker"]))
        recording = arguments.captions.parent / next(same)["audio"]
        for path in (recording, arguments.out / row["audio"]):
            clip = wav.read(path, voice.audio_tokenizer.sample_rate)
            sheet.append(Clip(wav.normalize_level(clip.waveform), clip.sample_rate))
    side_by_side(sheet, columns=4).save(arguments.out / "spectrograms.png")


if __name__ == "__main__":
    main()
