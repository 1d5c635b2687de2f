"""What `--fix` is to do to one adapter: the changes that its findings offer, put together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from adapterops.validation.rule import Change, Finding


@dataclass(slots=True)
class Plan:
    """All changes as one.  `findings` are those it mends, `done` says so in lines; `left` are the others, `why` in words."""

    findings: list[Finding] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)
    drop: set[str] = field(default_factory=set)
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    rewrite: bool = False
    rename: dict[str, str] = field(default_factory=dict)
    """Old to new names of files; filled by who knows the folder."""
    done: list[str] = field(default_factory=list)
    left: list[Finding] = field(default_factory=list)
    why: list[str] = field(default_factory=list)


def plan_of(findings: Iterable[Finding], unable: Callable[[Finding], str], config: Mapping[str, Any]) -> Plan:
    """Put the changes of findings together; `config` is what they change.

    Those that contradict each other are all left: none of them is known to be the right one.  `unable` says why a change
    cannot be made at all ("" where it can).
    """
    findings = [finding for finding in findings if finding.change is not None]
    reasons = {id(finding): unable(finding) for finding in findings}
    for at, one in enumerate(findings):
        for two in findings[at + 1 :]:
            reason = _clash(_change(one), _change(two), config)
            if reason:
                reasons[id(one)] = reasons[id(one)] or f"contradicts {two.code}: {reason}"
                reasons[id(two)] = reasons[id(two)] or f"contradicts {one.code}: {reason}"
    plan = Plan()
    for finding in findings:
        if reasons[id(finding)]:
            plan.left.append(finding)
            plan.why.append(reasons[id(finding)])
        else:
            _add(plan, finding, config)
    return plan


def _change(finding: Finding) -> Change:
    assert finding.change is not None
    return finding.change


def _clash(one: Change, two: Change, config: Mapping[str, Any]) -> str:
    """What two changes contradict each other in; "" where they do not."""
    for name in one.config.keys() & two.config.keys():
        if combined(config.get(name), one.config[name], two.config[name]) is None:
            return f"another value for the field {name!r}"
    for name in one.metadata.keys() & two.metadata.keys():
        if one.metadata[name] != two.metadata[name]:
            return f"another value for the header entry {name!r}"
    for key in one.keys.keys() & two.keys.keys():
        if composed(key, one.keys[key], two.keys[key]) is None:
            return f"another name for {key[:120]!r}"
    if one.keys.keys() & set(two.drop) or two.keys.keys() & set(one.drop):
        return "one renames what the other leaves out"
    if one.rename and two.rename and one.rename != two.rename:
        return "another name for the file"
    return ""


def combined(value: Any, one: Any, two: Any) -> tuple[Any] | None:
    """The value that both changes of a field make together; None where they contradict each other.

    Both may take entries out of a list or a table: then both are gone.
    """
    if one == two and type(one) is type(two):
        return (one,)
    if isinstance(value, list) and isinstance(one, list) and isinstance(two, list):
        out: list[Any] = []
        for entry in value:
            if out.count(entry) < min(one.count(entry), two.count(entry)):
                out.append(entry)
        fewer = all(entry in value and new.count(entry) <= value.count(entry) for new in (one, two) for entry in new)
        return (out,) if fewer else None
    if not (isinstance(value, dict) and isinstance(one, dict) and isinstance(two, dict)):
        return None
    if any(new[name] != value.get(name) for new in (one, two) for name in new):
        return None
    return ({name: entry for name, entry in value.items() if name in one and name in two},)


def composed(key: str, one: str, two: str) -> str | None:
    """The name that both changes of a name make together; None where they contradict each other.

    Both may take segments (between dots) out: then both are gone.
    """
    if one == two:
        return one
    segments = key.split(".")
    kept = [_kept(segments, name.split(".")) for name in (one, two)]
    if kept[0] is None or kept[1] is None:
        return None
    left = sorted(kept[0] & kept[1])
    return ".".join(segments[n] for n in left) if left else None


def _kept(segments: list[str], fewer: list[str]) -> set[int] | None:
    """The places of the segments that a shorter name keeps, the last ones that do; None where it has others."""
    places, at = set[int](), len(segments)
    for segment in reversed(fewer):
        at -= 1
        while at >= 0 and segments[at] != segment:
            at -= 1
        if at < 0:
            return None
        places.add(at)
    return places


def _add(plan: Plan, finding: Finding, config: Mapping[str, Any]) -> None:
    change = _change(finding)
    plan.findings.append(finding)
    for key, name in change.keys.items():
        plan.keys[key] = composed(key, plan.keys[key], name) or name if key in plan.keys else name
    plan.drop.update(change.drop)
    for name, value in change.config.items():
        both = combined(config.get(name), plan.config[name], value) if name in plan.config else None
        plan.config[name] = both[0] if both is not None else value
    plan.metadata.update(change.metadata)
    plan.rewrite = plan.rewrite or change.rewrite
    line = f"{change.about} ({finding.code})"
    if line not in plan.done:
        plan.done.append(line)
