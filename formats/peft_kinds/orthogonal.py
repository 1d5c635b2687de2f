"""OFT, BOFT, HRA, RoAd, PSOFT and GLoRA in PEFT configs.

Sources: huggingface/peft 0.21.2 `tuners/{oft,boft,hra,road,psoft,glora}/config.py` and `layer.py`; OFT's earlier
configs in peft 0.11, 0.15 and 0.17.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

from adapterops_formats.peft_kinds.row import LAST_SEED, PeftMethod, Setting, defaults
from adapterops_formats.peft_patterns import Base

from adapterops.plugin import METHODS, Certainty, Group, Update, errors, maths

_OFT = maths("oft")
_VARIANTS = maths("road").VARIANTS
SINCE = "0.18.0"
"""The first peft that computes OFT's series as today's does; configs say their peft since then."""
_SERIES = (
    Setting("use_cayley_neumann", (bool,), True, about="whether a series stands for the exact rotation"),
    Setting("num_cayley_neumann_terms", (int,), 5, about="how many terms it has", least=0, most=1000),
)


# ---- OFT ----------------------------------------------------------------------------------------------------


def nearest(size: int, wanted: int) -> int:
    """The divisor of `size` that peft takes where `wanted` is asked for: the nearest, of two the smaller."""
    if wanted >= size:
        return size
    low = next(n for n in range(wanted, 0, -1) if size % n == 0)
    high = next(n for n in range(wanted, size + 1) if size % n == 0)
    return low if wanted - low <= high - wanted else high


def asked_for(found: Mapping[int, int]) -> int | None:
    """A number for which peft takes `found[size]` of each size; None where there is none."""
    low, high = 1, max(found, default=1)
    for size, divisor in found.items():
        if size % divisor:
            return None
        before = max((n for n in range(1, divisor) if size % n == 0), default=0)
        after = next((n for n in range(divisor + 1, size + 1) if size % n == 0), None)
        low = max(low, (before + divisor) // 2 + 1 if before else 1)
        high = high if after is None else min(high, (divisor + after) // 2)
    usual = [d for d, _ in Counter(found.values()).most_common() if low <= d <= high]
    return usual[0] if usual else low if low <= high else None


def _sizes(update: Update, base: Base) -> tuple[int, int, int | None]:
    """The blocks that are stored, their size, and the inputs that they turn (None where one block leaves it open)."""
    stored, size = update.tensors["R"].shape[0], _OFT.block_size(update)
    shape = base.shapes.get(update.module) or update.options.get("shape")
    inputs = prod(shape[1:]) if shape else stored * size if stored > 1 else None
    return stored, size, inputs


def _oft_fields(updates: Sequence[Update], base: Base) -> dict[str, Any]:
    """`r` or `oft_block_size`, `block_share`, and which peft's series it is.

    Raises `CannotRepresent` where no config makes peft build such blocks.
    """
    now = [_oft_fitted(u) for u in updates]
    version = {} if any(not _OFT.halved(u) for u in now) else {"peft_version": SINCE}
    sizes = [_sizes(u, base) for u in now]
    share = any(stored == 1 and (inputs is None or inputs > size) for stored, size, inputs in sizes)
    open_ = [size for _, size, inputs in sizes if inputs is None]
    if share and any(stored > 1 for stored, _, _ in sizes):
        raise errors.CannotRepresent(
            f"{now[0].name} and others differ in whether their blocks are shared; a config of OFT says block_share for all"
        )
    by_size: dict[int, set[int]] = {}
    for _, size, inputs in sizes:
        if inputs is not None:
            by_size.setdefault(inputs, set()).add(size)
    alike = len({size for _, size, _ in sizes}) == 1
    if alike and all(inputs is None or inputs % size == 0 for _, size, inputs in sizes):
        return {"r": 0, "oft_block_size": sizes[0][1], "block_share": share, **version}
    if open_:
        # One block of another size in each module: all their inputs, unless the base says otherwise.
        return {"r": 1, "oft_block_size": 0, "block_share": False, **version}
    if all(len(found) == 1 for found in by_size.values()):
        one = {inputs: next(iter(found)) for inputs, found in by_size.items()}
        blocks, wanted = asked_for({inputs: inputs // size for inputs, size in one.items()}), asked_for(one)
        if blocks is not None:
            return {"r": blocks, "oft_block_size": 0, "block_share": share, **version}
        if wanted is not None:
            return {"r": 0, "oft_block_size": wanted, "block_share": share, **version}
    raise errors.CannotRepresent(
        f"{now[0].name} and others have blocks of {sorted({size for _, size, _ in sizes})} inputs, which no one r or "
        "oft_block_size of a PEFT config makes of their sizes"
    )


def _oft_problems(config: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    """Where the config would make peft build other blocks."""
    r, size = config.fields.get("r", 0), config.fields.get("oft_block_size", 32)
    share = config.fields.get("block_share", False)
    if None in (r, size, share):
        return  # they are to be derived anew
    anew = "--set r=null --set oft_block_size=null --set block_share=null derives them anew"
    for update in updates:
        if _OFT.generation(update) != 16:
            continue
        tensor = update.tensors["R"]
        stored, own, inputs = _sizes(update, base)
        if type(r) is not int or type(size) is not int or min(r, size) < 0 or bool(r) == bool(size):
            yield f"{config.where}: r is {r!r} and oft_block_size {size!r}; peft takes one of them, the other 0; {anew}"
            return
        # One block of inputs that nobody knows: as many as it turns, or where blocks are shared a multiple of that.
        turned = inputs or (own * r if share and r else own)
        number = turned // nearest(turned, size) if size else nearest(turned, r)
        made = (number, turned // number)
        if (1 if share else made[0], made[1]) != (stored, own):
            yield (
                f"{tensor.where}: shape {list(tensor.shape)} is {stored} blocks of {own} inputs, but with {config.where} "
                f"(r={r}, oft_block_size={size}, block_share={str(share).lower()}) peft would build "
                f"{1 if share else made[0]} of {made[1]}; {anew}"
            )


def _oft_options(entry: Group, config: Any, given: Mapping[str, Any], weight: tuple[int, ...]) -> dict[str, Any]:
    """The peft that wrote the config, where its series was another: before 0.18 no config said its peft."""
    if "R" not in entry.tensors or not entry.options.get("use_cayley_neumann", True):
        return {}
    version = config.fields.get("peft_version") if config is not None else given.get("peft_version")
    if version is None and config is not None and config.certainty is Certainty.READ:
        version = "0.17"
    one = Update("", entry.name, "oft", entry.tensors, options={"peft_version": version})
    return {} if _OFT.halved(one) else {"peft_version": str(version)}


def _oft_today(entry: Group, config: Any) -> str:
    """What today's peft makes of an earlier one's OFT."""
    if entry.method != "oft":
        return ""
    one = Update("", entry.name, "oft", entry.tensors)
    when = _OFT.generation(one)
    if when == 7:
        return (
            "is OFT of peft 0.7 to 0.13, which turns the outputs of modules; today's peft refuses it and has nothing "
            "that does the same: to-lora --base-weights BASE turns it into LoRA"
        )
    if when == 14:
        return (
            "is OFT of peft 0.14 or 0.15, which today's peft refuses: taken as BOFT with one butterfly factor, which does "
            "the same"
        )
    if config is None or config.certainty is not Certainty.READ or not config.fields.get("use_cayley_neumann", True):
        return ""
    if "peft_version" in _oft_options(entry, config, {}, ()):
        version = config.fields.get("peft_version")
        whose = (
            "no peft_version in the config: if it is of peft 0.16 or 0.17, its"
            if version is None
            else f"is OFT of peft {version}, whose"
        )
        return (
            f"{whose} Cayley-Neumann series ended with a term twice as large: peft since 0.18 warns, and computes something "
            "slightly different from the same tensors"
        )
    return ""


def _oft_complete(updates: list[Update]) -> list[Update]:
    """The updates of peft 0.14 and 0.15 as BOFT, but where the size of a module is needed and unknown."""

    def now(update: Update) -> Update:
        if update.method != "oft" or _OFT.generation(update) != 14:
            return update
        METHODS["oft"].check(update)
        try:
            upgraded: Update = _OFT.as_boft(update)
        except errors.CannotRepresent:
            return update  # `_oft_fitted` says why, where that matters
        return upgraded

    made = [now(u) for u in updates]
    # A config knows one method.
    return updates if any(u.method == "oft" for u in made) else made


def _oft_fitted(update: Update) -> Update:
    """An update as a method of today's peft has it.  Raises `CannotRepresent` where none has."""
    upgraded: Update = update if _OFT.generation(update) == 16 else _OFT.as_boft(update)
    return upgraded


OFT = PeftMethod(
    "OFT",
    "oft",
    "OFT",
    rank="",
    ranks_in="",
    shaping=("r", "oft_block_size", "block_share"),
    settings=(
        *_SERIES,
        Setting("coft", (bool,), False, about="whether the rotations are kept small"),
        Setting("eps", (float,), 6e-5, about="how small, with coft"),
    ),
    flags=("fan_in_fan_out",),
    biases=True,
    bias_only="oft_only",
    # The last two are those of peft before 0.14; what they say shows in the blocks.
    known=("module_dropout", "bias", "init_weights", "rank_pattern", "alpha_pattern"),
    defaults=defaults("OFT", module_dropout=0.0, bias="none", init_weights=True, modules_to_save=None),
    fields=_oft_fields,
    problems=_oft_problems,
    options=_oft_options,
    today=_oft_today,
    fitted=_oft_fitted,
    complete=_oft_complete,
)


# ---- BOFT ---------------------------------------------------------------------------------------------------


def _boft_fields(updates: Sequence[Update], base: Base) -> dict[str, Any]:
    """The blocks' size or number.  Raises `CannotRepresent` where neither is the same for all modules."""
    shapes = [u.tensors["R"].shape for u in updates]
    factors, numbers, sizes = ({shape[at] for shape in shapes} for at in range(3))
    if len(factors) > 1 or (len(numbers) > 1 and len(sizes) > 1):
        one, two = updates[0], next(u for u in updates if u.tensors["R"].shape != shapes[0])
        raise errors.CannotRepresent(
            f"{one.name} has BOFT blocks {list(shapes[0])} and {two.name} {list(two.tensors['R'].shape)}; a PEFT config says "
            "one number of factors, and one size or one number of blocks, for all"
        )
    size, number = (shapes[0][2], 0) if len(sizes) == 1 else (0, shapes[0][1])
    return {"boft_block_size": size, "boft_block_num": number, "boft_n_butterfly_factor": shapes[0][0]}


def _boft_problems(config: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    """Where the config would make peft build other blocks."""
    said = config.fields
    size, number = said.get("boft_block_size", 4), said.get("boft_block_num", 0)
    factors = said.get("boft_n_butterfly_factor", 1)
    if None in (size, number, factors):
        return  # they are to be derived anew
    if any(type(value) is not int for value in (size, number, factors)):
        yield f"{config.where}: boft_block_size, boft_block_num and boft_n_butterfly_factor are whole numbers"
        return
    for update in updates:
        tensor = update.tensors["R"]
        has = tensor.shape[:3]
        if (factors, number or has[1], size or has[2]) != has or bool(size) == bool(number):
            untold = factors > has[0] == 1  # and any other number is a mistake
            wrong = {
                "boft_n_butterfly_factor": None if factors == has[0] else has[0],
                "boft_block_num": None if number in (0, has[1]) else has[1],
                "boft_block_size": None if size in (0, has[2]) else has[2],
            }
            names = [f"{name}={value}" for name, value in wrong.items() if value is not None]
            remedy = names[0] if len(names) == 1 and bool(size) != bool(number) else "boft_block_size=null"
            yield (
                f"{tensor.where}: shape {list(tensor.shape)}, but {config.where} says boft_n_butterfly_factor {factors}, "
                f"boft_block_num {number}, boft_block_size {size} (one of the two is 0)"
                + ("; peft without its CUDA extension trains one factor, whatever its config says" if untold else "")
                + (f"; --set {remedy}" + (" derives them anew" if remedy.endswith("null") else ""))
            )


BOFT = PeftMethod(
    "BOFT",
    "boft",
    "BOFT",
    rank="",
    ranks_in="",
    shaping=("boft_block_size", "boft_block_num", "boft_n_butterfly_factor"),
    flags=("fan_in_fan_out",),
    biases=True,
    bias_only="boft_only",
    known=("boft_dropout", "bias", "init_weights"),
    defaults=defaults("BOFT", boft_dropout=0.0, bias="none", init_weights=True, modules_to_save=None),
    fields=_boft_fields,
    problems=_boft_problems,
)


# ---- HRA ----------------------------------------------------------------------------------------------------

HRA = PeftMethod(
    "HRA",
    "hra",
    "HRA",
    ranks_in="",
    settings=(Setting("apply_GS", (bool,), False, about="whether the reflections are made orthogonal first"),),
    biases=True,
    bias_only="hra_only",
    known=("bias", "init_weights"),
    defaults=defaults("HRA", bias="none", init_weights=True, modules_to_save=None),
)


# ---- RoAd ---------------------------------------------------------------------------------------------------


def _road_options(entry: Group, config: Any, given: Mapping[str, Any], weight: tuple[int, ...]) -> dict[str, Any]:
    """The variant, where the base's outputs tell.  Raises `BrokenAdapter` for a group_size that cannot be the outputs'."""
    _insist_on_groups(entry, config, weight)
    if "variant" in entry.options or "theta" not in entry.tensors or not weight:
        return {}
    ratio = entry.tensors["theta"].numel / weight[0]
    found = next((name for name, known in _VARIANTS.items() if known == ratio), None)
    return {} if found is None else {"variant": found}


def _insist_on_groups(entry: Group, config: Any, weight: tuple[int, ...]) -> None:
    theta, size = entry.tensors.get("theta"), entry.options.get("group_size")
    variant = entry.options.get("variant")
    if theta is None or size is None or not (weight or variant):
        return
    outputs = weight[0] if weight else int(theta.numel / _VARIANTS[variant])
    if size <= 0 or size % 2 or outputs % size:
        where = "--set" if config is None or config.certainty is Certainty.GIVEN else config.where
        raise errors.BrokenAdapter(
            f"{theta.where}: {entry.name} has {outputs} outputs, which groups of {size} ({where} says group_size {size}) do not "
            "divide evenly; --set group_size=N says another, which must be even and divide them; tensors cannot tell which"
        )


ROAD = PeftMethod(
    "ROAD",
    "road",
    "RoAd",
    rank="",
    ranks_in="",
    settings=(
        Setting(
            "variant",
            (str,),
            "road_1",
            asked=True,
            choices=tuple(_VARIANTS),
            about="how many angles a pair of outputs has: road_1 one, road_2 two, road_4 four",
        ),
        Setting("group_size", (int,), 64, asked=True, about="which outputs are turned together; a wrong one loads too"),
    ),
    narrowing=(),
    known=("init_weights",),
    defaults=defaults("ROAD", init_weights=True, modules_to_save=None),
    options=_road_options,
)


# ---- PSOFT --------------------------------------------------------------------------------------------------


def _psoft_shown(update: Update) -> dict[str, bool]:
    """What an update's tensors say for all."""
    return {
        "psoft_orth": len(update.tensors["R"].shape) == 1,
        "psoft_mag_a": "vector_a" in update.tensors,
        "psoft_mag_b": "vector_b" in update.tensors,
    }


def _psoft_fields(updates: Sequence[Update], base: Base) -> dict[str, Any]:
    """What is learned beside the rotation.  Raises `CannotRepresent` where modules differ."""
    shown = _psoft_shown(updates[0])
    for update in updates[1:]:
        for name, value in _psoft_shown(update).items():
            if value != shown[name]:
                raise errors.CannotRepresent(
                    f"{updates[0].name} and {update.name} differ in {name}; a config of PSOFT says it for all"
                )
    return dict(shown)


def _psoft_problems(config: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    """Where the config says other parameters than there are."""
    for update in updates:
        for name, value in _psoft_shown(update).items():
            said = config.fields.get(name, True)
            if said is not None and bool(said) != value:
                yield (
                    f"{update.tensors['R'].where}: the tensors of {update.module} show {name}={str(value).lower()}, but "
                    f"{config.where} says {str(bool(said)).lower()}; --set {name}=null derives it anew"
                )


PSOFT = PeftMethod(
    "PSOFT",
    "psoft",
    "PSOFT",
    ranks_in="",
    rank_default=32,
    shaping=("psoft_orth", "psoft_mag_a", "psoft_mag_b"),
    settings=(
        Setting(
            "ab_svd_init",
            (str,),
            "psoft_init",
            choices=("psoft_init", "pissa_init"),
            about="which factor has the singular values",
        ),
        Setting("psoft_svd", (str,), "full", choices=("full", "lowrank"), about="how they are computed"),
        Setting("psoft_svd_lowrank_niter", (int,), 10, about="steps of a low-rank computation", least=0, most=1000),
        Setting("random_seed", (int,), 0, about="seed of a low-rank computation", least=0, most=LAST_SEED),
        Setting("use_cayley_neumann", (bool,), False, about="whether a series stands for the exact rotation"),
        _SERIES[1],
        Setting("cayley_neumann_eps", (float,), None, about="how large the generator of that series may be"),
    ),
    flags=("fan_in_fan_out",),
    known=("psoft_alpha", "psoft_dropout", "init_weights"),
    defaults=defaults("PSOFT", psoft_alpha=32, psoft_dropout=0.0, init_weights=True, modules_to_save=None),
    fields=_psoft_fields,
    problems=_psoft_problems,
    needs="base weights; the signs of its singular vectors are the factorisation's",
)


# ---- GLoRA --------------------------------------------------------------------------------------------------

_PATHS = {"config_A_B": "AB", "config_C": "C", "config_D_E": "DE"}
"""The letters of each field."""
_FORMS = {
    "config_A_B": ("lora", "vector", "constant", "none"),
    "config_C": ("lora", "vector", "none"),
    "config_D_E": ("vector", "constant", "none"),
}
"""The forms that peft has for each."""


def _form(update: Update, letters: str) -> str | None:
    """How the letters are parametrised; None where nothing is there that says it."""
    for letter in letters:
        if f"{letter}.Xd" in update.tensors:
            return "lora"
        tensor = update.tensors.get(f"{letter}.X")
        if tensor is not None:
            single = tensor.shape == (1,) and letter != "C"
            return "constant" if single else "vector"
        if f"{letter}.zeros" in update.tensors:
            return "none"
    return None


def _glora_fields(updates: Sequence[Update], base: Base) -> dict[str, Any]:
    """The forms of the letters.  Raises `CannotRepresent` where modules differ."""
    out: dict[str, Any] = {}
    for name, letters in _PATHS.items():
        forms = {form for u in updates if (form := _form(u, letters)) is not None}
        if name != "config_A_B" and len(forms) > 1:
            forms.discard("none")  # modules without a bias have nothing there, whatever the config says
        if name == "config_D_E" and forms == {"constant", "vector"}:
            # A module of one output: its only number reads as either.
            alone = {u.tensors["D.X"].numel for u in updates if "D.X" in u.tensors and _form(u, letters) == "constant"}
            one_output = all(_outputs(u, base) == 1 for u in updates if _form(u, letters) == "constant")
            forms = {"vector"} if alone == {1} and one_output else forms
        if len(forms) > 1:
            raise errors.CannotRepresent(
                f"{updates[0].name} and others differ in {name} ({', '.join(sorted(forms))}); a config of GLoRA says it for all"
            )
        out[name] = next(iter(forms), "none")
    return out


def _outputs(update: Update, base: Base) -> int | None:
    shape = base.shapes.get(update.module)
    if shape:
        return shape[0]
    known: int | None = maths("glora").sizes(update)[0]
    return known


def _glora_problems(config: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    """Where the config says other forms than there are."""
    usual = {"config_A_B": "lora", "config_C": "lora", "config_D_E": "constant"}
    for name, forms in _FORMS.items():
        said = config.fields.get(name, usual[name])
        if said is not None and said not in forms:
            yield (
                f"{config.where}: {name} is {said!r:.60}; peft has {', '.join(forms)}; --set {name}=null derives it from the "
                "tensors"
            )
            return
    for update in updates:
        for name, letters in _PATHS.items():
            form, said = _form(update, letters), config.fields.get(name, usual[name])
            if said is None or form in (None, said) or (form == "none" and name != "config_A_B"):
                continue
            if (form, said) == ("constant", "vector") and _outputs(update, base) in (1, None):
                continue
            tensor = next(t for role, t in update.tensors.items() if role[0] in letters)
            yield (
                f"{tensor.where}: is {form} of {name}, but {config.where} says {said}; --set {name}=null derives it anew"
            )


def _glora_ranks(updates: Sequence[Update], base: Base) -> dict[str, int]:
    """r of each module; where it has no factors, that of the others, or peft's default."""
    own = {u.module: METHODS[u.method].rank(u) for u in updates}
    usual = next((rank for rank in own.values() if rank), 8)
    return {module: rank or usual for module, rank in own.items()}


GLORA = PeftMethod(
    "GLORA",
    "glora",
    "GLoRA",
    ranks_in="",
    shaping=tuple(_PATHS),
    narrowing=(),
    biases=True,
    bias_only="glora_only",
    known=("bias", "init_weights"),
    defaults=defaults("GLORA", bias="none", init_weights=True, modules_to_save=None),
    fields=_glora_fields,
    problems=_glora_problems,
    ranks=_glora_ranks,
)
