"""What a merge is asked to do, apart from its sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from adapterops.merging.registry import MergeMethod, Space


@dataclass(frozen=True, slots=True)
class Choice:
    """How one module is merged: a method with every parameter settled, and the rank asked for (None: the inputs')."""

    method: MergeMethod
    space: Space
    parameters: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """The parameters as the method's function takes them."""
        out = dict(self.parameters)
        if out.get("sign_election") == "auto":
            out["sign_election"] = "peft" if self.space is Space.FACTORS else "weighted"
        return out


Choose = Callable[[str, str], Choice]
"""(component, module) to how it is merged."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How the work is done.

    - `seed` of all random masks;
    - `exact_svd`: full decompositions of dense deltas, not iterated ones; `tolerance`: what an iterated one may lose,
      relative to the error of the best approximation of that rank;
    - `split`: where the singular values go: √ on both sides ("even"), or all into one factor ("b", as PEFT; "a");
    - `saved`: what to do where adapters hold different saved modules: "refuse", "mean" (weighted), "first";
    - `allow_disjoint`: merge adapters that share no module;
    - `dtype` of the output (a name of `storage.dtypes.FLOATS`); None: the widest of the inputs;
    - `device`: "auto", "cpu", "cuda", "cuda:1", "mps"; `workers`: modules at a time (0: as many as the machine allows).
    """

    seed: int = 0
    exact_svd: bool = False
    tolerance: float = 1e-5
    split: str = "even"
    saved: str = "refuse"
    allow_disjoint: bool = False
    dtype: str | None = None
    device: str = "auto"
    workers: int = 0


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """What became of one module.

    `kept` is the share of ‖ΔW‖² of the merged delta that the output's rank holds, `error` ‖ΔW − output‖ / ‖ΔW‖, with the
    rounding to the output's dtype; both None where nothing was approximated (factors merged as factors, vectors).  `error`
    alone is None for `tsv` of whole matrices: `kept` is the share of the weighted deltas' energy that its components have.
    `excess` estimates by how much an iterated decomposition misses the best one of its rank, relative to that one's error.
    """

    component: str
    module: str
    method: str
    rank: int | None
    kept: float | None = None
    error: float | None = None
    excess: float = 0.0
    cancels: bool = False
    """Whether the terms cancel nearly wholly, so that little but their rounding is left."""
    exact_rank: int | None = None
    """The rank that would hold it whole: for weighted sums of low-rank deltas, what `cat` has; for methods on singular vectors,
    that of what they make at full rank, which `kept` and `error` are relative to."""
    empty: bool = False
    """Whether the method makes nothing of terms that are not nothing."""
