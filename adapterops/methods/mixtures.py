"""Methods whose effect depends on what the model is given: mixtures that a router weighs, and networks beside the model.

- `lily`: `A` (r, in_features), `B` (num_B · r, out_features), `router` (num_B, r).  The hidden A·x decides, averaged over all
  tokens of the batch, how the num_B blocks of B are mixed.  Modules of one kind share B, and neighbours A (`stride_A`): peft
  writes the same numbers for each
- `poly`: `lora_A` (splits, skills, in_features / splits, r), `lora_B` (splits, skills, r, out_features / splits),
  `router.module_logits` (tasks, splits · skills).  Which task, the call says (`task_ids`)
- `xlora`, on the whole model (module ""): `classifier.layers.i.weight`, `classifier.layers.i.bias` of a classifier of the
  last hidden state, which weighs LoRAs that have folders of their own
- `shadow`, on a block: `down.weight` (r, d), `up.weight` (d, r) and two networks `update_gate`, `update_transform` of `0`
  (h, d) and `2` (d, h), weight and bias; and what the file holds once for all blocks: `backbone.…`, a small model of its
  own, `projection.…` (d, its width) where that is another, `head.…`

Sources: Lily https://arxiv.org/abs/2407.09946, peft `tuners/lily/layer.py`; Polytropon https://arxiv.org/abs/2202.13914, peft
`tuners/poly/layer.py`, `tuners/poly/router.py`; X-LoRA https://arxiv.org/abs/2402.07148, peft `tuners/xlora/classifier.py`;
peft `tuners/shadow/layers.py`, `tuners/shadow/model.py`.
"""

from __future__ import annotations

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter
from adapterops.methods.base import need
from adapterops.methods.no_delta import NoDelta
from adapterops.storage.tensor import LazyTensor, is_zero


class Lily(NoDelta):
    """Lily, on linear modules.  peft has no fewer than two blocks of B."""

    name = "lily"
    title = "Lily (mixed experts across layers)"
    source = "https://arxiv.org/abs/2407.09946"
    why = "a router mixes its matrices by what the module is given"

    def check(self, update: Update) -> None:
        need(update, "A", "B", "router")
        a, b, router = (update.tensors[role] for role in ("A", "B", "router"))
        for tensor in (a, b, router):
            if len(tensor.shape) != 2 or not tensor.numel:
                raise BrokenAdapter(
                    f"{tensor.where}: shape {list(tensor.shape)} is no factor of Lily, which has two axes"
                )
        rank, count = a.shape[0], router.shape[0]
        if router.shape[1] != rank or b.shape[0] != count * rank or count < 2:
            raise BrokenAdapter(
                f"{router.where}: shape {list(router.shape)}, {a.key!r} {list(a.shape)}, {b.key!r} {list(b.shape)}; Lily's are "
                "(num_B, r), (r, in_features), (num_B · r, out_features), num_B at least 2"
            )

    def rank(self, update: Update) -> int:
        return update.tensors["A"].shape[0]

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        a, b = update.tensors.get("A"), update.tensors.get("B")
        if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2:
            return True  # `check` says it better than a shape could
        return shape == (b.shape[1], a.shape[1])

    def is_nothing(self, update: Update) -> bool:
        return is_zero(update.tensors["B"])


class Poly(NoDelta):
    """Polytropon and multi-head routing, on linear modules."""

    name = "poly"
    title = "Poly (LoRAs mixed by task)"
    source = "https://arxiv.org/abs/2202.13914"
    why = "a router mixes its LoRAs by the task that the call names"

    def check(self, update: Update) -> None:
        need(update, "lora_A", "lora_B", "router.module_logits")
        a, b, logits = (update.tensors[role] for role in ("lora_A", "lora_B", "router.module_logits"))
        for tensor in (a, b):
            if len(tensor.shape) != 4 or not tensor.numel:
                raise BrokenAdapter(
                    f"{tensor.where}: shape {list(tensor.shape)} is no factor of Poly, which has four axes"
                )
        if (*a.shape[:2], a.shape[3]) != b.shape[:3]:
            raise BrokenAdapter(
                f"{b.where}: shape {list(b.shape)} has splits, skills and rank {list(b.shape[:3])}, but {a.key!r} "
                f"{list(a.shape)} has {[*a.shape[:2], a.shape[3]]}; they are not halves of one update",
                fault="ranks",
            )
        if len(logits.shape) != 2 or logits.shape[1] != a.shape[0] * a.shape[1] or not logits.numel:
            raise BrokenAdapter(
                f"{logits.where}: shape {list(logits.shape)}; with {a.key!r} {list(a.shape)} it has {a.shape[0] * a.shape[1]} "
                "columns, one for each split and skill"
            )

    def rank(self, update: Update) -> int:
        return update.tensors["lora_A"].shape[3]

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        a, b = update.tensors.get("lora_A"), update.tensors.get("lora_B")
        if a is None or b is None or len(a.shape) != 4 or len(b.shape) != 4:
            return True  # `check` says it better than a shape could
        return shape == (b.shape[0] * b.shape[3], a.shape[0] * a.shape[2])

    def is_nothing(self, update: Update) -> bool:
        return is_zero(update.tensors["lora_B"])


class Xlora(NoDelta):
    """X-LoRA's classifier."""

    name = "xlora"
    title = "X-LoRA (LoRAs weighed by a classifier)"
    source = "https://arxiv.org/abs/2402.07148"
    why = "a classifier weighs its LoRAs by what the model is given"

    def check(self, update: Update) -> None:
        """Every layer is there, and each takes what the one before gives."""
        layers = self.layers(update)
        if not layers:
            raise BrokenAdapter(f"{update.name}: X-LoRA without any layer of its classifier")
        first, *_ = present = next(iter(layers.values()))
        if 0 not in layers:
            raise BrokenAdapter(
                f"{first.where}: the first layer of X-LoRA's classifier, layers.0, is missing from the file; peft 0.21 leaves "
                "out every layer whose number is also an expert's name, and experts are named 0, 1, 2 …, so such a file "
                "holds no whole classifier: save it again with another version of peft",
                fault="missing-half",
            )
        width = None
        for number, present in sorted(layers.items()):
            weight, bias = present
            if len(weight.shape) != 2 or bias.shape != weight.shape[:1] or not weight.numel:
                raise BrokenAdapter(
                    f"{weight.where}: shape {list(weight.shape)}, its bias {list(bias.shape)}; a layer of a classifier is "
                    "(out, in) and (out,)"
                )
            if width not in (None, weight.shape[1]):
                raise BrokenAdapter(
                    f"{weight.where}: shape {list(weight.shape)} takes {weight.shape[1]} numbers, but the layer before "
                    f"layers.{number} gives {width}; is a layer missing?"
                )
            width = weight.shape[0]

    def layers(self, update: Update) -> dict[int, tuple[LazyTensor, LazyTensor]]:
        """Weight and bias of each layer, by its number.  Raises `BrokenAdapter` where one of the two is missing."""
        found = {}
        for role, tensor in update.tensors.items():
            number = role.removeprefix("classifier.layers.").partition(".")[0]
            if not role.startswith("classifier.layers.") or not number.isdigit():
                raise BrokenAdapter(f"{tensor.where}: no part of X-LoRA's classifier (layers.i.weight, layers.i.bias)")
            weight, bias = f"classifier.layers.{number}.weight", f"classifier.layers.{number}.bias"
            need(update, weight, bias)
            found[int(number)] = (update.tensors[weight], update.tensors[bias])
        return found


class Shadow(NoDelta):
    """ShadowPEFT: a small model that runs beside the blocks and is fed into them."""

    name = "shadow"
    title = "ShadowPEFT (a small model beside the blocks)"
    blocks = True
    source = "peft tuners/shadow/layers.py"
    why = "a second model runs beside the blocks, and what it adds depends on what they are given"

    def check(self, update: Update) -> None:
        networks = [f"{name}.{at}" for name in ("update_gate", "update_transform") for at in ("0", "2")]
        need(update, "down.weight", "up.weight", *(f"{n}.{part}" for n in networks for part in ("weight", "bias")))
        down, up = update.tensors["down.weight"], update.tensors["up.weight"]
        if len(down.shape) != 2 or not down.numel or up.shape != down.shape[::-1]:
            raise BrokenAdapter(
                f"{up.where}: shape {list(up.shape)}, {down.key!r} {list(down.shape)}; a shadow's are (hidden_size, r) and "
                "(r, hidden_size)"
            )
        for name in ("update_gate", "update_transform"):
            first, second = update.tensors[f"{name}.0.weight"], update.tensors[f"{name}.2.weight"]
            if len(first.shape) != 2 or first.shape[1] != down.shape[1] or second.shape != first.shape[::-1]:
                raise BrokenAdapter(
                    f"{second.where}: shape {list(second.shape)}, {first.key!r} {list(first.shape)}; with {down.key!r} they "
                    f"go from {down.shape[1]} numbers to some and back"
                )
            for weight, at in ((first, "0"), (second, "2")):
                bias = update.tensors[f"{name}.{at}.bias"]
                if bias.shape != weight.shape[:1]:
                    raise BrokenAdapter(
                        f"{bias.where}: shape {list(bias.shape)}; {weight.key!r} gives {weight.shape[0]} numbers"
                    )
        if not any(role.startswith("backbone.") for role in update.tensors):
            raise BrokenAdapter(
                f"{down.where}: the shadow model that it belongs to (shadow_backbone) is missing from the file",
                fault="missing-half",
            )

    def rank(self, update: Update) -> int | None:
        down = update.tensors.get("down.weight")
        return None if down is None else down.shape[0]

    def is_nothing(self, update: Update) -> bool:
        return False
