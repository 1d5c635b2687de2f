"""The configuration of `adapterops validate`: `.adapterops.toml`, or `[tool.adapterops.validate]` in `pyproject.toml`.

The nearest one from the current folder upward counts, as with ruff; of two in one folder, `.adapterops.toml`.  Paths and
globs in it are relative to its folder, and the command line wins over it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from adapterops.errors import UsageError
from adapterops.storage.hub import PREFIX as HUB
from adapterops.validation import registry
from adapterops.validation.options import TARGETS, Options, chosen
from adapterops.validation.report import Report
from adapterops.validation.reporters import FORMATS
from adapterops.validation.rule import Finding, Rule

OWN_NAME = ".adapterops.toml"
PYPROJECT = "pyproject.toml"
_MAX_BYTES = 1 << 20
"""Bytes of a configuration that are read."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a configuration says; None and "" where it says nothing.  `path` is the file, "" where there is none."""

    path: str = ""
    select: tuple[str, ...] | None = None
    ignore: tuple[str, ...] | None = None
    extend_ignore: tuple[str, ...] = ()
    arch: str | None = None
    base: str | None = None
    targets: tuple[str, ...] = ()
    strict: bool = False
    exclude: tuple[str, ...] = ()
    baseline: str | None = None
    per_file_ignores: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    format: str | None = None
    jobs: int = 0

    @property
    def root(self) -> str:
        """The folder that its globs are relative to."""
        return os.path.dirname(os.path.abspath(self.path)) if self.path else os.getcwd()

    def excludes(self, path: str) -> bool:
        """Whether an adapter is left out."""
        return any(matches(pattern, path, self.root) for pattern in self.exclude)

    def without_ignored(self, report: Report) -> Report:
        """The report without what `per-file-ignores` silences."""
        if not self.per_file_ignores:
            return report
        silenced = {glob: {rule.code for rule in _meant(codes)} for glob, codes in self.per_file_ignores.items()}

        def keeps(finding: Finding) -> bool:
            paths = (finding.adapter, finding.file)
            return not any(
                finding.code in codes and any(matches(glob, path, self.root) for path in paths)
                for glob, codes in silenced.items()
            )

        kept = [replace(a, findings=tuple(filter(keeps, a.findings))) for a in report.adapters]
        return replace(report, adapters=tuple(kept))


def load(path: str | None = None, start: str = os.curdir) -> Settings:
    """The configuration of a file, or the nearest one from the folder `start` upward; an empty one where there is none.

    Raises `UsageError` for a file that is missing or no TOML, and for keys and values that cannot be meant, by name.
    """
    if path is None:
        return _nearest(start)
    table = _table(path)
    if table is None:
        raise UsageError(f"{path}: has no {_header(path)}")
    return _read(path, table)


def _nearest(start: str) -> Settings:
    folder = os.path.abspath(start)
    while True:
        for name in (OWN_NAME, PYPROJECT):
            path = os.path.join(folder, name)
            if os.path.isfile(path) and (table := _table(path)) is not None:
                return _read(path, table)
        above = os.path.dirname(folder)
        if above == folder:
            return Settings()
        folder = above


def _header(path: str) -> str:
    return "[tool.adapterops.validate]" if os.path.basename(path) == PYPROJECT else "[validate]"


def _table(path: str) -> Mapping[str, Any] | None:
    """The table in a file that is ours; None where it has none."""
    import tomllib

    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise UsageError(f"{path}: is no configuration: it is larger than {_MAX_BYTES >> 20} MiB")
        document = tomllib.loads(text.decode("utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: is no TOML: {error}") from error
    except RecursionError as error:
        raise UsageError(f"{path}: is nested too deeply") from error
    outer: Any = document
    if os.path.basename(path) == PYPROJECT:
        outer = document.get("tool", {})
        outer = outer.get("adapterops") if isinstance(outer, dict) else None
    if outer is None:
        return None
    if not isinstance(outer, dict):
        raise UsageError(f"{path}: tool.adapterops is no table; write {_header(path)}")
    for key in outer:
        if key != "validate":
            raise UsageError(f"{path}: nothing is called {key!r} here; settings stand in {_header(path)}")
    inner = outer.get("validate")
    if inner is not None and not isinstance(inner, dict):
        raise UsageError(f"{path}: validate is no table; write {_header(path)}")
    return inner


def _read(path: str, table: Mapping[str, Any]) -> Settings:
    values: dict[str, Any] = {"path": path}
    for key, value in table.items():
        if key not in _KEYS:
            import difflib  # only ever needed for a message

            near = difflib.get_close_matches(key, _KEYS, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; it knows {', '.join(_KEYS)}"
            raise UsageError(f"{path}: there is no setting {key!r}{hint}")
        try:
            values[key.replace("-", "_")] = _KEYS[key](value, path)
        except UsageError as error:
            raise UsageError(f"{path}: {key}: {error}") from error
    if values.get("arch") is not None and values.get("base") is not None:
        raise UsageError(f"{path}: arch and base both name the base model; give one of them")
    return Settings(**values)


def matches(pattern: str, path: str, root: str) -> bool:
    """Whether a glob means a path, or a folder that it is in.

    As in .gitignore: `*` stays within a name, `**` goes over folders, and a glob without a slash is about each name of the path.
    """
    name = path if path.startswith(HUB) else os.path.relpath(os.path.abspath(path), root).replace(os.sep, "/")
    wanted, parts = pattern.removeprefix("./").rstrip("/").split("/"), name.split("/")
    return _fits(wanted if len(wanted) > 1 else ["**", *wanted], parts)


def _fits(wanted: list[str], parts: list[str]) -> bool:
    if not wanted:
        return True  # what is left of the path is inside
    if wanted[0] == "**":
        return any(_fits(wanted[1:], parts[at:]) for at in range(len(parts)))
    return bool(parts) and fnmatchcase(parts[0], wanted[0]) and _fits(wanted[1:], parts[1:])


def _meant(codes: Iterable[str]) -> list[Rule]:
    return chosen(registry.rules(), Options(select=tuple(codes)))


def _strings(value: Any, path: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UsageError(f"is {_shown(value)}, and must be a list of strings")
    return tuple(value)


def _codes(value: Any, path: str) -> tuple[str, ...]:
    words = _strings(value, path)
    _meant(words)
    return words


def _globs_to_codes(value: Any, path: str) -> dict[str, tuple[str, ...]]:
    if not isinstance(value, dict):
        raise UsageError(f'is {_shown(value)}, and must be a table: "drafts/*" = ["D"]')
    out = {}
    for glob, codes in value.items():
        try:
            out[glob] = _codes(codes, path)
        except UsageError as error:
            raise UsageError(f"{glob}: {error}") from error
    return out


def _string(value: Any, path: str) -> str:
    if not isinstance(value, str) or not value:
        raise UsageError(f"is {_shown(value)}, and must be a string")
    return value


def _path(value: Any, path: str) -> str:
    return os.path.relpath(os.path.join(os.path.dirname(os.path.abspath(path)), _string(value, path)))


def _flag(value: Any, path: str) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"is {_shown(value)}, and must be true or false")
    return value


def _count(value: Any, path: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"is {_shown(value)}, and must be a number from 1")
    return value


def _one_of(known: Iterable[str], value: str) -> str:
    known = tuple(known)
    if value not in known:
        raise UsageError(f"{value!r} is none of {', '.join(known)}")
    return value


def _targets(value: Any, path: str) -> tuple[str, ...]:
    return tuple(_one_of(TARGETS, name) for name in _strings(value, path))


def _format(value: Any, path: str) -> str:
    return _one_of(FORMATS, _string(value, path))


def _shown(value: Any) -> str:
    return f"{str(value)[:80]!r}" if isinstance(value, str) else f"{str(value)[:80]}"


_KEYS: dict[str, Callable[[Any, str], Any]] = {
    "select": _codes,
    "ignore": _codes,
    "extend-ignore": _codes,
    "arch": _string,
    "base": _path,
    "targets": _targets,
    "strict": _flag,
    "exclude": _strings,
    "baseline": _path,
    "per-file-ignores": _globs_to_codes,
    "format": _format,
    "jobs": _count,
}
"""The settings by name, and how each is read."""
