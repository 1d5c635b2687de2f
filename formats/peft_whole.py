"""A whole model's state dict in which peft's layers still hold their factors: the adapter is in it, and so is its base.

`model.save_pretrained` of the model inside a PEFT model, and trainers' checkpoints of it, write no config, no prefix and every
weight of the base: `model.layers.0.self_attn.q_proj.base_layer.weight` (before peft 0.6 `….q_proj.weight`) beside
`….q_proj.lora_A.default.weight`.  The adapted layers' own weights are the base's; what else there is may have been trained.

Source: huggingface/peft 0.21.2 `tuners/tuners_utils.py` (`BaseTunerLayer.base_layer`), v0.5.0 `tuners/lora.py` (`Linear`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from adapterops.plugin import Claim, Reading, Request, Source, errors


def of_whole_model(reading: Reading) -> Reading:
    """The reading without the model's weights.

    Those of adapted layers are nothing of the adapter; whether the others are, nothing tells.
    """
    if reading.prefix != "":
        return reading
    adapted = {claim.name for claim in reading.claims if claim.suffix.method != "saved"}
    saved = [claim for claim in reading.claims if claim.suffix.method == "saved"]
    own = {claim.key for claim in saved if claim.name in adapted}
    weighed = {claim.name for claim in saved if claim.key in own and claim.suffix.role == "weight"}
    if not adapted or weighed != adapted:
        return reading
    claims = tuple(claim for claim in reading.claims if claim.suffix.method != "saved")
    others = (claim.key for claim in saved if claim.key not in own)
    return reading._replace(claims=claims, unclaimed=(*reading.unclaimed, *others))


def left_out(keys: Sequence[str], claims: Iterable[Claim]) -> list[str]:
    """A note on the adapted layers' own weights among keys that are not read."""
    if not keys:
        return []
    stems = {claim.key.partition(claim.name)[0] + claim.name for claim in claims if claim.name}
    own = [key for key in keys if key.rpartition(".")[0].removesuffix(".base_layer") in stems]
    if not own:
        return []
    more = f" and {len(own) - 1} more are" if len(own) > 1 else " is"
    return [f"tensor {own[0]!r}{more} the base model's own, of layers that the adapter changes: left out"]


def insist_on_consent(source: Source, reading: Reading, request: Request) -> None:
    """Raise `UnsupportedFormat` for a whole model of which only a part is an adapter, unless it may be dropped."""
    if not reading.unclaimed or request.allow_drop or request.tell is not None:
        return
    read = {claim.key for claim in reading.claims}
    unclaimed = set(reading.unclaimed)
    if left_out([key for key in source.tensors if key not in read and key not in unclaimed], reading.claims):
        raise errors.UnsupportedFormat(
            f"{source.path}: is a whole model's state dict in which peft's layers still hold {len(reading.claims)} tensors of an "
            f"adapter; whether the model's other {len(unclaimed)} tensors ({reading.unclaimed[0]!r} …) were trained too, nothing "
            "tells: --allow-drop takes the adapter out, and lists what it leaves",
            fault="unclaimed",
            keys=reading.unclaimed,
        )
