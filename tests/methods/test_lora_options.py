"""LoRA's variants against peft: DoRA, biases, KaSA, BD-LoRA, QA-LoRA, MonteCLoRA, VeLoRA, MiCA, aLoRA."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from method_updates import perturbed, relative, update
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import variants
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapterops.adapter import Certainty, Fact, Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods import METHODS
from adapterops.methods.base import Own
from adapterops.methods.lora import Lora

LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(12, 8),
    "conv1d": lambda: nn.Conv1d(6, 8, 3),
    "conv2d": lambda: nn.Conv2d(6, 8, (3, 2)),
    "conv3d": lambda: nn.Conv3d(3, 8, 2),
    "embedding": lambda: nn.Embedding(12, 8),
    "Conv1D": lambda: Conv1D(8, 12),
}
INPUTS: dict[str, Any] = {
    "linear": lambda: torch.randn(5, 12),
    "conv1d": lambda: torch.randn(2, 6, 7),
    "conv2d": lambda: torch.randn(2, 6, 7, 5),
    "conv3d": lambda: torch.randn(2, 3, 4, 4, 4),
    "embedding": lambda: torch.arange(12),
    "Conv1D": lambda: torch.randn(5, 12),
}


class Toy(nn.Module):
    """One module under a name that a config can target."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.proj = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.proj(x)
        return out


def own(layer: Any) -> Own:
    weight = layer.weight.detach().clone()
    bias = getattr(layer, "bias", None)
    return Own(weight.T if isinstance(layer, Conv1D) else weight, None if bias is None else bias.detach().clone())


def randomised(model: nn.Module) -> None:
    """Numbers of about one in everything that the adapter has."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) + ("magnitude" in name) * 3)


def tuned(layer: nn.Module, **config: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A peft model of one layer, and its tensors by role."""
    fan = {"fan_in_fan_out": True} if isinstance(layer, Conv1D) else {}
    model = get_peft_model(Toy(layer), LoraConfig(r=4, lora_alpha=6, target_modules=["proj"], **config, **fan)).eval()
    randomised(model)
    roles = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_B.bias": "bias"}
    roles |= {
        "lora_embedding_A": "A",
        "lora_embedding_B": "B",
        "lora_magnitude_vector": "magnitude",
        "lora_diag": "diag",
    }
    state = get_peft_model_state_dict(model)
    named = {key.removeprefix("base_model.model.proj."): tensor.clone() for key, tensor in state.items()}
    return model, {roles.get(key, key.removeprefix("lora_")): tensor for key, tensor in named.items()}


def made(kind: str, tensors: dict[str, torch.Tensor], method: str = "lora", **options: Any) -> Update:
    if kind == "embedding":
        options["kind"] = "embedding"
    if "magnitude" in tensors:
        options["dora_axis"] = "out"
    return update(method, tensors, 6.0, options=options)


def outputs_are_the_layers(model: Any, kind: str, before: Own, one: Update) -> None:
    """The base layer with the changed parameters gives what peft's forward gives."""
    x = INPUTS[kind]()
    wanted = model(x)
    change = METHODS[one.method].change(one, before)
    layer = LAYERS[kind]()
    assert change.weight is not None
    assert change.weight.dtype == torch.float32
    with torch.no_grad():
        weight = before.weight + change.weight
        layer.weight.copy_(weight.T if kind == "Conv1D" else weight)
        if before.bias is not None:
            layer.bias.copy_(before.bias + (change.bias if change.bias is not None else 0))
        assert relative(wanted, layer(x)) < 1e-5


@pytest.mark.parametrize("kind", LAYERS)
def test_dora_is_pefts(kind: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    before = own(layer)
    model, tensors = tuned(layer, use_dora=True)
    one = made(kind, tensors)
    METHODS["lora"].check(one)
    outputs_are_the_layers(model, kind, before, one)
    with pytest.raises(CannotRepresent, match="--base-weights"):
        METHODS["lora"].change(one)


@pytest.mark.parametrize("kind", ["linear", "conv2d", "Conv1D"])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_bias_of_the_second_factor(kind: str, rslora: bool) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    before = own(layer)
    model, tensors = tuned(layer, lora_bias=True, use_rslora=rslora)
    outputs_are_the_layers(model, kind, before, replace(made(kind, tensors), rslora=rslora))


def test_a_magnitude_per_input() -> None:
    torch.manual_seed(0)
    weight, m = torch.randn(8, 6, 3, 2).double(), torch.rand(6).double() + 1
    tensors = {"A": torch.randn(4, 6, 3, 2), "B": torch.randn(8, 4, 1, 1), "magnitude": m.float().reshape(1, 6, 1, 1)}
    one = update("lora", tensors, 4.0, options={"dora_axis": "in"})
    whole = weight + METHODS["lora"].delta(one).double()
    wanted = whole * (m / whole.square().sum((0, 2, 3)).sqrt()).reshape(1, 6, 1, 1) - weight
    change = METHODS["lora"].change(one, Own(weight.float()))
    assert change.weight is not None
    assert relative(wanted, change.weight) < 1e-5


def test_a_flattened_kernel_takes_the_bases_shape() -> None:
    one = update("lora", {"A": torch.randn(4, 36), "B": torch.randn(8, 4)}, 4.0)
    change = METHODS["lora"].change(one, Own(torch.randn(8, 6, 3, 2)))
    assert change.weight is not None
    assert change.weight.shape == (8, 6, 3, 2)
    with pytest.raises(BrokenAdapter, match=r"another base model"):
        METHODS["lora"].change(one, Own(torch.randn(8, 6, 3, 3)))


def test_kasa_is_pefts() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 8)
    before = own(layer)
    model, tensors = tuned(layer, kasa_config=KasaConfig())
    assert set(tensors) == {"A", "B", "diag"}
    one = made("linear", tensors, "kasa")
    method = METHODS["kasa"]
    method.check(one)
    outputs_are_the_layers(model, "linear", before, one)
    tuner = model.base_model.model.proj
    wanted = variants.KasaLinearVariant._get_delta_weight(tuner, "default").detach()
    assert relative(wanted, method.delta(one)) < 1e-6
    # The rest is what peft took from the base.
    change = method.change(one, before).weight
    assert change is not None
    truncated = tuner.base_layer.weight.detach() - before.weight
    assert relative(truncated, change - method.delta(one)) < 1e-4
    assert torch.linalg.matrix_rank(change.double(), rtol=1e-5) == 8
    assert method.needs_weight
    with pytest.raises(CannotRepresent, match="--base-weights"):
        method.change(one)


def test_kasa_of_a_small_weight_is_refused() -> None:
    tensors = {"A": torch.randn(4, 12), "B": torch.randn(4, 4), "diag": torch.randn(4)}
    with pytest.raises(BrokenAdapter, match=r"rank 4.*\[4, 12\]"):
        METHODS["kasa"].change(made("linear", tensors, "kasa"), Own(torch.randn(4, 12)))


@pytest.mark.parametrize("factor", ["a", "b"])
@pytest.mark.parametrize("bias", [False, True])
def test_block_diagonal_factors_are_pefts(factor: str, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 8)
    before = own(layer)
    config: Any = BdLoraConfig(**{f"target_modules_bd_{factor}": ["proj"]}, nblocks=2)
    model, tensors = tuned(layer, use_bdlora=config, lora_bias=bias and factor == "a")
    assert tensors["A"].shape == ((4, 6) if factor == "a" else (4, 12))
    one = made("linear", tensors, "bdlora", nblocks=2)
    method = METHODS["bdlora"]
    method.check(one)
    assert (method.rank(one), method.scale(one)) == (4, 1.5)
    assert method.fits(one, (8, 12))
    assert not method.fits(one, (8, 24))
    assert method.weight_shape(one) == (8, 12)
    outputs_are_the_layers(model, "linear", before, one)
    # Where B has the blocks its shape says how many; where A has, the module's does.
    told = {"shape": (8, 12)} if factor == "a" else {}
    known = replace(one, options=told)
    assert method.error(one, known) == 0
    if factor == "a":
        with pytest.raises(CannotRepresent, match="nblocks"):
            method.delta(replace(one, options={}))
        assert method.fits(replace(one, options={}), (8, 12))
        assert not method.fits(replace(one, options={}), (8, 13))


def test_rows_of_block_diagonals() -> None:
    tensors = {"A": torch.randn(4, 6), "B": torch.randn(8, 4)}
    one = made("linear", tensors, "bdlora", nblocks=2)
    part = replace(one, tensors=METHODS["bdlora"].take_rows(one, [(2, 5)]))
    assert torch.equal(METHODS["bdlora"].delta(part), METHODS["bdlora"].delta(one)[2:5])
    other = made("linear", {"A": torch.randn(4, 12), "B": torch.randn(8, 2)}, "bdlora")
    with pytest.raises(CannotRepresent, match="to-lora"):
        METHODS["bdlora"].take_rows(other, [(0, 4)])


def pooled(layer: nn.Linear, size: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """A LoRA layer turned into QA-LoRA by peft's variant, which only its GPTQ layers ask for."""
    config: Any = LoraConfig(r=4, lora_alpha=6, use_qalora=True, qalora_group_size=size)
    tuner = LoraLinear(layer, "default", config=config, r=4, lora_alpha=6).eval()
    variants.QALoraLinearVariant.init(tuner, "default", config)
    randomised(tuner)
    return tuner, {"A": tuner.lora_A["default"].weight.detach(), "B": tuner.lora_B["default"].weight.detach()}


@pytest.mark.parametrize("size", [1, 3, 4])
def test_pooled_inputs_are_pefts(size: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 8)
    tuner, tensors = pooled(layer, size)
    one = made("linear", tensors, "qalora", qalora_group_size=size)
    method = METHODS["qalora"]
    method.check(one)
    for x in (torch.randn(5, 12), torch.randn(2, 5, 12)):
        base = layer(x)
        with torch.no_grad():
            wanted = variants.QALoraLinearVariant.forward(tuner, "default", x, base) - base
        assert relative(wanted, x @ method.delta(one).T) < 1e-5
    assert method.fits(one, (8, 12))
    assert not method.fits(one, (8, 24))
    assert method.error(one, replace(one, options={"shape": (8, 12)})) == 0
    with pytest.raises(CannotRepresent, match="qalora_group_size"):
        method.delta(replace(one, options={}))


def test_a_plain_layer_takes_no_notice_of_qalora() -> None:
    _, tensors = tuned(nn.Linear(12, 8), use_qalora=True, qalora_group_size=4)
    assert tensors["A"].shape == (4, 12)


@pytest.mark.parametrize(
    ("config", "roles"),
    [
        (
            {"monteclora_config": MontecloraConfig(num_samples=3, buffer_size=2)},
            {
                "monteclora_sampler.std_prior",
                "monteclora_sampler.expert_weights_prior",
                "monteclora_sampler.gaussian_var_prior",
                "monteclora_sampler.expert_weights",
            },
        ),
        ({"velora_config": VeloraConfig(num_groups=3, init_type="random")}, {"velora_embed"}),
        ({"init_lora_weights": "mica"}, set()),
        ({"init_lora_weights": "orthogonal"}, set()),
    ],
    ids=["monteclora", "velora", "mica", "orthogonal"],
)
def test_what_training_alone_uses_changes_nothing(config: dict[str, Any], roles: set[str]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 8)
    before = own(layer)
    model, tensors = tuned(layer, **config)
    assert set(tensors) == {"A", "B"} | roles
    one = made("linear", tensors)
    METHODS["lora"].check(one)
    outputs_are_the_layers(model, "linear", before, one)
    for role in roles:
        assert METHODS["lora"].error(one, perturbed(one, role, 0.1)) > 0.05
        assert METHODS["lora"].error(one, replace(one, tensors={k: one.tensors[k] for k in "AB"})) == float("inf")


def test_alora_has_no_delta_and_acts_behind_its_tokens() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 8)
    model, tensors = tuned(layer, alora_invocation_tokens=[1, 2])
    one = made("linear", tensors, "alora", alora_invocation_tokens=[1, 2])
    method = METHODS["alora"]
    method.check(one)
    x = torch.randn(1, 5, 12)
    with torch.no_grad():
        result = variants.ALoraLinearVariant.forward(
            model.base_model.model.proj, "default", x, layer(x), alora_offsets=[2]
        )
    added = x @ Lora().delta(one).T
    assert torch.equal(result[:, :3], layer(x)[:, :3].detach())
    assert relative(added[:, 3:], (result - layer(x)).detach()[:, 3:]) < 1e-5
    assert not method.linear
    assert method.low_rank(one) is None
    assert method.norm(one) is None
    for ask in (method.delta, method.matrix, method.change):
        with pytest.raises(CannotRepresent, match="invocation"):
            ask(one)
    assert method.error(one, one) == 0
    assert method.error(one, replace(one, options={"alora_invocation_tokens": [3]})) == float("inf")


def test_arrow_has_no_delta() -> None:
    one = made("linear", {"A": torch.randn(4, 12), "B": torch.randn(8, 4)}, "arrow")
    assert METHODS["arrow"].weight_shape(one) is None
    assert METHODS["arrow"].exact_rank(one) is None
    with pytest.raises(CannotRepresent, match="each token"):
        METHODS["arrow"].change(one)


VARIANTS = {
    "kasa": {"A": (4, 12), "B": (8, 4), "diag": (4,)},
    "bdlora": {"A": (4, 6), "B": (8, 4)},
    "qalora": {"A": (4, 6), "B": (8, 4)},
    "lora_merged": {"A": (4, 12), "B": (8, 4)},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "bdlora": {"nblocks": 2},
    "qalora": {"qalora_group_size": 2},
    "lora_merged": {"enable_lora": [True, False]},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("method", VARIANTS)
def test_factors_deltas_and_norms_agree(method: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = {role: torch.randn(shape).to(dtype) for role, shape in VARIANTS[method].items()}
    one, kind = made("linear", tensors, method, **OPTIONS.get(method, {})), METHODS[method]
    kind.check(one)
    pair, delta = kind.low_rank(one), kind.delta(one)
    assert pair is not None
    assert kind.exact_rank(one) == pair[0].shape[1] == 4
    scale = kind.scale(one)
    assert scale == 1.5
    assert relative(delta, pair[0] @ pair[1] * scale) < 1e-6
    norm = kind.norm(one)
    assert norm is not None
    assert abs(norm - float(delta.norm())) < 1e-4 * norm
    rows = torch.from_numpy(kind.matrix(one).at(2, 5))
    assert relative(delta[2:5], rows) < 1e-6
    plain = made("linear", {"A": pair[1], "B": pair[0]})
    assert METHODS["lora"].error(plain, plain) == 0
    assert relative(METHODS["lora"].delta(plain), delta) < 1e-6
    for role in tensors:
        assert 0.01 < kind.error(one, perturbed(one, role, 0.1)) < 1
    folded = replace(one, tensors=kind.folded(one, "F32"), alpha=Fact(4.0, Certainty.READ))
    assert kind.error(one, folded) < 1e-6


@pytest.mark.parametrize(
    ("method", "shapes", "options", "message"),
    [
        ("kasa", {"A": (4, 12), "B": (8, 4), "diag": (3,)}, {}, r"x\.diag.*\[3\].*rank 4"),
        ("kasa", {"A": (4, 12), "B": (8, 4)}, {}, "counterpart diag"),
        ("kasa", {"A": (4, 12, 1, 1), "B": (8, 4, 1, 1), "diag": (4,)}, {}, "linear modules"),
        ("bdlora", {"A": (4, 12), "B": (8, 3)}, {}, r"3 columns.*rank 4"),
        ("bdlora", {"A": (4, 12), "B": (8, 2)}, {"nblocks": 4}, "has 2 blocks, and nblocks says 4"),
        ("bdlora", {"A": (4, 12), "B": (8, 4)}, {"nblocks": 3}, "3 blocks do not divide"),
        ("bdlora", {"A": (4, 12), "B": (9, 2)}, {"nblocks": 2}, "2 blocks do not divide"),
        ("bdlora", {"A": (4, 12, 1), "B": (8, 2)}, {}, "linear modules"),
        ("bdlora", {"A": (4, 12)}, {}, "counterpart B"),
        ("qalora", {"A": (4, 3), "B": (8, 5)}, {}, r"rank 5.*rank 4"),
        ("qalora", {"A": (4, 3), "B": (8, 4)}, {"qalora_group_size": 2, "shape": (8, 12)}, "for 6 inputs.*has 12"),
        ("qalora", {"A": (4, 3), "B": (8, 4)}, {"qalora_group_size": 0}, "groups of 0"),
        ("lora_merged", {"A": (8, 12)}, {}, "counterpart B"),
        ("lora_merged", {"A": (8, 12), "B": (8, 3)}, {}, "not shared out evenly"),
        ("lora_merged", {"A": (8, 12), "B": (9, 4)}, {}, "not shared out evenly"),
        ("lora_merged", {"A": (8, 12), "B": (8, 4, 3)}, {}, "grouped LoRA"),
        ("lora_merged", {"A": (8, 12), "B": (8, 4)}, {"enable_lora": [True, True, True]}, "not for 3 parts"),
        (
            "lora_merged",
            {"A": (8, 12), "B": (8, 4)},
            {"enable_lora": [True, True], "shape": (9, 12)},
            "for 8 outputs.*has 9",
        ),
    ],
)
def test_shapes_that_cannot_belong_together(
    method: str, shapes: dict[str, tuple[int, ...]], options: dict[str, Any], message: str
) -> None:
    one = update(method, {role: torch.zeros(shape) for role, shape in shapes.items()}, 1.0, options=options)
    with pytest.raises(BrokenAdapter, match=message):
        METHODS[method].check(one)


def test_an_unknown_alpha_is_said() -> None:
    one = made("linear", {"A": torch.randn(4, 6), "B": torch.randn(8, 4)}, "bdlora", nblocks=2)
    for method in ("lora", "bdlora"):
        with pytest.raises(CannotRepresent, match="--alpha"):
            METHODS[method].change(replace(one, alpha=None))


def test_kasa_has_exact_factors_of_all_that_it_changes() -> None:
    torch.manual_seed(0)
    tensors = {"A": torch.randn(4, 12), "B": torch.randn(8, 4), "diag": torch.randn(4)}
    one, before = made("linear", tensors, "kasa"), Own(torch.randn(8, 12))
    pair, change = METHODS["kasa"].low_rank_of(one, before), METHODS["kasa"].change(one, before).weight
    assert pair is not None
    assert pair[0].shape == (8, 8)
    assert change is not None
    assert relative(change, pair[0] @ pair[1]) < 1e-6
