"""OFT folders of earlier pefts, and configs of the orthogonal methods that say other things than their tensors.

The reference outputs were made by peft 0.11.1, 0.15.2, 0.17.1 and 0.18.0 on a Linear without bias, whose weight counts
0, 0.1, … 1.1 (row by row), with tensors that count 0.1, −0.2, 0.3, …; the inputs are the rows of an identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft_models as pm
import pytest
import torch
from adapterops_formats.peft_kinds.orthogonal import asked_for, nearest
from peft import BOFTConfig, GloraConfig, HRAConfig, OFTConfig, RoadConfig, get_peft_model
from peft.tuners.oft.layer import OFTLayer
from peft_zoo import LINE, Case
from test_every_type import weights_of_base
from test_peft_methods import architecture_of
from torch import nn

import adapterops as ao
from adapterops import errors
from adapterops.methods import METHODS
from adapterops.methods.base import Own

OLD = {"peft_type": "OFT", "target_modules": ["lin"], "coft": False, "eps": 6e-5, "block_share": False}
OFT_11 = {**OLD, "r": 2, "rank_pattern": {}, "alpha_pattern": {}}
OFT_15 = {**OLD, "r": 2, "oft_block_size": 0, "bias": "none", "fan_in_fan_out": False}
OFT_17 = {**OLD, "r": 0, "oft_block_size": 4, "num_cayley_neumann_terms": 5, "use_cayley_neumann": True}
OUTPUTS_11 = [
    [-0.1411765, 0.2647059, -0.5789103, 0.9137082],
    [-0.1, 0.4, -0.6297011, 1.0456941],
    [-0.0588235, 0.5352941, -0.680492, 1.1776801],
]
OUTPUTS_15 = [
    [0.0235294, -0.3529412, 0.7905883],
    [0.0441176, -0.1517647, 0.2923529],
    [0.1776801, -0.5299824, 0.9878735],
    [-0.0304921, 0.1584886, -0.3271177],
]
OUTPUTS_17 = [
    [0.06568, 0.56664, 1.0676],
    [0.10742, 0.42326, 0.7391001],
    [0.1718801, 0.5590801, 0.9462801],
    [0.2905, 0.66026, 1.03002],
]
OUTPUTS_18 = [
    [0.11664, 0.5983199, 1.0799999],
    [0.18541, 0.4601301, 0.73485],
    [0.17134, 0.6193401, 1.0673401],
    [0.16775, 0.51823, 0.8687099],
]
OUTPUTS_EXACT = [
    [-0.0275517, 0.2111459, 0.4498434],
    [0.1250052, 0.5089753, 0.8929452],
    [0.3426842, 0.8168232, 1.2909623],
    [0.0786266, 0.5377374, 0.9968482],
]


class Alone(nn.Module):
    """One linear layer whose weight counts."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.lin = nn.Linear(inputs, outputs, bias=False)
        self.config = {"model_type": "alone"}
        with torch.no_grad():
            self.lin.weight.copy_(torch.arange(12.0).reshape(outputs, inputs) / 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.lin(x)
        return out


def counted(*shape: int, start: int = 1) -> torch.Tensor:
    size = torch.Size(shape).numel()
    return torch.tensor([0.1 * n * (-1) ** (n + 1) for n in range(start, start + size)]).reshape(shape)


def folder_of(path: Path, config: Mapping[str, Any] | None, **tensors: torch.Tensor) -> Path:
    named = {f"base_model.model.lin.{name.replace('__', '.')}": tensor for name, tensor in tensors.items()}
    return pm.folder_with(path, named, config)


def oft_11(path: Path, **fields: Any) -> Path:
    return folder_of(path, {**OFT_11, **fields}, oft_r=counted(2, 2, 2))


def oft_15(path: Path, **fields: Any) -> Path:
    return folder_of(path, {**OFT_15, **fields}, oft_r=counted(2, 2, 2), oft_s=counted(3, 1, start=5))


def oft_17(path: Path, **fields: Any) -> Path:
    return folder_of(path, {**OFT_17, **fields}, oft_R__weight=counted(1, 6))


def changed(folder: Path, base: nn.Module, **options: Any) -> torch.Tensor:
    """What the base's layer makes of an identity with the folder's change added to its weight."""
    (update,) = ao.load(folder, base=architecture_of(base), **options)
    linear = base.get_submodule("lin")
    assert isinstance(linear, nn.Linear)
    weight = linear.weight.detach()
    change = METHODS[update.method].change(update, Own(weight)).weight
    assert change is not None
    return (weight + change).T


def same(outputs: torch.Tensor, wanted: list[list[float]]) -> None:
    torch.testing.assert_close(outputs, torch.tensor(wanted), rtol=1e-5, atol=1e-6)


def to_lora(folder: Path, target: Path, base: nn.Module, tmp_path: Path) -> torch.Tensor:
    """What the base does with the LoRA made of the folder."""
    case = Case(lambda: base, None)
    ao.to_lora(
        folder, target, to="peft", rank=10, base_weights=weights_of_base(case, tmp_path),
        reading={"base": architecture_of(base)},
    )  # fmt: skip
    with torch.no_grad():
        out: torch.Tensor = pm.load(base, target)(torch.eye(base.get_submodule("lin").in_features))  # type: ignore[arg-type]
    return out


def test_peft_011_turns_outputs(tmp_path: Path) -> None:
    folder = oft_11(tmp_path / "old")
    adapter = ao.load(folder)
    assert any("0.7 to 0.13" in note and "--base-weights" in note for note in adapter.provenance.notes)
    same(changed(folder, Alone(4, 3)), OUTPUTS_11)
    with pytest.raises(errors.CannotRepresent, match=r"(?s)lin.*before 0.14.*outputs.*to-lora --base-weights"):
        ao.convert(folder, to="peft", output=tmp_path / "new")
    assert not (tmp_path / "new").exists()
    same(to_lora(folder, tmp_path / "lora", Alone(4, 3), tmp_path), OUTPUTS_11)


def test_peft_015_becomes_boft(tmp_path: Path) -> None:
    folder = oft_15(tmp_path / "old", base_model_name_or_path="some/base", task_type="CAUSAL_LM", module_dropout=0.1)
    adapter = ao.load(folder)
    assert any("0.14 or 0.15" in note and "BOFT" in note for note in adapter.provenance.notes)
    same(changed(folder, Alone(3, 4)), OUTPUTS_15)
    result = ao.convert(folder, to="peft", output=tmp_path / "new")
    assert result.proof is not None
    config = pm.config_of(tmp_path / "new")
    assert (config["peft_type"], config["boft_block_size"], config["boft_n_butterfly_factor"]) == ("BOFT", 2, 1)
    assert (config["base_model_name_or_path"], config["task_type"]) == ("some/base", "CAUSAL_LM")
    assert "r" not in config
    tensors, before = pm.weights_of(tmp_path / "new"), pm.weights_of(folder)
    assert torch.equal(tensors["base_model.model.lin.boft_R"][0], before["base_model.model.lin.oft_r"])
    assert torch.equal(tensors["base_model.model.lin.boft_s"], before["base_model.model.lin.oft_s"])


def test_boft_of_peft_015_does_the_same_in_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)
    ao.convert(oft_15(tmp_path / "old"), to="peft", output=tmp_path / "new")
    loaded = pm.load(Alone(3, 4), tmp_path / "new")
    with torch.no_grad():
        same(loaded(torch.eye(4)), OUTPUTS_15)


def test_shared_blocks_of_peft_015_need_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)
    block, s = counted(1, 2, 2), counted(3, 1, start=5)
    folder = folder_of(tmp_path / "shared", {**OFT_15, "block_share": True}, oft_r=block, oft_s=s)
    twice = folder_of(tmp_path / "twice", OFT_15, oft_r=block.repeat(2, 1, 1), oft_s=s)
    with pytest.raises(errors.CannotRepresent, match=r"(?s)one block.*--base CONFIG"):
        ao.convert(folder, to="peft", output=tmp_path / "new")
    ao.convert(folder, to="peft", output=tmp_path / "new", base=architecture_of(Alone(3, 4)))
    with torch.no_grad():
        outputs = pm.load(Alone(3, 4), tmp_path / "new")(torch.eye(4))
    torch.testing.assert_close(outputs, changed(twice, Alone(3, 4)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, OUTPUTS_17),
        ({"peft_version": "0.18.0"}, OUTPUTS_18),
        ({"peft_version": "0.17.2.dev0@UNKNOWN"}, OUTPUTS_17),
        ({"use_cayley_neumann": False}, OUTPUTS_EXACT),
        ({"use_cayley_neumann": False, "peft_version": "0.21.2"}, OUTPUTS_EXACT),
    ],
)
def test_the_series_is_that_of_the_peft_that_wrote_the_config(
    fields: dict[str, Any], wanted: list[list[float]], tmp_path: Path
) -> None:
    folder = oft_17(tmp_path / "old", **fields)
    same(changed(folder, Alone(3, 4)), wanted)
    noted = any("term twice as large" in note for note in ao.load(folder).provenance.notes)
    assert noted is (wanted is OUTPUTS_17)
    ao.convert(folder, to="peft", output=tmp_path / "new")
    same(changed(tmp_path / "new", Alone(3, 4)), wanted)
    same(to_lora(folder, tmp_path / "lora", Alone(3, 4), tmp_path), wanted)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [({}, OUTPUTS_18), ({"peft_version": "0.17.0"}, OUTPUTS_17), ({"use_cayley_neumann": False}, OUTPUTS_EXACT)],
)
def test_without_a_config_the_series_is_todays(
    given: dict[str, Any], wanted: list[list[float]], tmp_path: Path
) -> None:
    folder = folder_of(tmp_path / "alone", None, oft_R__weight=counted(1, 6))
    same(changed(folder, Alone(3, 4), fields=given), wanted)
    assert any("use_cayley_neumann true" in note for note in ao.load(folder).provenance.notes)
    ao.convert(folder, to="peft", output=tmp_path / "new", fields=given)
    assert pm.config_of(tmp_path / "new").get("peft_version", "0.18.0") == given.get("peft_version", "0.18.0")
    same(changed(tmp_path / "new", Alone(3, 4)), wanted)


def test_old_tensors_without_a_config(tmp_path: Path) -> None:
    first, second = oft_11(tmp_path / "first"), oft_15(tmp_path / "second")
    for folder in (first, second):
        (folder / "adapter_config.json").unlink()
    same(changed(first, Alone(4, 3)), OUTPUTS_11)
    same(changed(second, Alone(3, 4)), OUTPUTS_15)


ANEW: dict[str, Any] = {"r": None, "oft_block_size": None, "block_share": None}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 4, "oft_block_size": 0}, r"\[2, 1\] is 2 blocks of 2 inputs.*r=4.*4 of 1.*derives them anew"),
        ({"oft_block_size": 4}, r"2 blocks of 2 inputs.*oft_block_size=4.*1 of 4"),
        ({"r": 2, "oft_block_size": 2}, "takes one of them"),
        ({"oft_block_size": 2, "block_share": True}, r"block_share=true.*1 of 2"),
    ],
)
def test_oft_configs_that_contradict_their_tensors(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = {**OFT_17, "peft_version": "0.18.0", **fields}
    folder = folder_of(tmp_path / "old", config, oft_R__weight=counted(2, 1))
    with pytest.raises(errors.Conflict, match=rf"(?s){message}"):
        ao.convert(folder, to="peft", output=tmp_path / "new")
    ao.convert(folder, to="peft", output=tmp_path / "new", fields=ANEW)
    assert {name: pm.config_of(tmp_path / "new")[name] for name in ANEW} == {
        "r": 0, "oft_block_size": 2, "block_share": False,
    }  # fmt: skip
    with torch.no_grad():
        outputs = pm.load(Alone(3, 4), tmp_path / "new")(torch.eye(4))
    torch.testing.assert_close(outputs, changed(tmp_path / "new", Alone(3, 4)), rtol=1e-5, atol=1e-6)


def test_what_only_the_base_shows_to_be_wrong_is_derived_anew(tmp_path: Path) -> None:
    """One block may stand for one or for all: a base with as many inputs shows that it is one."""
    folder = oft_17(tmp_path / "old", peft_version="0.18.0", oft_block_size=2)
    base = architecture_of(Alone(3, 4))
    with pytest.raises(errors.Conflict, match=r"1 blocks of 4 inputs.*--repair"):
        ao.convert(folder, to="peft", output=tmp_path / "new", base=base)
    result = ao.convert(folder, to="peft", output=tmp_path / "new", base=base, repair=True)
    assert any("repaired oft_block_size: 2 → 4" in note for note in result.notes)
    assert pm.config_of(tmp_path / "new")["oft_block_size"] == 4
    with torch.no_grad():
        same(pm.load(Alone(3, 4), tmp_path / "new")(torch.eye(4)), OUTPUTS_18)


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (BOFTConfig(boft_block_size=4), {"boft_block_size": 8}, r"boft_R.*boft_block_size 8"),
        (BOFTConfig(boft_block_size=4), {"boft_block_num": 4}, "one of the two is 0"),
        (BOFTConfig(boft_block_size=4), {"boft_n_butterfly_factor": "1"}, "whole numbers"),
        (OFTConfig(oft_block_size=4), {"r": "2"}, "takes one of them"),
        (OFTConfig(oft_block_size=4), {"eps": "small"}, "eps is 'small'"),
        (HRAConfig(r=4), {"r": 6}, r"rank 4.*says 6"),
        (GloraConfig(r=4), {"config_A_B": "vector"}, r"is lora of config_A_B.*says vector"),
        (GloraConfig(r=4), {"config_D_E": "vector"}, r"is constant of config_D_E.*says vector"),
        (GloraConfig(r=4), {"r": 2}, r"rank 4.*says 2"),
        (RoadConfig(variant="road_2", group_size=4), {"group_size": 10}, "groups of 10"),
        (RoadConfig(variant="road_2", group_size=4), {"variant": "road_3"}, "must be road_1"),
    ],
)
def test_configs_that_contradict_their_tensors(
    config: Any, fields: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)
    config.target_modules = ["wide"]
    _, folder = Case(LINE, config).adapter(tmp_path / "original")
    pm.folder_with(tmp_path / "wrong", pm.weights_of(folder), {**pm.config_of(folder), **fields})
    with pytest.raises(errors.AdapterOpsError, match=rf"(?s){message}"):
        ao.convert(tmp_path / "wrong", to="peft", output=tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("config", "bias"),
    [(OFTConfig(oft_block_size=4), "oft_only"), (HRAConfig(r=4), "hra_only"), (HRAConfig(r=4), "all")],
)
def test_trained_biases(config: Any, bias: str, tmp_path: Path) -> None:
    config.target_modules, config.bias = ["wide", "square"], bias
    case = Case(LINE, config)
    base = LINE()
    model = pm.trained(base, config)
    for name, parameter in model.named_parameters():
        if name.endswith(".base_layer.bias" if bias != "all" else ".bias"):
            parameter.data += 0.5
    folder = pm.saved(model.eval(), tmp_path / "original", save_embedding_layers=False)
    (folder / "adapter_config.json").unlink()
    ao.convert(folder, to="peft", output=tmp_path / "new")
    assert pm.config_of(tmp_path / "new")["bias"] == bias
    loaded = pm.load(LINE(), tmp_path / "new")
    assert pm.apart(case.outputs(loaded), case.outputs(model)) < 1e-6


def test_the_variant_of_road_follows_from_the_base(tmp_path: Path) -> None:
    config = RoadConfig(variant="road_4", group_size=4, target_modules=["wide"])
    _, folder = Case(LINE, config).adapter(tmp_path / "original")
    (folder / "adapter_config.json").unlink()
    ao.convert(folder, to="peft", output=tmp_path / "new", fields={"group_size": 4}, base=architecture_of(LINE()))
    assert pm.config_of(tmp_path / "new")["variant"] == "road_4"


@pytest.mark.parametrize("size", [1, 7, 12, 30, 64, 360])
def test_divisors_are_those_that_peft_takes(size: int) -> None:
    layer = OFTLayer.__new__(OFTLayer)
    taken = {n: layer.adjust_oft_parameters(size, n) if size % n or n > size else n for n in range(1, size + 9)}
    assert {n: nearest(size, n) for n in taken} == taken
    for n, divisor in taken.items():
        wanted = asked_for({size: divisor})
        assert wanted is not None
        assert taken.get(wanted, size) == divisor, n


def test_one_number_for_several_sizes() -> None:
    assert asked_for({12: 4, 16: 4}) == 4
    wanted = asked_for({24: 6, 35: 7})
    assert wanted is not None
    assert (nearest(24, wanted), nearest(35, wanted)) == (6, 7)
    assert asked_for({12: 2, 16: 16}) is None
    assert asked_for({12: 5}) is None


def test_blocks_that_no_config_makes(tmp_path: Path) -> None:
    """Sizes 2 and 16 of 16 and 24 inputs: no one number is nearest to both."""
    tensors = {
        "base_model.model.wide.oft_R.weight": torch.ones(8, 1),
        "base_model.model.tall.oft_R.weight": torch.ones(2, 66),
    }
    folder = pm.folder_with(tmp_path / "odd", tensors)
    with pytest.raises(errors.CannotRepresent, match=r"(?s)\[2, 12\].*no one r or oft_block_size"):
        ao.convert(folder, to="peft", output=tmp_path / "new", base=architecture_of(LINE()))


def test_files_of_butterflies_keep_their_factors(tmp_path: Path) -> None:
    tensors = {
        "base_model.model.wide.boft_R": torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)),
        "base_model.model.wide.boft_s": torch.ones(24, 1),
    }
    ao.convert(pm.folder_with(tmp_path / "two", tensors), to="peft", output=tmp_path / "new")
    assert pm.config_of(tmp_path / "new")["boft_n_butterfly_factor"] == 2
    pm.same_tensors(pm.weights_of(tmp_path / "new"), tensors)


def test_a_factor_that_was_asked_for_and_not_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its CUDA extension, peft trains one factor and writes the config as it was given."""
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)
    case = Case(LINE, BOFTConfig(boft_n_butterfly_factor=2, target_modules=["wide"]))
    model, folder = case.adapter(tmp_path / "original")
    assert pm.config_of(folder)["boft_n_butterfly_factor"] == 2
    with pytest.raises(errors.Conflict, match=r"(?s)CUDA extension.*--set boft_n_butterfly_factor=1;"):
        ao.convert(folder, to="peft", output=tmp_path / "new")
    ao.convert(folder, to="peft", output=tmp_path / "new", fields={"boft_n_butterfly_factor": None})
    assert pm.config_of(tmp_path / "new")["boft_n_butterfly_factor"] == 1
    assert pm.apart(case.outputs(pm.load(LINE(), tmp_path / "new")), case.outputs(model)) < 1e-6


def test_sizes_of_boft_that_no_config_makes(tmp_path: Path) -> None:
    tensors = {
        "base_model.model.wide.boft_R": torch.ones(1, 4, 4, 4),
        "base_model.model.wide.boft_s": torch.ones(24, 1),
        "base_model.model.tall.boft_R": torch.ones(1, 3, 8, 8),
        "base_model.model.tall.boft_s": torch.ones(32, 1),
    }
    with pytest.raises(errors.CannotRepresent, match=r"(?s)\[1, 3, 8, 8\].*\[1, 4, 4, 4\]"):
        ao.convert(pm.folder_with(tmp_path / "odd", tensors), to="peft", output=tmp_path / "new")


def test_oft_is_named_in_peft() -> None:
    """The names that the cases here are made by hand with are those of today's peft."""
    model = get_peft_model(Alone(3, 4), OFTConfig(oft_block_size=4, target_modules=["lin"]))
    assert any(".oft_R." in name for name, _ in model.named_parameters())
