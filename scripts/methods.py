"""Write `docs/methods.md` from the table of methods: `.venv/bin/python scripts/methods.py`."""

from __future__ import annotations

from pathlib import Path

from adapterops import registry
from adapterops.cli.methods_text import lines, others
from adapterops.methods import METHODS

TARGET = Path(__file__).parent.parent / "docs" / "methods.md"
HEAD = """# Methods

Written by `scripts/methods.py` from the table that the code reads and writes by; `adapterops methods` prints the same.

Every type that PEFT 0.21 knows. *Derived* fields of its config follow from the tensors (with the base's modules, where it
is given); *assumed* ones are PEFT's defaults where there is no config, and said so; *unknowable* ones are asked for, since a
wrong value would load and compute something else; *read* ones only travel, as `task_type`, `base_model_name_or_path`,
`revision`, `auto_mapping`, `inference_mode` and `peft_version` of every type do. A LoRA that is exact takes no option;
`by singular values` is the best LoRA of the rank, energy or error that `adapterops to-lora` is given.
"""


def page() -> str:
    """The page's text."""
    out = [HEAD]
    rows = [row for form in registry.formats().values() for row in form.types()]
    for row in rows:
        out.append(f"## {row.name}: {row.title}\n")
        out += [f"- **{head}**: {said}" for head, said in lines(row) if said]
        out.append("")
    out.append("## Of other formats, or beside the above\n")
    for name in others(rows):
        out.append(f"- **{name}**: {METHODS[name].title} ({METHODS[name].source})")
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
