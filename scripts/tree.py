"""Print the package's tree for the README, one line per module with its docstring's first line.

python scripts/tree.py          # print
python scripts/tree.py --write  # put it into README.md
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def tree() -> str:
    """List folders and modules in reading order, with what each is for."""
    package = ROOT / "mllm_audio"
    lines = ["mllm_audio/"]
    for path in sorted(package.rglob("*.py"), key=lambda p: (p.parent != package, str(p))):
        if path.name == "__init__.py" and path.parent != package:
            continue
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        name = path.relative_to(package).as_posix()
        first = docstring.split("\n")[0].replace("`", "").rstrip(".")
        lines.append(f"  {name:<26} {first}")
    return "\n".join(lines)


def main() -> None:
    """Print the tree, or write it into README.md between its fence lines."""
    if "--write" not in sys.argv:
        print(tree())
        return
    readme = ROOT / "README.md"
    text = readme.read_text()
    start = text.index("mllm_audio/\n")
    end = text.index("\n```", start)
    readme.write_text(text[:start] + tree() + text[end:])


if __name__ == "__main__":
    main()
