"""`bench to-lora` and `bench loftq`: factors of one weight, beside the algorithm that peft uses, in one run.

- to-lora: what PiSSA took out of a weight, found again (block Krylov), beside the full decomposition by which peft's `pissa_init`
  made it; the error is relative to a trained change of 1 % of the weight
- loftq: the factors for a weight's NF4 residual, beside peft's `loftq_init` (its device patched to the CPU); the error is
  how much more is left than by peft's
"""

from __future__ import annotations

import time
from collections.abc import Callable
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
Made = tuple[torch.Tensor, torch.Tensor]


def weight_of(shape: tuple[int, int]) -> torch.Tensor:
    """A weight with a spectrum like that of a trained one: a power law over noise."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(shape, generator=generator)
    left, right = torch.randn(shape[0], 256, generator=generator), torch.randn(256, shape[1], generator=generator)
    falling = torch.arange(1, 257, dtype=torch.float32).pow(-0.7) * 0.1
    return (noise + (left * falling) @ right) * 0.02


def timed(action: Callable[[], Made]) -> tuple[float, Made]:
    """Seconds, and what was made."""
    started = time.perf_counter()
    made = action()
    return time.perf_counter() - started, made


def pissa_ours(weight: torch.Tensor, rank: int) -> Made:
    """As `adapterops to-lora --base-weights` finds it."""
    from adapterops.adapter import Update
    from adapterops.operations.demutate import _leading

    return _leading(weight, rank, 1.0, Update("model", "m", "lora", {}))


def pissa_peer(weight: torch.Tensor, rank: int) -> Made:
    """As peft's `pissa_init` does."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    roots = s[:rank].sqrt()
    return u[:, :rank] * roots, roots[:, None] * vh[:rank]


def pissa_error(weight: torch.Tensor, ours: Made, peer: Made) -> float:
    """The difference of the two products, relative to a trained change."""
    return float((ours[0] @ ours[1] - peer[0] @ peer[1]).norm() / (_TRAINED * weight.norm()))


def loftq_ours(weight: torch.Tensor, rank: int) -> Made:
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


def loftq_error(weight: torch.Tensor, ours: Made, peer: Made) -> float:
    """How much more of the residual ours leaves than peft's, relatively."""
    from adapterops.linalg.quant import quantiser

    residual = weight - quantiser("nf4").apply_(weight.clone())
    left = [float((residual - b @ a).double().norm()) for b, a in (ours, peer)]
    return left[0] / left[1] - 1


JOBS: dict[str, tuple[Callable[..., Made], Callable[..., Made], Callable[..., float]]] = {
    "to-lora": (pissa_ours, pissa_peer, pissa_error),
    "loftq": (loftq_ours, loftq_peer, loftq_error),
}


def measure(job: str, shapes: tuple[str, ...], ranks: tuple[int, ...], runs: int) -> None:
    """Print a table: seconds of both, their ratio, and the error."""
    ours, peer, error = JOBS[job]
    click.echo(f"{job} on {machine()}\n")
    click.echo("| weight | rank | ours, s | peft's algorithm, s | ratio | error | promised |")
    click.echo("| --- | --- | --- | --- | --- | --- | --- |")
    for text in shapes:
        rows, columns = (int(part) for part in text.split("x"))
        weight = weight_of((rows, columns))
        for rank in ranks:
            found = [timed(lambda w=weight, r=rank: ours(w, r)) for _ in range(runs)]  # type: ignore[misc]
            own = sorted(found, key=lambda pair: pair[0])[len(found) // 2]
            theirs = timed(lambda w=weight, r=rank: peer(w, r))  # type: ignore[misc]
            ratio = theirs[0] / own[0]
            met = "met" if ratio >= _LEAST[job] else "not met"
            click.echo(
                f"| {text} | {rank} | {own[0]:.2f} | {theirs[0]:.1f} | {ratio:.1f} | {error(weight, own[1], theirs[1]):.1e} | "
                f"{_LEAST[job]:.0f} ×: {met} |"
            )


def command(job: str) -> Any:
    """The subcommand of a job."""

    @click.command(job, help=f"Time the factors of `adapterops {job}` against peft's algorithm.")
    @click.option("--shape", "shapes", multiple=True, default=SHAPES, show_default=True, help="A weight, OUTxIN.")
    @click.option("--rank", "ranks", multiple=True, type=int, default=RANKS, show_default=True)
    @click.option(
        "--runs", type=click.IntRange(1), default=3, show_default=True, help="Runs of ours; the median counts."
    )
    def run(shapes: tuple[str, ...], ranks: tuple[int, ...], runs: int) -> None:
        measure(job, shapes, ranks, runs)

    return run
