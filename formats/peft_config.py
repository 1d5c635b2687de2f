"""PEFT's configs: what they say of a module's rank, scale and targets, and how to say it of a set of modules.

They stand in `adapter_config.json` of a PEFT folder and, with each field prefixed by its component, in the header
of a diffusers file (`lora_adapter_metadata`).  Which fields a method has is a row of `peft_kinds`.  Sources:
huggingface/peft 0.21.2 `tuners/*/config.py`, `tuners/tuners_utils.py` (`check_target_module_exists`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from types import NoneType
from typing import Any

from adapterops_formats.peft_kinds import KIND_OF, KINDS, row_of
from adapterops_formats.peft_kinds.lora import LORA
from adapterops_formats.peft_kinds.row import PeftMethod, Setting
from adapterops_formats.peft_patterns import (
    Base,
    in_layers,
    looked_up,
    named,
    pattern_table,
    shuts_out,
    target_modules,
)

from adapterops.plugin import METHODS, Adapter, Certainty, Fact, Request, ScaleRule, Update, errors, is_number

Config = Mapping[str, Any]

MUTATING = ("pissa", "olora", "corda", "lora_ga")
"""Values of `init_lora_weights` (or their beginnings) after which the base weights are no longer the published ones."""
ALPHA_DEFAULT = 8
"""What peft takes where a config of these types says no alpha."""
_EIGHT = ("LORA", "ADALORA", "LOHA", "LOKR")
_CHOICES = {
    "task_type": (*(None, "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"),),
    "peft_type": tuple(KINDS),
}
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "base_model_name_or_path": ((str, NoneType), "a name, or null"),
    "revision": ((str, NoneType), "a name, or null"),
    "auto_mapping": ((dict, NoneType), "a table, or null"),
    "inference_mode": ((bool, NoneType), "true or false"),
    "lora_dropout": ((int, float), "a number"),
}
"""Fields that reading has no use for: their types, and those in words; null is no dropout."""
_OF_CLASSES = frozenset(
    {
        *("runtime_config", "megatron_config", "megatron_core", "loftq_config", "peft_version", "unsloth_fixed"),
        *("swift_type", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"),
    }
)
"""Fields that say how a class runs or trains an adapter, and never what its tensors mean (the last four are of ms-swift's own
tuners, modelscope/ms-swift `swift/tuners/lora.py`, whose `use_merged_linear` and `use_qa_lora` do mean something)."""


def mistyped(fields: Config) -> Iterator[tuple[str, str]]:
    """The fields whose types reading has no use for and that peft would fail with, and what each must be."""
    for name, (types, wanted) in _TYPES.items():
        value = fields.get(name)
        if name in fields and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types)):
            yield name, wanted


def check_given(fields: Config, method: PeftMethod = LORA, removed: Collection[str] = ()) -> None:
    """Raise `UsageError` for a field of `--set` that the method's config does not have, or a value it would refuse.

    null takes a field of `removed` out of the config that it stands in, whatever it is.
    """
    known = method.all_fields
    for name, value in fields.items():
        if name not in known and value is None and name in removed:
            continue
        if name not in known:
            import difflib  # only ever needed for a message

            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise errors.UsageError(
                f"--set {name}: PEFT's {method.title} config has no such field{hint}; it has {', '.join(sorted(known))}"
            )
        setting = next((s for s in method.settings if s.name == name), None)
        if setting is not None:
            setting.check(value, "--set")
        choices = ("none", "all", method.bias_only) if name == "bias" else _CHOICES.get(name, (value,))
        if value not in choices:
            raise errors.UsageError(f"--set {name}={value}: must be one of {', '.join(map(str, choices))}")
    for name, wanted in mistyped(fields):
        raise errors.UsageError(f"--set: {name} is {json.dumps(fields[name], default=str)[:80]}, not {wanted}")


def refuse_scale(fields: Config, title: str) -> None:
    """Raise `UsageError` where `--set` says a scale to a file that has no config to say it in."""
    # The rows of all types are looked at only where there is something to look for.
    name = next((n for method in KINDS.values() for n in method.scale if n in fields), None) if fields else None
    if name is not None:
        raise errors.UsageError(
            f"--set {name}: the input is {title} and keeps no config; --alpha X says the alpha of modules that have none"
        )


def _bad(where: str, name: str, value: object, wanted: str, fault: str = "config-type") -> errors.AdapterOpsError:
    return errors.UnreadableFile(f"{where}: {name} is {json.dumps(value, default=str)[:80]}, not {wanted}", fault=fault)


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """A checked config and the place it stands in."""

    fields: Config
    where: str
    certainty: Certainty = Certainty.READ
    method: PeftMethod = LORA

    @classmethod
    def parse(cls, fields: Config, where: str, method: PeftMethod = LORA) -> PeftConfig:
        """Check the fields that have a meaning here; `method` is that of a config which does not say its own.

        Raises `UnreadableFile` for a field of the wrong type, `UnsupportedFormat` for another method, or for an
        option that changes the tensors' meaning and is not modelled.
        """
        method = kind_named(fields.get("peft_type") or method.kind, where)
        for name, why in method.refused.items():
            if fields.get(name):
                raise errors.UnsupportedFormat(f"{where}: {name} is set ({why}); this version does not convert that")
        if method.rank or method.alpha:
            _check_scale(fields, where, method)
        for setting in method.settings:
            setting.check(fields.get(setting.name), where)
            _check_within(fields, where, setting)
        _check_names(fields, where, method)
        for name, table in fields.items():
            # Patterns of whatever field, before anything is matched by them.
            for key in table if name.endswith("_pattern") and isinstance(table, Mapping) else ():
                _compile(where, name, f"(.*\\.)?({key})$")
        flags = (*method.flags, method.rslora, *(n for n, _ in method.roles), "use_effective_conv2d", "decompose_both")
        for name in flags:
            if not isinstance(fields.get(name, False), (bool, NoneType)):
                raise _bad(where, name, fields[name], "true or false")
        factor = fields.get("decompose_factor", -1)
        if "decompose_factor" in method.shaping and type(factor) not in (int, NoneType):
            raise _bad(where, "decompose_factor", factor, "a number of pieces, -1, or null")
        return cls(fields, where, method=method)

    @classmethod
    def lenient(
        cls, fields: Config, where: str, method: PeftMethod, tell: Callable[[errors.AdapterOpsError], None]
    ) -> PeftConfig:
        """What can be understood of a config: fields that are wrong are told of and left out.

        A rank that is wrong is then that of the tensors; an alpha that is wrong or missing is peft's own default.
        """
        kept = dict(fields)
        try:
            cls.parse(fields, where, method)
        except errors.AdapterOpsError:
            for name, value in fields.items():
                try:
                    cls.parse({name: value}, where, method)
                except errors.AdapterOpsError as error:
                    tell(error)
                    del kept[name]
                    if name == method.rank:
                        kept[name] = None
        if method.kind in _EIGHT:
            kept.setdefault(method.alpha, ALPHA_DEFAULT)
        return cls.parse(kept, where, method)

    @property
    def states_alpha(self) -> bool:
        """Whether the config says an alpha at all, or needs none."""
        return not self.method.alpha or self.method.alpha in self.fields

    def rank(self, module: str) -> int | None:
        """The rank of a module; None where the field is null, which leaves it to the tensors."""
        method = self.method
        patterns = (self.fields.get(method.ranks_in) if method.ranks_in else None) or {}
        found = looked_up(patterns, module, self.fields.get(method.rank, method.rank_default))
        return None if found is None else int(found)

    def setting(self, setting: Setting, module: str) -> Any:
        """What the config says of a module's `setting`; peft's default where it says nothing."""
        value = self.fields.get(setting.name)
        patterns = self.fields.get(setting.within) if setting.within else None
        return looked_up(patterns or {}, module, setting.default if value is None else value)

    def rule(self, module: str) -> ScaleRule:
        """The scale rule of a module."""
        rslora = bool(self.method.rslora and self.fields.get(self.method.rslora, False))
        if not self.method.alpha or not self.states_alpha:
            return ScaleRule(rslora=rslora)
        within = self.method.alphas_in
        patterns = (self.fields.get(within) if within else None) or {}
        alpha = looked_up(patterns, module, self.fields[self.method.alpha])
        source = f"{self.where}: {self.method.alpha}" + (f" or {within}" if within else "")
        return ScaleRule(float(alpha), rslora, self.certainty, source)

    def agrees(self, update: Update) -> bool:
        """Whether the config gives the update the scale that it has."""
        if update.alpha is None:
            return not self.method.alpha
        rule, method = self.rule(update.module), METHODS[update.method]
        if method.rank(update) is None:
            return rule.alpha == self.rank(update.module)  # scale 1, whatever alpha the update has
        return (rule.alpha, rule.rslora) == alpha_of(update, self.method)

    def targets(self, module: str) -> bool:
        """Whether peft would put an adapter on `module`, were it in the base (True where that cannot be told)."""
        fields = self.fields
        if not self.method.targeted:
            return True
        excluded, wanted = fields.get("exclude_modules"), fields.get("target_modules")
        if shuts_out(fields.get("modules_to_save") or (), module):
            return False
        if wanted is None:
            return True
        if excluded and named(module, excluded):
            return False
        if wanted == "all-linear":
            return True
        if not named(module, wanted):
            return False
        layers = fields.get("layers_to_transform")
        if isinstance(wanted, str) or layers is None or layers == []:
            return True
        return in_layers(module, layers, fields.get("layers_pattern"))

    @property
    def mutated_init(self) -> str | None:
        """The way of initialising that changed the base weights, if there was one."""
        init = str(self.fields.get("init_lora_weights", "")).lower()
        return init if init.startswith(MUTATING) else None


def rescaled(adapter: Adapter, config: PeftConfig, request: Request) -> Adapter:
    """The adapter under a config whose r is not that of the tensors, with the scale that the user means.

    Raises `Conflict` where the user has not said it: alpha may have been meant beside the config's r, or the tensors'.
    """
    method, given = config.method, request.alpha
    stated = adapter.as_stated()
    own = adapted(stated, method) if method.alpha else []
    told = method.divided(config, own) if own else {}
    wrong = {module: pair for module, pair in told.items() if pair[0] != pair[1]}
    answered = given is not None or any(request.fields.get(n) is not None for n in (*method.scale, "r", method.divisor))
    if wrong and not answered:
        raise errors.Conflict(_two_scales(config, own, wrong))
    if isinstance(given, float) and not wrong:
        other = next((u for u in own if u.alpha is not None and u.alpha.value != given), None)
        if other is not None:
            raise errors.Conflict(
                f"{next(iter(other.tensors.values())).where}: --alpha {given:g}, but {config.where} says {other.alpha} for "
                f"{other.name}, whose rank it has right; leave --alpha out"
            )
    if given is None:
        return adapter
    out = []
    for update, named_so in zip(adapter, stated, strict=True):
        if update.method in method.methods and named_so.module in wrong:
            said: Fact[float | None] | None = update.alpha
            if isinstance(given, float):
                said = Fact(given, Certainty.GIVEN, "--alpha")
            update = method.believed(replace(update, alpha=said))
        out.append(update)
    return adapter.with_updates(out)


def _two_scales(config: PeftConfig, updates: Sequence[Update], wrong: Mapping[str, tuple[int, int]]) -> str:
    """What the scale was by a config, and what it would be by the tensors."""
    method = config.method
    first = next(u for u in updates if u.module in wrong)
    said, has = wrong[first.module]
    alpha, rslora = config.rule(first.module)[:2]
    alpha = alpha or 0.0
    root = sqrt if rslora else float
    sign = "√" if rslora else ""
    kept = {}
    for module, (one, two) in wrong.items():
        kept[module] = number(float(f"{(config.rule(module).alpha or 0.0) * root(two) / root(one):.6g}"))
    if len({*kept.values()}) == 1:
        keeps = f"--alpha {kept[first.module]:g} keeps the scale {alpha / root(said):.6g}"
    elif method.alphas_in:
        usual, table = pattern_table(
            {u.module: kept.get(u.module, config.rule(u.module).alpha or 0.0) for u in updates}, Base()
        )
        keeps = f"--set {method.alpha}={usual:g} --set {method.alphas_in}={as_argument(table)} keeps the scales"
    else:
        keeps = "no one alpha keeps the scales of all modules"
    name = f"({method.divisor})" if " " in method.divisor else method.divisor
    other = f"; --set {name}={said} keeps both" if name in method.shaping else ""
    return (
        f"{next(iter(first.tensors.values())).where}: is of rank {has}, but {config.where} says {method.divisor} {said}: "
        f"the scale was {method.alpha}/{sign}{name} = {alpha:g}/{sign}{said} = {alpha / root(said):.6g}; with the tensors' "
        f"rank {has} it would be {alpha / root(has):.6g}: --alpha {alpha:g} keeps alpha, {keeps}{other}"
    )


def alpha_of(update: Update, method: PeftMethod) -> tuple[float | None, bool]:
    """The alpha that a config must say, and whether by √r; a config without that rule says alpha · √r."""
    if update.alpha is None or update.alpha.value is None:
        return None, update.rslora
    if update.rslora and not method.rslora:
        return (METHODS[update.method].scale(update) or 0.0) * (METHODS[update.method].rank(update) or 1), False
    return update.alpha.value, update.rslora


def kind_named(kind: object, where: str, shown: PeftMethod | None = None) -> PeftMethod:
    """The row of a `peft_type`; `shown` is the one whose tensors the file has, where they show one.

    Raises `UnsupportedFormat` for one that PEFT does not have.
    """
    name = str(kind).upper()
    if name in KINDS:
        return KINDS[name]
    if shown is not None:
        hint = (
            f"; the names of its tensors are {shown.title}'s: if they mean what {shown.title}'s do, "
            f"--set peft_type={shown.kind} reads them so"
        )
    else:
        import difflib  # only ever needed for a message

        near = difflib.get_close_matches(name, KINDS, n=1, cutoff=0.8)
        hint = f"; did its writer mean {near[0]}? --set peft_type={near[0]}" if near else ""
    raise errors.UnsupportedFormat(
        f"{where}: peft_type is {name[:40]}, which is no method of peft 0.21 (a fork's, or a later peft's){hint}; "
        "adapterops methods lists those that are known",
        fault="peft-type-unknown",
    )


def refuse_unknown(config: PeftConfig) -> None:
    """Raise `UnsupportedFormat` for a field that says something and that the method's config does not have."""
    for name in unknown_fields(config.method, config.fields):
        raise errors.UnsupportedFormat(
            f"{config.where}: {str(name)[:60]} is {json.dumps(config.fields[name], default=str)[:60]}, a field that the "
            f"{config.method.title} config of PEFT 0.21 "
            "does not have (a later version's, or a fork's); what it does to the tensors is not known; if it does "
            f"nothing to them, --set {str(name)[:60]}=null takes it out"
        )


def unknown_fields(method: PeftMethod, fields: Config) -> list[str]:
    """The fields that say something and that the method's config does not have."""
    known = {*method.all_fields, *_OF_CLASSES}
    return [n for n, v in fields.items() if n not in known and v not in (None, False, "", "none", 0, [], {})]


def _check_within(fields: Config, where: str, setting: Setting) -> None:
    """Raise `UnreadableFile` for a table of exceptions that is none."""
    table = (fields.get(setting.within) if setting.within else None) or {}
    if not isinstance(table, Mapping):
        raise _bad(where, setting.within, table, "a table of patterns")
    for key, value in table.items():
        setting.check(value, f"{where}: {setting.within}[{key!r}]")
        _compile(where, setting.within, f"(.*\\.)?({key})$")


def _check_scale(fields: Config, where: str, method: PeftMethod) -> None:
    rank = fields.get(method.rank, method.rank_default) if method.rank else 1
    if rank is not None and (type(rank) is not int or rank <= 0):
        raise _bad(where, method.rank, rank, "a positive number")
    alpha = fields.get(method.alpha, 8) if method.alpha else 1
    if not is_number(alpha):
        raise _bad(where, method.alpha, alpha, f"a number (--set {method.alpha}=X says it)")
    tables = (method.ranks_in if method.rank else "", method.alphas_in if method.alpha else "")
    for name in filter(None, tables):
        pattern = fields.get(name) or {}
        if not isinstance(pattern, Mapping):
            raise _bad(where, name, pattern, "a table of patterns")
        for key, value in pattern.items():
            ranks = name == method.ranks_in
            if not is_number(value) or (ranks and (value != int(value) or value <= 0)):
                wanted = "a rank" if ranks else "a number"
                raise _bad(where, f"{name}[{key!r}]", value, wanted)
            _compile(where, name, f"(.*\\.)?({key})$")


def _check_names(fields: Config, where: str, method: PeftMethod) -> None:
    for name in ("target_modules", "exclude_modules", *(n for n in method.shaping if n == "feedforward_modules")):
        names = fields.get(name)
        if isinstance(names, str):
            _compile(where, name, names)
        elif names is not None and not _is_names(names):
            raise _bad(where, name, names, "a list of names, a pattern, or null")
    saved = fields.get("modules_to_save")
    if saved is not None and not _is_names(saved):
        raise _bad(where, "modules_to_save", saved, "a list of names or null")
    for name in saved or ():
        _compile(where, "modules_to_save", name)
    layers = fields.get("layers_to_transform")
    if layers is not None and type(layers) is not int and not _is_list_of(layers, int):
        raise _bad(where, "layers_to_transform", layers, "a layer number, a list of them, or null")
    patterns = fields.get("layers_pattern")
    if patterns is not None and not isinstance(patterns, str) and not _is_names(patterns):
        raise _bad(where, "layers_pattern", patterns, "a name, a list of them, or null")
    for name in [patterns] if isinstance(patterns, str) else patterns or ():
        _compile(where, "layers_pattern", name)


_ATOM = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?#[^)]*\)|[()]|[*+]|\{\d*,?\d*\}|.", re.DOTALL)
"""What a regular expression is made of: escapes, classes, comments, brackets, repeats, everything else."""
_MOST_REPEATS = 16


def _repeats(pattern: str) -> tuple[int, bool]:
    """How many repeats a pattern has, and whether one stands around another (`(a+)*`): such take exponential
    time on a name that does not match."""
    groups, closed, count = [False], False, 0
    for match in _ATOM.finditer(pattern):
        atom, was = match[0], closed
        closed = False
        if atom == "(":
            groups.append(False)
        elif atom == ")" and len(groups) > 1:
            closed = groups.pop()
            groups[-1] |= closed
        elif atom in "*+" or (atom[0] == "{" and len(atom) > 2):
            count += 1
            if was:
                return count, True
            groups[-1] = True
    return count, False


def _compile(where: str, name: str, pattern: str) -> None:
    count, nested = _repeats(pattern) if len(pattern) <= 100_000 else (0, True)
    if nested or count > _MOST_REPEATS:
        wanted = (
            f"a pattern that surely ends in bounded time (a repeat inside a repeat?); --set {name}=null leaves it out"
        )
        raise _bad(where, name, pattern, wanted, "config-slow-pattern")
    try:
        # By itself, and as peft puts it into patterns of its own (flags may stand only at the beginning of one).
        re.compile(pattern)
        re.compile(f"(.*\\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise _bad(where, name, pattern, f"a regular expression ({error})", "config-pattern") from error


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(type(v) is kind for v in value)


def _is_names(value: object) -> bool:
    return _is_list_of(value, str)


def plural(count: int) -> str:
    """A number of modules, in words."""
    return f"{count} module" + ("s" if count != 1 else "")


def in_short(sentence: str, where: str) -> str:
    """What a sentence of `describes` says of a tensor, without paths and without what to do about it; "" where of none.

    `where` is the config that it was asked of.
    """
    told = sentence.partition("; --set")[0].partition(", but ")[0]
    at = told.find(": tensor ")
    return "" if at < 0 else told[at + 2 :].replace(where, "the config")


def number(value: float) -> int | float:
    """A number as people write it: 16, not 16.0."""
    return int(value) if value == int(value) else value


def adapted(updates: Sequence[Update], method: PeftMethod) -> list[Update]:
    """The updates that are the method's own, without what is saved beside them."""
    return [u for u in updates if u.method in method.methods]


def method_of(updates: Sequence[Update]) -> PeftMethod:
    """The method of the updates of one component.  Raises `CannotRepresent` for two (a config knows one)."""
    first: dict[str, Update] = {}
    for update in updates:
        if update.method in KIND_OF:
            first.setdefault(KIND_OF[update.method], update)
    if len(first) > 1:
        # Rows of an embedding that are trained beside another method are that method's.
        first.pop("TRAINABLE_TOKENS", None)
    if len(first) > 1:
        one, two = list(first.values())[:2]
        raise errors.CannotRepresent(
            f"{one.name} has {row_of(one.method).title} and {two.name} {row_of(two.method).title}; a PEFT config is "
            "for one method; write it as --to kohya, or split it into two files"
        )
    return KINDS[next(iter(first))] if first else LORA


_MAGNITUDES = (
    "; --to kohya holds magnitudes module by module, and adapterops merge --method svd --base-weights BASE folds them into "
    "plain LoRA"
)


def from_updates(
    updates: Sequence[Update], base: set[str] | Base | None, optional_prefix: str = "", method: PeftMethod = LORA
) -> dict[str, Any]:
    """The fields of `method.derived` that describe the updates of one component, but for what its shapes decide.

    `base` are the base's modules where they are known.  Raises `Conflict` where modules have different scale rules
    (a config knows one).
    """
    if not isinstance(base, Base):
        base = Base(frozenset(base) if base is not None else None, optional_prefix)
    own = adapted(updates, method)
    if not own:
        raise errors.CannotRepresent(
            f"{updates[0].name}: nothing but {METHODS[updates[0].method].title} is adapted there, and a PEFT folder of "
            f"{method.title} needs modules of its own; write it as --to kohya, or leave it out with --allow-drop"
        )
    fields: dict[str, Any] = {}
    if method.targeted:
        modules = {u.module for u in own if u.method not in method.bare}
        listed = all(u.module for u in own)  # an update of the whole component does not say which modules it is for
        # peft would look for its own idea of a model's modules, were there no list.
        fields["target_modules"] = (target_modules(modules, base) if modules else []) if listed else None
    if method.rank:
        fields |= _rank_fields(own, base, method)
    if method.alpha:
        fields |= _scale_fields(own, base, method)
    _insist_on_settings(own, method)
    for setting in method.settings:
        fields |= _setting_fields(own, base, method, setting)
    for name, role in method.roles:
        having = [u for u in own if role in u.tensors]
        if having and len(having) != len(own):
            lacking = next(u for u in own if role not in u.tensors)
            raise errors.CannotRepresent(
                f"{having[0].name} has a {role} and {lacking.name} has none; a PEFT config says {name} for all or none"
                + (_MAGNITUDES if role == "magnitude" else "")
            )
        if having:
            fields[name] = True
    return fields


def _scale_fields(updates: Sequence[Update], base: Base, method: PeftMethod) -> dict[str, Any]:
    rules = {alpha_of(u, method)[1] for u in updates}
    if len(rules) > 1:
        raise errors.Conflict("some modules are scaled by alpha/rank and some by alpha/√rank; a config holds one rule")
    ranks = method.ranks(updates, base) if any(METHODS[u.method].rank(u) is None for u in updates) else {}
    alphas: dict[str, float] = {}
    for update in updates:
        alpha = alpha_of(update, method)[0]
        if METHODS[update.method].rank(update) is None:
            alpha = float(ranks[update.module])
        if alpha is not None:
            alphas[update.module] = number(alpha)
    alpha, pattern = pattern_table(alphas, base)
    if pattern and not method.alphas_in:
        other = next(module for module, value in alphas.items() if value != alpha)
        raise errors.CannotRepresent(
            f"{other} has alpha {alphas[other]} and other modules {alpha}; a config of {method.title} says one for all"
        )
    fields: dict[str, Any] = {method.alpha: alpha, **({method.alphas_in: pattern} if method.alphas_in else {})}
    if method.rslora:
        fields[method.rslora] = rules.pop() if rules else False
    return fields


def _rank_fields(updates: Sequence[Update], base: Base, method: PeftMethod) -> dict[str, Any]:
    """r and its exceptions.  Raises `CannotRepresent` for exceptions that the method's config cannot say."""
    ranks = method.ranks(updates, base)
    r, pattern = pattern_table(ranks, base)
    if method.ranks_in:
        return {method.rank: r, method.ranks_in: pattern}
    if pattern:
        other = next(module for module, rank in ranks.items() if rank != r)
        raise errors.CannotRepresent(
            f"{other} has rank {ranks[other]} and other modules {r}; a config of {method.title} says one {method.rank} for all"
        )
    return {method.rank: r}


def _insist_on_settings(updates: Sequence[Update], method: PeftMethod) -> None:
    """Raise `UnknownFact` for settings that nothing has said, all at once."""
    silent = [(s, u) for s in method.settings for u in updates if s.asked and s.name not in u.options]
    if not silent:
        return
    asked = {s.name: s for s, _ in silent}
    names = " and ".join(asked)
    told = "; ".join(f"{s.name}: {s.about}" for s in asked.values())
    raise errors.UnknownFact(
        f"{next(iter(silent[0][1].tensors.values())).where}: {names} of {method.title} {'is' if len(asked) == 1 else 'are'} "
        f"not in the tensors, and no config says {'it' if len(asked) == 1 else 'them'} ({told}); say "
        + " ".join(f"--set {name}=VALUE" for name in asked)
    )


def _setting_fields(updates: Sequence[Update], base: Base, method: PeftMethod, setting: Setting) -> dict[str, Any]:
    """What the config must say of a setting.

    Raises `CannotRepresent` for exceptions that the config cannot say.
    """
    values = {u.module: u.options.get(setting.name, setting.default) for u in updates}
    hashable = {module: _frozen(value) for module, value in values.items()}
    if len(set(hashable.values())) < 2:
        value = next(iter(values.values()))
        return {} if value is None else {setting.name: value, **({setting.within: {}} if setting.within else {})}
    if not setting.within:
        one, two = list({v: m for m, v in hashable.items()}.values())[:2]
        raise errors.CannotRepresent(
            f"{one} has {setting.name} {as_json(values[one])} and {two} {as_json(values[two])}; a config of "
            f"{method.title} says one for all"
        )
    usual, table = pattern_table(values, base)
    return {setting.name: usual, setting.within: table}


def as_json(value: Any) -> str:
    """A value as a config has it."""
    return json.dumps(value, default=str, ensure_ascii=False)


def as_argument(value: Any) -> str:
    """A value as `--set` takes it on a command line."""
    text = as_json(value)
    return f"'{text}'" if isinstance(value, (list, tuple, dict)) or " " in text else text


def _frozen(value: Any) -> Any:
    """A value that can be counted."""
    return json.dumps(value, sort_keys=True) if isinstance(value, (list, dict, tuple)) else value


def describes(
    config: Config,
    where: str,
    updates: Sequence[Update],
    problem: Callable[[str], None],
    method: PeftMethod = LORA,
    base: Base | None = None,
) -> None:
    """Call `problem` with a sentence for everything that `config` and the tensors of `updates` say differently."""
    view = PeftConfig.parse(config, where, method)
    method = view.method
    for update in adapted(updates, method):
        tensor = update.tensors["B"] if method is LORA else next(iter(update.tensors.values()))
        rank = METHODS[update.method].rank(update)
        stated = view.rank(update.module) if method.rank else None
        if rank is not None and stated not in (None, rank):
            names = " or ".join(filter(None, (method.rank, method.ranks_in)))
            more = f", or --set {method.ranks_in}='{{\"…\": {rank}}}'" if method.ranks_in else ""
            problem(
                f"{tensor.where} has rank {rank}, but {where} says {stated} for it ({names}); --set {method.rank}={rank}{more}"
            )
        if update.module and update.method not in method.bare and not view.targets(update.module):
            narrowing = ", ".join(("target_modules", *method.narrowing[:1])) + (
                " or layers_to_transform" if "layers_to_transform" in method.narrowing else ""
            )
            problem(
                f"{tensor.where}: {where} targets no such module ({narrowing}), so peft would ignore this tensor; "
                "--set target_modules=null derives it anew"
            )
        for sentence in _other_settings(view, update):
            problem(sentence)
        for name, role in method.roles:
            if bool(config.get(name, False)) != (role in update.tensors):
                has = "has no" if config.get(name) else "has a"
                problem(
                    f"{tensor.where}: the module {has} {role}, but {where} says {name}="
                    f"{json.dumps(bool(config.get(name, False)))}; --set {name}={json.dumps(role in update.tensors)}"
                )
    for sentence in method.problems(view, adapted(updates, method), base or Base()):
        problem(sentence)


def contradictions(view: PeftConfig, updates: Sequence[Update]) -> Iterator[str]:
    """A sentence for everything that a config and the tensors say differently, but for ranks, targets and roles (DoRA's
    magnitudes): those are rules of their own."""
    own = adapted(updates, view.method)
    for update in own:
        yield from _other_settings(view, update)
    yield from view.method.problems(view, own, Base())


def _other_settings(view: PeftConfig, update: Update) -> Iterator[str]:
    """A sentence for each setting of which the update has another value than its config."""
    tensor = update.tensors["B"] if view.method is LORA else next(iter(update.tensors.values()))
    for setting in view.method.settings:
        said, has = view.setting(setting, update.module), update.options.get(setting.name)
        if setting.name in update.options and _frozen(said) != _frozen(has):
            yield (
                f"{tensor.where}: {setting.name} is {as_json(has)}, but {view.where} says {as_json(said)}; "
                f"--set {setting.name}={as_argument(has)}"
            )
