"""What `adapterops merge` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from adapterops.cli.text import plural, table
from adapterops.cli.written import closing, heading, proof_line
from adapterops.merging.registry import METHODS, Kind, find

if TYPE_CHECKING:
    from adapterops.merging.merge import MergeResult
    from adapterops.merging.recipe import SourceRef
    from adapterops.merging.settings import ModuleReport

_ROUNDING = 0.01
"""An error up to this is what rounding to 16 bits makes; of one above, the rank is to blame."""
_LOSSY = 0.1
"""An error above this is a warning."""


def lines(result: MergeResult, verbose: bool) -> list[str]:
    """The report of a merge, a line each."""
    written = result.written
    step = result.recipe.steps[-1]
    arch = f" ({written.architecture.value})" if written.architecture.value else ""
    out = [heading(written, f"{step.method}, {written.dialect}{arch}")]
    signs = find(step.method, step.space)[0].signs or (1.0, 1.0)
    for number, ref in enumerate(step.sources):
        out.append(f"    × {_weight(ref, signs[min(number, 1)]):<5} {ref.path or f'step {ref.step}'}")
    for name, modules in result.earlier:
        out += [f"  step {name}: {line}" for line in _losses(modules)]
    out += [f"  {line}" for line in _losses(result.modules)]
    if verbose:
        rows = [_row(m) for _, modules in (*result.earlier, ("", result.modules)) for m in modules]
        out += ["", *table(["module", "method", "rank", "energy kept", "error"], rows), ""]
    proved = str(written.proof)
    if written.proof is not None and written.proof.exact:
        proved = f"read back, it holds what was computed, bit for bit ({plural(written.proof.modules, 'update')})"
    out.append(proof_line(written.proof, proved))
    return [*out, *closing(written.dropped, dict.fromkeys((*result.notes, *written.notes)))]


def _weight(ref: SourceRef, sign: float) -> str:
    """What an adapter's delta is multiplied by, with the sign that the method gives it."""
    if not isinstance(ref.weight, Mapping):
        return f"{sign * ref.weight:g}"
    by = "by block" if "blocks" in ref.weight or "double" in ref.weight or "single" in ref.weight else "by module"
    return by if sign > 0 else f"-1 {by}"


def _row(module: ModuleReport) -> list[str]:
    return [
        f"{module.component}: {module.module}",
        module.method,
        "–" if module.rank is None else str(module.rank),
        "–" if module.kept is None else f"{module.kept:.1%}",
        "–" if module.error is None else f"{module.error:.1e}",
    ]


def _losses(modules: Sequence[ModuleReport]) -> list[str]:
    """How much of the merged deltas the output holds."""
    told = [m for m in modules if m.error is not None and m.kept is not None and not m.cancels and not m.empty]
    partly = sorted((m for m in modules if m.error is None and m.kept is not None), key=lambda m: m.kept or 0.0)
    out = _loss(sorted(told, key=lambda m: -(m.error or 0)), " in the others" if partly else "") if told else []
    if partly:
        worst, middle = partly[0], partly[len(partly) // 2]
        out.append(
            f"{worst.method} of whole matrices: its components hold {middle.kept:.1%} of the adapters' own energy in the middle "
            f"module of {len(partly)}, {worst.kept:.1%} in the worst"
        )
        out.append(f"       ({worst.component}: {worst.module}, rank {worst.rank}); a larger --rank takes more of them")
    empty = [m for m in modules if m.empty]
    if empty:
        out.append(
            f"{click.style('nothing left', fg='yellow')}: {empty[0].method} makes nothing of {plural(len(empty), 'module')} "
            f"(first: {empty[0].module}): the adapters do not agree there, or so small a --density keeps none of its entries"
        )
    cancelling = [m for m in modules if m.cancels]
    if cancelling:
        out.append(
            f"{click.style('cancels', fg='yellow')}: in {plural(len(cancelling), 'module')} the adapters cancel each other "
            f"nearly or wholly (first: {cancelling[0].module}); what is left is rounding, or nothing"
        )
    return out


def _loss(measured: Sequence[ModuleReport], where: str) -> list[str]:
    """Of modules with the largest error first; `where` they are not all."""
    worst, middle = measured[0], measured[len(measured) // 2]
    most = worst.error or 0.0
    if most <= _ROUNDING:
        return [f"exact up to rounding{where}: the outputs differ from the merged deltas by at most {most:.2%}"]
    if METHODS[worst.method].by_rank and (worst.rank or 0) < (worst.exact_rank or 0):
        return _directions(worst, middle, max(m.exact_rank or 0 for m in measured))
    if 1 - (worst.kept or 0.0) < (most / 2) ** 2:  # the square of what the rank alone loses
        label = click.style("lossy", fg="yellow") if most > _LOSSY else "kept"
        return [
            f"{label}: numbers so small lose digits in the output's type: ‖ΔW − output‖ / ‖ΔW‖ = {most:.2f} in the worst module",
            f"       ({worst.component}: {worst.module}); a wider --dtype keeps them",
        ]
    share = f"{middle.kept:.1%} of the merged deltas' energy in the middle module, {worst.kept:.1%} in the worst"
    where = f"({worst.component}: {worst.module}, rank {worst.rank}, ‖ΔW − output‖ / ‖ΔW‖ = {most:.2f})"
    label = click.style("lossy", fg="yellow") if most > _LOSSY else "kept"
    out = [f"{label}: the rank holds {share}", f"       {where}"]
    ranks = [m.exact_rank for m in measured]
    whole = max((rank for rank in ranks if rank is not None), default=0)
    cat = f"; --method cat keeps all, at rank {whole}" if whole and None not in ranks else ""
    if cat and any(METHODS[m.method].kind is not Kind.SPAN or METHODS[m.method].signs for m in measured):
        cat = f"; --rank {whole} keeps all"
    out.append(f"       a larger --rank keeps more{cat}")
    loose = max(m.excess for m in measured)
    if loose > 1e-4:
        out.append(f"the factorisation may miss the best of its rank by {loose:.1e} of its error; --svd exact does not")
    return out


def _directions(worst: ModuleReport, middle: ModuleReport, whole: int) -> list[str]:
    """Of a method that makes something else of a lower rank, and not the best approximation of what it makes of the full one."""
    label = click.style("lossy", fg="yellow") if (worst.error or 0.0) > _LOSSY else "kept"
    return [
        f"{label}: the rank has room for {middle.kept:.1%} of the energy of what {worst.method} makes at full rank in the middle "
        f"module, {worst.kept:.1%} in the worst",
        f"       ({worst.component}: {worst.module}, rank {worst.rank} of {worst.exact_rank}, ‖full − output‖ / ‖full‖ = "
        f"{worst.error:.2f})",
        f"       a larger --rank comes nearer; --rank {whole} makes all of it",
    ]


def as_dict(result: MergeResult) -> dict[str, Any]:
    """The document of `--json`."""
    written = result.written
    proof = written.proof
    told = None
    if proof is not None:
        told = {"modules": proof.modules, "largest_error": proof.largest_error, "exact": proof.exact}
    return {
        "sources": [ref.path or f"step {ref.step}" for ref in result.recipe.steps[-1].sources],
        "output": written.path,
        "files": list(written.files),
        "to": written.dialect,
        "architecture": written.architecture.value,
        "modules": [_module(m) for m in result.modules],
        "steps": [{"name": name, "modules": [_module(m) for m in modules]} for name, modules in result.earlier],
        "tensors": written.tensors,
        "bytes": written.bytes,
        "proof": told,
        "recipe": result.recipe.dump(),
        "dropped": list(written.dropped),
        "notes": list(dict.fromkeys((*result.notes, *written.notes))),
        "seconds": {**result.seconds, "copy": written.timings.copy, "proof": written.timings.proof},
    }


def _module(m: ModuleReport) -> dict[str, Any]:
    return {
        "component": m.component,
        "module": m.module,
        "method": m.method,
        "rank": m.rank,
        "exact_rank": m.exact_rank,
        "kept": m.kept,
        "error": m.error,
        "excess": m.excess,
        "cancels": m.cancels,
        "empty": m.empty,
    }
