"""The groups of a PEFT file made whole: what stands once is handed out, and what only a config says is added.

Source: huggingface/peft 0.21.2 `utils/save_and_load.py`, `tuners/tuners_utils.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from adapterops_formats.peft_config import PeftConfig
from adapterops_formats.peft_kinds import KIND_OF
from adapterops_formats.peft_kinds.row import PeftMethod, Setting, weight_of

from adapterops.plugin import Certainty, Group, Request, errors


def chosen(groups: list[Group], method: PeftMethod, config: PeftConfig | None) -> list[Group]:
    """The groups under the method that the config or the tensors name, where several spell a tensor alike (soft prompts)."""
    kinds = config.method if config is not None else method
    return [
        g._replace(method=kinds.method)
        if g.place.whole and not kinds.targeted and g.method not in kinds.methods and g.method in KIND_OF
        else g
        for g in groups
    ]


def arranged(
    groups: list[Group], method: PeftMethod, config: PeftConfig | None, request: Request, said: list[str]
) -> list[Group]:
    """The modules' groups, each with all its tensors and options; notes go to `said`."""
    method = config.method if config is not None else method
    groups = method.meant(groups, config, request.fields, request.architecture, said)
    for entry in groups:
        if entry.method in KIND_OF:
            note = method.today(entry, config)
            if note:
                said.append(note)
    once = [g for g in groups if g.place.whole and g.method in method.methods]
    members = [g for g in groups if not g.place.whole and g.method in method.methods]
    if members:
        shared = {role: tensor for entry in once for role, tensor in entry.tensors.items()}
        method.spread(shared, members, request.architecture)
        groups = [g for g in groups if g not in once]
    stated = config is not None and config.certainty is Certainty.READ
    alpha = {method.alpha: request.alpha} if method.alpha and isinstance(request.alpha, float) else {}
    given = {**alpha, **request.fields}
    for entry in groups:
        if entry.method not in method.methods:
            continue
        for setting in method.settings:
            entry.options.update(_setting(setting, entry, config, stated))
        entry.options.update(method.options(entry, config, given, weight_of(entry, request.architecture)))
        _insist_on_sense(entry)
    if not stated:
        said += _assumed(method, config, groups)
    said += _unknown(method, groups)
    return groups


def _setting(setting: Setting, entry: Group, config: PeftConfig | None, stated: bool) -> dict[str, Any]:
    """What is known of a setting of one module: said by a config or the user, or assumed."""
    if config is None:
        value = None if setting.asked else setting.default
    elif stated or setting.name in config.fields or not setting.asked:
        value = config.setting(setting, entry.name)
    else:
        value = None
    return {} if value is None else {setting.name: value}


def _assumed(method: PeftMethod, config: PeftConfig | None, groups: Sequence[Group]) -> list[str]:
    """A note on what no config said."""
    given = config.fields if config is not None else {}
    names = [
        f"{s.name} {json.dumps(s.default)}"
        for s in method.settings
        if not s.asked and s.default is not None and s.name not in given
    ]
    if not names or not any(g.method in method.methods for g in groups):
        return []
    return [f"no config is beside the tensors: assumed, as peft does, {', '.join(names)}; --set says otherwise"]


def _unknown(method: PeftMethod, groups: Sequence[Group]) -> list[str]:
    """A note on what nothing said, and is not to be guessed."""
    own = [g for g in groups if g.method in method.methods]
    missing = [s for s in method.settings if s.asked and any(s.name not in g.options for g in own)]
    return [f"unknown: {s.name} of {method.title} ({s.about}); --set {s.name}=VALUE says it" for s in missing if own]


def _insist_on_sense(entry: Group) -> None:
    """Raise `BrokenAdapter` for a module that has a part of a shared update only."""
    if not entry.tensors:
        raise errors.BrokenAdapter(f"{entry.name}: {entry.method} without any tensor")
