"""`scripts/fuzz`: thousands of damaged adapters, each refused cleanly or converted soundly."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import click

# Before numpy comes: threads of several workers, each waiting busily for others, would take a deadline for a hang.
os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

from fuzzing import inputs, report, workers
from fuzzing.check import Outcome


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--count", default=20_000, show_default=True, type=click.IntRange(1), help="Number of inputs.")
@click.option("--seed", default=0, show_default=True, help="Input N depends on the seed and N alone.")
@click.option("--workers", "processes", default=2, show_default=True, type=click.IntRange(1), help="Processes.")
@click.option("--only", type=click.IntRange(0), metavar="N", help="Run input N alone and say everything about it.")
@click.option("--keep", type=click.Path(path_type=Path), metavar="DIR", help="Save inputs with findings below DIR.")
@click.option("--timeout", default=workers.SECONDS, show_default=True, help="Seconds that one call may take.")
@click.option("--validate", is_flag=True, help="Only validate: neither inspect nor convert.")
def main(
    count: int, seed: int, processes: int, only: int | None, keep: Path | None, timeout: float, validate: bool
) -> None:
    """Damage adapters and see that adapterops gives findings, a clean error or a sound output, and never anything else.

    Bytes, headers, meanings, header strings, configs, pickles, zip archives and indices of shards are damaged; the
    adapters are the fixtures and, for every installed dialect, small ones made from its table.  Exit status 1 where
    anything was found.
    """
    tally = report.Tally(seed, keep)
    plan = workers.Plan(seed, timeout, validate)
    started = time.monotonic()

    def tell(outcome: Outcome) -> None:
        if only is not None:
            click.echo(json.dumps(report.describe(inputs.make(seed, only), outcome), indent=2))
        tally.add(outcome)
        if tally.done % 1000 == 0:
            rate = tally.done / (time.monotonic() - started)
            click.echo(f"{tally.done} of {count}, {rate:.0f} a second, {len(tally.faults)} faults", err=True)

    if only is not None:
        if keep is not None:
            report.save(keep, seed, Outcome(only, "", ""))
        workers.run([only], workers.Plan(seed, timeout, validate, 1), 1, tell)
    else:
        workers.run(range(count), plan, processes, tell)
        click.echo(tally.text())
    sys.exit(1 if tally.faults else 0)


if __name__ == "__main__":
    main()
