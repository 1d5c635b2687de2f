"""Validation's front door: adapters are found, each is examined by the rules that are asked, and a report made."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache

from adapterops import architectures
from adapterops.architectures import Architecture
from adapterops.errors import AdapterOpsError, UsageError
from adapterops.validation import registry
from adapterops.validation.discover import discover
from adapterops.validation.options import TARGETS, Options, chosen
from adapterops.validation.report import Checked, Report
from adapterops.validation.rule import Finding, Needs, Rule
from adapterops.validation.subject import Place, Subject, in_words
from adapterops.validation.workers import run_all

PathLike = str | os.PathLike[str]
Progress = Callable[[int, int], None]
"""Called with the number of adapters examined, and of all."""


def validate(
    *paths: PathLike,
    select: Iterable[str] = ("ALL",),
    ignore: Iterable[str] = (),
    arch: str | None = None,
    base: PathLike | Architecture | None = None,
    targets: Iterable[str] = (),
    load_test: bool = False,
    header_only: bool = False,
    jobs: int = 1,
    skip: Callable[[str], bool] | None = None,
    progress: Progress | None = None,
) -> Report:
    """What is wrong with adapters: files, folders, trees of folders, or `hf://owner/repo`.

    - `select` and `ignore` are codes of rules, beginnings of codes, names, or ALL, in a list or a text with commas;
    - `arch` or `base` is the base model that the adapters are for, as for `load`;
    - `targets` are the loaders that they are for (peft, diffusers, comfy, vllm, sglang, mlx, gguf);
    - `load_test` loads them with peft or diffusers, into a model without weights;
    - `header_only` asks only rules that read no tensor's bytes;
    - `jobs` is the number of cores: of processes, and, where there are fewer adapters, of threads that look at the bytes
      of one; 0 is all cores, and processes only where there are many adapters;
    - `skip` says of an adapter's path whether to leave it out.

    Raises `UsageError` for a path that does not exist and for options that cannot be understood; whatever is wrong inside
    what exists is a finding.
    """
    if arch is not None and base is not None:
        raise UsageError("--arch and --base both name the base model; give one of them")
    architecture = architectures.load(arch) if arch is not None else None
    if base is not None:
        architecture = base if isinstance(base, Architecture) else architectures.from_base(base)
    select, ignore, targets = map(_words, (select, ignore, targets))
    unknown = [name for name in targets if name not in TARGETS]
    if unknown:
        raise UsageError(f"--targets {unknown[0]!r} is none of {', '.join(TARGETS)}")
    options = Options(select, ignore, architecture, targets, load_test)
    rules = [r for r in chosen(registry.rules(), options) if not (header_only and r.needs is Needs.TENSORS)]
    places = discover(os.fspath(path) for path in paths)
    if skip is not None:
        places = [place for place in places if not skip(place.path)]
    return Report(tuple(run_all(examine, places, options, rules, jobs, progress)), tuple(rules))


def _words(value: Iterable[str]) -> tuple[str, ...]:
    return tuple(word.strip() for word in value.split(",")) if isinstance(value, str) else tuple(value)


def examine(place: Place, options: Options, rules: Sequence[Rule]) -> Checked:
    """What the rules find in one adapter."""
    subject = Subject(place, options)
    asked, checkers = _asked(tuple(rule.code for rule in rules), tuple(map(id, registry.checkers())))
    found: list[Finding] = []
    for check in checkers:
        try:
            found += check.find(subject)
        except AdapterOpsError as error:
            subject.faults.append(error)
    adapter = subject.adapter  # whose faults are told now, if no checker has asked for it
    found = [*_told(subject), *found]
    found = [replace(f, adapter=place.path) for f in found if f.rule.code in asked]
    return Checked(
        place.path,
        subject.dialect,
        (adapter.architecture.value or "") if adapter is not None else "",
        len({(u.component, u.module) for u in subject.updates}),
        sum(tensor.nbytes for tensor in subject.tensors.values()),
        tuple(sorted(found, key=lambda f: f.rule.code)),
    )


@lru_cache(maxsize=4)
def _asked(codes: tuple[str, ...], known: tuple[int, ...]) -> tuple[frozenset[str], tuple[registry.Checker, ...]]:
    """The codes that are asked, and the checkers of any of them; `known` are all checkers, by identity."""
    asked = frozenset(codes)
    return asked, tuple(c for c in registry.checkers() if any(rule.code in asked for rule in c.rules))


def _told(subject: Subject) -> list[Finding]:
    """The findings that reading told of: one a rule and kind of fault, however many modules have it."""
    by_fault = registry.by_fault()
    groups: dict[str, list[AdapterOpsError]] = {}
    for error in _causes(subject):
        groups.setdefault(error.fault, []).append(error)
    out = []
    paths = subject.weights, subject.config_path, subject.path
    for fault, errors in groups.items():
        rule = by_fault[fault]
        told = dict.fromkeys(in_words(error, *paths) for error in errors)
        more = f" ({len(told) - 1} more like it)" if len(told) > 1 else ""
        keys = tuple(dict.fromkeys(key for error in errors for key in error.keys))
        config = subject.config_path if subject.config_path in str(errors[0]) and not keys else ""
        out.append(rule.found(config or subject.weights, next(iter(told)) + more, keys))
    return out


def _causes(subject: Subject) -> list[AdapterOpsError]:
    """What reading told, without what follows from a key that nobody knows: its module lacks just that tensor."""
    unknown = subject.recognised[1].unclaimed if subject.recognised is not None else ()
    if not unknown or subject.recognised is None:
        return subject.faults
    stems = {claim.key: claim.stem.lower() for claim in subject.recognised[1].claims}
    lost = sorted(key.lower() for key in unknown)

    def is_there(stem: str) -> bool:
        at = bisect_left(lost, stem)
        return at < len(lost) and lost[at].startswith(stem)

    def follows(error: AdapterOpsError) -> bool:
        return error.fault in _OF_PARTS and any(is_there(stems[key]) for key in error.keys if key in stems)

    return [error for error in subject.faults if not follows(error)]


_OF_PARTS = ("missing-half", "ranks")
"""What is told of a module that lacks a tensor."""
