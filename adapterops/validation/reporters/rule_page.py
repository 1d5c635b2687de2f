"""A rule's page, in Markdown: what `adapterops rule CODE` prints, `docs/rules.md` holds, and SARIF carries as help."""

from __future__ import annotations

from adapterops.validation.rule import GROUPS, Needs, Rule

_READS = {
    Needs.HEADER: "reads headers and configs",
    Needs.FILES: "reads headers, configs and other files of the folder",
    Needs.TENSORS: "reads the tensors",
}


def facts(rule: Rule) -> str:
    """What kind of rule it is, in a line."""
    mending = ["`--fix` mends it where that is safe"] if rule.fixable else []
    return " · ".join([str(rule.severity), GROUPS[rule.group], _READS[rule.needs], *mending])


def examples(rule: Rule) -> str:
    """What breaks the rule and what does not, in plain text."""
    return f"Fires: {rule.fires}\nPasses: {rule.passes}"


def page(rule: Rule, level: int = 1) -> str:
    """The page, its title a heading of `level`."""
    out = [f"{'#' * level} {rule.code}: {rule.name}", "", facts(rule), "", f"**Why**: {rule.why}", ""]
    out += [f"**What to do**: {rule.remedy}", "", *_example("Fires", rule.fires), *_example("Passes", rule.passes)]
    if rule.source:
        out.append(f"Source: {rule.source}")
    return "\n".join(out).rstrip()


def _example(title: str, text: str) -> list[str]:
    if "\n" not in text:
        return [f"**{title}**: {text}", ""]
    return [f"**{title}**:", "", "```", *text.strip("\n").split("\n"), "```", ""]
