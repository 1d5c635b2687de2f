"""Write docs/corpus.md: what becomes of every file of the corpus of published adapters.

    python scripts/corpus.py [CORPUS] > docs/corpus.md

CORPUS defaults to ../shared/corpus.  Files are converted to a PEFT folder, the most demanding target (it needs
every alpha); none of the corpus's data ends up in the table.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "formats"))

from corpus_files import files, fill, skeletons  # noqa: E402

import adapterops as ao  # noqa: E402


def row(name: str, path: Path, folder: Path) -> str:
    """The verdict on one file as a row of the table."""
    output = folder / "out" / name.replace("/", "_").replace(".", "_")
    try:
        result = ao.convert(path, "peft", output)
    except ao.AdapterOpsError as error:
        message = str(error)
        for part in (path, path.parent):
            message = message.replace(f"{part}/", "").replace(f"{part}: ", "").replace(str(part), path.name)
        return f"| {name} | refused | {message.replace('|', '/')} |"
    assert result.proof is not None
    arch = f"{result.architecture.value}, " if result.architecture.value else ""
    listed = f"; {len(result.folded)} alphas folded" if result.folded else ""
    return f"| {name} | converted | {result.source_dialect}, {arch}{result.proof}{listed} |"


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
    converted = sum("| converted |" in r for r in rows)
    print("# What becomes of published files\n")
    print(
        f"Written by `scripts/corpus.py`: {len(rows)} files and skeletons of real adapters, {converted} converted to a "
        f"PEFT folder with proof, {len(rows) - converted} refused, each with the message shown. Skeletons are the keys and "
        "shapes of larger files, filled with random numbers. The files themselves are other people's and not part of "
        "this repository.\n"
    )
    print("| file | verdict | what it is, or why it is refused |\n| --- | --- | --- |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
