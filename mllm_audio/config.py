"""Strict overrides of nested frozen dataclasses: `section.key=value`, to and from plain dicts."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError


def nearest(name: str, known: Iterable[str]) -> str:
    """Phrase what a user may have meant: the nearest known name, or all of them."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def override(config: Any, assignments: Iterable[str]) -> Any:
    """Return `config` with every `path.to.key=value` applied.

    Raises:
        ValueError: for a missing `=`, an unknown key (with the nearest name), a value of the
            wrong type, or a value the dataclass itself refuses.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(
                f"found {assignment!r}, expected section.key=value, e.g. train.lr=3e-4"
            )
        config = _assign(config, path.split("."), text, path)
    return config


def _assign(config: Any, keys: list[str], text: str, path: str) -> Any:
    known = [f.name for f in fields(config)]
    key, rest = keys[0], keys[1:]
    if key not in known:
        where = path.removesuffix(".".join(keys)).rstrip(".") or "the configuration"
        raise ValueError(f"unknown key {key!r} in {where}; {nearest(key, known)}")
    current = getattr(config, key)
    if is_dataclass(current):
        if not rest:
            keys_of = ", ".join(f"{path}.{f.name}" for f in fields(current))
            raise ValueError(f"{path} is a section, set one of its keys: {keys_of}")
        return replace(config, **{key: _assign(current, rest, text, path)})
    if rest:
        raise ValueError(f"{path}: {key!r} is a value, not a section; type {key}=...")
    return replace(config, **{key: _parse(text, get_type_hints(type(config))[key], path)})


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
