"""Join manifests into one: rows as they are, paths of sound files relative to the new one.

    python scripts/join_manifests.py OUT.jsonl MANIFEST.jsonl...

Rows of validation and test keep their splits.
"""

import json
import os
import sys
from pathlib import Path


def main(out: Path, manifests: list[Path]) -> None:
    """Write `out`."""
    lines = []
    for manifest in manifests:
        for line in manifest.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            path = (manifest.parent / row["audio"]).absolute()
            row["audio"] = os.path.relpath(path, out.parent.absolute())
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    out.write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines):,} rows of {len(manifests)} manifests in {out}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("error: type  python scripts/join_manifests.py OUT.jsonl MANIFEST.jsonl...")
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
