"""`scripts/bench`: one subcommand a benchmark."""

from __future__ import annotations

import click
from benchmarks import convert, factors, merge, validate


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Measure adapterops against the peers that do the same job, in one run."""


main.add_command(convert.command)
main.add_command(merge.command)
main.add_command(validate.command)
for job in factors.JOBS:
    main.add_command(factors.command(job))

if __name__ == "__main__":
    main()
