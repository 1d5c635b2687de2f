"""Whether one tensor is another, rounded once: every element of 16-bit types, held against torch's rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapterops.storage.rounding import beyond_rounding
from adapterops.storage.tensor import TORCH_NAMES, LazyTensor, MemorySource

SMALL, FLOATS = ("F16", "BF16"), ("F16", "BF16", "F32", "F64")


def lazy(values: torch.Tensor) -> LazyTensor:
    dtype = next(name for name, torch_name in TORCH_NAMES.items() if getattr(torch, torch_name) is values.dtype)
    data = values.contiguous().view(torch.uint8).numpy().tobytes()
    return LazyTensor("x", dtype, tuple(values.shape), MemorySource(data), 0)


def every(dtype: str) -> torch.Tensor:
    """All finite numbers of a 16-bit type."""
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(getattr(torch, TORCH_NAMES[dtype]))
    return values[values.isfinite()]


def once(values: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """Float64 values in another type, rounded once; torch rounds twice, to float32 first."""
    _, exponent = torch.frexp(values)
    spacing = torch.ldexp(torch.full_like(values, torch.finfo(kind).eps), exponent - 1)
    smallest = torch.finfo(kind).smallest_normal * torch.finfo(kind).eps
    spacing = spacing.clamp(min=smallest)
    return ((values / spacing).round() * spacing).to(kind)


@pytest.mark.parametrize("factor", [1.0, 0.5, 0.3, -1.7])
@pytest.mark.parametrize("after", FLOATS)
@pytest.mark.parametrize("before", SMALL)
def test_every_number_rounded_by_torch_is_one(before: str, after: str, factor: float) -> None:
    source = every(before)
    written = (source.double() * factor).to(getattr(torch, TORCH_NAMES[after]))
    held = written.isfinite()
    assert beyond_rounding(lazy(source[held]), lazy(written[held]), factor) is None
    for element in (~held).nonzero().flatten()[:3].tolist():  # what is too large is no rounding
        assert beyond_rounding(lazy(source[element : element + 1]), lazy(written[element : element + 1]), factor) == 0


@pytest.mark.parametrize("after", SMALL)
@pytest.mark.parametrize("before", FLOATS)
def test_the_next_number_is_none(before: str, after: str) -> None:
    kind = getattr(torch, TORCH_NAMES[after])
    source = torch.randn(70000, dtype=torch.float64).to(getattr(torch, TORCH_NAMES[before]))
    written = once(source.double() * 0.7, kind)
    assert beyond_rounding(lazy(source), lazy(written), 0.7) is None
    for element in (0, 65535, 65536, 69999):
        for step in (-1, 1):
            other = written.clone()
            other.view(torch.int16)[element] += step
            as_near = abs(float(other[element]) - float(source[element]) * 0.7) <= abs(
                float(written[element]) - float(source[element]) * 0.7
            )
            assert (beyond_rounding(lazy(source), lazy(other), 0.7) == element) is not as_near


@given(st.integers(0, (1 << 16) - 1), st.integers(0, (1 << 16) - 1))
def test_numbers_that_are_none_are_no_roundings(one: int, two: int) -> None:
    """Whatever the bits: what is called a rounding is one by the numbers themselves."""
    source = torch.tensor([one], dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    written = torch.tensor([two], dtype=torch.int32).to(torch.int16).view(torch.float16)
    if beyond_rounding(lazy(source), lazy(written), 1.0) is None:
        assert source.isfinite().all()
        assert written.isfinite().all()
        nearest = once(source.double(), torch.float16)
        assert abs(float(written) - float(source)) == abs(float(nearest) - float(source))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["source", "written", "both"])
def test_no_nan_and_no_infinity_is_a_rounding(bad: float, where: str) -> None:
    source, written = torch.ones(5, dtype=torch.bfloat16), torch.ones(5, dtype=torch.float16)
    for name, values in {"source": source, "written": written}.items():
        if where in (name, "both"):
            values[3] = bad
    assert beyond_rounding(lazy(source), lazy(written), 1.0) == 3
    assert beyond_rounding(lazy(written), lazy(source), 1.0) == 3


def test_of_two_that_are_as_near_either_is_one() -> None:
    """A tie may be broken either way."""
    source = torch.tensor([1 + 2.0**-8], dtype=torch.float32)
    for written in (1.0, 1 + 2.0**-7):
        assert beyond_rounding(lazy(source), lazy(torch.tensor([written], dtype=torch.bfloat16)), 1.0) is None
    assert beyond_rounding(lazy(source), lazy(torch.tensor([1 - 2.0**-8], dtype=torch.bfloat16)), 1.0) == 0
    ties = torch.tensor([1 + 2.0**-7], dtype=torch.bfloat16)
    halves = torch.tensor([0.5 + 2.0**-8], dtype=torch.bfloat16)
    assert beyond_rounding(lazy(ties), lazy(halves), 0.5) is None


def test_torch_rounds_twice() -> None:
    """What is a little over the middle of two float16 becomes the middle in float32, and then the lower one."""
    source = torch.tensor([1 + 2.0**-11 + 2.0**-40], dtype=torch.float64)
    assert beyond_rounding(lazy(source), lazy(source.to(torch.float16)), 1.0) == 0
    assert beyond_rounding(lazy(source), lazy(once(source, torch.float16)), 1.0) is None
