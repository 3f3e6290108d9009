"""JSON objects of known fields, and what is said of those that are not."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from mllm_audio.config import nearest
from mllm_audio_vllm.server.errors import RequestError

TAGS = ("text", "input_audio")  # of parts; pydantic counts them into the path of a field


def _whole(value: str) -> str:
    """Refuse what JSON can write but no tokenizer can read."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError("found half of a surrogate pair, expected Unicode text") from error
    return value


WHOLE = AfterValidator(_whole)  # the last annotation of every text


class Wire(BaseModel):
    """A JSON object of known fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)
    keeps_null: ClassVar[frozenset[str]] = frozenset()  # elsewhere null is as if left out
    unsupported: ClassVar[tuple[str, ...]] = ()  # fields of OpenAI's that may only be null or false

    @model_validator(mode="before")
    @classmethod
    def check_names(cls, values: Any) -> Any:
        """Refuse unknown fields with the nearest name."""
        if not isinstance(values, dict):
            return values
        for key, value in values.items():
            if key in cls.unsupported and value is not None and value is not False:
                raise ValueError(f"{key} is not supported with audio; leave it out")
            if key not in cls.unsupported and key not in cls.model_fields:
                raise ValueError(f"unknown field {shown(key)}; {nearest(key, cls.model_fields)}")
        return {
            key: value
            for key, value in values.items()
            if key not in cls.unsupported and (value is not None or key in cls.keeps_null)
        }


Kind = TypeVar("Kind", bound=Wire)


def parse(kind: type[Kind], values: Any) -> Kind:
    """Read the body of a request.

    Raises:
        RequestError: naming the first field at fault.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    where = first["loc"]
    names = [
        str(name)
        for before, name in zip((None, *where), where, strict=False)
        if not (isinstance(before, int) and name in TAGS)
    ]
    path = ".".join(names)
    if first["type"] == "value_error":
        line = f"{path}: {first['ctx']['error']}" if path else str(first["ctx"]["error"])
    elif first["type"] == "missing":
        line = f"{path} is missing"
    else:
        reason = first["msg"][0].lower() + first["msg"][1:]
        line = f"{path or 'the body'} is {shown(first['input'])}: {reason}"
    raise RequestError(400, line, path or None)


def configured(make: Any, *arguments: Any, param: str | None = None, **values: Any) -> Any:
    """Make one of the configurations, whose refusals are the client's to read."""
    try:
        return make(*arguments, **values)
    except ValueError as error:
        raise RequestError(400, str(error), param) from error


def shown(value: Any) -> str:
    """Show a value within a line; what may be large is not written out."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value[:100] if isinstance(value, str) else value)
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."
