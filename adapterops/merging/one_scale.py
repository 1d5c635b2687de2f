"""The scales that `cat` keeps, for targets that know one scale for all modules.

Stacked factors keep their bytes under a scale of their own, module by module.  That scale is our choice and not the adapters', so
where the target's writer refuses it the factors take it up, those of as few modules as can be.
"""

from __future__ import annotations

from collections.abc import Callable
from math import frexp, isclose

from adapterops.adapter import Adapter
from adapterops.errors import CannotRepresent
from adapterops.methods import METHODS
from adapterops.operations.uniform import uniform


def fitting(adapter: Adapter, write: Callable[[Adapter], object]) -> tuple[Adapter, tuple[str, ...]]:
    """The adapter as `write` takes it, at one scale where it must be, and what the user should know of that.

    Raises what `write` raises of an adapter for which one scale is no remedy.
    """
    try:
        write(adapter)
    except CannotRepresent:
        if not differ(adapter):
            raise
        made = uniform(adapter, "one scale for all modules", rslora=False)
        even = adapter.with_updates(made.updates)
        try:
            write(even)
        except CannotRepresent:
            pass
        else:
            return even, _notes(adapter, made.scale)
        raise
    return adapter, ()


def _scales(adapter: Adapter) -> list[float]:
    found = [METHODS[update.method].scale(update) for update in adapter if update.method == "lora"]
    return [scale for scale in found if scale is not None]


def differ(adapter: Adapter) -> bool:
    """Whether its LoRAs have several scales."""
    scales = _scales(adapter)
    return any(not isclose(scale, scales[0], rel_tol=1e-12) for scale in scales)


def _notes(adapter: Adapter, common: float) -> tuple[str, ...]:
    factors = [scale / common for scale in _scales(adapter)]
    rounded = sum(1 for factor in factors if not isclose(abs(frexp(factor)[0]), 0.5, rel_tol=1e-12))
    if not rounded:
        return ()
    dtypes = sorted({update.tensors["B"].dtype for update in adapter if update.method == "lora"})
    return (
        f"cat keeps factors under the scale that they had, and the target has one scale for all modules: {common:g}; B takes up "
        f"what is left in {rounded} modules, rounded once to {' and '.join(dtypes)}",
    )
