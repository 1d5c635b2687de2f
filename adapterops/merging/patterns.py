"""Globs over modules, as weights files and recipes write them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import translate
from functools import cache

from adapterops.errors import UsageError


def matches(glob: str, component: str, module: str) -> bool:
    """Whether `glob` (`*`, `?`, `[…]`; upper and lower case differ) fits `component.module`, or the module's name."""
    fits = _compiled(glob)
    return fits(f"{component}.{module}") is not None or fits(module) is not None


@cache
def _compiled(glob: str) -> Callable[[str], re.Match[str] | None]:
    return re.compile(translate(glob)).match


def insist_on_matches(globs: Iterable[str], modules: Iterable[tuple[str, str]], where: str) -> None:
    """Raise `UsageError` for a glob that fits none of the modules (component, name): it does nothing, so is a typo."""
    listed = list(modules)
    for glob in globs:
        if not any(matches(glob, *module) for module in listed):
            import difflib

            names = [".".join(module) for module in listed]
            near = difflib.get_close_matches(glob, names, n=2, cutoff=0.4) or names[:2]
            called = f"modules here are called {', '.join(near)} …" if near else "there is no module here"
            raise UsageError(f"{where}: the pattern {glob!r} fits no module; {called}")
