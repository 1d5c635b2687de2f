"""The entries of a GGUF adapter's header: what llama.cpp reads there, and what is kept for the way back.

Sources: https://github.com/ggml-org/llama.cpp `src/llama-adapter.cpp` (`llama_adapter_lora_init_impl`); gguf `constants.py`
(`Keys`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from adapterops.plugin import Adapter, Source, Update, errors, header

FORMAT = "gguf"
"""The dialect under whose name the types of entries are kept."""
ALPHA = "adapter.lora.alpha"
TOKENS = "adapter.alora.invocation_tokens"
INVOCATION = "alora_invocation_tokens"
OWN = (
    *("general.architecture", "general.type", "general.alignment", "adapter.type", ALPHA, TOKENS),
    *("general.file_type", "general.quantization_version"),
)
"""The header's entries that are made anew, or are true of one file's bytes only."""
EXPERTS = "lora_parameters"
"""The method of updates of a layer's experts."""
HEADS = (".attention.head_count", ".attention.head_count_kv")


def alpha_of(source: Source) -> float | None:
    """The header's alpha.  Raises `InvalidHeader` for what is no number."""
    if ALPHA not in source.metadata:
        return None
    value = number_of(source, ALPHA)
    if value is None or not isfinite(value):
        text = source.metadata[ALPHA]
        raise errors.InvalidHeader(f"{source.path}: {ALPHA} is {text!r:.60}, not a number", fault="metadata")
    return float(value)


def number_of(source: Source, key: str) -> int | float | None:
    """What the header says under `key`, where that is a number, and none spelled out in a string."""
    kind = getattr(source.metadata, "types", {}).get(key)
    value = _json(source.metadata[key]) if kind is not None else None
    return value if type(value) in (int, float) else None


def _json(text: str) -> Any:
    """What a text says as JSON; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def tokens_of(source: Source) -> list[int] | None:
    """aLoRA's tokens.  Raises `InvalidHeader` for what are none."""
    text = source.metadata.get(TOKENS)
    if text is None:
        return None
    value = _json(text)
    if not isinstance(value, list) or not all(type(token) is int and token >= 0 for token in value):
        raise errors.InvalidHeader(f"{source.path}: {TOKENS} is {text!r:.60}, not a list of tokens", fault="metadata")
    return value or None


def entries_of(
    adapter: Adapter, updates: Sequence[Update], architecture: str, heads: Sequence[int] | None, alpha: float
) -> dict[str, tuple[str, Any]]:
    """The header's entries, each with its type.  Raises `CannotRepresent` where modules differ in what it says for all."""
    out: dict[str, tuple[str, Any]] = {
        "general.type": ("STRING", "adapter"),
        "adapter.type": ("STRING", "lora"),
        ALPHA: ("FLOAT32", alpha),
    }
    if heads is not None:
        out |= {f"{architecture}{end}": ("UINT32", n) for end, n in zip(HEADS, heads, strict=True)}
    tokens = {json.dumps(u.options.get(INVOCATION) if u.method == "alora" else None): u for u in updates}
    if len(tokens) > 1:
        one, two = list(tokens.values())[:2]
        raise errors.CannotRepresent(
            f"{one.name} and {two.name} are not called by the same tokens (aLoRA), and GGUF says them once for all modules"
        )
    invoked = next((json.loads(text) for text in tokens), None)
    if invoked:
        out[TOKENS] = ("ARRAY:UINT32", invoked)
    types = adapter.provenance.carried.spelling.get(FORMAT, {}).get("types", {})
    for key, text in header(adapter).items():
        if key.startswith("GGUF."):
            raise errors.CannotRepresent(
                f"{adapter.provenance.path}: its header has an entry {key[:80]!r}, and GGUF's readers keep such names for "
                "their own counts; take the entry out of the header"
            )
        if key not in (*OWN, *out) and key != "format":
            out[key] = _typed(text, types.get(key, ""))
    return out


_LARGEST = (2 - 2**-23) * 2.0**127
"""Of float32."""
_TYPES: Mapping[str, Any] = {
    **{f"{sign}INT{bits}": int for sign in ("", "U") for bits in (8, 16, 32, 64)},
    "FLOAT32": float,
    "FLOAT64": float,
    "BOOL": bool,
    "STRING": str,
}


def _typed(text: str, kind: str) -> tuple[str, Any]:
    """An entry under the type that its file gave it; a string where that no longer fits."""
    main, _, inner = kind.partition(":")
    value = _json(text) if main else None
    if main == "ARRAY" and isinstance(value, list) and value and _TYPES.get(inner) is not None:
        return (kind, value) if all(_holds(inner, each) for each in value) else ("STRING", text)
    return (main, value) if main != "ARRAY" and _holds(main, value) else ("STRING", text)


def _holds(kind: str, value: Any) -> bool:
    wanted = _TYPES.get(kind)
    if wanted is None or type(value) is not wanted:
        return False
    if wanted is float:
        return bool(isfinite(value)) and (kind == "FLOAT64" or abs(value) <= _LARGEST)
    if wanted is str:
        return not any("\ud800" <= letter <= "\udfff" for letter in value)  # halves of a pair, which UTF-8 has not
    if wanted is not int:
        return True
    bits = int(kind.rpartition("INT")[2])
    low, high = (0, 2**bits) if kind.startswith("U") else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    return bool(low <= value < high)
