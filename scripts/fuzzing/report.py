"""What a run says at its end: how many inputs came to what, the costliest of them, and what was found."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from fuzzing import inputs
from fuzzing.check import CONVERTED, Finding, Outcome, flags

_HEAD: tuple[str, ...] = (
    "damage", "inputs", CONVERTED, "refused", "faults", "most seconds", "(input)", "most MiB", "(input)",
)  # fmt: skip
_KEPT = 5
"""Inputs that are kept of each fault."""


@dataclass
class Tally:
    """Outcomes, counted as they come."""

    seed: int
    keep: Path | None = None
    outcomes: Counter[str] = field(default_factory=Counter)
    kinds: dict[str, list[Outcome]] = field(default_factory=lambda: defaultdict(list))
    faults: dict[str, list[tuple[Outcome, Finding]]] = field(default_factory=lambda: defaultdict(list))
    done: int = 0

    def add(self, outcome: Outcome) -> None:
        """Count an outcome; keep its input where something was found."""
        self.done += 1
        self.outcomes[outcome.result] += 1
        self.kinds[outcome.kind].append(outcome)
        outcome.message = ""
        for finding in outcome.findings:
            same = self.faults[finding.signature]
            same.append((outcome, finding))
            if self.keep is not None and len(same) <= _KEPT:
                save(self.keep, self.seed, outcome)

    def text(self) -> str:
        """The tables, and every fault with how to see it again."""
        rows = [_HEAD]
        for kind in inputs.WEIGHTS:
            of = self.kinds.get(kind, [])
            if of:
                rows.append(_row(kind, of))
        rows.append(_row("all", [o for of in self.kinds.values() for o in of]))
        parts = [_table(rows), _table([("outcome", "inputs"), *((k, str(n)) for k, n in self.outcomes.most_common())])]
        for signature, same in sorted(self.faults.items(), key=lambda item: -len(item[1])):
            numbers = ", ".join(str(o.number) for o, _ in same[:8])
            first, finding = same[0]
            parts.append(
                f"FAULT {signature}: {len(same)} inputs ({numbers}{' …' if len(same) > 8 else ''})\n"
                f"  see it again: scripts/fuzz --seed {self.seed} --only {first.number}    ({first.kind}: {first.what})\n"
                + "\n".join("  | " + line for line in finding.detail.rstrip().splitlines()[-12:])
            )
        found = sum(map(len, self.faults.values()))
        parts.append(f"{self.done} inputs, seed {self.seed}: " + (f"{found} findings" if found else "all clean"))
        return "\n\n".join(parts)


def _row(kind: str, of: list[Outcome]) -> tuple[str, ...]:
    converted = sum(o.result == CONVERTED for o in of)
    faulty = sum(bool(o.findings) for o in of)
    refused = sum(o.result not in (CONVERTED, "fault") for o in of)
    slow, large = max(of, key=lambda o: o.seconds), max(of, key=lambda o: o.memory)
    return (
        kind, str(len(of)), str(converted), str(refused), str(faulty),
        f"{slow.seconds:.2f}", str(slow.number), f"{large.memory:.0f}", str(large.number),
    )  # fmt: skip


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = []
    for row in rows:
        numbers = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers]))
    return "\n".join(lines)


def save(folder: Path, seed: int, outcome: Outcome) -> Path:
    """Write an input's files and what was done with them below `folder`."""
    given = inputs.make(seed, outcome.number)
    place = folder / f"{seed}-{outcome.number}"
    for name, data in given.files.items():
        path = place / inputs.FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (place / "finding.json").write_text(json.dumps(describe(given, outcome), indent=2) + "\n", encoding="utf-8")
    return place


def describe(given: inputs.Input, outcome: Outcome) -> dict[str, object]:
    """An input and its outcome as plain values."""
    return {
        "damage": given.title,
        "command": ["adapterops", "convert", given.path, "--to", given.to, "-o", given.output, *flags(given)],
        "result": outcome.result,
        "message": outcome.message,
        "seconds": round(outcome.seconds, 3),
        "MiB": round(outcome.memory),
        "findings": [{"signature": f.signature, "detail": f.detail} for f in outcome.findings],
    }
