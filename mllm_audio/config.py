"""Configuration as nested frozen dataclasses: strict overrides, ranges, to and from JSON."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError


def nearest(name: str, known: Iterable[str]) -> str:
    """Phrase what a user may have meant: the nearest known name, or all of them."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def override(config: Any, assignments: Iterable[str]) -> Any:
    """Return `config` with every `path.to.key=value` applied, in any order, the last one winning.

    Raises:
        ValueError: for a missing `=`, an unknown key (with the nearest name), a value of the
            wrong type, or values the dataclass itself refuses.
    """
    changes: dict[str, Any] = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(
                f"found {assignment!r}, expected section.key=value, e.g. train.optim.lr=3e-4"
            )
        section, *keys = [changes, *path.split(".")]
        for key in keys[:-1]:
            section = section.setdefault(key, {})
            if not isinstance(section, dict):
                raise ValueError(f"{path}: {key!r} is a value, not a section; type {key}=...")
        section[keys[-1]] = text
    return _apply(config, changes, "")


def _apply(config: Any, changes: dict[str, Any], prefix: str) -> Any:
    """Apply the nested `changes` to a dataclass that stands at `prefix`, all at once."""
    known = {f.name: getattr(config, f.name) for f in fields(config)}
    hints = get_type_hints(type(config))
    values: dict[str, Any] = {}
    for key, change in changes.items():
        path = prefix + key
        if key not in known:
            where = prefix.rstrip(".") or "the configuration"
            raise ValueError(f"unknown key {key!r} in {where}; {nearest(key, known)}")
        if is_dataclass(known[key]):
            if not isinstance(change, dict):
                keys = ", ".join(f"{path}.{f.name}" for f in fields(known[key]))
                raise ValueError(f"{path} is a section, set one of its keys: {keys}")
            values[key] = _apply(known[key], change, f"{path}.")
        elif isinstance(change, dict):
            raise ValueError(f"{path}: {key!r} is a value, not a section; type {path}=...")
        else:
            values[key] = _parse(change, hints[key], path)
    return replace(config, **values)


def check_range(
    section: str, config: Any, low: float, high: float, *keys: str, open_low: bool = False
) -> None:
    """Refuse values of the named fields outside [low, high], or (low, high]; None passes.

    Raises:
        ValueError: naming the field, what was found and the range.
    """
    for key in keys:
        value = getattr(config, key)
        if value is None or (low < value <= high) or (value == low and not open_low):
            continue
        bracket = "(" if open_low else "["
        raise ValueError(f"{section}.{key}={value}, expected {bracket}{low:g}, {high:g}]")


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: if the file is missing or damaged, naming it and the `remedy`.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); {remedy}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, expected an object; {remedy}")
    return values


def _parse(text: str, kind: Any, path: str) -> Any:
    """Read `text` as a value of type `kind`; "none" is None where the type allows it."""
    adapter = TypeAdapter(kind)
    try:
        if text.lower() in ("none", "null"):
            return adapter.validate_python(None)
        if text.startswith(("[", "{")):
            return adapter.validate_json(text)
        return adapter.validate_strings(text)
    except ValidationError as error:
        expected = getattr(kind, "__name__", str(kind))
        raise ValueError(
            f"{path}={text}: {error.errors()[0]['msg']}, expected {expected}"
        ) from error


def to_dict(config: Any) -> dict[str, Any]:
    """Turn a dataclass into a JSON-ready dict."""
    return asdict(config)


def from_dict(kind: type, values: dict[str, Any], where: str) -> Any:
    """Rebuild a dataclass of type `kind` from `to_dict`'s output; unknown keys are refused.

    Raises:
        ValueError: naming `where` the dict came from and the key or value at fault.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where}: found {values!r}, expected the fields of {kind.__name__}")
    known = [f.name for f in fields(kind)]
    for key in values:
        if key not in known:
            raise ValueError(
                f"{where}: unknown key {key!r} in {kind.__name__}; {nearest(key, known)}"
            )
    hints = get_type_hints(kind)
    built = {
        key: from_dict(hints[key], value, where)
        if is_dataclass(hints[key])
        else _restore(value, hints[key], f"{where}: {key}")
        for key, value in values.items()
    }
    return kind(**built)


def _restore(value: Any, kind: Any, where: str) -> Any:
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{where}={value!r}: {error.errors()[0]['msg']}") from error
