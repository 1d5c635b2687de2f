"""Every type of PEFT: made by peft, its config thrown away, made again, loaded by peft; and what it does to each weight."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import peft
import peft_models as pm
import pytest
import torch
from adapterops_formats.peft_kinds import KINDS
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft_zoo import Case, add, own
from safetensors.torch import save_file
from test_peft_methods import architecture_of

import adapterops as ao
from adapterops import errors
from adapterops.methods import METHODS
from adapterops.operations.lora_factors import Budget
from adapterops.operations.lora_maker import AS_THEY_ARE

pytestmark = pytest.mark.usefixtures("one_thread", "quiet")

CASES: dict[str, Case] = {
    name: case
    for family in sorted(Path(__file__).parent.glob("zoo_*.py"))
    for name, case in import_module(family.stem).CASES.items()
}


def remake(case: Case, weights: Path, target: Path, fields: Mapping[str, Any], known: bool) -> None:
    """Convert tensors that have no config, with the base `known` or not."""
    base = architecture_of(case.base()) if known else None
    ao.save(ao.load(weights, alpha=case.alpha, fields=fields, base=base), target, format="peft", fields=fields)


def compare(case: Case, original: peft.PeftModel, folder: Path, converted: Path) -> None:
    """Assert that peft makes of `converted` what it made of `folder`."""
    loaded = pm.load(case.base(), converted)
    assert pm.adapted(loaded) == pm.adapted(original)
    pm.same_tensors(pm.weights_of(converted), pm.weights_of(folder))
    expected = case.outputs(original)
    assert pm.apart(expected, case.outputs(case.base())) > 1e-4, "the adapter does nothing, so nothing is shown"
    assert pm.apart(case.outputs(loaded), expected) < 1e-6 * max(1.0, float(expected[0].abs().max()))


def test_every_type_has_a_row_and_every_injectable_one_a_case() -> None:
    assert {kind.value for kind in peft.PeftType} <= set(KINDS)
    tested = {case.config.peft_type.value for case in CASES.values()}
    injectable = {
        kind.value
        for kind in peft.PeftType
        if "target_modules" in PEFT_TYPE_TO_CONFIG_MAPPING[kind].__dataclass_fields__
    }
    assert injectable - tested == set()


@pytest.mark.parametrize("kind", [kind.value for kind in peft.PeftType])
def test_fields_of_each_config_are_known(kind: str) -> None:
    """A field that peft has and the table lacks would be refused as a later version's."""
    assert (
        set(PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)].__dataclass_fields__) - set(KINDS[kind].all_fields)
        == set()
    )


FIXTURES = sorted((Path(__file__).parents[2] / "fixtures" / "peft-types").iterdir())


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda folder: folder.name)
def test_fixture_of_each_type(folder: Path, tmp_path: Path) -> None:
    result = ao.convert(folder, to="peft", output=tmp_path / "converted")
    assert result.proof is not None
    assert result.proof.exact
    pm.same_tensors(pm.weights_of(tmp_path / "converted"), pm.weights_of(folder))
    written, published = pm.config_of(tmp_path / "converted"), pm.config_of(folder)
    assert {field: written[field] for field in published} == published
    assert ao.inspect(folder).modules


@pytest.mark.parametrize("name", CASES)
def test_with_its_config(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    original, folder = case.adapter(tmp_path / "original")
    result = ao.convert(folder, to="peft", output=tmp_path / "converted")
    assert result.proof is not None
    assert result.proof.exact
    compare(case, original, folder, tmp_path / "converted")
    written, published = pm.config_of(tmp_path / "converted"), pm.config_of(folder)
    assert {field: written[field] for field in published} == published


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.alone])
def test_with_its_config_thrown_away(name: str, known: bool, tmp_path: Path) -> None:
    case = CASES[name]
    if case.base_needed and not known:
        pytest.skip("the base's modules are needed")
    original, folder = case.adapter(tmp_path / "original")
    weights = pm.folder_with(tmp_path / "alone", pm.weights_of(folder)) / "adapter_model.safetensors"
    remake(case, weights, tmp_path / "converted", {**case.said, **case.assumed}, known)
    compare(case, original, folder, tmp_path / "converted")


@pytest.mark.parametrize(("name", "fact"), [(name, fact) for name, case in CASES.items() for fact in case.said])
def test_fact_that_no_tensor_holds_is_asked_for(name: str, fact: str, tmp_path: Path) -> None:
    case = CASES[name]
    _, folder = case.adapter(tmp_path / "original")
    weights = pm.folder_with(tmp_path / "alone", pm.weights_of(folder)) / "adapter_model.safetensors"
    said = {field: value for field, value in {**case.said, **case.assumed}.items() if field != fact}
    with pytest.raises(errors.AdapterOpsError, match=rf"--set '?{fact}"):
        remake(case, weights, tmp_path / "converted", said, case.base_needed)
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.change])
def test_change_does_what_peft_does(name: str, tmp_path: Path) -> None:
    """The base with every update's change added to its parameters gives the adapted model's outputs."""
    case = CASES[name]
    original, folder = case.adapter(tmp_path / "original")
    base = case.base()
    for update in ao.load(folder, base=architecture_of(base)):
        module = base.get_submodule(update.module)
        if update.method != "saved":
            add(module, METHODS[update.method].change(update, own(module)))
            continue
        for role, tensor in update.tensors.items():
            module.get_parameter(role).data = tensor.torch()
    expected = case.outputs(original)
    assert pm.apart(case.outputs(base), expected) < case.tolerance * max(1.0, float(expected[0].abs().max()))


def weights_of_base(case: Case, folder: Path) -> Path:
    tensors = {name: tensor.clone() for name, tensor in case.base().state_dict().items()}
    save_file(tensors, folder / "base.safetensors")
    return folder / "base.safetensors"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.change and case.lora])
def test_lora_of_full_rank_does_the_same(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    original, folder = case.adapter(tmp_path / "original")
    ao.to_lora(
        folder, tmp_path / "lora", to="peft", rank=10_000, base_weights=weights_of_base(case, tmp_path),
        reading={"base": architecture_of(case.base())},
    )  # fmt: skip
    assert pm.config_of(tmp_path / "lora")["peft_type"] == "LORA"
    expected, outputs = case.outputs(original), case.outputs(pm.load(case.base(), tmp_path / "lora"))
    assert pm.apart(expected, outputs) < 1e-4 * max(1.0, float(expected[0].abs().max()))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.change and case.lora])
def test_lora_of_what_is_of_low_rank_is_exact(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    original, folder = case.adapter(tmp_path / "original")
    reading = {"base": architecture_of(case.base())}
    updates = [u for u in ao.load(folder, **reading) if u.method not in AS_THEY_ARE]
    alone = [u for u in updates if not METHODS[u.method].acts_on_base(u)]
    # What changes biases alone is exact too.
    low = len(alone) == len(updates) and all(METHODS[u.method].exact_rank(u) or u.method == "beft" for u in alone)
    if not low:
        with pytest.raises(errors.CannotRepresent, match=r"--rank R|--base-weights"):
            ao.to_lora(folder, tmp_path / "lora", to="peft", reading=reading)
        return
    ao.to_lora(folder, tmp_path / "lora", to="peft", reading=reading)
    expected, outputs = case.outputs(original), case.outputs(pm.load(case.base(), tmp_path / "lora"))
    assert pm.apart(expected, outputs) < case.tolerance * max(1.0, float(expected[0].abs().max()))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.change and case.lora])
def test_lora_of_a_rank_is_the_best_of_it(name: str, tmp_path: Path) -> None:
    """Against the singular values of what the update does, which `test_change_does_what_peft_does` holds against peft."""
    case, rank = CASES[name], 2
    _, folder = case.adapter(tmp_path / "original")
    base = case.base()
    adapter = ao.load(folder, base=architecture_of(base))
    _, reports, dropped = ao.as_lora(adapter, Budget(rank=rank), weights_of_base(case, tmp_path))
    assert not dropped
    for report in reports:
        update = adapter.updates["model", report.module, report.method]
        if report.rank is None or (report.method == "lora" and report.error == 0):
            continue
        weight = METHODS[report.method].change(update, own(base.get_submodule(report.module))).weight
        if weight is None:
            continue
        s = torch.linalg.svdvals(weight.double().reshape(len(weight), -1))
        best = float(s[rank:].square().sum().sqrt() / s.square().sum().sqrt()) if s.any() else 0.0
        assert report.rank <= rank
        assert report.error == pytest.approx(best, rel=0.01, abs=1e-6)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.change and not case.lora])
def test_what_no_lora_does_is_refused(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    _, folder = case.adapter(tmp_path / "original")
    with pytest.raises(errors.CannotRepresent, match=r"norm|LoRA"):
        ao.to_lora(
            folder, tmp_path / "lora", to="peft", rank=4, base_weights=weights_of_base(case, tmp_path),
            reading={"base": architecture_of(case.base())},
        )  # fmt: skip
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.change])
def test_no_change_is_claimed_where_there_is_none(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    _, folder = case.adapter(tmp_path / "original")
    base = case.base()
    update = next(
        u for u in ao.load(folder, base=architecture_of(base)) if u.method not in ("saved", "trainable_tokens")
    )
    module = base.get_submodule(update.module) if update.module else base
    parameters = own(module) if hasattr(module, "weight") else None
    with pytest.raises(errors.CannotRepresent, match=r".+"):
        METHODS[update.method].change(update, parameters)
