"""Texts that `--fix` changes and shows: a config edited in place, a header as lines, and the differences of both."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapterops.storage import LazyTensor
from adapterops.storage.safetensors import NullMetadata
from adapterops.validation.rule import REMOVE

MAX_DIFF = 200
"""Lines of one file's differences that are shown."""
_MAX_LINE = 200
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class _Field:
    """Where a field of a JSON object stands in its text: its name, its value, the end of the value."""

    name: str
    begin: int
    value: int
    end: int


def edited(text: str, changes: Mapping[str, Any]) -> str:
    """A JSON object with other values of some fields; everything else stays as it is written, character by character.

    A new field is put in where the names are in order, else behind the last one.  `REMOVE` takes a field out.
    """
    for name, value in changes.items():
        fields = _fields(text)
        at = next((n for n, field in enumerate(fields) if field.name == name), None)
        if at is None:
            text = text if value is REMOVE else _with(text, fields, name, value)
        elif value is REMOVE:
            text = _without(text, fields, at)
        else:
            field = fields[at]
            old = text[field.value : field.end]
            text = text[: field.value] + _spelled(text, fields, value, old) + text[field.end :]
    return text


def _fields(text: str) -> list[_Field]:
    decoder, out = json.JSONDecoder(), []
    at = _skip(text, _skip(text, 0) + 1)
    while text[at] != "}":
        name, after = decoder.raw_decode(text, at)
        value = _skip(text, _skip(text, after) + 1)
        _, end = decoder.raw_decode(text, value)
        out.append(_Field(name, at, value, end))
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return out


def _skip(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    return space.end() if space is not None else at


def _margin(text: str, fields: list[_Field]) -> str | None:
    """What stands before a field that has a line of its own; None where the object is written in one line."""
    start = text.rfind("\n", 0, fields[0].begin) + 1 if fields else 0
    return text[start : fields[0].begin] if start and not text[start : fields[0].begin].strip() else None


def _spelled(text: str, fields: list[_Field], value: Any, old: str | None = None) -> str:
    """A value as the object writes its values."""
    ascii_only, margin = text.isascii(), _margin(text, fields)
    tight = bool(fields) and text[fields[0].value - 1] == ":"
    if margin is None or (old is not None and old[:1] in ("[", "{") and "\n" not in old):
        return json.dumps(value, ensure_ascii=ascii_only, separators=(",", ":") if tight else (", ", ": "))
    lines = json.dumps(
        value, ensure_ascii=ascii_only, indent=margin, separators=(",", ":" if tight else ": ")
    ).splitlines()
    return ("\r\n" if "\r\n" in text else "\n").join([lines[0], *(margin + line for line in lines[1:])])


def _with(text: str, fields: list[_Field], name: str, value: Any) -> str:
    between = ":" if fields and text[fields[0].value - 1] == ":" else ": "
    field = json.dumps(name, ensure_ascii=text.isascii()) + between + _spelled(text, fields, value)
    if not fields:
        at = text.index("{") + 1
        return text[:at] + field + text[_skip(text, at) :]
    names = [f.name for f in fields]
    after = next((f for f in fields if f.name > name), None) if names == sorted(names) else None
    before = text.rfind(",", 0, fields[1].begin) + 1 if len(fields) > 1 else text.index("{") + 1
    gap = text[before : fields[1].begin] if len(fields) > 1 else text[before : fields[0].begin]
    if after is not None:
        return text[: after.begin] + field + "," + gap + text[after.begin :]
    end = fields[-1].end
    return text[:end] + "," + gap + field + text[end:]


def _without(text: str, fields: list[_Field], at: int) -> str:
    if at + 1 < len(fields):
        return text[: fields[at].begin] + text[fields[at + 1].begin :]
    if at:
        return text[: fields[at - 1].end] + text[fields[at].end :]
    return text[: fields[0].begin] + text[fields[0].end :]


def header_lines(tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> list[str]:
    """A header for people: a line a tensor and a line an entry, sorted."""
    lines = [f"{_shown(key)} {t.dtype} {list(t.shape)}" for key, t in sorted(tensors.items())]
    if isinstance(metadata, NullMetadata):
        return [*lines, "metadata = null"]
    return lines + [
        f"metadata.{_shown(k)} = {_shown(json.dumps(v, ensure_ascii=False))}" for k, v in sorted(metadata.items())
    ]


def _shown(text: str) -> str:
    text = text if len(text) <= _MAX_LINE else f"{text[: _MAX_LINE - 40]} … {text[-30:]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def difference(old: list[str], new: list[str], before: str, after: str) -> str:
    """What differs between two texts, as a unified diff of bounded length; "" where nothing does."""
    lines = list(difflib.unified_diff(old, new, before, after, lineterm="", n=2))
    if not lines and before != after:
        lines = [f"--- {before}", f"+++ {after}"]
    if len(lines) > MAX_DIFF:
        lines = [*lines[:MAX_DIFF], f"… {len(lines) - MAX_DIFF} more lines"]
    return "".join(f"{_shown(line)}\n" for line in lines)
