"""Ratings in one SQLite file: each is on the disk before the page hears that it was taken."""

from __future__ import annotations

import secrets
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from mllm_audio.files import locked
from mllm_audio.listening.plan import ListeningTest, Stimulus

QUESTIONS = ("REL", "OVL")  # relevance to the caption, overall quality (paper, table 2)
SCORES = (1, 2, 3, 4, 5)  # worst to best

APPLICATION_ID = 0x4D4C4C54  # "MLLT": tells our files from other SQLite files
SCHEMA_VERSION = 1
_SCHEMA = f"""
CREATE TABLE settings (seed INTEGER NOT NULL, clips_per_rater INTEGER);
CREATE TABLE clips (
    id TEXT PRIMARY KEY, system TEXT NOT NULL, caption TEXT NOT NULL, take INTEGER NOT NULL,
    audio TEXT NOT NULL, sha256 TEXT NOT NULL, speech INTEGER NOT NULL,
    position INTEGER NOT NULL UNIQUE, UNIQUE (system, caption, take)
);
CREATE TABLE ratings (
    rater TEXT NOT NULL, clip TEXT NOT NULL REFERENCES clips (id),
    question TEXT NOT NULL CHECK (question IN {QUESTIONS}),
    score INTEGER NOT NULL CHECK (score IN {SCORES}),
    plays INTEGER NOT NULL CHECK (plays >= 1), rated_at TEXT NOT NULL,
    PRIMARY KEY (rater, clip, question)
) WITHOUT ROWID;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
"""


@dataclass(frozen=True, kw_only=True)
class Rating:
    """An answer of one rater to one question about one clip."""

    rater: str
    clip: str  # opaque id
    question: str  # one of QUESTIONS
    score: int  # one of SCORES
    plays: int  # times the clip had been heard to its end
    rated_at: str  # UTC, ISO 8601


class RatingStore:
    """The ratings of one listening test; threads may share it."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection
        self._lock = threading.Lock()

    def register(self, test: ListeningTest) -> dict[str, Stimulus]:
        """Write the test into a file without ratings, or check that the ratings are of this test.

        Returns:
            The stimulus of each opaque id, which are random and stay the same.

        Raises:
            ValueError: if the ratings are of another test, naming what differs.
        """
        settings = (test.seed, test.clips_per_rater)
        with self._lock, self._connection as connection:
            if not connection.execute("SELECT EXISTS (SELECT * FROM ratings)").fetchone()[0]:
                connection.execute("DELETE FROM settings")
                connection.execute("DELETE FROM clips")
                connection.execute("INSERT INTO settings VALUES (?, ?)", settings)
                connection.executemany(
                    "INSERT INTO clips VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    [
                        (secrets.token_hex(8), *astuple(stimulus), position)
                        for position, stimulus in enumerate(test.stimuli)
                    ],
                )
            stored = connection.execute("SELECT seed, clips_per_rater FROM settings").fetchone()
        clips = self.clips()
        if differs := _difference(stored, clips, test):
            raise ValueError(
                f"{self.path} holds another listening test: {differs}; type what it was started "
                "with, or another --out"
            )
        found = {stimulus.key: stimulus for stimulus in test.stimuli}
        return {clip: found[stimulus.key] for clip, stimulus in clips.items()}

    def clips(self) -> dict[str, Stimulus]:
        """Give the stimulus of each opaque id, in the order of the test."""
        names = [field.name for field in fields(Stimulus)]
        query = f"SELECT id, {', '.join(names)} FROM clips ORDER BY position"
        clips = {}
        for clip, *values in self._read(query):
            row = dict(zip(names, values, strict=True))
            clips[clip] = Stimulus(**{**row, "speech": bool(row["speech"])})
        return clips

    def rate(self, rater: str, clip: str, question: str, score: int, plays: int) -> None:
        """Store one rating, in a transaction of its own; a later answer replaces an earlier one."""
        rated_at = datetime.now(UTC).isoformat(timespec="milliseconds")
        with self._lock, self._connection as connection:
            connection.execute(
                "INSERT INTO ratings VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
                "score = excluded.score, plays = excluded.plays, rated_at = excluded.rated_at",
                (rater, clip, question, score, plays, rated_at),
            )

    def answers(self, rater: str) -> dict[tuple[str, str], int]:
        """Give a rater's score of each (clip, question)."""
        query = "SELECT clip, question, score FROM ratings WHERE rater = ?"
        return {(clip, question): score for clip, question, score in self._read(query, rater)}

    def ratings(self) -> list[Rating]:
        """Give every rating, in the order of time."""
        names = [field.name for field in fields(Rating)]
        query = f"SELECT {', '.join(names)} FROM ratings ORDER BY rated_at, rater, clip, question"
        return [Rating(**dict(zip(names, row, strict=True))) for row in self._read(query)]

    def _read(self, query: str, *values: str) -> list[tuple]:
        with self._lock:
            return self._connection.execute(query, values).fetchall()


@contextmanager
def opened(path: Path, *, serve: bool) -> Iterator[RatingStore]:
    """Open a file of ratings.

    Args:
        path: of the file.
        serve: make it if it is not there, and let no other process serve it meanwhile; else only
            read it, also while it is served.

    Raises:
        ValueError: if it is not a file of ours, of a newer version, missing, or served already.
    """
    if not serve and not path.is_file():
        raise ValueError(f"{path} is not a file; type the --out of `mllm-audio listen`")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"{path.resolve().parent} is not a folder; make it, or correct --out")
    mode = "rwc" if serve else "ro"
    try:
        with closing(
            sqlite3.connect(
                f"{path.resolve().as_uri()}?mode={mode}", uri=True, check_same_thread=False
            )
        ) as connection:
            _check_ours(path, connection)
            if not serve:
                yield RatingStore(path, connection)
                return
            busy = f"another process serves {path}; stop it, or type another --out"
            with locked(path.with_name(path.name + ".lock"), busy):
                _make(connection)
                yield RatingStore(path, connection)
    except sqlite3.Error as error:
        raise ValueError(
            f"{path} cannot be used as a file of ratings ({error}); type another path"
        ) from error


def _check_ours(path: Path, connection: sqlite3.Connection) -> None:
    """Refuse a database that another program, or a newer version, made."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application != APPLICATION_ID and (tables or application or version):
        raise ValueError(f"{path} is a database of another program; type another path")
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"{path} has version {version}, this mllm-audio knows {SCHEMA_VERSION}; update it"
        )


def _make(connection: sqlite3.Connection) -> None:
    """Create the tables of a new file, all or none; set how safely is written."""
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")  # each rating survives a power failure too
    connection.execute("PRAGMA foreign_keys = ON")
    if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        connection.executescript(f"BEGIN; {_SCHEMA} COMMIT;")


def _difference(
    settings: tuple[int, int | None], clips: dict[str, Stimulus], test: ListeningTest
) -> str:
    """Say how a test differs from the stored one, or nothing."""
    now = (test.seed, test.clips_per_rater)
    for option, before, after in zip(("--seed", "--clips-per-rater"), settings, now, strict=True):
        if before != after:
            return f"{option} {before} there, {after} here"
    stored = {stimulus.key: stimulus for stimulus in clips.values()}
    found = {stimulus.key: stimulus for stimulus in test.stimuli}
    if odd := sorted(stored.keys() ^ found.keys()):
        system, caption, _ = odd[0]
        return f"{caption!r} of {system!r} is only {'there' if odd[0] in stored else 'here'}"
    for key, stimulus in found.items():
        if stored[key].sha256 != stimulus.sha256:
            return f"the sound of {stimulus.caption!r} of {stimulus.system!r} has changed"
        if stored[key].speech != stimulus.speech:
            return f"--speech sorts {stimulus.caption!r} differently"
    return ""
