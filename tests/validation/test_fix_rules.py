"""Every fixable rule: an adapter broken in its way is mended, and then nothing is found; what it computes stays."""

from __future__ import annotations

import importlib
import json
import pkgutil
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import adapterops as ao
from adapterops.validation import registry
from adapterops.validation.fix import mend
from adapterops.validation.report import Checked, Report
from adapterops.validation.rule import Rule

Break = Callable[[Path], Any]
"""Makes a broken adapter: its path, and perhaps the options (or the target) with which it is seen."""


def broken() -> dict[str, list[Break]]:
    """The tables of every group's tests: how a sound adapter is broken in the way of each rule."""
    out: dict[str, list[Break]] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name.startswith("test_") and module.name.endswith("_rules") and module.name != __name__:
            held = importlib.import_module(module.name)
            for code, make in (*getattr(held, "BROKEN", {}).items(), *getattr(held, "MORE_BROKEN", ())):
                out.setdefault(code, []).append(make)
    return out


def examined(make: Break, folder: Path) -> tuple[Path, dict[str, Any], Report]:
    """A broken adapter, the options with which it is seen, and what is found in it."""
    folder.mkdir()
    made = make(folder)
    path, options = made if isinstance(made, tuple) else (made, {})
    options = {"targets": [options]} if isinstance(options, str) else options
    return path, options, ao.validate(path, **options)


def other_rank(kind: str) -> Break:
    """A folder of a type of peft's that has no alpha, whose config says twice the rank of its tensors."""

    def make(folder: Path) -> Path:
        out = folder / kind
        shutil.copytree(Path(__file__).parents[2] / "fixtures" / "peft-types" / kind, out)
        config = json.loads((out / "adapter_config.json").read_text())
        (out / "adapter_config.json").write_text(json.dumps(config | {"r": config["r"] * 2}, indent=2))
        return out

    return make


TABLE = broken()
TABLE["C230"] += [other_rank(kind) for kind in ("miss",)]
FIXABLE = [rule for rule in registry.rules() if rule.fixable]


def contents(path: str) -> list[tuple[str, tuple[int, ...], bytes]]:
    """Every tensor that belongs to a module, in no order: its names may change, its bytes may not."""
    from adapterops.validation.discover import discover
    from adapterops.validation.options import Options
    from adapterops.validation.subject import Subject

    (place,) = discover([path])
    subject = Subject(place, Options())
    return sorted((t.dtype, t.shape, bytes(t.read())) for u in subject.updates for t in u.tensors.values())


@pytest.mark.parametrize("rule", FIXABLE, ids=lambda rule: rule.code)
def test_a_fixable_rule_is_mended(rule: Rule, tmp_path: Path) -> None:
    for number, make in enumerate(TABLE[rule.code]):
        path, options, report = examined(make, tmp_path / str(number))
        if rule.code in {f.code for f in report if f.fixable}:
            break
    else:
        pytest.fail("nothing that is broken in this way can be mended")
    assert {f.code for f in report if f.fixable} == {rule.code}, [(f.code, f.message) for f in report]
    (adapter,) = (a for a in report.adapters if any(f.fixable for f in a.findings))
    before = contents(adapter.path)
    shown = mend(adapter, dry_run=True)
    mended = mend(adapter)
    assert not mended.left, mended.why
    assert shown == mended
    assert mended.diff
    after = ao.validate(mended.path if mended.path != adapter.path else path, **options)
    assert [(f.code, f.message) for f in after if f.code == rule.code or f.fixable] == []
    assert {f.code for f in after} <= {f.code for f in report}
    found = contents(mended.path)
    assert [t for t in before if t not in found] == []
    # A second time there is nothing to do, and nothing is done.
    stats = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    for adapter in after.adapters:
        again = mend(adapter)
        assert (again.done, again.diff, again.left) == ((), "", ())
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == stats


@pytest.mark.parametrize(
    "kind", ["delora", "hra", "lily", "peanut", "poly", "psoft", "pvera", "shadow", "vblora", "vera"]
)
def test_ranks_of_other_methods(kind: str, tmp_path: Path) -> None:
    path, _, report = examined(other_rank(kind), tmp_path / "one")
    before = contents(str(path))
    mended = mend(report.adapters[0])
    assert not mended.left, mended.why
    assert [f.code for f in ao.validate(path) if f.fixable] == []
    assert contents(str(path)) == before


def test_every_fixable_rule_can_be_tried() -> None:
    assert {rule.code for rule in FIXABLE} <= TABLE.keys()


def test_what_offers_a_change_is_called_fixable(tmp_path: Path) -> None:
    """Of everything that is broken on purpose: a finding with a change belongs to a rule that says so.

    What is wrong for a loader, with a base or with the scale is not for us to change.
    """
    wrong = {}
    for number, make in enumerate(make for code, makes in TABLE.items() if code[0] not in "LBS" for make in makes):
        _, _, report = examined(make, tmp_path / str(number))
        wrong |= {f.code: f.message for f in report if f.fixable and not f.rule.fixable}
    assert not wrong


def test_all_at_once_leaves_nothing_to_mend(tmp_path: Path) -> None:
    """Several faults in one adapter: one run mends them all."""
    from sound import edit, peft_folder, set_config

    folder = set_config(peft_folder(tmp_path), inference_mode=False, target_modules=["q_proj", "v_proj", "v_proj"])
    edit(folder, lambda tensors: {f"module.{k}".replace(".weight", ".default.weight"): t for k, t in tensors.items()})
    report = ao.validate(folder)
    assert len([f for f in report if f.fixable]) >= 3, [(f.code, f.message) for f in report]
    mended = mend(report.adapters[0])
    assert not mended.left, mended.why
    assert [(f.code, f.message) for f in ao.validate(folder) if f.fixable] == []
    assert mend(Checked(str(folder), findings=ao.validate(folder).findings)).done == ()
