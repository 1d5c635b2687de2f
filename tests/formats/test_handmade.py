"""LoRA that people write themselves, against modules written as books and tutorials write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

import adapterops as ao
from adapterops import errors
from adapterops.methods import METHODS

WIDTHS = {"q": (12, 12), "up": (12, 20)}


class Model(nn.Module):
    """Two linear layers, one of them with as many inputs as outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.up = nn.Linear(12, 12), nn.Linear(12, 20, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.q(x).tanh())


class Pair(nn.Module):
    """x @ A @ B, times alpha."""

    def __init__(self, inputs: int, outputs: int, names: tuple[str, str]) -> None:
        super().__init__()
        self.names = names
        setattr(self, names[0], nn.Parameter(torch.randn(inputs, 3)))
        setattr(self, names[1], nn.Parameter(torch.randn(3, outputs)))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (x @ getattr(self, self.names[0]) @ getattr(self, self.names[1]))


class Around(nn.Module):
    """A layer with a pair beside it."""

    def __init__(self, linear: nn.Linear, names: tuple[str, str], inner: str) -> None:
        super().__init__()
        self.inner = inner
        self.linear = linear
        setattr(self, inner, Pair(linear.in_features, linear.out_features, names))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + getattr(self, self.inner)(x)


class Weight(nn.Module):
    """W + B @ A, as a parametrization."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.randn(3, linear.in_features))
        self.lora_B = nn.Parameter(torch.randn(linear.out_features, 3))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + 0.5 * self.lora_B @ self.lora_A


def with_pairs(names: tuple[str, str] = ("A", "B"), inner: str = "lora") -> Model:
    model = Model()
    model.q, model.up = Around(model.q, names, inner), Around(model.up, names, inner)  # type: ignore[assignment]
    return model


def with_parametrizations() -> Model:
    model = Model()
    for layer in (model.q, model.up):
        parametrize.register_parametrization(layer, "weight", Weight(layer))
    return model


def delta(update: ao.Update) -> Tensor:
    return METHODS[update.method].delta(update)


def saved(state: dict[str, Tensor], path: Path) -> Path:
    save_file({key: value.detach().contiguous() for key, value in state.items()}, path)
    return path


def as_peft_does(base: Model, folder: Path, x: Tensor) -> Tensor:
    from peft import PeftModel

    base.config = {"model_type": "own"}  # type: ignore[assignment]
    with torch.no_grad():
        return PeftModel.from_pretrained(base, str(folder))(x)


def base_of(model: nn.Module) -> Model:
    """The model without what was put around its layers."""
    base, state = Model(), model.state_dict()
    kept = {
        key.replace(".linear.", ".").replace(".parametrizations.weight.original", ".weight"): v
        for key, v in state.items()
    }
    base.load_state_dict({key: kept[key] for key in base.state_dict()})
    return base


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(with_pairs, id="lora.A"),
        pytest.param(lambda: with_pairs(inner="lora_layer"), id="lora_layer.A"),
        pytest.param(lambda: with_pairs(("lora_A", "lora_B")), id="lora.lora_A"),
        pytest.param(lambda: with_pairs(("lora_a", "lora_b")), id="lora.lora_a"),
        pytest.param(with_parametrizations, id="parametrization"),
    ],
)
def test_it_does_in_peft_what_it_did(model: Any, whole: bool, tmp_path: Path) -> None:
    torch.manual_seed(1)
    own = model()
    x = torch.randn(5, 12)
    state = {key: value for key, value in own.state_dict().items() if whole or "lora" in key}
    source = saved(state, tmp_path / "lora.safetensors")
    ao.convert(source, "peft", tmp_path / "peft", fields={"scale": 0.5})
    with torch.no_grad():
        wanted = own(x)
    torch.testing.assert_close(as_peft_does(base_of(own), tmp_path / "peft", x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("turned", "ends"),
    [
        (False, (".A", ".B")),
        (True, (".A", ".B")),
        (False, (".lora_a.weight", ".lora_b.weight")),
        (True, (".lora_A", ".lora_B")),
        (False, (".lora_a", ".lora_b")),
    ],
)
@pytest.mark.parametrize("square", [False, True])
def test_which_way_round_is_in_the_shapes(turned: bool, ends: tuple[str, str], square: bool, tmp_path: Path) -> None:
    state, deltas = {}, {}
    for name, (inputs, outputs) in WIDTHS.items():
        if square and inputs != outputs:
            continue
        a, b = torch.randn(3, inputs), torch.randn(outputs, 3)
        deltas[name] = 2.0 * b @ a
        state |= {f"layers.0.{name}{ends[0]}": a.T if turned else a, f"layers.0.{name}{ends[1]}": b.T if turned else b}
    adapter = ao.load(saved(state, tmp_path / "own.safetensors"), fields={"scale": 2})
    assert adapter.provenance.dialect == ("handmade-turned" if turned else "handmade-straight")
    assert {u.module for u in adapter} == {f"layers.0.{name}" for name in deltas}
    for update in adapter:
        torch.testing.assert_close(delta(update), deltas[update.module.removeprefix("layers.0.")])
    notes = " ".join(adapter.provenance.notes)
    assert ("smaller dimension is taken for the rank" in notes) is square
    assert ("(in_features, r)" in notes) is turned


def test_the_way_round_of_equal_sides_is_asked_for(tmp_path: Path) -> None:
    state = {"x.lora.A": torch.randn(4, 4), "x.lora.B": torch.randn(4, 4)}
    path = saved(state, tmp_path / "own.safetensors")
    with pytest.raises(errors.AmbiguousFormat, match=r"--from handmade-straight.*--from handmade-turned"):
        ao.load(path)
    straight, turned = (
        delta(next(iter(ao.load(path, format=name, alpha=4)))) for name in ("handmade-straight", "handmade-turned")
    )
    torch.testing.assert_close(straight, state["x.lora.B"] @ state["x.lora.A"])
    torch.testing.assert_close(turned, (state["x.lora.A"] @ state["x.lora.B"]).T)


def test_the_scale_is_asked_for(tmp_path: Path) -> None:
    path = saved({"x.lora.A": torch.randn(8, 2), "x.lora.B": torch.randn(2, 6)}, tmp_path / "own.safetensors")
    with pytest.raises(errors.UnknownFact, match=r"x\.lora\.A.*alpha / r: --set scale=X"):
        ao.convert(path, "peft", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize(
    "more",
    [
        {"x.lora.alpha": torch.tensor(4.0)},
        {"x.lora.core": torch.randn(2, 2)},
        {"x.lora.lora_C": torch.randn(2, 2)},
    ],
)
def test_what_may_change_the_pairs_is_not_passed_over(more: dict[str, Tensor], tmp_path: Path) -> None:
    state = {"x.lora.A": torch.randn(8, 2), "x.lora.B": torch.randn(2, 6), **more}
    with pytest.raises(errors.AdapterOpsError):
        ao.load(saved(state, tmp_path / "own.safetensors"))


def test_matrices_of_another_kind_are_no_pairs(tmp_path: Path) -> None:
    """A state space model has matrices A and B, too, among its weights."""
    state = {
        f"layers.{i}.ssm.{n}": torch.randn(16, 4) if n == "A" else torch.randn(4, 16) for i in range(2) for n in "AB"
    }
    state |= {f"layers.{i}.norm.weight": torch.randn(16) for i in range(2)}
    with pytest.raises(errors.NotAnAdapter):
        ao.load(saved(state, tmp_path / "model.safetensors"))


@pytest.mark.parametrize("ends", [(".lora_A", ".lora_B"), (".lora_A.weight", ".lora_B.weight")])
def test_loralib_and_peft_stay_what_they_are(ends: tuple[str, str], tmp_path: Path) -> None:
    state = {f"x{ends[0]}": torch.randn(2, 8), f"x{ends[1]}": torch.randn(6, 2)}
    adapter = ao.load(saved(state, tmp_path / "own.safetensors"), alpha=2)
    assert adapter.provenance.format in ("loralib", "peft")
    torch.testing.assert_close(delta(next(iter(adapter))), state[f"x{ends[1]}"] @ state[f"x{ends[0]}"])


def test_mlx_vlm_s_own_layers_are_read_once_the_scale_is_said(tmp_path: Path) -> None:
    """`y + scale · (x @ A) @ B` (mlx_vlm/trainer/lora.py), where scale was alpha, and is alpha / rank since 0.5."""
    torch.manual_seed(0)
    stem = "language_model.model.layers.0.mlp.down_proj"
    a, b = torch.randn(12, 3), torch.randn(3, 8)
    (tmp_path / "in").mkdir()
    save_file({f"{stem}.A": a, f"{stem}.B": b}, tmp_path / "in" / "adapters.safetensors")
    (tmp_path / "in" / "adapter_config.json").write_text('{"rank": 3, "alpha": 0.3, "dropout": 0.1}')
    with pytest.raises(
        errors.UnknownFact, match=r"before 0\.5 .* multiplied by alpha, 0\.3, and since then by alpha / rank, 0\.1"
    ):
        ao.convert(tmp_path / "in", "peft", tmp_path / "out")
    ao.convert(tmp_path / "in", "peft", tmp_path / "out", fields={"scale": 0.3})
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    delta = (
        config["lora_alpha"]
        / 3
        * made[f"base_model.model.{stem}.lora_B.weight"]
        @ made[f"base_model.model.{stem}.lora_A.weight"]
    )
    x = torch.randn(5, 12)
    torch.testing.assert_close(x @ delta.T, 0.3 * (x @ a) @ b)


def test_a_rank_above_the_features_is_no_other_way_round(tmp_path: Path) -> None:
    """A layer's own weight stands one way, whatever its shape says."""
    state = {"x.lora_A.weight": torch.randn(64, 32), "x.lora_B.weight": torch.randn(32, 64)}
    one = next(iter(ao.load(saved(state, tmp_path / "own.safetensors"), alpha=64)))
    torch.testing.assert_close(delta(one), state["x.lora_B.weight"] @ state["x.lora_A.weight"])


def test_the_rest_of_a_whole_model_is_left_out_by_name(tmp_path: Path) -> None:
    """LLMs-from-scratch calls the parameters of its norms `scale` and `shift`."""
    state = {
        "q.lora.A": torch.randn(8, 2),
        "q.lora.B": torch.randn(2, 6),
        "norm.scale": torch.ones(8),
        "norm.shift": torch.ones(8),
    }
    path = saved(state, tmp_path / "model.safetensors")
    with pytest.raises(errors.UnsupportedFormat, match=r"does not know 'norm.scale', 'norm.shift'.*--allow-drop"):
        ao.load(path, alpha=2)
    assert {u.module for u in ao.load(path, alpha=2, allow_drop=True)} == {"q"}


def test_what_stands_in_a_pairs_layer_is_not_passed_over(tmp_path: Path) -> None:
    state = {"q.lora.A": torch.randn(8, 2), "q.lora.B": torch.randn(2, 6), "q.magnitude.weight": torch.randn(6)}
    with pytest.raises(errors.UnsupportedFormat, match=r"q\.magnitude\.weight.*a magnitude"):
        ao.load(saved(state, tmp_path / "own.safetensors"), alpha=2)
