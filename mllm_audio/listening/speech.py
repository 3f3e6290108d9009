"""Which captions mention human speech: the paper reports them apart from the others (table 2).

The paper does not say how it told them apart. This is our rule: the caption holds one of `WORDS`
as a whole word, in any case. It does not understand negation ("without speech") or figures of
speech; a list of the user's own replaces it (`read_speech_file`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

# Regular expressions of whole words. Voices that say nothing (laughing, crying, screaming, singing,
# crowd noise) and the ambiguous "speaker", also a loudspeaker, are not speech.
WORDS = (
    r"speech(es)?",
    r"speaks?|speaking|spoke|spoken",
    r"talks?|talking|talked",
    r"says?|saying|said",
    r"tells|telling|told",
    r"asks?|asking|asked",
    r"voices?",
    r"convers(es?|ing|ations?)",
    r"dialogues?|monologues?",
    r"discuss(es|ing|ions?)?",
    r"argu(es?|ing|ments?)",
    r"narrat(es?|ing|ions?|ors?)",
    r"announc(es?|ing|ements?|ers?)",
    r"comment(ary|ators?|ating)",
    r"lectur(es?|ing|ers?)|preach(es|ing|ers?)",
    r"recit(es?|ing)",
    r"communicat(es?|ing)",
    r"chats?|chatting|chatted",
    r"whispers?|whispering|whispered",
    r"mumbl(es?|ing)|murmurs?|murmuring",
    r"shouts?|shouting|shouted|yells?|yelling|yelled",
)
_PATTERN = re.compile(rf"\b({'|'.join(WORDS)})\b", re.IGNORECASE)


def mentions_speech(caption: str) -> bool:
    """Tell whether a caption holds one of `WORDS`."""
    return _PATTERN.search(caption) is not None


def read_speech_file(path: Path, known: Iterable[str]) -> set[str]:
    """Read which prompts are speech: one caption or file name a line, UTF-8; all others are not.

    Args:
        path: of the list.
        known: captions and file names that may be in it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and line, if a line is none of `known`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; check the path")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    listed, known = set(), set(known)
    for number, line in enumerate(lines, start=1):
        if not (name := line.strip()):
            continue
        if name not in known:
            raise ValueError(
                f"{path}:{number}: {name[:80]!r} is neither a caption of the test nor a file name "
                "of its first system; correct or remove the line"
            )
        listed.add(name)
    return listed
