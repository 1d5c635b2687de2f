"""`adapterops rules` and `adapterops rule`: what `validate` looks for."""

from __future__ import annotations

import shutil
import sys

import click

from adapterops.cli.main import print_json
from adapterops.cli.text import table

_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, nothing else.")


@click.command(short_help="The rules of `validate`.")
@click.option("--select", metavar="CODES", default="ALL", help="Only these: codes, beginnings of codes, names.")
@_json
def rules(select: str, as_json: bool) -> None:
    """List the rules: code, severity, whether --fix mends it, name, and why it is one.

    \b
    Examples:
      adapterops rules
      adapterops rules --select T,C
      adapterops rule T101
    """
    from adapterops.validation import registry
    from adapterops.validation.options import Options, chosen

    words = tuple(word.strip() for word in select.split(",") if word.strip())
    found = chosen(registry.rules(), Options(select=words))
    if as_json:
        print_json([rule.to_dict() for rule in found])
        return
    rows = [[rule.code, str(rule.severity), "[*]" if rule.fixable else "", rule.name] for rule in found]
    lines = table(["code", "severity", "fix", "name"], rows)
    width = max(map(len, lines))
    room = max(30, shutil.get_terminal_size().columns - width - 2) if sys.stdout.isatty() else None
    for line, why in zip(lines, ["why", "───", *(rule.why for rule in found)], strict=True):
        click.echo(f"{line.ljust(width)}  {_cut(why, room)}".rstrip())
    click.echo(
        f"\n{len(found)} rules; [*]: --fix mends it where that is safe. adapterops rule CODE says what a rule is about."
    )


def _cut(text: str, width: int | None) -> str:
    """On a terminal a row stays a row."""
    return text if width is None or len(text) <= width else text[: width - 1].rsplit(" ", 1)[0].rstrip(",;:") + " …"


@click.command(short_help="What a rule of `validate` is about.")
@click.argument("code", metavar="CODE")
@_json
def rule(code: str, as_json: bool) -> None:
    """Print the page of a rule, by its code or its name: why, what to do, an example that fires and one that does not.

    \b
    Examples:
      adapterops rule F001
      adapterops rule unreadable-file --json
    """
    from adapterops.validation import registry
    from adapterops.validation.reporters.rule_page import page

    found = registry.find(code)
    if as_json:
        print_json(found.to_dict())
        return
    click.echo(page(found))
