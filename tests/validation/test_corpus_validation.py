"""Published adapters: every oddity that a rule covers is found, and every error and warning is true."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

import adapterops as ao

ROOT = Path(__file__).parents[2]
CORPUS = ROOT.parent / "shared" / "corpus"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("corpus_validation", ROOT / "scripts" / "corpus_validation.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # where its dataclass looks for itself
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not CORPUS.is_dir(), reason="the corpus of published adapters is not here")
def test_what_is_odd_is_found_and_what_is_found_is_true(script: ModuleType) -> None:
    oddities = script.oddities_of(json.loads((CORPUS / "manifest.json").read_text(encoding="utf-8")))
    report = ao.validate(CORPUS / "files")
    assert len(report.adapters) >= 60
    assert list(script.unaccounted(oddities, script.codes_by_slug(report, CORPUS))) == []
    assert list(script.unjudged(report, oddities, CORPUS)) == []


def test_what_is_neither_is_told(script: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "files" / "someone"
    folder.mkdir(parents=True)
    (folder / "lora.safetensors").write_bytes(b"")
    report = ao.validate(tmp_path / "files")
    oddities = script.oddities_of([{"kind": "file", "slug": "someone", "peculiar": ["it hums"]}])
    assert list(script.unaccounted(oddities, {})) == ["someone: 'it hums' is not accounted for"]
    (line,) = script.unjudged(report, oddities, tmp_path)
    assert line.startswith("someone: F003 is neither announced nor judged")
