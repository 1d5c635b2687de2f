"""OFT and BOFT as LyCORIS has them: the outputs of a module turned, and multiplied.

Q = M − Mᵀ of each block M (b, b); r = (I + Q)(I − Q)⁻¹; W is (out, in, *kernel); the bias stays.

- `blocks` (k, b, b), k·b = out, "diag-oft": W' = diag(r)ᵀ · W
- `blocks` (m, k, b, b), "boft": W' = R_m ⋯ R_1 · W, R_i = P_iᵀ · diag(r_i) · P_i, where P_i puts, of every b·2^(i−1) outputs in
  a row, each of the first half beside its counterpart in the second
- `rescale` (out, 1 …): factors on the outputs, where LyCORIS was told `rescaled`
- `constraint` (one number c, the `alpha` of such files, which is no scale): where c > 0, all Q together are shortened to the
  norm c·out

peft's methods of these names turn a module's inputs, but for its OFT of before 0.14.

Sources: https://arxiv.org/abs/2306.07280, https://arxiv.org/abs/2311.06243; KohakuBlueleaf/LyCORIS 4.1.3
`lycoris/modules/diag_oft.py`, `boft.py`, `lycoris/functional/diag_oft.py`, `boft.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Change, Own, array_error, need, worst
from adapterops.methods.orthogonal import OfTheWeight, blocks_error, cayley, minus_eye, turned, values
from adapterops.storage.tensor import LazyTensor

if TYPE_CHECKING:
    import torch


class LycorisOft(OfTheWeight):
    """LyCORIS' diag-OFT and BOFT.  It has them for Linear and convolutions."""

    name = "lycoris_oft"
    title = "OFT and BOFT of LyCORIS (rotation of the outputs)"
    formula = "W' = diag(s) · diag(r)ᵀ · W, or diag(s) · R_m ⋯ R_1 · W"
    source = "KohakuBlueleaf/LyCORIS lycoris/modules/diag_oft.py, boft.py"
    alpha_role = "constraint"

    def check(self, update: Update) -> None:
        need(update, "blocks")
        blocks, s, limit = (update.tensors.get(role) for role in ("blocks", "rescale", "constraint"))
        stray = next((t for role, t in update.tensors.items() if role not in ("blocks", "rescale", "constraint")), None)
        if stray is not None:
            raise BrokenAdapter(f"{stray.where}: is no part of LyCORIS' OFT or BOFT ({update.name})")
        assert blocks is not None
        if len(blocks.shape) not in (3, 4) or blocks.shape[-1] != blocks.shape[-2] or 0 in blocks.shape:
            raise BrokenAdapter(
                f"{blocks.where}: shape {list(blocks.shape)}; LyCORIS has square blocks [blocks, size, size] for OFT, and "
                "[stages, blocks, size, size] for BOFT"
            )
        if len(blocks.shape) == 4:
            stages, count, size, _ = blocks.shape
            if size % 2 or count % 2 ** (stages - 1):
                raise BrokenAdapter(
                    f"{blocks.where}: shape {list(blocks.shape)}; {stages} stages of BOFT need blocks of even size, and their "
                    f"number divisible by {2 ** (stages - 1)}"
                )
        if s is not None and (s.numel != _outputs(blocks) or s.shape[:1] != (s.numel,)):
            raise BrokenAdapter(
                f"{s.where}: shape {list(s.shape)}; one factor an output is [{_outputs(blocks)}, 1 …] beside {blocks.key!r} "
                f"{list(blocks.shape)}"
            )
        if limit is not None and limit.numel != 1:
            raise BrokenAdapter(
                f"{limit.where}: shape {list(limit.shape)}; the constraint of LyCORIS' OFT is one number",
                fault="alpha-shape",
            )
        if limit is not None and not isfinite(limit.item()):
            raise BrokenAdapter(
                f"{limit.where}: the constraint is {limit.item()}; the file is damaged", fault="not-finite"
            )

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        blocks = update.tensors.get("blocks")
        if blocks is None or len(blocks.shape) not in (3, 4):
            return True  # `check` says it better than a shape could
        return len(shape) >= 2 and _outputs(blocks) == shape[0]

    def take_rows(self, update: Update, pieces: Sequence[tuple[int, int]]) -> dict[str, LazyTensor]:
        blocks, size = update.tensors["blocks"], update.tensors["blocks"].shape[-1]
        whole = len(blocks.shape) == 3 and all(n % size == 0 for piece in pieces for n in piece)
        if not whole or _limit(update) > 0:
            why = (
                "its blocks do not end where the parts do"
                if _limit(update) <= 0
                else "its constraint is on all blocks together"
            )
            raise CannotRepresent(
                f"{update.name}: {self.title} is not split into the parts of a fused projection, since {why} (tensor "
                f"{blocks.key!r} {list(blocks.shape)}); a target that keeps the projection whole holds it (--to kohya, "
                "--to comfy)"
            )
        out = {**update.tensors, "blocks": blocks.rows([(start // size, stop // size) for start, stop in pieces])}
        if "rescale" in update.tensors:
            out["rescale"] = update.tensors["rescale"].rows(pieces)
        return out

    def is_nothing(self, update: Update) -> bool:
        m, s = update.tensors["blocks"].numpy(), update.tensors.get("rescale")
        return bool((m == m.swapaxes(-1, -2)).all()) and (s is None or bool((s.numpy() == 1).all()))

    def skews(self, update: Update) -> torch.Tensor:
        """Q (…, b, b) in float64."""
        blocks = values(update.tensors["blocks"])
        q, limit = blocks - blocks.mT, _limit(update) * _outputs(update.tensors["blocks"])
        if limit > 0:
            norm = float(q.norm()) + 1e-8
            q = q * (limit / norm) if norm > limit else q
        return q

    def rotations(self, update: Update) -> torch.Tensor:
        """What the rows of W are multiplied by, block by block: rᵀ of OFT, r of BOFT, (…, b, b) in float64."""
        q = self.skews(update)
        return cayley(q if q.dim() == 3 else -q)

    def change(self, update: Update, own: Own | None = None) -> Change:
        import torch

        own = self.own(update, own)
        shape = tuple(own.weight.shape)
        weight = own.weight.float().reshape(shape[0], -1)
        extra = minus_eye(self.rotations(update))
        if extra.dim() == 3:
            made = turned(weight.T, extra).T
        else:
            made = torch.zeros_like(weight)
            for stage, blocks in enumerate(extra):
                order = mixed(shape[0], blocks.shape[-1], stage)
                moved = torch.zeros_like(weight)
                moved[order] = turned((weight + made)[order].T, blocks).T
                made += moved
        if "rescale" in update.tensors:
            s = values(update.tensors["rescale"]).reshape(-1, 1)
            made = s.float() * made + (s - 1).float() * weight
        return Change(made.reshape(shape))

    def error(self, update: Update, other: Update) -> float:
        """How far the rotations (and factors minus one) are from each other."""
        if update.tensors.keys() - {"constraint"} != other.tensors.keys() - {"constraint"}:
            return float("inf")
        one, two = (self.rotations(u) for u in (update, other))
        if one.shape != two.shape:
            return float("inf")
        errors = (
            [blocks_error(a, b) for a, b in zip(one, two, strict=True)] if one.dim() == 4 else [blocks_error(one, two)]
        )
        if "rescale" in update.tensors:
            s, s2 = (u.tensors["rescale"].numpy().astype("f8").reshape(-1) - 1 for u in (update, other))
            errors.append(array_error(s, s2) if s.shape == s2.shape else float("inf"))
        return worst(errors)


def mixed(size: int, block: int, stage: int) -> torch.Tensor:
    """P of a stage of BOFT (from 0), as the output that it puts at each place: (size,)."""
    import torch

    step = 2**stage * block // 2
    return torch.arange(size).reshape(-1, 2, step).transpose(1, 2).reshape(-1)


def _outputs(blocks: LazyTensor) -> int:
    return blocks.shape[-3] * blocks.shape[-1]


def _limit(update: Update) -> float:
    """c; 0 where there is none."""
    limit = update.tensors.get("constraint")
    return 0.0 if limit is None else float(limit.item())
