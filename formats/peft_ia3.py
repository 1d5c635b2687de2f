"""(IA)³ in PEFT configs: which modules are multiplied at their inputs (`feedforward_modules`).

peft keeps (1, in_features) for those and (out_features, 1) for others, so a linear layer's vector shows what it is; a
convolution's is (1, n, 1, 1) in both cases, and then the config decides, or a base whose inputs and outputs differ.
`feedforward_modules` is matched by the bare end of a name or as a whole pattern; as a list it must be part of
`target_modules`.  Sources: huggingface/peft 0.21.2 `tuners/ia3/layer.py`, `model.py`, `config.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adapterops_formats.peft_patterns import Base, exact_endings, target_modules, whole_names

from adapterops.plugin import Group, LazyTensor, Update, errors


def is_feedforward(module: str, wanted: Any) -> bool:
    """Whether peft takes `module` for one of `feedforward_modules`."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module.endswith(name) for name in wanted)


def on_input(tensor: LazyTensor, module: str, stated: Any, weight: tuple[int, ...]) -> bool:
    """Whether a vector multiplies its module's inputs; `weight` is () where the base is not known.

    Raises `UnknownFact` where neither the shape nor the config (`stated`) nor the base tells.
    """
    shape = tensor.shape
    if len(shape) == 2 and shape[0] != shape[1] and 1 in shape:
        return shape[0] == 1
    if stated is not None:
        return is_feedforward(module, stated)
    if len(weight) > 1 and weight[0] != weight[1] and tensor.numel in weight[:2]:
        return tensor.numel == weight[1]
    raise errors.UnknownFact(
        f"{tensor.where}: shape {list(shape)} does not tell whether (IA)³ multiplies the inputs or the outputs of {module}: "
        "say which modules it multiplies at their inputs with --set feedforward_modules='[…]' ([] where there are none)"
    )


def options(entry: Group, config: Any, given: Mapping[str, Any], weight: tuple[int, ...]) -> dict[str, Any]:
    """Which end of its module a vector multiplies."""
    if "vector" not in entry.tensors:
        return {}
    stated = config.fields.get("feedforward_modules") if config is not None else None
    return {"on_input": on_input(entry.tensors["vector"], entry.name, stated, weight)}


def fields(updates: Sequence[Update], base: Base) -> dict[str, Any]:
    """`feedforward_modules`, and the `target_modules` that go with it."""
    inputs = {u.module for u in updates if u.options["on_input"]}
    outputs = {u.module for u in updates} - inputs
    endings = exact_endings([inputs, outputs], base)
    if endings is not None and not any(is_feedforward(name, endings[0]) for name in outputs):
        return {"target_modules": sorted({*endings[0], *endings[1]}), "feedforward_modules": endings[0]}
    targets = target_modules(inputs | outputs, Base(None, base.optional_prefix))
    return {"target_modules": targets, "feedforward_modules": whole_names(inputs, base) if inputs else []}


def problems(config: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    """Where `feedforward_modules` is not what the shapes show."""
    stated = config.fields.get("feedforward_modules")
    for update in updates if stated is not None else ():
        if is_feedforward(update.module, stated) != update.options["on_input"]:
            tensor, names = update.tensors["vector"], ("inputs", "outputs")
            shown, said = names if update.options["on_input"] else names[::-1]
            yield (
                f"{tensor.where}: shape {list(tensor.shape)} multiplies the module's {shown}, but by {config.where} "
                f"(feedforward_modules) peft would multiply its {said}; --set feedforward_modules=null derives it anew"
            )


def refuse_other_start(update: Update) -> None:
    """Raise `CannotRepresent` for vectors that start from zero, as LyCORIS keeps them."""
    if update.method == "ia3" and update.options.get("initial") != 1:
        raise errors.CannotRepresent(
            f"{update.name}: its (IA)³ vector (tensor {update.tensors['vector'].key!r}) is kept as the factor minus one, and "
            "peft keeps the factor itself: adding one would round every number, and peft would multiply the module's bias "
            "too; write it as --to kohya"
        )
