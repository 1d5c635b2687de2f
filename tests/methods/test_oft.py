"""OFT against peft: today's layers, and reference outputs of the older ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from method_updates import update
from peft import BOFTConfig, OFTConfig, get_peft_model, set_peft_model_state_dict
from torch import nn
from turned_layers import changed, inputs_of, outputs_agree, own_of, update_of, wrapped

from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.oft import Oft, as_boft, block_size
from adapterops.methods.orthogonal import neumann, skew

OFT = Oft()
BASES: dict[str, Any] = {
    "linear": lambda: nn.Linear(12, 8),
    "no bias": lambda: nn.Linear(12, 8, bias=False),
    "conv1": lambda: nn.Conv2d(12, 8, 1),
    "embedding": lambda: nn.Embedding(10, 12),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "exact": {"use_cayley_neumann": False},
    **{f"{n} terms": {"num_cayley_neumann_terms": n} for n in (2, 3, 4, 6, 7)},
    "shared": {"block_share": True},
    "shared exact": {"block_share": True, "use_cayley_neumann": False},
    "coft": {"coft": True, "eps": 0.5},
    "coft shared": {"coft": True, "eps": 0.5, "block_share": True},
}


def prefix_of(base: nn.Module) -> str:
    return "oft_embedding_" if isinstance(base, nn.Embedding) else "oft_"


def options_of(base: nn.Module, **options: Any) -> dict[str, Any]:
    return options | ({"kind": "embedding"} if isinstance(base, nn.Embedding) else {})


@pytest.mark.parametrize("variant", OPTIONS)
@pytest.mark.parametrize("kind", BASES)
def test_outputs_are_pefts(kind: str, variant: str) -> None:
    base = BASES[kind]()
    model = wrapped(base, OFTConfig(oft_block_size=4, **OPTIONS[variant]))
    one = update_of(model, "oft", prefix_of(base), **options_of(base, **OPTIONS[variant]))
    outputs_agree(OFT, one, base, model)


@pytest.mark.parametrize(("r", "size"), [(1, 12), (12, 1), (3, 4), (2, 6)])
def test_sizes_follow_from_the_shapes(r: int, size: int) -> None:
    base = nn.Linear(12, 8)
    model = wrapped(base, OFTConfig(r=r, oft_block_size=0))
    one = update_of(model, "oft", "oft_")
    assert block_size(one) == size
    if size > 1:
        return outputs_agree(OFT, one, base, model)
    assert OFT.is_nothing(one)
    change = OFT.change(one, own_of(base)).weight
    assert change is not None
    assert not change.any()
    return None


def test_the_exact_rotation_turns_the_other_way_than_the_series() -> None:
    base = nn.Linear(12, 8)
    model = wrapped(base, OFTConfig(oft_block_size=4), spread=0.02)
    one = update_of(model, "oft", "oft_")
    series, exact = (OFT.rotations(replace(one, options={"use_cayley_neumann": n}), (8, 12)) for n in (True, False))
    torch.testing.assert_close(series, exact.mT, rtol=0, atol=1e-5)
    assert OFT.error(one, replace(one, options={"use_cayley_neumann": False})) > 1


@pytest.mark.parametrize("terms", range(1, 9))
def test_the_series_before_and_since_018(terms: int) -> None:
    s = skew(torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).double())
    powers = [torch.linalg.matrix_power(s, n) for n in range(terms)]
    before = powers[0] + 2 * sum(powers[1:], torch.zeros_like(s))
    torch.testing.assert_close(neumann(s, terms, halved=False), before)
    if terms < 3:
        torch.testing.assert_close(neumann(s, terms), before)
    elif terms > 3:
        torch.testing.assert_close(neumann(s, terms), before - powers[-1])
    else:
        torch.testing.assert_close(neumann(s, 3), neumann(s, 4))


def test_kernels_have_no_weight_that_does_what_pefts_forward_does() -> None:
    """A fault of peft (0.16 to 0.21): patches are summed up where they overlap, so nothing learned changes outputs too."""
    base = nn.Conv2d(4, 6, 3, padding=1)
    untrained = wrapped(base, OFTConfig(oft_block_size=4), spread=0)
    inputs = inputs_of(base)
    with torch.no_grad():
        before = base(inputs)
        assert float((untrained(inputs) - before).norm()) > float(before.norm())
    model = wrapped(base, OFTConfig(oft_block_size=4))
    one = update_of(model, "oft", "oft_")
    with pytest.raises(CannotRepresent, match=r"(?s)mid.to_q.*overlapping.*merge_and_unload"):
        OFT.change(one, own_of(base))
    model.merge_adapter()
    outputs_agree(OFT, replace(one, options={"as_merged": True}), base, model)


def old(kind: str, blocks: int, base: nn.Module, share: bool = False, coft: bool = False) -> Any:
    """Blocks of peft 0.14 ("s") or of 0.7 to 0.13 (""), the options, and the layer's W', by their formulas."""
    generator = torch.Generator().manual_seed(3)
    own = own_of(base)
    flat = own.weight.double().reshape(len(own.weight), -1)
    out, inputs = flat.shape
    size = inputs // blocks if kind else -(-out // blocks)
    r = 0.4 * torch.randn(1 if share else blocks, size, size, generator=generator)
    tensors = {"r": r}
    m = r.double()
    if coft:
        limit = 0.01 * (-(-out // blocks)) ** 2 / len(r) ** 0.5
        norms = torch.linalg.matrix_norm(m)
        assert (norms > limit).any()
        m = torch.stack([one * min(1.0, limit / float(n)) for one, n in zip(m, norms, strict=True)])
    s = (m - m.mT) / 2
    eye = torch.eye(size).double()
    turned = (eye - s) @ torch.linalg.inv(eye + s)
    whole: torch.Tensor = torch.block_diag(*(turned[0 if share else at] for at in range(blocks)))  # type: ignore[no-untyped-call]
    if kind:
        tensors["s"] = 1 + 0.2 * torch.randn(out, 1, generator=generator)
        after = tensors["s"].double() * (flat @ whole.T)
    else:
        after = whole[:out, :out].T @ flat
    options = {"coft": True, "eps": 0.01} if coft else {}
    one = update("oft", tensors, options=options | {"shape": tuple(own.weight.shape)})
    return one, after.float().reshape(own.weight.shape)


OLD_BASES: list[tuple[str, Any, int]] = [
    ("s", lambda: nn.Linear(12, 8), 3),
    ("s", lambda: nn.Conv2d(4, 6, 3), 9),
    ("", lambda: nn.Linear(12, 8), 2),
    ("", lambda: nn.Linear(12, 10), 3),
    ("", lambda: nn.Linear(12, 5), 4),
    ("", lambda: nn.Conv2d(4, 6, 3), 3),
]


@pytest.mark.parametrize("coft", [False, True])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(("kind", "make", "blocks"), OLD_BASES)
def test_older_generations(kind: str, make: Any, blocks: int, share: bool, coft: bool) -> None:
    base = make()
    one, wanted = old(kind, blocks, base, share, coft)
    OFT.check(one)
    own = own_of(base)
    assert OFT.fits(one, tuple(own.weight.shape))
    change = OFT.change(one, own)
    assert change.weight is not None
    assert change.bias is None
    torch.testing.assert_close(own.weight + change.weight, wanted, rtol=1e-5, atol=1e-6)


# Made by scripts that ran peft 0.11.1 and 0.15.2: a Linear(3, 4) without bias whose weight is 0, 0.1, … 1.1, r=2, and
# blocks (and oft_s) of the numbers 0.1, −0.2, 0.3, … in order; outputs of the identity (3, 4) or (4, 4).
REFERENCE_11 = [
    [-0.1411765, 0.2647059, -0.5789103, 0.9137082],
    [-0.1, 0.4, -0.6297011, 1.0456941],
    [-0.0588235, 0.5352941, -0.680492, 1.1776801],
]
REFERENCE_15 = [
    [0.0235294, -0.3529412, 0.7905883],
    [0.0441176, -0.1517647, 0.2923529],
    [0.1776801, -0.5299824, 0.9878735],
    [-0.0304921, 0.1584886, -0.3271177],
]


def counted(*shape: int, start: int = 1) -> torch.Tensor:
    size = 1
    for n in shape:
        size *= n
    values = torch.tensor([(0.1 * n) * (-1) ** (n + 1) for n in range(start, start + size)])
    return values.reshape(shape)


@pytest.mark.parametrize(
    ("tensors", "shape", "reference"),
    [
        ({"r": counted(2, 2, 2)}, (4, 3), REFERENCE_11),
        ({"r": counted(2, 2, 2), "s": counted(3, 1, start=5)}, (3, 4), REFERENCE_15),
    ],
)
def test_outputs_that_older_peft_gave(tensors: Any, shape: tuple[int, int], reference: list[list[float]]) -> None:
    weight = torch.arange(12.0).reshape(shape) / 10
    base = nn.Linear(shape[1], shape[0], bias=False)
    with torch.no_grad():
        base.weight.copy_(weight)
    change = OFT.change(update("oft", tensors), own_of(base))
    with torch.no_grad():
        made = changed(base, change)(torch.eye(shape[1]))
    torch.testing.assert_close(made, torch.tensor(reference), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("coft", [False, True])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("make", [lambda: nn.Linear(12, 8), lambda: nn.Conv2d(4, 6, 3)])
def test_peft_014_is_boft_which_peft_loads(make: Any, share: bool, coft: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)
    base = make()
    one, wanted = old("s", 3, base, share, coft)
    boft = as_boft(one)
    assert boft.method == "boft"
    model: Any = get_peft_model(
        nn.Sequential(base), BOFTConfig(target_modules=["0"], boft_block_num=3, boft_block_size=0)
    )
    state = {f"base_model.model.0.boft_{role}": t.torch() for role, t in boft.tensors.items()}
    result: Any = set_peft_model_state_dict(model, state)
    assert not result.unexpected_keys
    model.merge_adapter()
    merged = model.base_model.model[0].get_base_layer().weight.detach()
    torch.testing.assert_close(merged, wanted, rtol=1e-5, atol=1e-5)
    if not coft and not share:
        assert boft.tensors["R"].read() == one.tensors["r"].read()
        assert boft.tensors["s"].read() == one.tensors["s"].read()


def test_what_has_no_successor_says_why() -> None:
    first, _ = old("", 2, nn.Linear(12, 8))
    with pytest.raises(CannotRepresent, match=r"(?s)mid.to_q.*before 0.14.*outputs.*--base-weights"):
        as_boft(first)
    shared, _ = old("s", 3, nn.Linear(12, 8), share=True)
    with pytest.raises(CannotRepresent, match=r"(?s)one block.*--arch"):
        as_boft(replace(shared, options={}))
    shortened, _ = old("s", 3, nn.Linear(12, 8), coft=True)
    with pytest.raises(CannotRepresent, match=r"(?s)COFT.*--arch"):
        as_boft(replace(shortened, options={"coft": True}))
    today = update("oft", {"R": torch.ones(3, 6)})
    with pytest.raises(CannotRepresent, match="no BOFT"):
        as_boft(today)


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({}, True),
        ({"peft_version": "0.18.0"}, True),
        ({"peft_version": "0.21.2@abc"}, True),
        ({"peft_version": "UNKNOWN"}, True),
        ({"peft_version": "1.0"}, True),
        ({"peft_version": "0.17.1"}, False),
        ({"peft_version": "0.17.1", "use_cayley_neumann": False}, True),
        ({"peft_version": "0.17.1", "num_cayley_neumann_terms": 2}, True),
    ],
)
def test_the_series_of_018(options: dict[str, Any], same: bool) -> None:
    one = update("oft", {"R": counted(3, 6)}, options=options)
    today = replace(one, options={name: value for name, value in options.items() if name != "peft_version"})
    error = OFT.error(one, today)
    assert error == 0.0 if same else error > 1e-3


def test_errors_are_those_of_the_rotations() -> None:
    one = update("oft", {"R": counted(3, 6) / 10}, options={"use_cayley_neumann": False})
    size = 1e-3
    off = update("oft", {"R": counted(3, 6) / 10 * (1 + size)}, options={"use_cayley_neumann": False})
    assert OFT.error(one, one) == 0.0
    assert OFT.error(one, off) == pytest.approx(size, rel=0.5)
    assert OFT.error(one, update("oft", {"R": counted(2, 6)})) == float("inf")
    assert OFT.error(one, update("oft", {"r": counted(3, 4, 4)})) == float("inf")
    alike = update("oft", {"R": counted(1, 6)})
    repeated = update("oft", {"R": counted(1, 6).repeat(3, 1)})
    assert OFT.error(alike, repeated) == pytest.approx(0.0, abs=1e-12)
    older, _ = old("s", 3, nn.Linear(12, 8))
    louder = replace(older, tensors={**older.tensors, "s": older.tensors["s"].mapped("F64", 1.1)})
    assert OFT.error(older, older) == 0.0
    assert OFT.error(older, louder) > 0.1


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"R": torch.ones(3, 5)}, r"\[3, 5\].*no size has so many"),
        ({"R": torch.ones(3)}, "upper entries"),
        ({"R": torch.ones(0, 6)}, "upper entries"),
        ({"r": torch.ones(3, 4, 5)}, "square blocks"),
        ({"r": torch.ones(0, 4, 4)}, "square blocks"),
        ({"r": torch.ones(3, 4, 4), "s": torch.ones(3, 4)}, "one factor an output"),
        ({"s": torch.ones(3, 1)}, "r is missing"),
        ({"other": torch.ones(3, 1)}, "R is missing"),
    ],
)
def test_tensors_that_are_no_oft(tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(BrokenAdapter, match=message):
        OFT.check(update("oft", tensors))


@pytest.mark.parametrize(
    ("tensors", "shape", "fits"),
    [
        ({"R": (3, 6)}, (8, 12), True),
        ({"R": (3, 6)}, (8, 3, 2, 2), True),
        ({"R": (3, 6)}, (12, 8), False),
        ({"R": (1, 6)}, (12, 8), True),
        ({"R": (1, 6)}, (12, 6), False),
        ({"R": (3, 6)}, (12,), False),
        ({"r": (3, 4, 4), "s": (8, 1)}, (8, 12), True),
        ({"r": (3, 4, 4), "s": (7, 1)}, (8, 12), False),
        ({"r": (3, 4, 4)}, (12, 8), True),
        ({"r": (3, 4, 4)}, (10, 8), True),
        ({"r": (3, 4, 4)}, (8, 12), False),
        ({"r": (1, 4, 4)}, (9, 8), True),
        ({"r": (1, 4, 4)}, (3, 8), False),
    ],
)
def test_what_it_fits(tensors: dict[str, tuple[int, ...]], shape: tuple[int, ...], fits: bool) -> None:
    one = update("oft", {role: torch.ones(size) for role, size in tensors.items()})
    assert OFT.fits(one, shape) is fits


def test_another_base_is_told_by_its_shape() -> None:
    one = update("oft", {"R": torch.ones(3, 6)})
    with pytest.raises(BrokenAdapter, match=r"(?s)x.R.*\[8, 13\].*another model"):
        OFT.change(one, own_of(nn.Linear(13, 8)))
    for act in (OFT.change, OFT.delta):
        with pytest.raises(CannotRepresent, match=r"(?s)mid.to_q.*--base-weights"):
            act(one)


def test_rows_are_turned_alike() -> None:
    base = nn.Linear(12, 8)
    model = wrapped(base, OFTConfig(oft_block_size=4))
    one = update_of(model, "oft", "oft_")
    pieces = [(5, 8), (1, 2)]
    assert OFT.take_rows(one, pieces) == dict(one.tensors)
    second, wanted = old("s", 3, base)
    part = replace(second, tensors=OFT.take_rows(second, pieces))
    own = own_of(base)
    cut = torch.cat([own.weight[5:8], own.weight[1:2]])
    change = OFT.change(part, own._replace(weight=cut)).weight
    assert change is not None
    torch.testing.assert_close(cut + change, torch.cat([wanted[5:8], wanted[1:2]]), rtol=1e-5, atol=1e-6)
    with pytest.raises(CannotRepresent, match="fused"):
        OFT.take_rows(old("", 2, base)[0], pieces)


def test_nothing() -> None:
    zero = update("oft", {"R": torch.zeros(3, 6)})
    assert OFT.is_nothing(zero)
    assert not OFT.is_nothing(update("oft", {"R": torch.ones(3, 6)}))
    symmetric = torch.ones(3, 4, 4)
    assert OFT.is_nothing(update("oft", {"r": symmetric}))
    assert OFT.is_nothing(update("oft", {"r": symmetric, "s": torch.ones(8, 1)}))
    assert not OFT.is_nothing(update("oft", {"r": symmetric, "s": torch.full((8, 1), 2.0)}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_small_floats(dtype: torch.dtype) -> None:
    base = nn.Linear(12, 8)
    rough = counted(3, 6).to(dtype)
    one, same = update("oft", {"R": rough}), update("oft", {"R": rough.float()})
    assert OFT.error(one, same) == 0.0
    ours, wanted = (OFT.change(u, own_of(base)).weight for u in (one, same))
    assert ours is not None
    assert wanted is not None
    torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_cayley_neumann": "perhaps"}, "use_cayley_neumann is true or false"),
        ({"num_cayley_neumann_terms": 0}, "whole number above zero"),
        ({"num_cayley_neumann_terms": "2.5"}, "whole number above zero"),
        ({"coft": True, "eps": "much"}, "eps is a number"),
    ],
)
def test_settings_that_mean_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CannotRepresent, match=message):
        OFT.change(update("oft", {"R": torch.ones(3, 6)}, options=options), own_of(nn.Linear(12, 8)))


def test_settings_as_text() -> None:
    one = update("oft", {"R": counted(3, 6)}, options={"num_cayley_neumann_terms": "3", "use_cayley_neumann": "True"})
    two = replace(one, options={"num_cayley_neumann_terms": 3})
    assert OFT.error(one, two) == 0.0
