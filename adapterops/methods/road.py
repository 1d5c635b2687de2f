"""RoAd: the outputs of a module turned and stretched in pairs.

y' = M·y, so W' = M·W and b' = M·b.  Of every `group_size` outputs in a row, the first half is paired with the second:

    y'_1 = f_1·y_1 − g_1·y_2,    y'_2 = g_2·y_1 + f_2·y_2,    f = α·cos θ,  g = α·sin θ

- `theta`, `alphas`: angles θ and factors α.  With `options["variant"]`
  - "road_1": (out/2,), one for both of a pair
  - "road_2": (out,), one an output
  - "road_4": (2·out,): of every 2·group_size, the first half makes f, the second g
- `options["group_size"]`, which no tensor tells and which changes the outputs; the variant follows from the number of
  outputs where that is known

Sources: https://arxiv.org/abs/2409.00119; peft `tuners/road/layer.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Change, Own, need, setting
from adapterops.methods.orthogonal import OfTheWeight, count, values

if TYPE_CHECKING:
    import torch

VARIANTS = {"road_1": 0.5, "road_2": 1.0, "road_4": 2.0}
"""The angles of each variant, per output."""


class Road(OfTheWeight):
    """RoAd.  peft has it for Linear alone."""

    name = "road"
    title = "RoAd (rotations of pairs of outputs)"
    formula = "W' = M · W, b' = M · b; M of blocks α·[[cos θ, −sin θ], [sin θ, cos θ]] on pairs of outputs"
    source = "https://arxiv.org/abs/2409.00119"
    compared = frozenset({"shape"})

    def check(self, update: Update) -> None:
        need(update, "theta", "alphas")
        theta, alpha = update.tensors["theta"], update.tensors["alphas"]
        if len(theta.shape) != 1 or not theta.numel or theta.shape != alpha.shape:
            raise BrokenAdapter(
                f"{theta.where}: shape {list(theta.shape)}, but {alpha.key!r} is {list(alpha.shape)}; RoAd has as many "
                "angles as factors, in a row"
            )
        outputs = self.outputs(update)
        size = update.options.get("group_size")
        if size is None:
            return
        whole = count(update, "group_size", size)
        if whole % 2:
            raise CannotRepresent(f"{update.name}: group_size is even, not {whole}")
        if outputs is not None and outputs % whole:
            raise BrokenAdapter(
                f"{theta.where}: {theta.numel} angles of {variant_of(update)} are {outputs} outputs, which groups of "
                f"{whole} do not divide; another group_size or variant was meant"
            )

    def outputs(self, update: Update) -> int | None:
        """The outputs of the module; None where the variant is unknown."""
        variant = variant_of(update)
        return None if variant is None else int(update.tensors["theta"].numel / VARIANTS[variant])

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        theta = update.tensors.get("theta")
        if theta is None or len(shape) != 2:
            return theta is None
        known = variant_of(update)
        named = VARIANTS if known is None else {known: VARIANTS[known]}
        return any(shape[0] * ratio == theta.numel for ratio in named.values())

    def is_nothing(self, update: Update) -> bool:
        return bool((update.tensors["theta"].numpy() == 0).all() and (update.tensors["alphas"].numpy() == 1).all())

    def change(self, update: Update, own: Own | None = None) -> Change:
        own = self.own(update, own)
        out = len(own.weight)
        size = count(update, "group_size", setting(update, "group_size"))
        if size % 2 or out % size:
            raise BrokenAdapter(
                f"{update.tensors['theta'].where}: {update.name} has {out} outputs, which groups of {size} do not halve "
                "and divide; another group_size was meant"
            )
        first, second = self._columns(update, out, size)

        def turn(own: torch.Tensor) -> torch.Tensor:
            """(M − I) · (out, m)."""
            y = own.float().reshape(-1, 2, size // 2, own.shape[-1])
            f, g = (c.float().reshape(-1, 2, size // 2, 1) for c in (first - 1, second))
            made = f * y
            made[:, 0] -= g[:, 0] * y[:, 1]
            made[:, 1] += g[:, 1] * y[:, 0]
            return made.reshape(own.shape)

        bias = None if own.bias is None else turn(own.bias.reshape(-1, 1)).reshape(own.bias.shape)
        return Change(turn(own.weight), bias)

    def _columns(self, update: Update, out: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """f and g (out,) in float64."""
        theta, alpha = values(update.tensors["theta"]), values(update.tensors["alphas"])
        if len(theta) * 2 == out:
            theta, alpha = (v.reshape(-1, size // 2).repeat_interleave(2, dim=0).reshape(-1) for v in (theta, alpha))
        elif len(theta) == 2 * out:
            (t1, t2), (a1, a2) = (v.reshape(-1, 2, size).unbind(1) for v in (theta, alpha))
            return (a1 * t1.cos()).reshape(-1), (a2 * t2.sin()).reshape(-1)
        return alpha * theta.cos(), alpha * theta.sin()


def variant_of(update: Update) -> str | None:
    """The variant: as said, or as many angles as the module's outputs ask for; None where neither is known.

    Raises `CannotRepresent` for a name that peft has not.
    """
    said, shape = update.options.get("variant"), update.options.get("shape")
    if said is not None:
        if said not in VARIANTS:
            raise CannotRepresent(f"{update.name}: variant {said!r} of RoAd is none of {', '.join(VARIANTS)}")
        return str(said)
    ratio = update.tensors["theta"].numel / shape[0] if shape else None
    return next((name for name, known in VARIANTS.items() if known == ratio), None)
