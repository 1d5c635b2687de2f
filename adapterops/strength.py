"""What is known of an adapter's scales before anything is written: refused where it would be a guess, told where it is an
assumption."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping

from adapterops.adapter import Adapter, Certainty, Update
from adapterops.carried import HEADER_CONFIG, is_number
from adapterops.errors import UnknownFact


def insist_on_alphas(adapter: Adapter) -> None:
    """Raise `UnknownFact` for the first update whose alpha no source holds."""
    for update in adapter:
        if update.alpha is not None and update.alpha.value is None:
            tensor = next(iter(update.tensors.values()))
            raise UnknownFact(
                f"{tensor.where}: the alpha of {update.name} is unknown: {update.alpha.source}. Without it the strength "
                "of the adapter would be a guess; say it with --alpha X (the trainer's lora_alpha)"
            )


def notes_on_alphas(adapter: Adapter, assumed: bool = True) -> Iterator[str]:
    """What the user should know of scales that no file holds: odd ones of `--alpha`, and, if asked, those assumed by
    convention, which another format may write down."""
    scaled = [update for update in adapter if update.alpha is not None]
    usual = _with(scaled, Certainty.ASSUMED) if assumed else []
    if usual:
        source = usual[0].alpha.source if usual[0].alpha is not None else ""
        some = "" if len(usual) == len(scaled) else f" of {len(usual)} modules of {len(scaled)} ({usual[0].name})"
        yield f"alpha{some}: {source}; if training had another, say it with --alpha X"
    yield from notes_on_nothing(adapter)
    yield from notes_on_header(adapter)
    given = {update.alpha.value for update in _with(scaled, Certainty.GIVEN) if update.alpha is not None}
    if 0.0 in given:
        yield "--alpha 0 makes the scale 0: the adapter changes nothing"
    for value in sorted(value for value in given if value is not None and value < 0):
        yield f"--alpha {value:g} turns the adapter's effect around: trainers write no negative alpha"


def notes_on_nothing(adapter: Adapter) -> Iterator[str]:
    """What the user should know of an alpha that its file says is 0: verl's `model_merger` writes it, for one."""
    alphas = (update.alpha for update in adapter if update.alpha is not None and update.alpha.value == 0.0)
    stated = next((alpha for alpha in alphas if alpha.certainty is Certainty.READ), None)
    if stated is not None:
        yield (
            f"alpha is 0 ({stated.source}), so it changes nothing; some programs write 0 for an alpha that they do not know: "
            "--alpha X says the trainer's"
        )


def notes_on_header(adapter: Adapter) -> Iterator[str]:
    """What the user should know of an alpha in the header that readers of the file's spelling do not look for there."""
    alphas = [update.alpha for update in adapter if update.alpha is not None]
    taken = {alpha.value for alpha in alphas if alpha.certainty is Certainty.ASSUMED}
    fields = _in_header(adapter) if all(alpha.certainty is Certainty.ASSUMED for alpha in alphas) else []
    stated = list(dict.fromkeys(value for name, value in fields if name == "lora_alpha" and is_number(value)))
    more = any(value for name, value in fields if name in ("use_rslora", "alpha_pattern"))
    if stated and (more or not taken.issubset(stated)):
        values = " and ".join(f"{value:g}" for value in stated)
        said = f"lora_alpha {values}{' with use_rslora or an alpha_pattern' if more else ''}"
        way = (
            f"{stated[0]:g} takes what the header says"
            if len(stated) == 1 and not more
            else "X makes the scale X / rank"
        )
        yield (
            f"the header's {HEADER_CONFIG} says {said}, where readers of this spelling do not look: they apply scale 1, and "
            f"that is kept; --alpha {way}"
        )


def _in_header(adapter: Adapter) -> list[tuple[str, object]]:
    """The fields of the config in the header, of one model or of components."""
    try:
        config = json.loads(adapter.metadata.get(HEADER_CONFIG, "null"))
    except (ValueError, RecursionError):
        return []  # not diffusers' entry
    fields = config.items() if isinstance(config, Mapping) else ()
    return [(key.rpartition(".")[2], value) for key, value in fields]


def _with(updates: Iterable[Update], certainty: Certainty) -> list[Update]:
    return [update for update in updates if update.alpha is not None and update.alpha.certainty is certainty]
