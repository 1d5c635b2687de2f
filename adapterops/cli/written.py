"""What the commands that make an adapter say of the file that they wrote."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from adapterops.cli.text import bytes_text, plural

if TYPE_CHECKING:
    from adapterops.api import Result
    from adapterops.proof import Proof


def heading(written: Result, what: str) -> str:
    """`style: LoRA, peft, 29 modules, 58 tensors, 300.5 kB`."""
    return (
        f"{click.style(written.path, bold=True)}: {what}, {plural(written.modules, 'module')}, "
        f"{plural(written.tensors, 'tensor')}, {bytes_text(written.bytes)}"
    )


def proof_line(proof: Proof | None, said: str) -> str:
    """What was proved; that nothing was, where there is no proof."""
    if proof is None:
        return f"  {click.style('not proved', fg='yellow')} (--no-verify)"
    return f"  {click.style('proved', fg='green')}: {said}"


def closing(dropped: Iterable[str], notes: Iterable[str]) -> list[str]:
    """What was left out, and what the user should know besides."""
    return [
        *(f"  {click.style('dropped', fg='yellow')}: {line}" for line in dropped),
        *(f"  note: {note}" for note in notes),
    ]


def last_entries(written: Result, dropped: Iterable[str]) -> dict[str, Any]:
    """The end of the document of `--json`, for what was computed."""
    proof = written.proof
    return {
        "tensors": written.tensors,
        "bytes": written.bytes,
        "proof": None if proof is None else {"modules": proof.modules, "exact": proof.exact},
        "dropped": list(dropped),
        "notes": list(dict.fromkeys(written.notes)),
    }
