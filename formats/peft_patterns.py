"""Names and patterns of modules, as peft matches them and as they are made for it.

`target_modules` is matched by dotted ending or as a whole pattern, `rank_pattern` and `alpha_pattern` by
`(.*\\.)?(key)$`, `modules_to_save` by bare ending.  Sources: huggingface/peft 0.21.2 `utils/other.py`
(`get_pattern_key`), `tuners/tuners_utils.py` (`check_target_module_exists`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple


class Base(NamedTuple):
    """What is known of the base model that peft will walk over: nothing, by default."""

    names: frozenset[str] | None = None
    """The modules of the component; None where they are not known."""
    optional_prefix: str = ""
    """What the names begin with in one version of the base's class and not in another."""
    shapes: Mapping[str, tuple[int, ...]] = {}
    """Of weights, (out, in, *kernel)."""
    kinds: Mapping[str, str] = {}
    """`linear`, `conv`, `embedding` …; `transposed` for a layer that stores its weight as (in, out)."""
    parameters: frozenset[str] = frozenset()
    """Matrices that modules hold under other names than `weight`, each by its dotted name."""

    @classmethod
    def of(cls, component: Any) -> Base:
        """The base of an architecture's component, or of None."""
        if component is None:
            return cls()
        specs = component.modules
        return cls(
            frozenset(specs) | component.bare,
            component.optional_prefix,
            {name: spec.shape for name, spec in specs.items() if spec.shape},
            {name: "transposed" if spec.transposed else spec.kind for name, spec in specs.items()},
            frozenset(component.parameters),
        )


def named(module: str, wanted: Any) -> bool:
    """Whether `wanted`, a pattern of whole names or a list of dotted endings, means `module`."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == name or module.endswith("." + name) for name in wanted)


def in_layers(module: str, layers: Any, patterns: Any) -> bool:
    """Whether `layers_to_transform` and `layers_pattern` leave `module` in."""
    wanted = [layers] if isinstance(layers, int) else list(layers)
    names = [patterns] if isinstance(patterns, str) else list(patterns or [])
    for name in names or [r"[^.]*"]:
        lead = r".*?\." if not names else r"(?:^|.*?\.)"
        match = re.match(rf"{lead}{name}\.(\d+)\.", module)
        if match:
            return int(match.group(1)) in wanted
    return False


def looked_up(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that fits `module`."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def shuts_out(modules_to_save: Iterable[str], module: str) -> bool:
    """Whether peft leaves `module` unadapted for the sake of saved ones (it reads their names as patterns)."""
    return any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in modules_to_save)


# ---- from a set of modules to patterns ----------------------------------------------------------------------


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts dotted names by their segments, numbers by their value."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]


def names_regex(names: Iterable[str]) -> str:
    """A regular expression that matches exactly `names`: a trie by dotted segments, equal branches joined.

    It is the same whatever order the names come in.
    """
    branches: dict[str, list[str]] = {}
    ends = False
    for name in sorted(set(names), key=natural):
        if name == "":
            ends = True
            continue
        first, _, rest = name.partition(".")
        branches.setdefault(first, []).append(rest)
    joined: dict[str, list[str]] = {}
    for first, rests in branches.items():
        joined.setdefault(names_regex(rests), []).append(first)
    parts = []
    for rest, firsts in joined.items():
        head = re.escape(firsts[0]) if len(firsts) == 1 else "(?:" + "|".join(map(re.escape, firsts)) + ")"
        if rest.startswith("?"):
            parts.append(head + f"(?:\\.{rest[1:]})?")
        else:
            parts.append(head + (rf"\.{rest}" if rest else ""))
    body = parts[0] if len(parts) == 1 else "(?:" + "|".join(parts) + ")"
    if not parts:
        return ""
    return "?" + body if ends else body


def shortest_suffixes(chosen: set[str], among: Iterable[str]) -> dict[str, str]:
    """For every name in `chosen` its shortest dotted ending that no name of `among` outside `chosen` has too."""
    taken: dict[str, bool] = {}
    for name in among:
        inside = name in chosen
        for ending in _endings(name):
            taken[ending] = taken.get(ending, True) and inside
    # An ending that begins with a number would also fit a sibling without parameters, which no table lists.
    return {
        name: next((e for e in _endings(name) if taken.get(e, True) and not e[0].isdigit()), name) for name in chosen
    }


def _endings(name: str) -> list[str]:
    """The dotted endings of a name, shortest first, itself last."""
    out, at = [], len(name)
    while at >= 0:
        at = name.rfind(".", 0, at)
        out.append(name[at + 1 :])
    return out


def with_parents(names: Iterable[str]) -> set[str]:
    """The names and every module that contains them, as a walk over a model meets them."""
    out: set[str] = set()
    for name in names:
        parts = name.split(".")
        out.update(".".join(parts[:n]) for n in range(1, len(parts) + 1))
    return out


def exact_endings(groups: Sequence[set[str]], base: Base) -> list[list[str]] | None:
    """For each group of modules the short endings that mean it and nothing else of the base; None where none do."""
    if base.names is None:
        return None
    walk, adapted = with_parents(base.names), set().union(*groups)
    found = [sorted(set(shortest_suffixes(group, walk).values())) for group in groups]
    chosen = {ending for endings in found for ending in endings}
    exact = all(chosen.isdisjoint(_endings(n)) != (n in adapted) for n in walk)
    lost = base.optional_prefix and any(e.startswith(base.optional_prefix) for e in chosen)
    return found if exact and not lost else None


def target_modules(adapted: set[str], base: Base) -> list[str] | str:
    """`target_modules` that makes peft adapt exactly `adapted`.

    With the base's modules known, short endings where they are exact; otherwise a pattern of the full names,
    because an ending (even a whole name) could also fit a module that nobody has listed.
    """
    endings = exact_endings([adapted], base)
    return endings[0] if endings is not None else whole_names(adapted, base)


def whole_names(modules: set[str], base: Base) -> str:
    """A pattern of the full names of `modules`."""
    return optional(names_regex(modules), base.optional_prefix)


def optional(pattern: str, prefix: str) -> str:
    """The pattern with the beginning that one version of a class has lost made optional."""
    escaped = re.escape(prefix)
    return pattern.replace(escaped, f"(?:{escaped})?", 1) if prefix and pattern.startswith(escaped) else pattern


def pattern_table(values: Mapping[str, Any], base: Base) -> tuple[Any, dict[str, Any]]:
    """The commonest of `values` and a table of patterns for the others, exact over the modules given.

    peft looks patterns up for adapted modules only, so an ending that no other adapted module has is exact.
    """
    counted = Counter(values.values())
    default = min(counted, key=lambda v: (-counted[v], str(v)))
    table: dict[str, Any] = {}
    for value in sorted((v for v in counted if v != default), key=str):
        chosen = {name for name, v in values.items() if v == value}
        for name, ending in sorted(shortest_suffixes(chosen, values).items()):
            key = optional(re.escape(ending), base.optional_prefix)
            table[f"^{key}" if ending == name else key] = value
    return default, table
