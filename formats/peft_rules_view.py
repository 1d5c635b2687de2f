"""A PEFT adapter as the rules about its config see it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary, ref

from adapterops_formats.peft_config import PeftConfig, kind_named
from adapterops_formats.peft_kinds import KINDS
from adapterops_formats.peft_kinds.lora import LORA
from adapterops_formats.peft_kinds.row import PeftMethod
from adapterops_formats.peft_patterns import Base

from adapterops.plugin import Update
from adapterops.validation.subject import Subject

CONFIG_NAME = "adapter_config.json"
_WRAPPED = ".base_layer"
_FEW = 256
"""Unknown keys whose names are looked at."""
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""What peft itself adds to `modules_to_save`, by `task_type` (`peft_model.py`)."""


class View:
    """The config of an adapter, and the modules that its keys name, whether their tensors are sound or not."""

    def __init__(self, subject: Subject) -> None:
        self._subject = ref(subject)
        self.where = subject.config_path
        self.weights = subject.weights
        recognised = subject.recognised
        self.is_peft = recognised is not None and recognised[0].name in ("peft", "miss")
        config = _config(subject)
        is_own = self.is_peft or (recognised is None and config is not None and "peft_type" in config)
        self.config: Mapping[str, Any] | None = config if is_own else None
        """The config as it stands in the file; None where there is none, or one of something else (MLX calls its so, too)."""

    @property
    def subject(self) -> Subject:
        """The adapter, which is not kept alive by this: it would hold its files open for as long as the process runs."""
        found = self._subject()
        assert found is not None  # a view is asked for by who has the subject
        return found

    @cached_property
    def parsed(self) -> PeftConfig | None:
        """What can be understood of the config; reading the adapter tells of the rest, or where that cannot be read, this."""
        if self.config is None:
            return None
        fields = dict(self.config)
        adapter = self.subject.adapter if self.is_peft else None
        if adapter is not None and len(adapter.config) == 1:
            # As reading understood it.
            fields = dict(next(iter(adapter.config.values())))
            return PeftConfig.parse(fields, self.where, self._kind(fields.get("peft_type")))
        if str(fields.get("peft_type")).upper() not in KINDS:
            return None
        kind = self._kind(fields["peft_type"])
        tell = (lambda error: None) if self.is_peft else self.subject.faults.append
        return PeftConfig.lenient({**fields, "peft_type": kind.kind}, self.where, kind, tell)

    @staticmethod
    def _kind(name: Any) -> PeftMethod:
        return kind_named(name, "") if str(name).upper() in KINDS else LORA

    @property
    def is_anothers(self) -> bool:
        """Whether the config is for another method than the tensors are of; that is told, and the rest is of no use."""
        stated = str(self.config.get("peft_type")).upper() if self.config is not None else ""
        return stated in KINDS and self.method.kind not in (stated, KINDS[stated].now)

    def lost(self, field: str) -> bool:
        """Whether the config says something in a field that could not be understood, which is told."""
        stated = self.config.get(field) if self.config is not None else None
        return bool(stated) and self.parsed is not None and not self.parsed.fields.get(field)

    @property
    def method(self) -> PeftMethod:
        """The row of the adapter's type; LoRA's where that is not known."""
        return self.parsed.method if self.parsed is not None else LORA

    @cached_property
    def keys(self) -> dict[str, list[str]]:
        """The adapted modules and their keys, without bare parameters, which `target_modules` does not name."""
        if not self.is_peft or self.subject.recognised is None:
            return {}
        bare = self._bare
        out: dict[str, list[str]] = {}
        for claim in self.subject.recognised[1].claims:
            if claim.suffix.method in self.method.methods and not claim.place.whole and claim.name not in bare:
                out.setdefault(claim.name, []).append(claim.key)
        return out

    @cached_property
    def _bare(self) -> set[str]:
        names = {
            _key_name(u.module, u.options) for u in self.subject.updates if u.method in self.method.bare and u.module
        }
        own = self.subject.recognised
        claims = own[1].claims if own is not None else ()
        return names | {c.name for c in claims if c.name.endswith(_WRAPPED) and c.suffix.method in self.method.methods}

    @cached_property
    def updates(self) -> list[Update]:
        """The updates that could be understood, under the names that the file and its config have for their modules."""
        adapter = self.subject.adapter if self.is_peft else None
        return [u for u in adapter.as_stated() if u.method in self.method.methods] if adapter is not None else []

    @property
    def is_whole(self) -> bool:
        """Whether every adapted module could be understood: only then do the tensors prove a config."""
        return bool(self.updates) and {u.module for u in self.updates} >= set(self.keys) and not self._bare

    @cached_property
    def unknown(self) -> list[str]:
        """What may be modules in the keys that nobody knows, which are told of: every name in them, to each of its dots."""
        found = self.subject.recognised[1].unclaimed if self.subject.recognised is not None else ()
        return list(dict.fromkeys(key[:at] for key in found[:_FEW] for at, letter in enumerate(key) if letter == "."))

    @cached_property
    def saved(self) -> dict[str, list[str]]:
        """The modules that are saved whole, and their keys."""
        out: dict[str, list[str]] = {}
        if self.is_peft and self.subject.recognised is not None:
            for claim in self.subject.recognised[1].claims:
                if claim.suffix.method == "saved" and not claim.suffix.options:
                    out.setdefault(claim.name, []).append(claim.key)
        return out

    @property
    def heads(self) -> tuple[str, ...]:
        """What peft itself lists as saved modules for the config's task."""
        task = self.config.get("task_type") if self.config is not None else None
        return _HEADS.get(task, ()) if isinstance(task, str) else ()

    @cached_property
    def base(self) -> Base | None:
        """The base's modules, where the user has named it: the component that the adapter is for.

        One that was told by the adapter's modules may have fewer (a smaller model of the same names).
        """
        adapter = self.subject.adapter
        if (
            self.subject.options.architecture is None
            or adapter is None
            or adapter.base is None
            or not adapter.components
        ):
            return None
        component = adapter.base.components.get(adapter.components[0])
        # A table without the modules that own no parameter, and of which names may begin otherwise, is no walk over a model.
        return Base.of(component) if component is not None and not component.optional_prefix else None

    def tensors_of(self, modules: Iterable[str]) -> list[str]:
        """The keys of modules."""
        return [key for module in modules for key in self.keys.get(module, ())]


def _key_name(module: str, options: Mapping[str, Any]) -> str:
    name = options.get("parameter_name")
    return module.removesuffix(f".{name}") if name else module


def _config(subject: Subject) -> Mapping[str, Any] | None:
    """The config; also where the weights beside it cannot be read."""
    if subject.config is not None or subject.source is not None or not subject.is_folder:
        return subject.config
    text = subject.text(CONFIG_NAME)
    try:
        document = json.loads(text) if text is not None else None
    except (ValueError, RecursionError):  # told of where the weights can be read
        return None
    return document if isinstance(document, dict) else None


_views: WeakKeyDictionary[Subject, View] = WeakKeyDictionary()


def view(subject: Subject) -> View:
    """The view of a subject, made once."""
    if subject not in _views:
        _views[subject] = View(subject)
    return _views[subject]
