"""Write docs/corpus.md: what becomes of every file of the corpus of published adapters.

    python scripts/corpus.py [CORPUS] > docs/corpus.md

CORPUS defaults to ../shared/corpus.  None of the corpus's data ends up in the table.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "formats"))

from corpus_files import files, fill, skeletons  # noqa: E402

import adapterops as ao  # noqa: E402
from adapterops.errors import CannotRepresent  # noqa: E402

TARGETS = ("peft", "diffusers", "comfy", "kohya")
"""Tried in this order; the reason of a refusal is the first one's, which needs the most to be known."""


def row(name: str, path: Path, folder: Path) -> str:
    """The verdict on one file as a row of the table."""
    refusal = ""
    for target in TARGETS:
        output = folder / "out" / f"{target}-{name.replace('/', '_').replace('.', '_')}"
        try:
            result = ao.convert(path, target, output)
        except ao.AdapterOpsError as error:
            refusal = refusal or _without_paths(str(error), path)
            if not isinstance(error, CannotRepresent):
                break
            continue
        assert result.proof is not None
        arch = f"{result.architecture.value}, " if result.architecture.value else ""
        listed = f"; {len(result.folded)} alphas folded" if result.folded else ""
        split = "".join(f"; {note}" for note in result.notes if "fused" in note)
        other = f" (not to peft: {refusal})" if refusal else ""
        return f"| {name} | {target} | {result.source_dialect}, {arch}{result.proof}{listed}{split}{other} |"
    return f"| {name} | refused | {refusal} |"


def _without_paths(message: str, path: Path) -> str:
    for part in (path, path.parent):
        message = message.replace(f"{part}/", "").replace(f"{part}: ", "").replace(str(part), path.name)
    return message.replace("|", "/")


def main() -> None:
    """Print the table."""
    corpus = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT.parent / "shared" / "corpus"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [row(name, path, folder) for name, path in files(corpus)]
        for name, path in skeletons(corpus):
            target = folder / f"{name}.safetensors"
            fill(path, target)
            rows.append(row(f"skeleton: {name}", target, folder))
            target.unlink()
    converted = sum("| refused |" not in r for r in rows)
    print("# What becomes of published files\n")
    print(
        f"Written by `scripts/corpus.py`: {len(rows)} files and skeletons of real adapters, {converted} converted with "
        f"proof, {len(rows) - converted} refused, each with the message shown. The target is a PEFT folder, the most "
        "demanding one (it needs every alpha), or where that cannot hold the adapter the first of diffusers, comfy and kohya "
        "that can. Skeletons are the keys and "
        "shapes of larger files, filled with random numbers. The files themselves are other people's and not part of "
        "this repository.\n"
    )
    print("| file | converted to | what it is, or why it is refused |\n| --- | --- | --- |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
