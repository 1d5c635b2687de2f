"""`bench to-lora` and `bench loftq`: factors of one weight, beside the algorithm that peft uses, in one run.

- to-lora: what PiSSA took out of a weight, found again (block Krylov, beginning with the trained factors), beside the full
  decomposition by which peft's `pissa_init` made it; errors are against float64, relative to a trained change of 1 % of the
  weight
- loftq: the factors for a weight's NF4 residual, beside peft's `loftq_init` (its device patched to the CPU); the error is
  how much more is left than by peft's
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import click
import torch

from benchmarks.measure import machine

SHAPES = ("4096x4096", "14336x4096")
RANKS = (16, 64)
_TRAINED = 0.01
"""‖ΔW‖ / ‖W‖ of a change as training makes it."""
_LEAST = {"to-lora": 15.0, "loftq": 8.0}
"""How many times faster than the peer is promised."""
_SPECTRA = {"to-lora": ("trained", "noise"), "loftq": ("trained",)}
"""What quantising takes is noise, whatever the weight's spectrum is."""
_TAIL = 256
"""Directions of a weight that stand out from noise."""
SPECTRA = {
    "trained": "singular values that fall as i^(-1/4) down to the noise, as of well-trained layers",
    "noise": "some 14 singular values above those of noise, which lie so close that telling them apart is hardest",
}
"""A tail of squares λ^(-α) with α from 2 to 4 is what Martin and Mahoney find in well-trained layers
(https://jmlr.org/papers/v22/20-410.html); α = 3 is i^(-1/4) of the singular values."""
Made = tuple[torch.Tensor, torch.Tensor]


def weight_of(shape: tuple[int, int], spectrum: str) -> torch.Tensor:
    """A seeded weight with one of the `SPECTRA`."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(shape, generator=generator)
    left, right = torch.randn(shape[0], _TAIL, generator=generator), torch.randn(_TAIL, shape[1], generator=generator)
    order = torch.arange(1, _TAIL + 1, dtype=torch.float32)
    # The largest singular value of the noise is √m + √n, and each column of `left` times its row of `right` has √(m·n).
    edge = (shape[0] ** 0.5 + shape[1] ** 0.5) / (shape[0] * shape[1]) ** 0.5
    falling = edge * (order / _TAIL).pow(-0.25) if spectrum == "trained" else 0.1 * order.pow(-0.7)
    return (noise + (left * falling) @ right) * 0.02


def trained(weight: torch.Tensor, start: Made) -> Made:
    """What became of factors in training: their product is off by 1 % of the weight."""
    generator = torch.Generator().manual_seed(1)
    b, a = start
    db = torch.randn(b.shape, generator=generator) * b.norm(dim=0) / b.shape[0] ** 0.5
    da = torch.randn(a.shape, generator=generator) * a.norm(dim=1)[:, None] / a.shape[1] ** 0.5
    share = _TRAINED * weight.norm() / (db @ a + b @ da).norm()
    return b + share * db, a + share * da


def timed(action: Callable[[], Made]) -> tuple[float, Made]:
    """Seconds, and what was made."""
    started = time.perf_counter()
    made = action()
    return time.perf_counter() - started, made


def pissa_ours(weight: torch.Tensor, rank: int, adapter: Made) -> Made:
    """As `adapterops to-lora --base-weights` finds it, with the adapter at hand."""
    from adapterops.operations.demutate import _leading

    return _leading(weight, rank, 1.0, adapter[1], "m")


def pissa_peer(weight: torch.Tensor, rank: int) -> Made:
    """As peft's `pissa_init` does."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    roots = s[:rank].sqrt()
    return u[:, :rank] * roots, roots[:, None] * vh[:rank]


def pissa_errors(weight: torch.Tensor, ours: Made, peer: Made) -> tuple[float, float]:
    """How far the products are from the best approximation in float64, relative to a trained change."""
    whole = weight.double()
    best = torch.linalg.eigh(whole.T @ whole)[1][:, -len(ours[1]) :]
    exact = (whole @ best) @ best.T
    size = _TRAINED * float(whole.norm())
    one, other = (float((b.double() @ a.double() - exact).norm()) / size for b, a in (ours, peer))
    return one, other


def loftq_ours(weight: torch.Tensor, rank: int, _: Made) -> Made:
    """As `adapterops loftq` does, one iteration."""
    from adapterops.linalg.loftq import split
    from adapterops.linalg.quant import quantiser

    found = split(weight, rank, quantiser("nf4"))
    return found.left, found.right


def loftq_peer(weight: torch.Tensor, rank: int) -> Made:
    """As peft does: a full decomposition of the residual (`_low_rank_decomposition`)."""
    from peft.utils.loftq_utils import _low_rank_decomposition

    from adapterops.linalg.quant import quantiser

    residual = weight - quantiser("nf4").apply_(weight.clone())
    found = _low_rank_decomposition(residual, reduced_rank=rank)
    return found["L"], found["R"]


def loftq_errors(weight: torch.Tensor, ours: Made, peer: Made) -> tuple[float, float]:
    """How much more of the residual ours leaves than peft's, relatively."""
    from adapterops.linalg.quant import quantiser

    residual = weight - quantiser("nf4").apply_(weight.clone())
    left = [float((residual - b @ a).double().norm()) for b, a in (ours, peer)]
    return left[0] / left[1] - 1, 0.0


JOBS: dict[str, tuple[Callable[..., Made], Callable[..., Made], Callable[..., tuple[float, float]]]] = {
    "to-lora": (pissa_ours, pissa_peer, pissa_errors),
    "loftq": (loftq_ours, loftq_peer, loftq_errors),
}


def measure(job: str, spectra: Sequence[str], shapes: Sequence[str], ranks: Sequence[int], runs: int) -> None:
    """Print a table: seconds of both, their ratio, and the error."""
    ours, peer, errors = JOBS[job]
    click.echo(f"{job} on {machine()}\n")
    click.echo("| weight | spectrum | rank | ours, s | peft's algorithm, s | ratio | error | peft's | promised |")
    click.echo("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for spectrum, text in product(spectra, shapes):
        rows, columns = (int(part) for part in text.split("x"))
        weight = weight_of((rows, columns), spectrum)
        for rank in ranks:
            theirs = timed(partial(peer, weight, rank))
            adapter = trained(weight, theirs[1])
            found = [timed(partial(ours, weight, rank, adapter)) for _ in range(runs)]
            own = sorted(found, key=lambda pair: pair[0])[len(found) // 2]
            ratio = theirs[0] / own[0]
            met = "met" if ratio >= _LEAST[job] else "not met"
            off, other = errors(weight, own[1], theirs[1])
            click.echo(
                f"| {text} | {spectrum} | {rank} | {own[0]:.2f} | {theirs[0]:.1f} | {ratio:.1f} | {off:.1e} | "
                f"{other:.1e} | {_LEAST[job]:.0f} ×: {met} |"
            )


def command(job: str) -> Any:
    """The subcommand of a job."""

    @click.command(job, help=f"Time the factors of `adapterops {job}` against peft's algorithm.")
    @click.option(
        "--spectrum", "spectra", type=click.Choice(tuple(SPECTRA)), multiple=True, default=_SPECTRA[job], show_default=True,
        help="Of the weight.  " + "  ".join(f"{name}: {text}." for name, text in SPECTRA.items()),
    )  # fmt: skip
    @click.option("--shape", "shapes", multiple=True, default=SHAPES, show_default=True, help="A weight, OUTxIN.")
    @click.option("--rank", "ranks", multiple=True, type=int, default=RANKS, show_default=True)
    @click.option(
        "--runs", type=click.IntRange(1), default=3, show_default=True, help="Runs of ours; the median counts."
    )
    def run(spectra: tuple[str, ...], shapes: tuple[str, ...], ranks: tuple[int, ...], runs: int) -> None:
        measure(job, spectra, shapes, ranks, runs)

    return run
