"""`adapterops to-lora`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from adapterops.cli.main import print_json
from adapterops.cli.options import Reading, Writing, reading, writing
from adapterops.cli.progress import counting
from adapterops.cli.text import spread, table
from adapterops.cli.written import closing, heading, last_entries, proof_line

if TYPE_CHECKING:
    from adapterops.operations.lora_maker import ModuleReport
    from adapterops.operations.to_lora import ToLoraResult

_ROUNDING = 1e-6
"""An error up to this is float32's."""


@click.command("to-lora", short_help="Make a plain LoRA of an adapter of any method.")
@click.argument("source", metavar="SRC")
@click.option("--rank", metavar="R", type=int, help="The rank of every module, at most.")
@click.option("--energy", metavar="E", type=float, help="The least share of each delta's ‖ΔW‖² to keep: 0.99.")
@click.option("--error", metavar="T", type=float, help="The relative error ‖ΔW − B·A‖ / ‖ΔW‖ that is allowed: 0.05.")
@click.option(
    "--target-rank",
    metavar="R",
    type=int,
    help="AdaLoRA: keep R triplets a module on average, the strongest of the whole adapter.",
)
@click.option(
    "--base-weights",
    metavar="BASE",
    type=click.Path(),
    help="The base model's weights (a file, or a model's or pipeline's folder), for methods that act on them.",
)
@click.option(
    "--initial",
    metavar="INIT",
    type=click.Path(),
    help="PiSSA, OLoRA, CorDA, LoRA-GA: the adapter as it was before its training.",
)
@click.option(
    "--residual-base",
    metavar="DIR",
    type=click.Path(),
    help="The base as that start changed it; with --base-weights, the published one.",
)
@click.option("--accept-approximate", is_flag=True, help="Estimate a random start (pissa_niter_N) from --base-weights.")
@click.option("--to", metavar="FORMAT", help="Format or dialect to write. [default: the source's]")
@reading
@click.option("-v", "--verbose", is_flag=True, help="List every module.")
@writing
def to_lora(
    source: str,
    rank: int | None,
    energy: float | None,
    error: float | None,
    target_rank: int | None,
    base_weights: str | None,
    initial: str | None,
    residual_base: str | None,
    accept_approximate: bool,
    to: str | None,
    read_with: Reading,
    verbose: bool,
    write_with: Writing,
) -> None:
    """Make a plain LoRA of the adapter SRC (a file, a folder, an hf:// name).

    Exact where its method is of low rank (MiSS, AdaLoRA, VeRA, GraLoRA …); for others --rank, --energy or --error says how
    much to keep, and the result is the best there is.  Methods that act on the base's own weights (OFT, HRA, HiRA …) need
    --base-weights.  Biases become LoRA biases, DoRA magnitudes and saved modules are kept; nothing is lost unsaid.

    \b
    Examples:
      adapterops to-lora adalora-folder -o lora
      adapterops to-lora style-lokr.safetensors --rank 32
      adapterops to-lora oft-folder --energy 0.99 --base-weights model/
      adapterops to-lora pissa-folder --initial pissa-before-training
      adapterops to-lora olora-folder --base-weights model/ --rank 16
      adapterops to-lora fourierft.safetensors --error 0.1 --base model/config.json --set random_loc_seed=777 --set scaling=150
    """
    from adapterops.operations.to_lora import to_lora as run

    with counting("making a LoRA", "modules", quiet=write_with.as_json) as progress:
        result = run(
            source,
            write_with.output,
            to=to,
            rank=rank,
            energy=energy,
            error=error,
            target_rank=target_rank,
            base_weights=base_weights,
            initial=initial,
            residual_base=residual_base,
            accept_approximate=accept_approximate,
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


def _lines(result: ToLoraResult, verbose: bool) -> list[str]:
    written = result.written
    arch = f" ({written.architecture.value})" if written.architecture.value else ""
    out = [heading(written, f"LoRA, {written.dialect}{arch}")]
    made = [m for m in result.modules if m.rank is not None]
    ranks: Counter[object] = Counter(sorted(m.rank or 0 for m in made))
    out.append(f"  rank {spread(ranks)}")
    out += [f"  {line}" for line in _losses(made)]
    if verbose:
        rows = [_row(m) for m in result.modules]
        out += ["", *table(["module", "method", "rank", "energy kept", "error"], rows), ""]
    out.append(proof_line(written.proof, f"read back, it holds what was computed ({written.proof})"))
    return [*out, *closing((*result.dropped, *written.dropped), dict.fromkeys(written.notes))]


def _losses(made: Sequence[ModuleReport]) -> list[str]:
    worst = max(made, key=lambda m: m.error)
    if worst.error <= _ROUNDING:
        return [f"exact: the LoRA differs from the deltas by at most {worst.error:.1e}"]
    middle = sorted(made, key=lambda m: m.error)[len(made) // 2]
    return [
        f"kept: {middle.kept:.2%} of the energy in the middle module, {worst.kept:.2%} in the worst",
        f"      ({worst.component}: {worst.module}, rank {worst.rank}, ‖ΔW − B·A‖ / ‖ΔW‖ = {worst.error:.2g})",
    ]


def _row(module: ModuleReport) -> list[str]:
    where = f"{module.component}: {module.module}"
    if module.rank is None:
        return [where, module.method, "–", "–", "–"]
    return [where, module.method, str(module.rank), f"{module.kept:.2%}", f"{module.error:.3g}"]


def _as_dict(result: ToLoraResult) -> dict[str, Any]:
    written = result.written
    return {
        "source": written.source,
        "output": written.path,
        "files": list(written.files),
        "to": written.dialect,
        "architecture": written.architecture.value,
        "modules": [
            {
                "component": m.component, "module": m.module, "method": m.method, "rank": m.rank, "kept": m.kept,
                "error": m.error,
            }
            for m in result.modules
        ],
        **last_entries(written, (*result.dropped, *written.dropped)),
    }  # fmt: skip
