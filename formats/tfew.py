"""T-Few: (IA)³ as its authors' code saves it, the state dict of what was trained.

    encoder.block.0.layer.0.SelfAttention.k.multi_lora_b      (out_features, 1)
    decoder.block.3.layer.2.DenseReluDense.wi_1.multi_lora_b

A layer's output, its bias included, is multiplied by the vector, which begins at one: what peft's (IA)³ does to a
module that is none of its `feedforward_modules`, in the same shape.  The feed-forward vectors of T-Few are on the
*outputs* of `wi_1`; peft's own default for T5 puts them on the inputs of `wo`, which computes the same in a gated T5
but is another module, so they stay where they are.

Names are the model's own (`T5ForConditionalGeneration`), without a prefix.  There is no scale.

What else that code can train stands beside no reader of (IA)³ here: `multi_lora_a` multiplies a layer's inputs while
`multi_lora_b` multiplies its outputs, and of several columns (`lora_scaling_rank` above 1) the mean is taken of
products with `multi_lora_a`, which such a file lacks.

Sources: r-three/t-few `src/models/lora.py` (`LoRALinear`), `src/models/EncoderDecoder.py` (`save_model`),
`configs/ia3.json`; huggingface/peft 0.21.2 `tuners/ia3/layer.py`, `utils/constants.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from adapterops.plugin import (
    Adapter,
    AlphaIn,
    Dialect,
    Format,
    Group,
    Output,
    Place,
    Reading,
    Request,
    Source,
    Suffix,
    Target,
    component_by_names,
    errors,
    no_config,
    read_by_table,
)

_OUTPUTS = Suffix(".multi_lora_b", "ia3", "vector", {"initial": 1, "on_input": False})
TFEW = Dialect(
    name="tfew",
    format="tfew",
    title="T-Few",
    places=(Place("*", "", (_OUTPUTS,), sure=True),),
    alpha=AlphaIn.NOWHERE,
    convention="rank",
    example="encoder.block.0.layer.0.SelfAttention.k.multi_lora_b",
)


class TFew(Format):
    """T-Few's vectors."""

    name = "tfew"
    for_lora = "peft"
    title = "T-Few ((IA)³ of its authors)"
    limits = ("Anything but (IA)³ on the outputs of modules.",)
    dialects = (TFEW,)
    file_name = "finish.safetensors"
    foreign = {
        r"\.multi_lora_a$": (
            "multiplies a layer's inputs beside its outputs (T-Few's lora_scaling), and no other format's (IA)³ does "
            "both to one layer; "
            "this version does not convert it"
        ),
    }

    def recognise(self, source: Source, dialects: Sequence[Dialect]) -> list[Reading]:
        return [] if source.config is not None else super().recognise(source, dialects)

    def read(self, source: Source, reading: Reading, request: Request) -> Adapter:
        def settle(groups: list[Group]) -> list[Group]:
            for group in groups:
                _insist_on_a_column(group, request)
            component = component_by_names(groups, request.architecture) or "model"
            place = replace(TFEW.places[0], component=component)
            return [group._replace(place=place) for group in groups]

        return read_by_table(reading, source, request, no_config, None, settle)

    def write(self, adapter: Adapter, target: Target) -> Output:
        other = next((u for u in adapter if u.component != adapter.components[0]), None)
        if other is not None:
            raise errors.CannotRepresent(
                f"{other.name}: T-Few's names say no component, and the adapter has {' and '.join(adapter.components)}; split "
                "it into a file each"
            )
        for update in adapter:
            vector = update.tensors.get("vector")
            if (
                vector is not None
                and update.method == "ia3"
                and vector.shape != (vector.numel, 1)
                and not update.options["on_input"]
            ):
                raise errors.CannotRepresent(
                    f"{update.name}: tensor {vector.key!r} {list(vector.shape)} is of no linear layer, and T-Few "
                    "adapts no other; "
                    "--to peft holds it"
                )
        return super().write(adapter, target)


def _insist_on_a_column(group: Group, request: Request) -> None:
    vector = group.tensors["vector"]
    if len(vector.shape) == 2 and vector.shape[1] > 1:
        request.wrong(
            errors.UnsupportedFormat(
                f"{vector.where}: shape {list(vector.shape)} is of lora_scaling_rank {vector.shape[1]}, whose effect "
                "depends on a "
                "multi_lora_a that the file lacks; only vectors (out_features, 1) are read"
            ),
            (vector.key,),
        )


FORMAT = TFew()
