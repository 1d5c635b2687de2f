"""`adapterops inspect`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from adapterops.cli.main import print_json
from adapterops.cli.options import Reading, reading
from adapterops.cli.text import bytes_text, plural, spread, table
from adapterops.errors import AdapterOpsError

if TYPE_CHECKING:
    from adapterops.adapter import Adapter
    from adapterops.inspection import Inspection


@click.command(short_help="What an adapter file is and holds.")
@click.argument("source", metavar="SRC")
@reading
@click.option("--norms", is_flag=True, help="Size of every block's weight delta (reads the tensors).")
@click.option("--hash", "hashes", is_flag=True, help="Recompute sshs_model_hash and compare it with the header's.")
@click.option("--metadata", "show_metadata", is_flag=True, help="The header's metadata in full.")
@click.option("--config", "show_config", is_flag=True, help="The PEFT config that `convert --to peft` would write.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, nothing else.")
def inspect(
    source: str,
    read_with: Reading,
    norms: bool,
    hashes: bool,
    show_metadata: bool,
    show_config: bool,
    as_json: bool,
) -> None:
    """Report what the adapter SRC (a file or a folder) is: format, base model, modules, ranks, scale.

    Reads the header only, unless --norms or --hash asks for more.

    \b
    Examples:
      adapterops inspect style.safetensors
      adapterops inspect style.safetensors --norms
      adapterops inspect my-peft-folder --json
      adapterops inspect adapter_model.safetensors --config --alpha 16
    """
    from adapterops import loading
    from adapterops.inspection import report

    try:
        adapter = loading.load(source, **read_with.arguments)
    except AdapterOpsError as refusal:
        if show_config:
            raise
        from adapterops.looking import look  # a success has no use for it

        adapter = look(refusal, source, **read_with.arguments)
    if show_config:
        config, notes = _configs(adapter, read_with.fields)
        for note in notes:
            click.echo(f"note: {note}", err=True)
        print_json(config)
        return
    loading.insist_on_use(adapter, read_with.fields)
    found = report(adapter, norms=norms, hashes=hashes)
    if as_json:
        print_json(found.to_dict())
        return
    for line in _lines(found, show_metadata):
        click.echo(line)


def _configs(adapter: Adapter, fields: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The config of each component (of the only one, where there is one), and what was assumed for it."""
    from adapterops import registry
    from adapterops.plugin import Target
    from adapterops.strength import insist_on_alphas, notes_on_alphas

    insist_on_alphas(adapter)
    form, dialect = registry.find("peft")
    out = form.write(form.prepared(adapter), Target(dialect, adapter.base, fields))
    configs = {f.path.rpartition("/")[0]: json.loads(f.text) for f in out.files if f.text is not None}
    notes = list(dict.fromkeys((*adapter.provenance.notes, *notes_on_alphas(adapter), *out.notes)))
    return configs[""] if list(configs) == [""] else configs, notes


def _merged(found: Inspection) -> list[str]:
    """What the file was merged from, if its header holds a recipe that can be read."""
    if "adapterops_recipe" not in found.metadata:
        return []
    from adapterops.errors import UsageError
    from adapterops.merging import document
    from adapterops.merging.recipe import build

    where = f"{found.path}: its recipe"
    try:
        recipe = build(document.parse_json(found.metadata["adapterops_recipe"], where), where)
    except UsageError as error:
        return [f"merged from   a recipe that cannot be read: {error}"]
    out = []
    for step in recipe.steps:
        names = [ref.path or f"step {ref.step}" for ref in step.sources]
        weights = ["" if isinstance(ref.weight, dict) else f" × {ref.weight:g}" for ref in step.sources]
        out.append(f"{step.method} of " + ", ".join(n + w for n, w in zip(names, weights, strict=True)))
    return ["merged        " + "; then ".join(out) + " (merge --recipe makes it again)"]


def _lines(found: Inspection, show_metadata: bool) -> list[str]:
    lines = [*_heading(found), "", *_components(found)]
    if found.norms:
        rows = [[b, str(int(n["modules"])), f"{n['norm']:.4g}", f"{n['largest']:.4g}"] for b, n in found.norms.items()]
        lines += ["", *table(["block", "modules", "‖ΔW‖", "largest"], rows)]
    lines += [*_hashes(found), *_metadata(found, show_metadata)]
    if found.dropped:
        lines += ["", "left out (--allow-drop): " + ", ".join(found.dropped)]
    if found.notes:
        lines += ["", *(f"note: {note}" for note in found.notes)]
    return lines


def _heading(found: Inspection) -> list[str]:
    arch = found.architecture
    return [
        click.style(found.path, bold=True),
        f"format        {found.title} ({found.dialect})",
        f"architecture  {arch.value} ({arch.certainty}: {arch.source})"
        if arch.value
        else f"architecture  unknown: {arch.source}",
        f"size          {bytes_text(found.size)}, {plural(found.tensors, 'tensor')}, {plural(found.modules, 'module')}",
        "dtypes        " + ", ".join(f"{name} ({count})" for name, count in found.dtypes.items()),
        *_merged(found),
    ]


def _components(found: Inspection) -> list[str]:
    rows = [
        [
            c.name,
            str(c.modules),
            spread(c.methods),
            spread(c.ranks),
            spread(c.alphas) + (f" {c.alpha_source}" if c.alpha_source else ""),
            spread(c.scales),
            ", ".join(f"{k} ({v})" for k, v in c.extras.items()) or "–",
        ]
        for c in found.components
    ]
    return table(["component", "modules", "method", "rank", "alpha", "scale", "besides"], rows)


def _hashes(found: Inspection) -> list[str]:
    if "sshs_model_hash" in found.metadata and not found.hashes:
        return ["", f"sshs hash     {found.metadata['sshs_model_hash']} (as recorded; --hash recomputes it)"]
    lines = []
    for path, entry in found.hashes.items():
        verdict = {None: "none recorded", True: "as recorded", False: f"recorded: {entry['recorded']}"}[entry["agree"]]
        lines += ["", f"sshs_model_hash of {path}: {entry['computed']} ({verdict})"]
    return lines


def _metadata(found: Inspection, whole: bool) -> list[str]:
    if whole:
        return ["", *(f"{k}: {v}" for k, v in sorted(found.metadata.items()))]
    if not found.metadata:
        return []
    names = sorted(found.metadata)
    shown = ", ".join(names[:6]) + (f", … {len(names)} entries" if len(names) > 6 else "")
    return ["", f"metadata      {shown} (--metadata shows them)"]
