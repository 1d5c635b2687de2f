"""Which of an adapter's modules LoftQ is for, and the base's weights of those."""

from __future__ import annotations

from dataclasses import dataclass

from adapterops.adapter import Update
from adapterops.architectures import ModuleSpec
from adapterops.errors import UsageError
from adapterops.methods import METHODS
from adapterops.operations.own_parameters import OwnParameters
from adapterops.storage import dtypes
from adapterops.storage.tensor import LazyTensor

_HEADS = ("lm_head", "embed_out")
"""The last names of output embeddings, which transformers does not quantise (`get_keys_to_not_convert`)."""
_BESIDE = ("saved", "trainable_tokens", "bundled")
"""Methods whose updates are whole parameters, which are kept."""
_HARMLESS = ("kind", "dora_axis", "shape", "monteclora_config", "velora_config")
"""Options with which s·B·A is still all that is added to the module's own weight (layer_replication means another's)."""


@dataclass(frozen=True, slots=True)
class LoftqWeights(OwnParameters):
    """The base's weights as an adapter's linear modules have them, and where they are kept."""

    def stored(self, update: Update) -> tuple[LazyTensor, bool] | None:
        """The one tensor that is the module's weight, and whether it is kept as (in, out); None where it is in parts."""
        parts, flipped = self._parts(update, "weight")
        return (parts[0], flipped) if len(parts) == 1 else None

    def left(self, update: Update) -> str:
        """Why an update is not for LoftQ to replace, "" where it is."""
        if update.method in _BESIDE:
            return "saved whole"
        if update.method != "lora":
            return f"{METHODS[update.method].title}, no plain LoRA"
        spec = self._spec(update)
        if update.options.get("kind") == "embedding" or (spec is not None and spec.kind == "embedding"):
            return "an embedding, which bitsandbytes does not quantise"
        if any(len(update.tensors[role].shape) != 2 for role in "AB") or "mid" in update.tensors:
            return "a convolution, which bitsandbytes does not quantise"
        if "magnitude" in update.tensors:
            return "DoRA: its magnitude is of the weight that it was made for"
        more = next((role for role in update.tensors if role not in ("A", "B")), None)
        if more is not None:
            return f"has {more!r} beside B and A"
        said = next((name for name in update.options if name not in _HARMLESS), None)
        if said is not None:
            return f"its config has {said}"
        if METHODS["lora"].scale(update) == 0:
            return "its scale is 0"
        if update.module.rpartition(".")[2] in _HEADS or (spec is not None and spec.tied_to is not None):
            return "an output head or a tied weight, which is not quantised"
        saved = self.adapter.updates.get((update.component, update.module, "saved"))
        if saved is not None and "weight" in saved.tensors:
            return "the adapter holds a weight of its own for it"
        self._insist_on_plain(update)
        if len(self._parts(update, "weight")[0][0].shape) != 2:
            return "a convolution, which bitsandbytes does not quantise"
        self._insist_on_shape(update)
        return ""

    def _insist_on_plain(self, update: Update) -> None:
        if self.weights.has(update.component, self._names(update, None), "qweight"):
            raise UsageError(
                f"{self.weights.path}: {update.name} is quantised (it has a `qweight`, as GPTQ and AWQ keep); the base must "
                "not be quantised"
            )
        for part in self._parts(update, "weight")[0]:
            if part.dtype not in dtypes.FLOATS:
                raise UsageError(f"{part.where}: has dtype {part.dtype}; the base must not be quantised")

    def _insist_on_shape(self, update: Update) -> None:
        wanted, has = METHODS["lora"].weight_shape(update), self.shape(update)
        if wanted != has:
            raise UsageError(
                f"{update.tensors['B'].where}: {update.name} is {list(wanted or ())}, and the base's weight {list(has)}: it "
                "is for another base model"
            )

    def _flipped(self, update: Update, spec: ModuleSpec | None, tensor: LazyTensor) -> bool:
        """As the shapes say; a square one as its table or config does.

        A config of a quantised GPT-2 says `fan_in_fan_out: false`, as peft sees no Conv1D there, and the base has them still.
        """
        wanted = METHODS["lora"].weight_shape(update)
        if len(tensor.shape) != 2 or wanted is None:
            return False
        if wanted in (tensor.shape, tensor.shape[::-1]) and tensor.shape[0] != tensor.shape[1]:
            return wanted != tensor.shape
        flipped = OwnParameters._flipped(self, update, spec, tensor)
        if not flipped and spec is None and wanted == tensor.shape and self._has_conv1d(update.component):
            raise UsageError(
                f"{tensor.where}: is square, and the base keeps others as (in, out), as GPT-2's Conv1D does, while the adapter's "
                "config does not say fan_in_fan_out; --base CONFIG (the base's config.json) tells which this one is"
            )
        return flipped

    def _has_conv1d(self, component: str) -> bool:
        """Whether the base has a weight whose bias shows that its second axis is the output."""
        part = self.weights.parts.get(component) or self.weights.parts.get("")
        for key, tensor in part.tensors.items() if part is not None else ():
            bias = part.tensors.get(key.removesuffix("weight") + "bias") if part is not None else None
            if key.endswith(".weight") and bias is not None and len(tensor.shape) == 2:
                rows, columns = tensor.shape
                if rows != columns and bias.shape == (columns,):
                    return True
        return False
