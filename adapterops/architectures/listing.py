"""Lists the modules of an instantiated torch model, on any device, the meta device included."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterops.architectures.spec import ModuleSpec

if TYPE_CHECKING:
    from torch import nn


def list_modules(model: nn.Module) -> dict[str, ModuleSpec]:
    """Every module of `model` that owns a parameter or a buffer, by the name that the model's class gives it.

    A module that stands in two places is listed in both; `tied_to` names the owner of a shared weight, by
    transformers' declaration where the model has one, else the place that comes first. What the model's
    root owns itself is listed under the name "".
    """
    declared = _declared_ties(model)
    first_owner: dict[int, str] = {}
    modules: dict[str, ModuleSpec] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        # Private, but the public iterators drop what is shared with a module that came before.
        params = [key for key, value in (*module._parameters.items(), *module._buffers.items()) if value is not None]
        if not params:
            continue
        weight = module._parameters.get("weight")
        tied_to = declared.get(name)
        if weight is not None and tied_to is None:
            owner = first_owner.setdefault(id(weight), name)
            tied_to = owner if owner != name else None
        kind, transposed = _kind(module)
        shape = tuple(weight.shape) if weight is not None else ()
        modules[name] = ModuleSpec(
            name=name,
            original=name,
            shape=shape[::-1] if transposed else shape,
            kind=kind,
            bias=module._parameters.get("bias") is not None,
            transposed=transposed,
            tied_to=tied_to,
            params=tuple(params),
        )
    return modules


def list_parameters(model: nn.Module) -> dict[str, ModuleSpec]:
    """Every matrix or stack of matrices that a module of `model` owns under another name than `weight`, by its dotted name.

    `transposed` tells that the module says of its stacks that they are (experts, in, out); `shape` is as it is stored.
    """
    found: dict[str, ModuleSpec] = {}
    for module_name, module in model.named_modules():
        for name, value in module._parameters.items():
            if value is None or name in ("weight", "bias") or value.ndim not in (2, 3) or not module_name:
                continue
            path = f"{module_name}.{name}"
            transposed = bool(getattr(module, "is_transposed", False))
            found[path] = ModuleSpec(path, path, tuple(value.shape), "parameter", False, transposed, params=(name,))
    return found


def _kind(module: nn.Module) -> tuple[str, bool]:
    """The module's kind, and whether its weight is stored as (in, out)."""
    from torch import nn

    weight = module._parameters.get("weight")
    if weight is None:
        return "other", False
    name = type(module).__name__
    if isinstance(module, nn.Linear):
        return "linear", False
    # transformers.pytorch_utils.Conv1D, told by name so that a diffusers model does not load transformers.
    if name == "Conv1D" and weight.ndim == 2:
        return "linear", True
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "conv", False
    if isinstance(module, nn.Embedding):
        return "embedding", False
    # Every library has an RMSNorm of its own, without a common base class.
    if "norm" in name.lower() and weight.ndim == 1:
        return "norm", False
    return "other", False


def _declared_ties(model: nn.Module) -> dict[str, str]:
    """Module to owner of its weight, from the ties that a transformers 5 model declares for its config."""
    keys = getattr(model, "all_tied_weights_keys", None) or {}
    ties: dict[str, str] = {}
    for target in keys:
        source = target
        # A tie may point at a weight that is tied itself.
        while source in keys and keys[source] != target:
            source = keys[source]
        target_module, _, parameter = target.rpartition(".")
        if parameter == "weight" and source != target:
            ties[target_module] = source.rpartition(".")[0]
    return ties
