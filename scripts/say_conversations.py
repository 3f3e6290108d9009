"""Turn captioned recordings of spoken words into conversations that ask for them.

    python scripts/say_conversations.py DATA/captions.jsonl --out conversations.jsonl

Each row with `audio` (a path relative to its file) and `label` becomes a request, "say seven", and
its answer: "Sure:", the recording, " that was seven." Fields `split` and `speaker` are kept. Paths
in the written file are relative to its folder.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any


def conversation(label: str, audio: str) -> list[dict[str, Any]]:
    """Write a request to say `label`, and its answer around the recording, as chat messages."""
    request = [{"type": "text", "text": f"say {label}"}]
    answer = [
        {"type": "text", "text": "Sure:"},
        {"type": "audio", "audio": audio},
        {"type": "text", "text": f" that was {label}."},
    ]
    return [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]


def main() -> None:
    """Convert every row, in order."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("captions", type=Path, help="JSONL with `audio` and `label` in each row")
    parser.add_argument("--out", type=Path, required=True, help="the JSONL file to write")
    arguments = parser.parse_args()

    rows = []
    for number, line in enumerate(arguments.captions.read_text().splitlines(), 1):
        row = json.loads(line)
        where = f"line {number} of {arguments.captions}"
        if not {"audio", "label"} <= row.keys():
            parser.error(f"{where} has {', '.join(row)}; give a file with `audio` and `label`")
        recording = (arguments.captions.parent / row["audio"]).resolve()
        if not recording.is_file():
            parser.error(f"{where} names {recording}, which is no file; put it there")
        audio = Path(os.path.relpath(recording, arguments.out.resolve().parent)).as_posix()
        kept = {key: row[key] for key in ("split", "label", "speaker") if key in row}
        rows.append({"messages": conversation(row["label"], audio), **kept})
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(rows)} conversations in {arguments.out}")


if __name__ == "__main__":
    main()
