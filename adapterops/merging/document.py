"""Small text files that people write, YAML or JSON, as plain data: what weights files and recipes are read from.

Of YAML only what JSON has, too: no tags, no aliases, no key twice, and none of the words and numbers that YAML 1.1
takes for something else than they look like (`on`, `010`, `1:30`, a date): those are refused, with the remedy.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from adapterops.errors import UnreadableFile, UsageError
from adapterops.storage.regular import open_regular

MAX_BYTES = 1_000_000
"""Of a text file."""
_DEEPEST = 32
_TAG = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.?[0-9]*)([eE][-+]?[0-9]+)?")
_SHORT_FLOAT = re.compile(r"[-+]?[0-9]+\.?[0-9]*[eE][-+]?[0-9]+$|[-+]?\.[0-9]+[eE][0-9]+$")
_SPECIAL = re.compile(r"([-+]?)\.(inf|Inf|INF|nan|NaN|NAN)")


def read(path: str) -> Any:
    """The data of a file, JSON where its name ends with .json, else YAML.

    Raises `UnreadableFile` where it cannot be read, `UsageError` where it is no such text.
    """
    descriptor, (_, _, size, _) = open_regular(path)
    try:
        with open(descriptor, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UnreadableFile(f"{path}: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise UsageError(f"{path}: has {size:,} bytes; a text of at most {MAX_BYTES:,} is expected here")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is no UTF-8 text (byte {error.start}); YAML or JSON is expected here") from error
    return parse_json(text, path) if path.lower().endswith(".json") else parse_yaml(text, path)


def parse_json(text: str, where: str) -> Any:
    """The data of a JSON text.  Raises `UsageError` for what is none, and for a key that stands twice."""
    depth = deepest = 0
    for character in re.sub(r'"(?:[^"\\\\]|\\\\.)*"', "", text):
        depth += (character in "[{") - (character in "]}")
        deepest = max(deepest, depth)
    if deepest > _DEEPEST:
        raise UsageError(f"{where}: is no JSON: nested too deeply")
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, where))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: is no JSON: {error or 'nested too deeply'}") from error


def parse_yaml(text: str, where: str) -> Any:
    """The data of a YAML text.  Raises `UsageError` for what is none, or more than plain data."""
    import yaml

    loader = None
    try:
        loader = _variant(yaml.SafeLoader)(text)
        node = loader.get_single_node()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).replace('"<unicode string>", ', "").split())
        raise UsageError(f"{where}: is no YAML: {reason}") from error
    finally:
        if loader is not None:
            loader.dispose()
    return None if node is None else _Plain(loader, where).value(node, 0)


def to_yaml(data: Any) -> str:
    """`data` as YAML that `parse_yaml` reads as the same, its keys in their order."""
    import yaml

    variant = _variant(yaml.SafeDumper)
    return str(yaml.dump(data, Dumper=variant, sort_keys=False, allow_unicode=True, width=110))


def unknown(key: object, listed: Iterable[str], known: Iterable[str] = ()) -> str:
    """What to say of a key that is none of those `listed`: the nearest of them and of those `known`, or the list."""
    listed = list(listed)
    near = nearest(str(key), [*listed, *known])
    return f"unknown key {key!r}; " + (f"did you mean {near}?" if near else f"known: {', '.join(listed)}")


def insist_on_keys(data: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Raise `UsageError` for a key that is none of those known."""
    known = list(known)
    for key in data:
        if key not in known:
            raise UsageError(f"{where}: {unknown(key, known)}")


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The one of `known` that a word is most likely meant to be."""
    import difflib

    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)


def number(value: Any, where: str) -> float:
    """A finite number.  Raises `UsageError` for everything else, text that reads as one included."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        quoted = isinstance(value, str) and _FLOAT.fullmatch(value.strip())
        raise UsageError(f"{where}: {value!r} is no number" + ("; write it without quotes" if quoted else ""))
    try:
        finite = float(value)
    except OverflowError:
        finite = math.inf
    if not math.isfinite(finite):
        raise UsageError(f"{where}: {value!r:.40} is no finite number")
    return finite


def text(value: Any, where: str) -> str:
    """A text that says something.  Raises `UsageError` for everything else."""
    if not isinstance(value, str):
        raise UsageError(f"{where}: {value!r} is no text; put it in quotes if that is what it is")
    if not value.strip() or "\0" in value:
        raise UsageError(f"{where}: is empty" if not value.strip() else f"{where}: {value!r} has a NUL in it")
    return value


def pairs(value: Any, where: str) -> list[tuple[str, Any]]:
    """The entries of a mapping in which order counts, in their order: a mapping, or a list of [key, value].

    The list is what canonical data has, since JSON promises no order in a mapping.
    """
    if isinstance(value, Mapping):
        return list(value.items())
    if not isinstance(value, list):
        raise UsageError(f"{where}: must be a mapping of patterns to what holds for them")
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise UsageError(f"{where}: a list here must hold pairs, each [pattern, what holds for it]")
    out = [(text(key, where), entry) for key, entry in value]
    _unique(out, where)
    return out


def _unique(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise UsageError(f"{where}: the key {key!r} stands twice; keep one of them")
        out[key] = value
    return out


def _variant(base: Any) -> Any:
    """PyYAML's loader or dumper, for which 1e-3 is a number, as it is in JSON and YAML 1.2, and nothing an alias."""
    made: Any = type(base.__name__, (base,), {"ignore_aliases": lambda self, data: True})
    made.add_implicit_resolver(f"{_TAG}float", _SHORT_FLOAT, list("-+.0123456789"))
    return made


class _Plain:
    """The data of YAML's nodes."""

    def __init__(self, loader: Any, where: str) -> None:
        self._loader, self._where = loader, where
        self._seen: set[int] = set()

    def value(self, node: Any, depth: int) -> Any:
        """What `node` holds.  Raises `UsageError`, with the line."""
        import yaml

        if id(node) in self._seen:
            raise self._wrong(
                node, "an alias (*name) stands for this elsewhere, which is not taken; write it out there"
            )
        self._seen.add(id(node))
        if depth > _DEEPEST:
            raise self._wrong(node, "nested too deeply")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        kind = "seq" if isinstance(node, yaml.SequenceNode) else "map"
        if node.tag != _TAG + kind:
            raise self._wrong(node, f"the tag {node.tag} is not taken here")
        if kind == "seq":
            return [self.value(item, depth + 1) for item in node.value]
        out = {}
        for key_node, value_node in node.value:
            key = self.value(key_node, depth + 1)
            if not isinstance(key, str):
                raise self._wrong(key_node, f"the key {key!r} is no text; put it in quotes")
            if key in out:
                raise self._wrong(key_node, f"the key {key!r} stands twice; keep one of them")
            out[key] = self.value(value_node, depth + 1)
        return out

    def _scalar(self, node: Any) -> Any:
        import yaml

        text, plain = str(node.value), node.style is None
        if node.tag != self._loader.resolve(yaml.ScalarNode, text, (plain, not plain)):
            raise self._wrong(node, f"the tag {node.tag} is not taken here; quotes make text of anything")
        kind = node.tag.removeprefix(_TAG)
        if kind == "str":
            return text
        if kind == "null":
            return None
        if kind == "bool" and text.lower() in ("true", "false"):
            return text.lower() == "true"
        try:
            if kind == "int" and _INTEGER.fullmatch(text):
                return int(text)
            if kind == "float" and _FLOAT.fullmatch(text):
                return float(text)
        except ValueError as error:
            raise self._wrong(node, f"{text[:20]}… has too many digits") from error
        if kind == "float" and _SPECIAL.fullmatch(text):
            return float(text.replace(".", "", 1))
        remedy = "write true or false, or put it in quotes" if kind == "bool" else "put it in quotes if it is text"
        raise self._wrong(
            node, f"{text!r} is read as {kind} by some readers of YAML and as something else by others; {remedy}"
        )

    def _wrong(self, node: Any, what: str) -> UsageError:
        return UsageError(f"{self._where}: line {node.start_mark.line + 1}: {what}")
