"""`adapterops convert`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from adapterops.cli.main import print_json
from adapterops.cli.options import Reading, Writing, reading, writing
from adapterops.cli.progress import bar
from adapterops.cli.text import bytes_text, listing, plural
from adapterops.cli.written import closing, proof_line

if TYPE_CHECKING:
    from adapterops.api import Result


@click.command(short_help="Convert an adapter to another format, with proof.")
@click.argument("source", metavar="SRC")
@click.option("--to", required=True, metavar="FORMAT", help="Format or dialect to write (adapterops formats).")
@reading
@click.option("--fold-alpha", is_flag=True, help="Bake the scale into the factors, for readers that ignore alpha.")
@click.option(
    "--repair", is_flag=True, help="Believe the tensors where a PEFT config contradicts them, and list what is changed."
)
@click.option(
    "--for",
    "reader",
    metavar="READER",
    help="With --to peft: what vllm or sglang loads and applies as peft does; folds, fills up or refuses the rest.",
)
@click.option("-v", "--verbose", is_flag=True, help="List every folded key.")
@writing
def convert(
    source: str,
    to: str,
    read_with: Reading,
    fold_alpha: bool,
    repair: bool,
    reader: str | None,
    verbose: bool,
    write_with: Writing,
) -> None:
    """Convert the adapter SRC (a file or a folder) to another format.

    The output is read back from disk and every module's weight delta compared with the source's before it appears;
    without -o it stands in the current folder, named after the source and the target.

    \b
    Examples:
      adapterops convert style.safetensors --to peft
      adapterops convert style.safetensors --to diffusers -o style-diffusers.safetensors
      adapterops convert my-peft-folder --to kohya -o style.safetensors --dtype float16
      adapterops convert adapter_model.safetensors --to peft --alpha 16 --base model/config.json
      adapterops convert folder --to peft --repair -o repaired
      adapterops convert folder --to peft --for vllm --base model/config.json -o served
      adapterops convert botched.safetensors --to diffusers --rename '_lora_(down|up)\\.weight$=.lora_\\1.weight'
    """
    from adapterops import api, registry

    form, dialect = registry.find(to)
    api.insist_on_reader(form, reader)
    place = write_with.output if write_with.output is not None else api.default_output(source, form, dialect)
    adapter = api.load(source, repair=repair, **read_with.arguments)
    # The bytes are moved once and compared once.
    with bar(f"converting to {dialect.title}", 2 * adapter.provenance.size, quiet=write_with.as_json) as progress:
        result = api.save(
            adapter,
            place,
            format=to,
            dtype=write_with.dtype,
            fold_alpha=fold_alpha,
            fields=read_with.fields,
            allow_drop=read_with.allow_drop,
            repair=repair,
            reader=reader,
            overwrite=write_with.overwrite,
            verify=not write_with.no_verify,
            progress=progress,
        )
    if write_with.as_json:
        print_json(_as_dict(result))
        return
    titles = {d.name: d.title for f in registry.formats().values() for d in f.dialects}
    for line in _lines(result, titles, verbose):
        click.echo(line)


def _lines(result: Result, titles: Mapping[str, str], verbose: bool) -> list[str]:
    arch = f", {result.architecture.value}" if result.architecture.value else ""
    out = [
        f"{result.source} ({titles[result.source_dialect]}{arch}) → {result.path} ({titles[result.dialect]})",
        f"  {plural(result.modules, 'module')}, {plural(result.tensors, 'tensor')}, {bytes_text(result.bytes)}",
        proof_line(result.proof, str(result.proof)),
    ]
    if result.folded:
        shown = None if verbose else 2
        out.append(f"  folded: {listing(result.folded, shown, 'an alpha each, now part of the scale; -v lists all')}")
    return [*out, *closing(result.dropped, result.notes)]


def _as_dict(result: Result) -> dict[str, Any]:
    proof = result.proof
    return {
        "source": result.source,
        "output": result.path,
        "files": list(result.files),
        "from": result.source_dialect,
        "to": result.dialect,
        "for": result.reader or None,
        "architecture": {
            "value": result.architecture.value,
            "certainty": str(result.architecture.certainty),
            "source": result.architecture.source,
        },
        "modules": result.modules,
        "tensors": result.tensors,
        "bytes": result.bytes,
        "proof": None
        if proof is None
        else {
            "modules": proof.modules,
            "tensors": proof.tensors,
            "identical": proof.identical,
            "largest_error": proof.largest_error,
            "worst": proof.worst,
            "tolerance": proof.tolerance,
            "exact": proof.exact,
        },
        "folded": list(result.folded),
        "dropped": list(result.dropped),
        "notes": list(result.notes),
        "seconds": {"copy": result.timings.copy, "flush": result.timings.flush, "proof": result.timings.proof},
    }
