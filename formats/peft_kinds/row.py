"""What a row of the table of PEFT's methods says.

Source: huggingface/peft 0.21.2 `tuners/*/config.py`, `tuners/*/layer.py`, `utils/save_and_load.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from adapterops_formats.peft_patterns import Base

from adapterops.plugin import METHODS, Architecture, Group, LazyTensor, Update, errors

Fields = Callable[[Sequence[Update], Base], dict[str, Any]]
Problems = Callable[[Any, Sequence[Update], Base], Iterable[str]]
Ranks = Callable[[Sequence[Update], Base], dict[str, int]]
Shared = Mapping[str, LazyTensor]
Gathered = tuple[list[Update], dict[str, LazyTensor]]


def no_fields(updates: Sequence[Update], base: Base) -> dict[str, Any]:
    """Nothing follows from the shapes."""
    return {}


def _no_problems(config: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    return iter(())


def _own_ranks(updates: Sequence[Update], base: Base) -> dict[str, int]:
    return {u.module: METHODS[u.method].rank(u) or 0 for u in updates}


def _by_rank(config: Any, updates: Sequence[Update]) -> dict[str, tuple[int, int]]:
    ranks = {u.module: METHODS[u.method].rank(u) for u in updates}
    return {m: (said, rank) for m, rank in ranks.items() if rank and (said := config.rank(m)) is not None}


def _no_options(entry: Group, config: Any, given: Mapping[str, Any], weight: tuple[int, ...]) -> dict[str, Any]:
    return {}


def _as_today(entry: Group, config: Any) -> str:
    return ""


def _same(updates: list[Update]) -> list[Update]:
    return updates


def _all_listed(config: Any, architecture: Architecture | None) -> list[str]:
    return []


def _as_named(
    groups: list[Group], config: Any, given: Mapping[str, Any], architecture: Architecture | None, said: list[str]
) -> list[Group]:
    return groups


def _each_alone(updates: Sequence[Update]) -> str:
    return ""


def _as_it_is(update: Update) -> Update:
    return update


def weight_of(entry: Group, architecture: Architecture | None) -> tuple[int, ...]:
    """The shape of a group's module; () where the base is not known."""
    parts = architecture.components.values() if architecture is not None else ()
    return next((spec.shape for part in parts if (spec := part.spec(entry.name)) is not None), ())


def to_all(shared: Shared, members: Sequence[Group], architecture: Architecture | None) -> None:
    """Every module gets what the file holds once."""
    for entry in members:
        for role, tensor in shared.items():
            entry.tensors.setdefault(role, tensor)


LAST_SEED = (1 << 64) - 1
"""The largest number that generators start from."""


def is_finite(value: float) -> bool:
    """Whether a number is one, and no larger than arithmetic takes."""
    return abs(value) <= 1e300


class Setting(NamedTuple):
    """A field of a config that changes what the tensors mean and does not follow from them.

    It becomes an option of the update, under the field's name.  Where a config lacks the field, peft takes `default`.
    Where there is no config, `default` is *assumed*, and said; but where a wrong value would load and silently compute
    something else, the fact is `asked` for.  `within` names the field whose patterns give single modules other values.
    `least` and `most` bound a number, which is finite in any case.
    """

    name: str
    kinds: tuple[type, ...]
    default: Any = None
    asked: bool = False
    within: str = ""
    choices: tuple[Any, ...] = ()
    about: str = ""
    least: int | None = None
    most: int | None = None

    def check(self, value: Any, where: str) -> None:
        """Raise `UnreadableFile` for a value that the field cannot have."""
        typed = type(value) in self.kinds or (type(value) is int and float in self.kinds)
        if value is None or (typed and (not self.choices or value in self.choices) and self._is_within(value)):
            return
        wanted = ", ".join(map(str, self.choices)) or " or ".join(kind.__name__ for kind in self.kinds)
        if typed and type(value) in (int, float):
            low, high = (None if bound is None else f"{bound:,}" for bound in (self.least, self.most))
            wanted = f"from {low} to {high}" if low and high else f"at most {high}" if high else "a finite number"
        raise errors.UnreadableFile(f"{where}: {self.name} is {value!r:.80}; it must be {wanted}", fault="config-type")

    def _is_within(self, value: Any) -> bool:
        if type(value) not in (int, float):
            return True
        low, high = self.least, self.most
        return is_finite(value) and (low is None or low <= value) and (high is None or value <= high)


class PeftMethod(NamedTuple):
    """One `peft_type`.

    `method` is that of its updates, `also` further ones that may stand in the same adapter.
    `alpha`, `alphas_in` and `rslora` name the fields of a config that say the scale and its exceptions, `rank` and
    `ranks_in` those that say r and its exceptions ("" where there is none); `roles` the fields that say for all modules
    whether they have a tensor.
    `shaping` are fields that follow from the tensors' shapes and nothing else: `fields` derives them, `problems` names
    where a config contradicts the tensors, `ranks` gives r.  `settings` are fields that change what the tensors mean and
    do not follow from them.  `known` lists further fields, which only travel; `refused` those that change what the
    tensors mean and are not modelled, with the reason.

    `shared` are the roles that the file holds once for all modules: `spread` hands them out to the modules' groups (and
    may set options that depend on all of them), `gather` takes them back from the updates.  `options` says of one group
    what its keys and `settings` do not, given the config (a `PeftConfig`, or None), the user's fields and the weight's
    shape (() where the base is not known).  `today` turns a group that an earlier peft wrote into today's tensors, in
    place, and returns what was done ("" where nothing was).  `unlisted` names the modules of the base, in its order, that
    the adapter changes although the file has no tensor of their own.  `complete` sets options that depend on all updates and
    their shapes.
    """

    kind: str
    method: str
    title: str
    also: tuple[str, ...] = ()
    alpha: str = ""
    rslora: str = ""
    rank: str = "r"
    ranks_in: str = "rank_pattern"
    alphas_in: str = "alpha_pattern"
    rank_default: int = 8
    roles: tuple[tuple[str, str], ...] = ()
    shaping: tuple[str, ...] = ()
    nulls: tuple[str, ...] = ()
    """Fields of `shaping` for which null is a value like any other, and not one that was left out."""
    settings: tuple[Setting, ...] = ()
    narrowing: tuple[str, ...] = ("exclude_modules", "layers_to_transform", "layers_pattern")
    flags: tuple[str, ...] = ()
    shown: tuple[tuple[str, str], ...] = ()
    """Roles that show that tensors which are spelled alike are another type's, and that `peft_type` (soft prompts)."""
    targeted: bool = True
    """Whether `target_modules` says which modules are adapted (soft prompts have none)."""
    saves: bool = True
    """Whether `modules_to_save` may stand beside it."""
    tokens: bool = False
    """Whether `trainable_token_indices` may stand beside it."""
    biases: bool = False
    """Whether `bias` may say that biases are saved."""
    bias_only: str = "lora_only"
    """What `bias` says where the adapted modules' own are."""
    now: str = ""
    """The `peft_type` that today's peft has in its place, with at least its fields; it is read only then."""
    known: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()
    """Methods whose updates act on bare parameters of a module, which `target_modules` does not name."""
    legacy: tuple[str, ...] = ()
    """Fields of earlier releases, and facts of other writers, that say how tensors are read and are never written."""
    refused: Mapping[str, str] = {}
    defaults: Mapping[str, Any] = {}
    """What a config that is written anew says where nothing is known: fields that every peft with the method has."""
    shared: tuple[str, ...] = ()
    fields: Fields = no_fields
    problems: Problems = _no_problems
    ranks: Ranks = _own_ranks
    options: Callable[[Group, Any, Mapping[str, Any], tuple[int, ...]], dict[str, Any]] = _no_options
    today: Callable[[Group, Any], str] = _as_today
    spread: Callable[[Shared, Sequence[Group], Architecture | None], None] = to_all
    gather: Callable[[list[Update]], Gathered] | None = None
    unlisted: Callable[[Any, Architecture | None], list[str]] = _all_listed
    complete: Callable[[list[Update]], list[Update]] = _same
    together: Callable[[Sequence[Update]], str] = _each_alone
    """Why what one update computes changes where another module's is taken away; "" where it does not."""
    meant: Callable[[list[Group], Any, Mapping[str, Any], Architecture | None, list[str]], list[Group]] = _as_named
    """The groups under the methods and names that the config and the base give them; notes go to the last argument."""
    fitted: Callable[[Update], Update] = _as_it_is
    """The update in the form that today's layers of peft have.  Raises `CannotRepresent` where they have none."""
    divided: Callable[[Any, Sequence[Update]], dict[str, tuple[int, int]]] = _by_rank
    """By what a config divides each module's alpha, and what its tensors show in the place of that."""
    divisor: str = "r"
    """What messages call that."""
    believed: Callable[[Update], Update] = _as_it_is
    """The update with that number as its tensors show it."""
    needs: str = ""
    """For the table of methods: what is needed beside the tensors, in words."""
    lost: tuple[str, ...] = ()
    """Facts that no tensor holds and no search recovers, for the table of methods."""

    @property
    def methods(self) -> tuple[str, ...]:
        """Every method of its updates."""
        return (self.method, *self.also)

    @property
    def scale(self) -> tuple[str, ...]:
        """The fields that say a scale."""
        return tuple(name for name in (self.alpha, self.alphas_in if self.alpha else "", self.rslora) if name)

    @property
    def derived(self) -> tuple[str, ...]:
        """The fields that the tensors and their facts decide; the rest of a config only travels."""
        ranked = tuple(name for name in (self.rank, self.ranks_in if self.rank else "") if name)
        tokens = ("trainable_token_indices",) if self.tokens else ()
        roles = tuple(name for name, _ in self.roles)
        settings = tuple(n for s in self.settings for n in (s.name, s.within) if n)
        saved = ("modules_to_save",) if self.saves else ()
        targets = ("target_modules",) if self.targeted else ()
        return (*ranked, *self.scale, *roles, *self.shaping, *settings, *targets, *saved, *tokens)

    @property
    def all_fields(self) -> tuple[str, ...]:
        """Every field of the method's config: what `--set` may name."""
        return (*EVERYWHERE, *self.derived, *self.narrowing, *self.flags, *self.refused, *self.legacy, *self.known)

    def collect(self, updates: list[Update]) -> Gathered:
        """The updates without what the file holds once, and that.

        Raises `CannotRepresent` where modules differ in it.
        """
        if self.gather is not None:
            return self.gather(updates)
        shared: dict[str, LazyTensor] = {}
        out = []
        for update in updates:
            own = {role: t for role, t in update.tensors.items() if role not in self.shared}
            for role in self.shared:
                tensor = update.tensors.get(role)
                if tensor is not None and not same_tensor(shared.setdefault(role, tensor), tensor):
                    raise errors.CannotRepresent(
                        f"{tensor.where} and {shared[role].where} differ, but PEFT keeps one {role} of {self.title} for the "
                        "whole model"
                    )
            out.append(with_tensors(update, own))
        return out, shared


def with_tensors(update: Update, tensors: Mapping[str, LazyTensor]) -> Update:
    """The update with other tensors."""
    from dataclasses import replace

    return replace(update, tensors=tensors)


def same_tensor(one: LazyTensor, two: LazyTensor) -> bool:
    """Whether two tensors are the same bytes."""
    if one is two or (one.source is two.source and (one.start, one.dtype) == (two.start, two.dtype)):
        return one.shape == two.shape
    return (one.dtype, one.shape) == (two.dtype, two.shape) and bytes(one.read()) == bytes(two.read())


def defaults(kind: str, **own: Any) -> dict[str, Any]:
    """The fields of every config, and a method's own."""
    return {"peft_type": kind, "task_type": None, "base_model_name_or_path": None, "inference_mode": True, **own}


EVERYWHERE = (
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode"),
    "peft_version",
)
"""The fields of every config."""
