"""`python -m adapterops`."""

from adapterops.cli.main import script

script()
