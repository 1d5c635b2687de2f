"""PEFT files whose tensors stand once for all modules, or at places that a seed says: what is derived, what is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import peft_models as pm
import pytest
import torch
from adapterops_formats.peft_kinds.seeded import FOURIERFT
from adapterops_formats.peft_patterns import Base
from peft import TinyLoraConfig
from peft_zoo import LINE, Case, own
from test_peft_methods import architecture_of
from zoo_seeded import CASES as SEEDED
from zoo_shared import CASES as SHARED

import adapterops as ao
from adapterops import errors
from adapterops.adapter import Adapter, Update
from adapterops.methods import METHODS
from adapterops.storage import LazyTensor
from adapterops.storage.tensor import MemorySource

CASES = SHARED | SEEDED
Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def folder_of(name: str, at: Path, edit: Callable[[Tensors], None] = lambda t: None, **fields: Any) -> Path:
    """The folder that peft writes for a case, with other tensors or fields (None: without the field)."""
    _, folder = CASES[name].adapter(at / "original")
    tensors, config = pm.weights_of(folder), pm.config_of(folder) | fields
    edit(tensors)
    return pm.folder_with(at / "edited", tensors, {k: v for k, v in config.items() if v is not None})


def alone(folder: Path) -> Path:
    (folder / "adapter_config.json").unlink()
    return folder / "adapter_model.safetensors"


def loaded(path: Path, case: Case | None = None, **fields: Any) -> Adapter:
    return ao.load(path, fields=fields, base=architecture_of(case.base()) if case is not None else None)


def changes(adapter: Adapter, case: Case) -> None:
    """Ask for every change, which raises where a fact is missing."""
    base = case.base()
    for update in adapter:
        if update.method == "saved":
            continue
        module = base.get_submodule(update.module)
        assert METHODS[update.method].change(update, own(module)).weight is not None


# ---- configs that contradict their tensors ------------------------------------------------------------------

CONTRADICTIONS: Mapping[str, tuple[str, Mapping[str, Any], str, Mapping[str, Any]]] = {
    "vera saved": ("vera, linear", {"save_projection": False}, "save_projection=true", {"save_projection": True}),
    "vera not saved": (
        "vera, projections from a seed",
        {"save_projection": True},
        "save_projection=false",
        {"save_projection": False},
    ),
    "vera rank": ("vera, linear", {"r": 5}, "r=4", {"r": 4}),
    "randlora saved": (
        "randlora, linear",
        {"save_projection": False},
        "save_projection=true",
        {"save_projection": True},
    ),
    "vblora vectors": ("vblora, linear", {"num_vectors": 99}, "num_vectors=12", {"num_vectors": 12}),
    "vblora length": ("vblora, linear", {"vector_length": None}, "vector_length=8", {"vector_length": 8}),
    "vblora few": (
        "vblora, linear",
        {"save_only_topk_weights": True},
        "save_only_topk_weights=false",
        {"save_only_topk_weights": False},
    ),
    "vblora topk": ("vblora, weights of the topk", {"topk": 4}, "topk=3", {"topk": 3}),
    "tinylora u": ("tinylora, linear", {"u": 7}, "u=6", {"u": 6}),
    "tinylora rank": ("tinylora, linear", {"r": 2}, "r=null", {"r": None}),
    "tinylora no rank": ("tinylora, linear", {"r": "3"}, "r=null", {"r": None}),
    "tinylora groups": ("tinylora, linear", {"weight_tying": 0.9}, "weight_tying=null", {"weight_tying": None}),
    "tinylora no share": ("tinylora, linear", {"weight_tying": 1e400}, "weight_tying=null", {"weight_tying": None}),
    "tinylora saved": (
        "tinylora, linear",
        {"save_projection": False},
        "save_projection=true",
        {"save_projection": True},
    ),
    "frod rate": ("frod, another rate", {"sparse_rate": 0.5}, "sparse_rate=null", {"sparse_rate": None}),
    "frod no rate": ("frod, linear", {"sparse_rate": "much"}, "sparse_rate=null", {"sparse_rate": None}),
    "frod saved": ("frod, no basis", {"save_projection": True}, "save_projection=false", {"save_projection": False}),
    "fourierft": ("fourierft, linear", {"n_frequency": 21}, "n_frequency=20", {"n_frequency": 20}),
    "fourierft pattern": (
        "fourierft, linear",
        {"n_frequency_pattern": {"wide": 3}},
        "n_frequency=20",
        {"n_frequency_pattern": {}},
    ),
    "waveft": (
        "waveft, no transform",
        {"n_frequency_pattern": {}},
        "n_frequency=9",
        {"n_frequency_pattern": {"tall": 9}},
    ),
    "unilora length": ("unilora, one vector", {"theta_d_length": 41}, "theta_d_length=40", {"theta_d_length": 40}),
    "unilora saved": ("unilora, indices", {"save_indices": False}, "save_indices=true", {"save_indices": True}),
    "unilora rank": ("unilora, indices", {"r": 4}, "r=3", {"r": 3}),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_config_that_contradicts_its_tensors_is_told_and_repaired(name: str, tmp_path: Path) -> None:
    case, wrong, message, right = CONTRADICTIONS[name]
    folder = folder_of(case, tmp_path, **wrong)
    with pytest.raises(errors.Conflict, match=f"--set {message}"):
        ao.load(folder)
    ao.convert(folder, to="peft", output=tmp_path / "repaired", fields=right)
    original = pm.load(CASES[case].base(), tmp_path / "original")
    repaired = pm.load(CASES[case].base(), tmp_path / "repaired")
    outputs = CASES[case].outputs
    assert pm.apart(outputs(repaired), outputs(original)) == 0


def test_proportional_numbers_are_checked(tmp_path: Path) -> None:
    """Without the base, which says how large the modules are, their sum still is."""
    case = CASES["waveft, in proportion"]
    folder = folder_of("waveft, in proportion", tmp_path, n_frequency=40)
    with pytest.raises(errors.Conflict, match=r"have \d+ coefficients, but .* which makes \d+; --set n_frequency="):
        loaded(folder)
    loaded(tmp_path / "original")
    with pytest.raises(errors.Conflict, match=r"has \d+ coefficients, but .* says \d+"):
        loaded(folder, case)
    loaded(tmp_path / "original", case)


# ---- FourierFT's patterns -----------------------------------------------------------------------------------


def test_fourierft_looks_its_numbers_up_by_whole_names_or_behind_a_dot() -> None:
    def fields(**counts: int) -> dict[str, Any]:
        tensors = [LazyTensor("x", "F32", (n,), MemorySource(bytes(4 * n)), 0) for n in counts.values()]
        names = [name.replace("_", ".") for name in counts]
        made = [Update("model", m, "fourierft", {"spectrum": t}) for m, t in zip(names, tensors, strict=True)]
        return FOURIERFT.fields(made, Base())

    assert fields(q=4, a_q=4, a_k=9) == {"n_frequency": 4, "n_frequency_pattern": {"a.k": 9}}
    with pytest.raises(errors.CannotRepresent, match="the end of its own"):
        fields(q=4, a_q=9, b=7, c=7, d=7)


# ---- RandLoRA's copies --------------------------------------------------------------------------------------


def is_copy(key: str) -> bool:
    return ".model." in key and key.endswith(("randlora_A", "randlora_B"))


def drop(which: Callable[[str], bool]) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for key in [key for key in tensors if which(key)]:
            del tensors[key]

    return edit


@pytest.mark.parametrize("which", [is_copy, lambda key: key.startswith("base_model.randlora_")])
def test_projections_that_stand_once_or_in_every_module_are_written_as_today(
    which: Callable[[str], bool], tmp_path: Path
) -> None:
    case = CASES["randlora, linear"]
    folder = folder_of("randlora, linear", tmp_path, drop(which))
    ao.convert(folder, to="peft", output=tmp_path / "converted")
    pm.same_tensors(pm.weights_of(tmp_path / "converted"), pm.weights_of(tmp_path / "original"))
    pm.load(case.base(), tmp_path / "converted")


def test_copies_that_differ_are_no_adapter_of_peft(tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        tensors["base_model.model.tall.randlora_A"][0, 0, 0] += 1

    folder = folder_of("randlora, linear", tmp_path, edit)
    with pytest.raises(errors.CannotRepresent, match=r"randlora_A.* differ, but PEFT keeps one A of RandLoRA"):
        ao.convert(folder, to="peft", output=tmp_path / "converted")


# ---- TinyLoRA's order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tinylora, linear", "tinylora, groups", "tinylora, one vector"])
def test_saved_matrices_tell_the_order_of_the_modules(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    adapter = loaded(alone(folder_of(name, tmp_path)))
    changes(adapter, case)
    # The same vectors as the base's own order gives.
    known = loaded(tmp_path / "original", case)
    for key, update in adapter.updates.items():
        assert METHODS["tinylora"].error(known.updates[key], update) == 0.0


def test_another_seed_has_to_be_said_for_that(tmp_path: Path) -> None:
    case = Case(LINE, TinyLoraConfig(r=3, u=6, target_modules=["wide", "tall"], projection_seed=9))
    path = alone(case.adapter(tmp_path / "original")[1])
    changes(loaded(path, projection_seed=9), case)
    with pytest.raises(errors.CannotRepresent, match=r"--base CONFIG.*--set projection_seed=VALUE"):
        changes(loaded(path), case)
    # Whatever the order, the file can be written again.
    ao.save(loaded(path), tmp_path / "converted", format="peft")
    pm.same_tensors(pm.weights_of(tmp_path / "converted"), pm.weights_of(tmp_path / "original"))


def test_the_order_is_the_bases_where_the_matrices_do_not_tell(tmp_path: Path) -> None:
    case = CASES["tinylora, projections from a seed"]
    folder = folder_of("tinylora, projections from a seed", tmp_path)
    changes(loaded(folder, case), case)
    with pytest.raises(errors.CannotRepresent, match=r"order of the base's modules.*--base"):
        changes(loaded(folder), case)


def test_vectors_that_are_missing(tmp_path: Path) -> None:
    folder = folder_of("tinylora, linear", tmp_path, drop(lambda key: key == "base_model.tinylora_v.1"))
    with pytest.raises(errors.BrokenAdapter, match="2 vectors, but number 1 is missing"):
        ao.load(folder)
    folder = folder_of("tinylora, linear", tmp_path, drop(lambda key: "tinylora_v" in key))
    with pytest.raises(errors.BrokenAdapter, match="counterpart tinylora_v is missing"):
        ao.load(folder)


# ---- FRoD's categories --------------------------------------------------------------------------------------


def test_a_basis_that_no_module_has(tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        tensors["base_model.frod_V.mlp_up"] = torch.eye(16)

    with pytest.raises(errors.BrokenAdapter, match=r"frod_V.mlp_up.*names end in 'mlp_up'"):
        ao.load(folder_of("frod, linear", tmp_path, edit))


@pytest.mark.parametrize("name", ["vera, linear", "vblora, linear", "frod, linear", "tinylora, linear"])
def test_half_a_file(name: str, tmp_path: Path) -> None:
    method = name.partition(",")[0]
    gone = ("vera_B", "vblora_vector_bank", "frod_s_indices.wide", "tinylora_A")
    folder = folder_of(name, tmp_path, drop(lambda key: key.endswith(gone)))
    with pytest.raises(errors.BrokenAdapter, match=f"method {method}"):
        ao.load(folder)
    folder = folder_of(name, tmp_path, drop(lambda key: key.startswith("base_model.model.")))
    with pytest.raises(errors.AdapterOpsError, match=r"counterpart|no tensor|nothing"):
        ao.convert(folder, to="peft", output=tmp_path / "converted")


# ---- Uni-LoRA without a module ------------------------------------------------------------------------------


def test_one_vector_without_its_base_stays_one_update(tmp_path: Path) -> None:
    case = CASES["unilora, one vector"]
    folder = folder_of("unilora, one vector", tmp_path)
    adapter = loaded(folder)
    assert [u.module for u in adapter] == [""]
    with pytest.raises(errors.CannotRepresent, match=r"only theta_d was saved.*--base"):
        METHODS["unilora"].change(next(iter(adapter)))
    known = loaded(folder, case)
    assert [u.module for u in known] == ["wide", "tall", "square"]
    changes(known, case)


def test_linear_layers_that_only_peft_can_list_are_not_guessed(tmp_path: Path) -> None:
    case = CASES["unilora, one vector"]
    folder = folder_of("unilora, one vector", tmp_path, target_modules="all-linear")
    assert [u.module for u in loaded(folder, case)] == [""]


# ---- seeds and numbers that no generator takes --------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fact", "value"),
    [
        ("unilora, one vector", "r", 10_000),
        ("unilora, one vector", "r", 0),
        ("waveft, linear", "wavelet_family", "db38"),
    ],
)
def test_facts_that_cannot_be_used(name: str, fact: str, value: Any, tmp_path: Path) -> None:
    adapter = loaded(folder_of(name, tmp_path, **{fact: value}), CASES[name])
    with pytest.raises(errors.CannotRepresent, match=rf"--set {fact}|wavelet"):
        changes(adapter, CASES[name])


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("vera, linear", "projection_prng_key", "0"),
        ("fourierft, linear", "n_frequency_pattern", [3]),
        ("fourierft, linear", "n_frequency_pattern", {"(a+)+": 3}),
        ("fourierft, linear", "n_frequency", 0),
        ("waveft, linear", "use_idwt", "yes"),
        ("vblora, linear", "topk", 1.5),
        ("vera, projections from a seed", "projection_prng_key", -1),
        ("randlora, projections from a seed", "projection_prng_key", 1 << 70),
        ("tinylora, projections from a seed", "projection_seed", -5),
        ("fourierft, linear", "random_loc_seed", 1 << 64),
        ("waveft, linear", "random_loc_seed", -1),
        ("unilora, one vector", "proj_seed", -1),
    ],
)
def test_values_that_no_field_has(name: str, field: str, value: Any, tmp_path: Path) -> None:
    folder = folder_of(name, tmp_path, **{field: value})
    with pytest.raises(errors.UnreadableFile, match="n_frequency|r is 0" if field.startswith("n_frequency") else field):
        ao.load(folder)


def test_an_adapters_name_in_the_keys(tmp_path: Path) -> None:
    """As in a model's own state dict."""
    for name in ("vera, linear", "frod, linear", "tinylora, linear", "vblora, linear"):
        case = CASES[name]
        original, folder = case.adapter(tmp_path / name / "original")
        prefix = f"{case.config.peft_type.value.lower()}_"
        state = {key for key in original.state_dict() if f".{prefix}" in key and ".default" in key}
        clean = pm.weights_of(folder)
        stripped = {key.replace(".default", ""): key for key in state}
        made = {stripped[key]: t for key, t in clean.items()}
        path = pm.folder_with(tmp_path / name / "state", made, json.loads((folder / "adapter_config.json").read_text()))
        one, other = loaded(folder, case), loaded(path, case)
        for key, update in one.updates.items():
            assert {role: t.shape for role, t in update.tensors.items()} == {
                role: t.shape for role, t in other.updates[key].tensors.items()
            }
            assert METHODS[update.method].error(update, other.updates[key]) == 0.0
