"""Steps of recipes from plain data, everything in it checked.

Errors are `UsageError`s that begin with `where`: the file, the step, and what in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from adapterops.errors import UsageError
from adapterops.merging import document, weights
from adapterops.merging.registry import METHODS, Parameter, find
from adapterops.merging.steps import FLAGS, OPTIONS, READING, TEXTS, Pattern, SourceRef, Step, settle

_STEP = ("name", "method", "space", "sources", *OPTIONS, *FLAGS, *TEXTS, "patterns")
_PATTERN = ("method", "space", "rank")
_SOURCE = ("path", "step", "weight", *READING, "hash")


def step(data: Any, where: str, earlier: list[str]) -> Step:
    """A step; `earlier` are the names of those before it, which it may refer to."""
    if not isinstance(data, Mapping):
        raise UsageError(f"{where}: must be a mapping with method and sources")
    name = document.text(data["name"], f"{where}: name") if "name" in data else ""
    where = f"{where} ({name})" if name else where
    if name in earlier:
        raise UsageError(f"{where}: name: an earlier step has the same; give each its own")
    for key in ("method", "sources"):
        if key not in data:
            near = document.nearest(key, [k for k in data if k not in _STEP])
            raise UsageError(f"{where}: {key} is missing" + (f"; is {near!r} meant to be it?" if near else ""))
    method = document.text(data["method"], f"{where}: method")
    space = document.text(data["space"], f"{where}: space") if "space" in data else None
    _named(method, space, where)
    sources = data["sources"]
    if not isinstance(sources, list) or not sources:
        raise UsageError(f"{where}: sources: must be a list of at least one file or step")
    options = {key: _checked(option, data[key], where) for key, option in OPTIONS.items() if key in data}
    options |= {key: flag(data[key], f"{where}: {key}") for key in FLAGS if key in data}
    options |= {key: document.text(data[key], f"{where}: {key}") for key in TEXTS if key in data}
    patterns = _patterns(data["patterns"], f"{where}: patterns") if "patterns" in data else ()
    given = {key: value for key, value in data.items() if key not in _STEP}
    made = Step(
        method,
        tuple(_source(item, f"{where}: source {n}", earlier) for n, item in enumerate(sources, 1)),
        name,
        space,
        _parameters(given, [method, *_methods(patterns)], _STEP, where),
        tuple(_with_parameters(pattern, method, patterns, where) for pattern in patterns),
        options,
        where,
    )
    _insist_on_completeness(made)
    return made


def _source(data: Any, where: str, earlier: list[str]) -> SourceRef:
    if isinstance(data, str):
        data = {"path": data}
    if not isinstance(data, Mapping):
        raise UsageError(f"{where}: must be a path, or a mapping with path or step")
    document.insist_on_keys(data, _SOURCE, where)
    if ("path" in data) == ("step" in data):
        raise UsageError(f"{where}: needs either path or step{', not both' if 'path' in data else ''}")
    weight = weights.entry(data["weight"], f"{where}: weight").data() if "weight" in data else 1.0
    if "step" in data:
        step = document.text(data["step"], f"{where}: step")
        if step not in earlier:
            known = f"; those are: {', '.join(earlier)}" if earlier else "; none before it has a name"
            raise UsageError(f"{where}: step: {step!r} is no earlier step{known}")
        for key in data:
            if key not in ("step", "weight"):
                raise UsageError(f"{where}: {key} is for files; the result of a step is not read from one")
        return SourceRef(step=step, weight=weight, where=where, weighed="weight" in data)
    path = document.text(data["path"], f"{where}: path")
    stated = document.text(data["hash"], f"{where}: hash") if "hash" in data else ""
    reading = {key: _reading(key, data[key], f"{where}: {key}") for key in READING if key in data}
    return SourceRef(path, "", weight, reading, stated, where, "weight" in data)


def _reading(key: str, value: Any, where: str) -> Any:
    if key == "set":
        if not isinstance(value, Mapping):
            raise UsageError(f"{where}: must be a mapping of fields of a PEFT config to their values")
        return _json(value, where)
    if key == "rename":
        if not isinstance(value, list):
            raise UsageError(f"{where}: must be a list of texts, each a PATTERN=REPLACEMENT")
        return [document.text(item, where) for item in value]
    if key == "allow_drop":
        return flag(value, where)
    if key == "alpha" and not isinstance(value, str):
        return document.number(value, where)
    if key == "alpha" and value not in _alpha_words():
        raise UsageError(f"{where}: {value!r} is neither a number nor one of {', '.join(_alpha_words())}")
    return document.text(value, where)


def _alpha_words() -> tuple[str, ...]:
    from adapterops.loading import ALPHA_WORDS

    return ALPHA_WORDS


def _patterns(data: Any, where: str) -> list[tuple[str, dict[str, Any]]]:
    out = []
    for glob, item in document.pairs(data, where):
        here = f"{where}: {glob!r}"
        if not isinstance(item, Mapping) or not item:
            raise UsageError(f"{here}: must be a mapping of what differs there: method, space, rank, or parameters")
        for key in item:
            if key in _STEP and key not in _PATTERN:
                raise UsageError(
                    f"{here}: {key} is for the whole step; a pattern sets {', '.join(_PATTERN)}, parameters"
                )
        out.append((glob, dict(item)))
    return out


def _methods(patterns: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    return [item["method"] for _, item in patterns if isinstance(item.get("method"), str)]


def _with_parameters(
    pattern: tuple[str, dict[str, Any]], method: str, patterns: Iterable[tuple[str, dict[str, Any]]], where: str
) -> Pattern:
    glob, item = pattern
    where = f"{where}: patterns: {glob!r}"
    own = document.text(item["method"], f"{where}: method") if "method" in item else None
    space = document.text(item["space"], f"{where}: space") if "space" in item else None
    # Without a method of its own it changes whatever holds there: the step's, or that of another pattern that fits.
    for_methods = [method, *_methods(patterns)] if own is None else [own]
    if own is not None or space is not None:
        _named(for_methods[0], space, where, for_methods[1:])
    rank = _checked(OPTIONS["rank"], item["rank"], where) if "rank" in item else None
    given = {key: value for key, value in item.items() if key not in _PATTERN}
    return Pattern(glob, own, space, rank, _parameters(given, for_methods, _PATTERN, where))


def _named(method: str, space: str | None, where: str, others: Iterable[str] = ()) -> None:
    """Raise `UsageError` unless one of the methods exists and can act in that space."""
    try:
        find(method, space)
    except UsageError as error:
        for other in others:
            try:
                find(other, space)
            except UsageError:
                continue
            return
        key = "method" if space is None else "method, space"
        raise UsageError(f"{where}: {key}: {error}") from error


def _parameters(given: Mapping[str, Any], methods: list[str], keys: tuple[str, ...], where: str) -> dict[str, Any]:
    """Parameters, each checked as that of the first method that has it."""
    known: dict[str, Parameter] = {}
    for name in methods:
        try:
            found, _ = find(name)
        except UsageError:  # which is said where that method is named
            continue
        known = {parameter.name: parameter for parameter in found.parameters} | known
    out = {}
    for key, value in given.items():
        if key in known:
            out[key] = _checked(known[key], value, where)
            continue
        everywhere = {parameter.name for method in METHODS.values() for parameter in method.parameters}
        if key in everywhere:
            takes = f"; its parameters: {', '.join(known)}" if known else ", nor any other parameter"
            raise UsageError(f"{where}: {key}: the method {methods[0]} has no such parameter{takes}")
        raise UsageError(f"{where}: {document.unknown(key, [*keys, *sorted(known)], [*keys, *sorted(everywhere)])}")
    return out


def _insist_on_completeness(step: Step) -> None:
    """Raise `UsageError` where a method lacks a parameter that nothing gives, or has the wrong number of sources."""
    _complete(step.method, step.parameters, step)
    everything = dict(step.parameters)
    for pattern in step.patterns:
        everything |= pattern.parameters
    for pattern in step.patterns:
        if pattern.method is not None:
            _complete(pattern.method, everything, step)


def _complete(name: str, parameters: Mapping[str, Any], step: Step) -> None:
    method, _ = find(name)
    if method.adapters is not None and len(step.sources) != method.adapters:
        raise UsageError(
            f"{step.where}: sources: the method {name} takes {method.adapters} adapters, and here are {len(step.sources)}"
        )
    try:
        settle(method, parameters)
    except UsageError as error:
        raise UsageError(f"{step.where}: {error}") from error


def _checked(parameter: Parameter, value: Any, where: str) -> Any:
    if parameter.type is not str:
        document.number(value, f"{where}: {parameter.name}")
    try:
        return parameter.checked(value)
    except UsageError as error:
        raise UsageError(f"{where}: {parameter.name}: {error}") from error


def flag(value: Any, where: str) -> bool:
    """A value that is true or false.  Raises `UsageError`."""
    if not isinstance(value, bool):
        raise UsageError(f"{where}: {value!r} is neither true nor false")
    return value


def _json(value: Any, where: str) -> Any:
    """The same data, once it is seen to be what JSON can hold."""
    if isinstance(value, Mapping):
        return {document.text(key, where): _json(item, f"{where}: {key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_json(item, where) for item in value]
    if value is None or isinstance(value, str | int):
        return value
    return document.number(value, where)
