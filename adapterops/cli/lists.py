"""`adapterops formats`, `architectures` and `methods`: what this installation knows."""

from __future__ import annotations

import click

from adapterops.cli.main import print_json
from adapterops.cli.text import table

_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, nothing else.")


@click.command(short_help="The formats and dialects that are read and written.")
@_json
def formats(as_json: bool) -> None:
    """List the formats, their dialects, and an example of a key in each.  --to and --from take either."""
    from adapterops import registry

    found = [
        {
            "format": form.name,
            "dialect": d.name,
            "title": d.title,
            "written": d.written,
            "alpha": d.alpha.value,
            "example": d.example,
        }
        for form in registry.formats().values()
        for d in form.dialects
    ]
    if as_json:
        print_json(found)
        return
    rows = []
    for f in found:
        row = {name: str(value) for name, value in f.items()}
        title = row["title"] + ("" if f["written"] else " (read only)")
        rows.append([row["format"], row["dialect"], title, row["alpha"], row["example"]])
    for line in table(["format", "dialect", "what it is", "alpha in", "a key"], rows):
        click.echo(line)


@click.command(short_help="The base models whose module names are built in.")
@_json
def architectures(as_json: bool) -> None:
    """List the built-in base models.  Any other one is given by its config: --base CONFIG."""
    from adapterops import architectures as known

    tables = [known.load(name) for name in known.names()]
    found = [
        {"name": a.name, "title": a.title, "components": {c.name: len(c.modules) for c in a.components.values()}}
        for a in tables
    ]
    if as_json:
        print_json(found)
        return
    rows = [[a.name, a.title, ", ".join(f"{c.name} ({len(c.modules)})" for c in a.components.values())] for a in tables]
    for line in table(["name", "base model", "components (modules)"], rows):
        click.echo(line)


@click.command(short_help="The adapter methods that are understood, and those of merging.")
@click.option("--merge", "merging", is_flag=True, help="The methods of `adapterops merge`, with their parameters.")
@click.option("-v", "--verbose", is_flag=True, help="Every field of the configs, too.")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@_json
def methods(merging: bool, verbose: bool, names: tuple[str, ...], as_json: bool) -> None:
    """List the methods of adaptation (all, or those of the NAMEs), or with --merge those of merging.

    Of each: what it is recognised by, what it does to a weight, its LoRA, what its tensors leave open.

    \b
    Examples:
      adapterops methods
      adapterops methods oft miss -v
      adapterops methods --merge
    """
    if merging:
        _merge_methods(as_json)
        return
    from adapterops import registry
    from adapterops.cli.methods_text import lines, meant, no_such, others, text
    from adapterops.methods import METHODS

    rows = [row for form in registry.formats().values() for row in form.types()]
    wanted = {name.lower() for name in names}
    unknown = [name for name in sorted(wanted) if name not in METHODS and not any(meant(row, name) for row in rows)]
    if unknown:
        raise click.UsageError(no_such(unknown[0], rows))
    own = [row for row in rows if not wanted or any(meant(row, name) for name in wanted)]
    rest = [METHODS[name] for name in others(rows) if not wanted or name in wanted]
    if as_json:
        print_json(
            [{"type": row.name, "title": row.title, "methods": list(row.methods), **dict(lines(row))} for row in own]
            + [{"type": None, "title": m.title, "methods": [m.name], "source": m.source} for m in rest]
        )
        return
    for line in text(own, verbose or bool(wanted)):
        click.echo(line)
    if rest:
        click.echo("" if wanted else "\nof other formats, or beside the above:")
    for line in table(["method", "what it is", "source"], [[m.name, m.title, m.source] for m in rest]) if rest else ():
        click.echo(line)


def _merge_methods(as_json: bool) -> None:
    import adapterops.merging.methods  # noqa: F401  (fills the table)
    from adapterops.merging.registry import ALIASES, METHODS

    found = [
        {
            "method": m.name,
            "aliases": [alias for alias, (name, _) in ALIASES.items() if name == m.name],
            "spaces": [space.value for space in m.spaces],
            "summary": m.summary,
            "source": m.source,
            "adapters": m.adapters,
            "parameters": [
                {"name": p.name, "option": p.option, "help": p.help, "default": p.default, "range": p.range}
                for p in m.parameters
            ],
        }
        for m in METHODS.values()
    ]
    if as_json:
        print_json(found)
        return
    for m in METHODS.values():
        names = [m.name, *(alias for alias, (name, _) in ALIASES.items() if name == m.name)]
        click.echo(click.style(", ".join(names), bold=True) + f"  ({' or '.join(space.value for space in m.spaces)})")
        click.echo(f"    {m.summary}")
        if m.parameters:
            click.echo("    " + ", ".join(p.option for p in m.parameters))
        click.echo(f"    {m.source}")
    click.echo()
    for p in {p.name: p for m in METHODS.values() for p in m.parameters}.values():
        usual = "must be given" if p.default is None else f"default {p.default}"
        click.echo(click.style(p.option, bold=True) + f"  {p.help} ({p.range}; {usual})")
