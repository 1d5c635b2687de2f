"""Soft prompts that IBM's text-generation server (TGIS) keeps: `decoder.pt`, a bare tensor (virtual tokens, width).

The server puts its rows before the embeddings of the input, as peft's prompt tuning does, and takes a PEFT folder with
the key `prompt_embeddings` for the same thing, so the tensor goes to PEFT as it is.  A tensor without a name may be
anything: it is read where the user says what it is (`--from tgis`).

A model with an encoder and a decoder has two such files; peft keeps both prompts in one table, encoder first, and no
file says that its neighbour belongs to it.  An `encoder.pt`, or a `decoder.pt` beside one, is refused.

A pickle is never written: `--to peft` is what the server reads, too.

Sources: IBM/text-generation-inference `server/text_generation_server/prompt_cache.py`; opendatahub-io/vllm-tgis-adapter
`src/vllm_tgis_adapter/tgis_utils/convert_pt_to_prompt.py`; peft 0.21.2 `peft_model.py` (`get_prompt`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from adapterops.plugin import (
    NAMELESS,
    Adapter,
    AlphaIn,
    Claim,
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
    errors,
    no_config,
    read_by_table,
)

_PROMPT = Suffix(NAMELESS, "prompt_tuning", "prompt_embeddings")
TGIS = Dialect(
    name="tgis",
    format="tgis",
    title="IBM TGIS",
    places=(Place("model", "", (_PROMPT,), free=True, whole=True),),
    alpha=AlphaIn.NOWHERE,
    convention="rank",
    asked=True,
    written=False,
    example=NAMELESS,
)
ENCODER = "encoder.pt"


class Tgis(Format):
    """A bare prompt."""

    name = "tgis"
    title = "IBM TGIS prompt (decoder.pt; read only)"
    limits = (
        "It is not written: a pickle is what no reader should be given, and `--to peft` is read by the server, too.",
    )
    dialects = (TGIS,)
    file_name = "decoder.safetensors"

    def recognise(self, source: Source, dialects: Sequence[Dialect]) -> list[Reading]:
        if list(source.tensors) != [NAMELESS] or len(source.tensors[NAMELESS].shape) != 2:
            return []
        return [Reading(TGIS, (Claim(NAMELESS, TGIS.places[0], "", _PROMPT, ""),), ())] if dialects else []

    def read(self, source: Source, reading: Reading, request: Request) -> Adapter:
        path = source.tensors[NAMELESS].source.path
        folder, name = os.path.split(path)
        if name == ENCODER or os.path.exists(os.path.join(folder, ENCODER)):
            raise errors.UnsupportedFormat(
                f"{path}: with an {ENCODER} it is one of two prompts, an encoder's and a decoder's, which peft keeps "
                "in one table; "
                f"this version does not join them. Move {ENCODER} away if the two do not belong together"
                if name != ENCODER
                else f"{path}: is the prompt of an encoder, whose decoder has one of its own; this version does not join them"
            )
        if request.fields.get("task_type") == "SEQ_2_SEQ_LM":
            raise errors.UnsupportedFormat(
                f"{path}: is a decoder's prompt alone, and peft gives a model with an encoder (task_type SEQ_2_SEQ_LM) "
                "one for both"
            )
        task = request.fields.get("task_type")

        def settle(groups: list[Group]) -> list[Group]:
            for group in groups:
                group.options.update({"task_type": task} if task is not None else {})
            return groups

        return read_by_table(reading, source, request, no_config, None, settle)

    def write(self, adapter: Adapter, target: Target) -> Output:
        raise errors.CannotRepresent(
            "TGIS' decoder.pt is a pickle, which is read and never written; the server reads --to peft, too"
        )


FORMAT = Tgis()
