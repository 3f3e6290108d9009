"""Ask a voice to say words, and keep what it answers: text and sounds, for a judge to listen to.

    python scripts/say_generate.py RUN --recordings DIR --out DIR [--count 200]

Asks "say zero" ... "say nine" in turn. Writes DIR/wav/*.wav, DIR/captions.jsonl with rows {audio,
caption, label, text} of the answers that have one sound, DIR/answers.json with the share of answers
that read exactly "Sure: <audio> that was seven.", and DIR/spectrograms.png: recordings in odd
columns, answers to the same word in even ones.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tqdm import tqdm

from mllm_audio import Clip, Voice, wav
from mllm_audio.evaluation.report import side_by_side
from mllm_audio.types import AudioChunk

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def ask(voice: Voice, digit: str, seed: int) -> tuple[str, list[AudioChunk]]:
    """Ask for one digit; return the answer as text, `<audio>` in place of sound, and the sounds."""
    text, chunks = "", []
    messages = [{"role": "user", "content": f"say {digit}"}]
    for event in voice.generate_interleaved(messages, seed=seed):
        if isinstance(event, AudioChunk):
            chunks.append(event)
            text += "<audio>"
        else:
            text += event.text
    return text, chunks


def main() -> None:
    """Ask `--count` times, ten digits in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a trained voice")
    parser.add_argument("--recordings", type=Path, required=True, help="holds captions.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    voice = Voice.load(arguments.run)
    (arguments.out / "wav").mkdir(parents=True, exist_ok=True)
    rows, exact, clips = [], 0, []
    for index in tqdm(range(arguments.count), desc="asking", unit="answer"):
        digit = DIGITS[index % len(DIGITS)]
        text, chunks = ask(voice, digit, arguments.seed + index)
        exact += text == f"Sure:<audio> that was {digit}."
        if len(chunks) != 1:
            continue
        name = f"wav/{index:03}_{digit}.wav"
        wav.write(arguments.out / name, chunks[0].waveform, chunks[0].sample_rate)
        rows.append({"audio": name, "caption": f"say {digit}", "label": digit, "text": text})
        clips.append((digit, Clip(chunks[0].waveform, chunks[0].sample_rate)))
    (arguments.out / "captions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    share = {"asked": arguments.count, "one_sound": len(rows), "text_exact": exact}
    (arguments.out / "answers.json").write_text(json.dumps(share) + "\n")
    recorded = [
        json.loads(line)
        for line in (arguments.recordings / "captions.jsonl").read_text().splitlines()
    ]
    sheet = []
    for digit, clip in clips[:8]:
        name = next(row["audio"] for row in recorded if row["label"] == digit)
        sheet += [wav.read(arguments.recordings / name, clip.sample_rate), clip]
    side_by_side(sheet, 4).save(arguments.out / "spectrograms.png")
    print(json.dumps(share))


if __name__ == "__main__":
    main()
