"""Methods in PEFT configs whose numbers stand at random places: Uni-LoRA, FourierFT, WaveFT.

Sources: huggingface/peft 0.21.2 `tuners/{unilora,fourierft,waveft}/config.py` and `model.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from adapterops_formats.peft_kinds.row import LAST_SEED, PeftMethod, Setting, defaults
from adapterops_formats.peft_patterns import Base, looked_up, pattern_table

from adapterops.plugin import Architecture, Group, Update, errors, maths

_FLAG = ("fan_in_fan_out",)
_COMMON: dict[str, Any] = {"bias": "none", "fan_in_fan_out": False, "modules_to_save": None}

# ---- FourierFT and WaveFT -----------------------------------------------------------------------------------


def _counts(updates: Sequence[Update], base: Base) -> dict[str, int]:
    """How many coefficients each module has."""
    return {u.module: u.tensors["spectrum"].numel for u in updates}


def _at_the_end(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """What FourierFT finds for a module: by the first pattern behind a dot, else by its whole name."""
    key = next((k for k in patterns if re.match(rf".*\.{k}$", module)), module)
    return patterns.get(key, default)


def _fourier_fields(updates: Sequence[Update], base: Base) -> dict[str, Any]:
    """Raises `CannotRepresent` where peft's matching would give a module another's number."""
    counts = _counts(updates, base)
    usual, _ = pattern_table(counts, base)
    # Longer names first: the whole name of one module may be the end of another's.
    others = sorted((m for m, count in counts.items() if count != usual), key=lambda m: (-m.count("."), m))
    table = {module: counts[module] for module in others}
    wrong = next((m for m in counts if _at_the_end(table, m, usual) != counts[m]), None)
    if wrong is not None:
        raise errors.CannotRepresent(
            f"{wrong}: no n_frequency_pattern of FourierFT says its {counts[wrong]} frequencies, since the name of another "
            "module is the end of its own; rename one of them in the base"
        )
    return {"n_frequency": usual, "n_frequency_pattern": table}


def _spectrum_problem(config: Any, update: Update, said: Any) -> str:
    spectrum = update.tensors["spectrum"]
    return (
        f"{spectrum.where} has {spectrum.numel} coefficients, but {config.where} says {said!r:.60} for it (n_frequency or "
        f'n_frequency_pattern); --set n_frequency={spectrum.numel}, or --set n_frequency_pattern=\'{{"…": '
        f"{spectrum.numel}}}'"
    )


def _fourier_problems(config: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    patterns, usual = config.fields.get("n_frequency_pattern") or {}, config.fields.get("n_frequency", 1000)
    for update in updates:
        said = _at_the_end(patterns, update.module, usual)
        if said != update.tensors["spectrum"].numel:
            yield _spectrum_problem(config, update, said)


def _wave_fields(updates: Sequence[Update], base: Base) -> dict[str, Any]:
    return {"proportional_parameters": False}


def _wave_problems(config: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    patterns, usual = config.fields.get("n_frequency_pattern") or {}, config.fields.get("n_frequency", 2592)
    shares: dict[str, int] = {}
    if config.fields.get("proportional_parameters"):
        sizes = {u.module: shape[0] * shape[1] for u in updates if (shape := _shape(u, base))}
        if len(sizes) < len(updates):
            # What each module is given follows from the sizes of all; what all are given together does not.
            counts = [u.tensors["spectrum"].numel for u in updates]
            if type(usual) is int and abs(sum(counts) - usual * len(counts)) > len(counts) / 2 + counts.count(1):
                yield (
                    f"{updates[0].tensors['spectrum'].where}: all {len(counts)} modules have {sum(counts)} coefficients, but "
                    f"{config.where} says proportional_parameters with n_frequency {usual}, which makes "
                    f"{usual * len(counts)}; --set n_frequency={round(sum(counts) / len(counts))}"
                )
            return
        # As peft rounds it, the ratio first.
        shares = {m: max(1, round(size / sum(sizes.values()) * (usual * len(sizes)))) for m, size in sizes.items()}
    for update in updates:
        said = shares.get(update.module) or looked_up(patterns, update.module, usual)
        if said != update.tensors["spectrum"].numel:
            yield _spectrum_problem(config, update, said)


def _shape(update: Update, base: Base) -> tuple[int, ...]:
    return base.shapes.get(update.module) or tuple(update.options.get("shape") or ())


def _wave_options(entry: Group, config: Any, given: Mapping[str, Any], weight: tuple[int, ...]) -> dict[str, Any]:
    """Without a transform the wavelet does not matter."""
    idle = entry.options.get("use_idwt") is False and "wavelet_family" not in entry.options
    return {"wavelet_family": "db1"} if idle else {}


_PLACES = Setting(
    "random_loc_seed",
    (int,),
    777,
    asked=True,
    about="it is the seed of the places where the coefficients stand",
    least=0,
    most=LAST_SEED,
)
_SCALING = "it multiplies the whole update"

FOURIERFT = PeftMethod(
    "FOURIERFT",
    "fourierft",
    "FourierFT",
    rank="n_frequency",
    ranks_in="n_frequency_pattern",
    rank_default=1000,
    settings=(_PLACES, Setting("scaling", (float,), 150.0, asked=True, about=_SCALING)),
    flags=_FLAG,
    biases=True,
    bias_only="fourier_only",
    known=("bias", "init_weights"),
    defaults=defaults("FOURIERFT", **_COMMON, init_weights=False),
    ranks=_counts,
    fields=_fourier_fields,
    problems=_fourier_problems,
    needs="the module's shape, random_loc_seed, scaling",
    lost=("random_loc_seed", "scaling"),
)
WAVEFT = PeftMethod(
    "WAVEFT",
    "waveft",
    "WaveFT",
    rank="n_frequency",
    ranks_in="n_frequency_pattern",
    rank_default=2592,
    shaping=("proportional_parameters",),
    settings=(
        _PLACES,
        Setting("scaling", (float,), 25.0, asked=True, about=_SCALING),
        Setting("use_idwt", (bool,), True, asked=True, about="it says whether the coefficients are a wavelet's"),
        Setting("wavelet_family", (str,), "db1", asked=True, about="it says whose coefficients they are"),
    ),
    flags=_FLAG,
    biases=True,
    bias_only="waveft_only",
    known=("bias", "init_weights"),
    defaults=defaults("WAVEFT", **_COMMON, init_weights=True),
    ranks=_counts,
    fields=_wave_fields,
    problems=_wave_problems,
    options=_wave_options,
    needs="the module's shape, random_loc_seed, scaling, use_idwt, wavelet_family",
    lost=("random_loc_seed", "scaling", "use_idwt", "wavelet_family"),
)

# ---- Uni-LoRA -----------------------------------------------------------------------------------------------

_INDICES = "indices_A"


def _uni_unlisted(config: Any, architecture: Architecture | None) -> list[str]:
    """The modules that a file of one vector is for: those of the base that the config names.

    A built-in table has the modules of a base, not the order in which its class makes them, which counts here.
    """
    targets = config.fields.get("target_modules") if config is not None else None
    if architecture is None or architecture.builtin or not targets or targets == "all-linear":
        return []
    for component in architecture.components.values():
        linear = [name for name, spec in component.modules.items() if spec.kind == "linear" or spec.transposed]
        found = [name for name in linear if config.targets(name)]
        if found:
            return found
    return []


def _uni_options(entry: Group, config: Any, given: Mapping[str, Any], weight: tuple[int, ...]) -> dict[str, Any]:
    """Where the indices are saved, r is theirs, and the seed says nothing."""
    indices = entry.tensors.get(_INDICES)
    if indices is None:
        return {}
    return {"r": indices.shape[0] if indices.shape else 0, "proj_seed": entry.options.get("proj_seed", 42)}


def _uni_fields(updates: Sequence[Update], base: Base) -> dict[str, Any]:
    kept = [u for u in updates if _INDICES in u.tensors]
    if kept and len(kept) < len(updates):
        other = next(u for u in updates if _INDICES not in u.tensors)
        raise errors.CannotRepresent(
            f"{kept[0].tensors[_INDICES].where}: {other.name} has no indices, and a config of Uni-LoRA says save_indices for "
            "all modules or none"
        )
    length = updates[0].tensors["theta_d"].numel
    return {"theta_d_length": length, "save_indices": bool(kept)}


def _uni_problems(config: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    if not updates:
        return
    has, usual = _uni_fields(updates, base), {"theta_d_length": 256, "save_indices": False}
    for name, value in has.items():
        said = config.fields.get(name, usual[name])
        if said is not None and said != value:
            yield (
                f"{next(iter(updates[0].tensors.values())).where}: {name} is {value} by the tensors, but {config.where} says "
                f"{said!r:.60}; --set {name}={str(value).lower()}"
            )


def _uni_complete(updates: list[Update]) -> list[Update]:
    """Each module with the part of the indices that is its own, if the shapes of all are known."""
    layout = maths("unilora").layout

    own = [u for u in updates if u.method == "unilora" and _INDICES not in u.tensors and u.module]
    shapes = [tuple(u.options["shape"]) for u in own if u.options.get("shape")]
    rank = own[0].options.get("r") if own else None
    if rank is None or len(shapes) < len(own):
        return updates
    starts, total = layout(shapes, rank)
    places = {u.key: {"offset": start, "total": total} for u, start in zip(own, starts, strict=True)}
    return [replace(u, options={**u.options, **places.get(u.key, {})}) for u in updates]


UNILORA = PeftMethod(
    "UNILORA",
    "unilora",
    "Uni-LoRA",
    rank="",
    shaping=("theta_d_length", "save_indices"),
    settings=(
        Setting("r", (int,), 4, asked=True, about="it says how many of the vector's numbers a module has"),
        Setting(
            "proj_seed",
            (int,),
            42,
            asked=True,
            about="it is the seed of which number of the vector stands where",
            least=0,
            most=LAST_SEED,
        ),
    ),
    narrowing=("layers_to_transform", "layers_pattern"),
    flags=_FLAG,
    biases=True,
    bias_only="unilora_only",
    known=("bias", "unilora_dropout", "init_theta_d_bound", "init_weights"),
    defaults=defaults("UNILORA", **_COMMON, unilora_dropout=0.0, init_weights=True),
    shared=("theta_d",),
    fields=_uni_fields,
    problems=_uni_problems,
    options=_uni_options,
    unlisted=_uni_unlisted,
    complete=_uni_complete,
    needs="target_modules, r, proj_seed and the base's modules in their order, unless the indices were saved",
    lost=("target_modules, r and proj_seed, where the indices were not saved",),
)
