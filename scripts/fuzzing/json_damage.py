"""Damage to JSON as a structure: wrong types, absurd numbers, hostile strings, missing, doubled and nested fields."""

from __future__ import annotations

import copy
import json
from collections import deque
from random import Random
from typing import Any


class Pairs(list[tuple[str, Any]]):
    """An object that may name a key twice."""


class Raw(str):
    """Text that is written as it stands, JSON or not."""


PATTERNS = (
    r"(\w+\.?)+!", r"([a-z0-9_]+\.?)*$x", r"(.*)*(.*)*(.*)*x", r"((a|a)*)*b", r"(.*a){25}", r"(?P<a", "[", "*", "(?!)",
    r".*\.q_proj", "^", "", r"\1", r"(?i)Q_PROJ", r"(" * 300 + r")" * 300, r"q_proj|" * 3000, r"\d{1,4000000000}",
    r"(?:(?:.?){30}){30}", r"(?=(\w+))\1!", "all-linear",
)  # fmt: skip
"""Regular expressions: some without end, some without meaning."""

STRINGS = (
    "", "\0", "a\nb", "\x1b[31mred\x1b[0m", "\ud800", "\u202e", "🙂" * 50, "x" * 20_000, "../../../etc/passwd", "/etc/passwd",
    "null", "1e999", "-1", "LORA", "lora", "LOHA", "F32", "float16", "__class__", "{adapter}", "%s%n", "{0}", "None",
    "unet", "model", "rank", "all", "q_proj", "base_model.model.", "a.b.c." * 500, *PATTERNS,
)  # fmt: skip

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**30, 1.5, -0.0, 1e308, -1e308, 5e-324,
    float("nan"), float("inf"), float("-inf"), [], {}, [[]], [None], [{}], {"": None}, [1, "a"], ["q_proj"], {"q_proj": 4},
    {"a": {"b": {}}}, Raw("1" + "0" * 400), Raw("1" + "0" * 5000), Raw("1e400"), Raw("-"), Raw("nul"), Raw("0x10"), Raw("'a'"),
    Raw("01"), Raw("\"\\ud800\""), Raw("\"\\x\""), Raw("\"\t\""), Raw("[" * 400 + "]" * 400), Raw("[" * 100_000),
    Raw("{\"a\":" * 3000 + "1" + "}" * 3000), Raw("[" + "0," * 20_000 + "0]"),
)  # fmt: skip


def hostile(rng: Random) -> Any:
    """A value that nobody expects."""
    return copy.deepcopy(rng.choice(VALUES)) if rng.random() < 0.6 else rng.choice(STRINGS)


def dump(value: Any) -> bytes:
    """JSON text, with what `json.dumps` cannot say: doubled keys, literal text."""
    return _text(value).encode("utf-8", "surrogatepass")


def _text(value: Any) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict | Pairs):
        items = value.items() if isinstance(value, dict) else value
        return "{" + ",".join(f"{_text(k)}:{_text(v)}" for k, v in items) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_text, value)) + "]"
    return json.dumps(value)


def damaged(value: Any, rng: Random) -> Any:
    """The value with one change somewhere in it; the original is left as it is."""
    value = copy.deepcopy(value)
    holders = [h for h in _holders(value) if h]
    if not holders or rng.random() < 0.02:
        return hostile(rng)
    # The upper levels hold what readers look for; the lower ones are many.
    holder = rng.choice(holders[:3]) if rng.random() < 0.4 else rng.choice(holders)
    if isinstance(holder, list):
        return _list_damage(value, holder, rng)
    key = rng.choice(list(holder))
    match rng.randrange(9):
        case 0:
            del holder[key]
        case 1:
            holder[_other_key(key, rng)] = holder.pop(key)
        case 2:
            holder[key] = [holder[key]]
        case 3:
            holder[key] = {key: holder[key]}
        case 4:
            holder[_other_key(key, rng)] = hostile(rng)
        case 5:
            holder[key] = _near(holder[key], rng)
        case 6:
            doubled = Pairs([*holder.items(), (key, hostile(rng) if rng.random() < 0.5 else holder[key])])
            return _swap(value, holder, doubled)
        case _:
            holder[key] = hostile(rng)
    return value


def _list_damage(value: Any, holder: list[Any], rng: Random) -> Any:
    at = rng.randrange(len(holder))
    match rng.randrange(6):
        case 0:
            del holder[at]
        case 1:
            holder.insert(at, holder[at])
        case 2:
            holder[at] = _near(holder[at], rng)
        case 3:
            # Lists of lists, each grown so, would be billions of values, and of long texts gigabytes.
            short = not any(isinstance(item, list | dict) or len(str(item)) > 100 for item in holder)
            holder *= 3000 if len(holder) < 20 and short else 1
        case _:
            holder[at] = hostile(rng)
    return value


def _holders(value: Any) -> list[Any]:
    """Every object and list in a value, from the top down."""
    out, queue = [], deque([value])
    while queue:
        item = queue.popleft()
        if isinstance(item, dict | list) and not isinstance(item, Pairs):
            out.append(item)
            queue += item.values() if isinstance(item, dict) else item
    return out


def _swap(value: Any, old: Any, new: Any) -> Any:
    if value is old:
        return new
    for holder in _holders(value):
        for key, item in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
            if item is old:
                holder[key] = new
    return value


def _other_key(key: str, rng: Random) -> str:
    return rng.choice((key + " ", key.upper(), key[:-1], "_" + key, key + "\0", rng.choice(STRINGS), key * 2))


def _near(value: Any, rng: Random) -> Any:
    """A value of the same kind that says something else, or the same in another type."""
    if isinstance(value, bool):
        return rng.choice((not value, int(value), str(value)))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return rng.choice(
            (value + 1, -value, value * 2, float(value), str(value), value * 10**9, value / 3, bool(value))
        )
    if isinstance(value, str):
        return rng.choice(
            (
                value[:-1],
                value + "x",
                [value],
                value.upper(),
                "^" + value,
                value + ".*",
                value.encode("utf-8", "surrogatepass").hex(),
            )
        )
    if isinstance(value, dict):
        return rng.choice((list(value.items()), list(value), json.dumps(value, default=str), {"": value}))
    return rng.choice((hostile(rng), str(value), [value]))
