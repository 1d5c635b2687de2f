"""Write fixtures/peft-types: one small adapter of every type that PEFT can put into a model, made by peft itself.

    .venv/bin/python scripts/peft_fixtures.py

The models and configs are those of `tests/formats/zoo_*.py`; of each type the smallest is taken.  The numbers are noise.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import warnings
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "fixtures" / "peft-types"
sys.path.insert(0, str(ROOT / "tests" / "formats"))


def main() -> None:
    """Write them all anew."""
    cases = [
        case
        for family in sorted((ROOT / "tests" / "formats").glob("zoo_*.py"))
        for case in import_module(family.stem).CASES.values()
    ]
    shutil.rmtree(TARGET, ignore_errors=True)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        best: dict[str, tuple[int, Path]] = {}
        for number, case in enumerate(cases):
            _, made = case.adapter(Path(folder) / str(number))
            size = sum(file.stat().st_size for file in made.glob("adapter_model.*"))
            kind = case.config.peft_type.value.lower()
            if kind not in best or size < best[kind][0]:
                best[kind] = size, made
        for kind, (_, made) in sorted(best.items()):
            place = TARGET / kind
            place.mkdir(parents=True)
            shutil.copyfile(made / "adapter_model.safetensors", place / "adapter_model.safetensors")
            config = json.loads((made / "adapter_config.json").read_text(encoding="utf-8"))
            for name in ("target_modules", "modules_to_save"):
                if isinstance(config.get(name), list):
                    config[name].sort()  # peft writes sets, in a new order every time
            text = json.dumps(config, indent=2, sort_keys=True) + "\n"
            (place / "adapter_config.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
