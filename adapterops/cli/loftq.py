"""`adapterops loftq`."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from adapterops.cli.main import print_json
from adapterops.cli.options import Reading, Writing, reading, writing
from adapterops.cli.progress import counting
from adapterops.cli.text import listing, plural, spread, table
from adapterops.cli.written import closing, heading, last_entries, proof_line

if TYPE_CHECKING:
    from adapterops.operations.loftq import LoftqModule, LoftqResult

_SHOWN = 3
"""Modules of one kind that are named without -v."""


@click.command("loftq", short_help="Start a LoRA as what quantisation takes from the base.")
@click.argument("source", metavar="SRC")
@click.option(
    "--base-weights",
    metavar="BASE",
    type=click.Path(),
    required=True,
    help="The base model's own weights, not quantised (a file, or a model's or pipeline's folder).",
)
@click.option(
    "--quant", metavar="KIND", default="nf4", help="How the base will be quantised: nf4, fp4 or int8. [default: nf4]"
)
@click.option("--block-size", metavar="N", type=int, help="Numbers with one scale, for nf4 and fp4. [default: 64]")
@click.option("--double-quant", is_flag=True, help="Quantise the scales too, as bnb_4bit_use_double_quant does.")
@click.option(
    "--iterations",
    metavar="N",
    type=int,
    default=1,
    help="Alternate between factors and base so often; more than 1 needs --write-base. [default: 1]",
)
@click.option("--rank", metavar="R", type=int, help="The rank of the new factors. [default: the adapter's]")
@click.option(
    "--write-base", metavar="DIR", type=click.Path(), help="Write the base that goes with the factors, dequantised."
)
@click.option("--device", metavar="NAME", default="auto", help="auto, cpu, cuda or cuda:N. [default: auto]")
@click.option("--to", metavar="FORMAT", help="Format or dialect to write. [default: the source's]")
@reading
@click.option("-v", "--verbose", is_flag=True, help="List every module.")
@writing
def loftq(
    source: str,
    base_weights: str,
    quant: str,
    block_size: int | None,
    double_quant: bool,
    iterations: int,
    rank: int | None,
    write_base: str | None,
    device: str,
    to: str | None,
    read_with: Reading,
    verbose: bool,
    write_with: Writing,
) -> None:
    """Replace the factors of the LoRA SRC by what quantising the base takes from each weight (LoftQ).

    SRC is an adapter that is about to be trained on a quantised base; what a trained one has learnt is replaced. The base is
    read one weight at a time, quantised as bitsandbytes will (pip install 'adapterops[quant]'), and the best factors for
    the difference take the adapter's place: quantised base and adapter together are nearer to the base than the quantised
    base alone. A module for which they are not stays as it is.

    \b
    Examples:
      adapterops loftq fresh-lora --base-weights model/ -o loftq-lora
      adapterops loftq fresh-lora --base-weights model/ --quant int8 --rank 32
      adapterops loftq fresh-lora --base-weights model/ --iterations 5 --write-base loftq-model
    """
    from adapterops.operations.loftq import loftq as run

    with counting("quantising", "modules", quiet=write_with.as_json) as progress:
        result = run(
            source,
            write_with.output,
            base_weights=base_weights,
            quant=quant,
            block_size=block_size,
            double_quant=double_quant,
            iterations=iterations,
            rank=rank,
            write_base=write_base,
            device=device,
            to=to,
            reading=read_with.given,
            dtype=write_with.dtype,
            allow_drop=read_with.allow_drop,
            overwrite=write_with.overwrite,
            verify=not write_with.no_verify,
            progress=progress,
        )
    if write_with.as_json:
        print_json(_as_dict(result))
        return
    for line in _lines(result, verbose):
        click.echo(line)


def _lines(result: LoftqResult, verbose: bool) -> list[str]:
    written = result.written
    out = [heading(written, f"LoRA, {written.dialect}")]
    if result.base_path:
        out.append(f"{click.style(result.base_path, bold=True)}: the base that goes with it, dequantised")
    new = [m for m in result.modules if m.replaced]
    if new:
        ranks: Counter[object] = Counter(sorted(m.rank or 0 for m in new))
        out.append(f"  {result.quant}: {plural(len(new), 'module')} replaced, rank {spread(ranks)}")
        fall = 1 - result.after / result.before
        out.append(f"  ‖W − Q‖ {result.before:.4g}, ‖W − Q − s·B·A‖ {result.after:.4g} over all ({fall:.2%} less)")
    out += [f"  {click.style('as it was', fg='yellow')}: {line}" for line in _left(result, verbose)]
    if verbose:
        rows = [_row(m) for m in result.modules]
        out += ["", *table(["module", "rank", "‖W − Q‖", "‖W − Q − s·B·A‖", ""], rows), ""]
    out.append(proof_line(written.proof, f"read back, it holds what was computed ({written.proof})"))
    return [*out, *closing(written.dropped, dict.fromkeys(written.notes))]


def _left(result: LoftqResult, verbose: bool) -> list[str]:
    """The modules that stay as they are, by reason."""
    reasons: dict[str, list[str]] = {}
    for module in result.modules:
        if not module.replaced:
            reasons.setdefault(module.note, []).append(_name(module))
    shown = None if verbose else _SHOWN
    return [f"{listing(names, shown, '-v lists them')}: {reason}" for reason, names in reasons.items()]


def _name(module: LoftqModule) -> str:
    return f"{module.component}: {module.module}" if module.module else module.component


def _row(module: LoftqModule) -> list[str]:
    before, after = ("–" if norm is None else f"{norm:.5g}" for norm in (module.before, module.after))
    return [_name(module), str(module.rank or "–"), before, after, module.note]


def _as_dict(result: LoftqResult) -> dict[str, Any]:
    written = result.written
    return {
        "source": written.source,
        "output": written.path,
        "files": list(written.files),
        "base": result.base_path or None,
        "to": written.dialect,
        "architecture": written.architecture.value,
        "quant": result.quant,
        "before": result.before,
        "after": result.after,
        "modules": [
            {
                "component": m.component, "module": m.module, "rank": m.rank, "replaced": m.replaced, "before": m.before,
                "after": m.after, "note": m.note,
            }
            for m in result.modules
        ],
        **last_entries(written, written.dropped),
    }  # fmt: skip
