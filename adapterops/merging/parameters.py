"""Parameters that several merge methods share."""

from __future__ import annotations

from adapterops.merging.registry import Parameter

DENSITY = Parameter("density", "the share of entries to keep", above=0.0, most=1.0)
MAJORITY_SIGN = Parameter(
    "majority_sign",
    "elect each entry's sign by the sum of its values (total) or by their number (frequency)",
    type=str,
    default="total",
    choices=("total", "frequency"),
)
SIGN_ELECTION = Parameter(
    "sign_election",
    "elect signs before the weights are applied, as PEFT does (peft), or after it, so that negative weights count "
    "(weighted); auto: as PEFT on factors, weighted on deltas",
    type=str,
    default="auto",
    choices=("auto", "peft", "weighted"),
)
