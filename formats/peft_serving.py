"""PEFT folders for servers, which read less of them than peft does: `convert --to peft --for vllm`, `--for sglang`.

Both know LoRA on linear layers (on embeddings and heads where the model's class allows it), one `r` and one `lora_alpha`.
What can be said so is: other scales are multiplied into B, smaller ranks filled up with zeros, targets listed by name.  What
cannot is refused, with the way that works; `--allow-drop` leaves parameters and biases out that are saved beside the factors.

Sources: vllm-project/vllm `vllm/lora/peft_helper.py` (`PEFTHelper`: `modules_to_save`, `use_dora`, `bias`, one scale for all;
`rank_pattern` and `alpha_pattern` are not read: issue 59799), `vllm/lora/utils.py` (`parse_fine_tuned_lora_name`,
`is_base_embedding_weights`), `vllm/lora/lora_model.py` (`LoRAModel.from_local_checkpoint`), `vllm/lora/model_manager.py`
(packed projections take their parts from `q_proj`, `k_proj` …, each of which may be absent), `vllm/config/lora.py`
(`MaxLoRARanks`), issues 9280, 41384, 52198 and 55545; sglang 0.5.23 `sglang/srt/lora/lora.py` (`LoRAAdapter`: scaling,
`_process_weight`, `normalize_qkv_proj`, `normalize_gate_up_proj`), `lora_manager.py` (`validate_new_adapter`), `utils.py`
(`get_normalized_target_modules`), `mem_pool.py` (`load_lora_weight_tensor`: every factor has the config's rank).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from adapterops_formats.peft_config import number
from adapterops_formats.peft_patterns import Base, exact_endings, named

from adapterops.plugin import METHODS, Adapter, Fitted, Rounding, Target, Update, errors, nothing, uniform


class Server(NamedTuple):
    """What one server reads of a PEFT folder.

    `rslora`: whether it reads `use_rslora`, and `rslora_experts`, whether for experts too.  `largest` is the largest rank
    that it can be started for.  `layers` fits the modules that it finds.  `packed` are projections that it joins: where one
    of the first stands, it looks for the second ones beside it and fails, or leaves all out, without them.
    """

    name: str
    title: str
    rslora: bool
    rslora_experts: bool
    largest: int | None = None
    layers: str = ""
    packed: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = ()
    rank_option: str = ""


SERVERS: Mapping[str, Server] = {
    server.name: server
    for server in (
        Server(
            "vllm",
            "vLLM",
            rslora=True,
            rslora_experts=False,
            largest=512,
            rank_option="--max-lora-rank, whose default is 16",
        ),
        Server(
            "sglang",
            "SGLang",
            rslora=False,
            rslora_experts=False,
            layers=r"layers\.\d+\.|embed_tokens|lm_head",
            packed=((("q_proj", "k_proj", "v_proj"), ("q_proj", "v_proj")), (("up_proj",), ("gate_proj",))),
        ),
    )
}
READERS: Mapping[str, str] = {server.name: server.title for server in SERVERS.values()}

_FACTORS = ("A", "B")
_OF_TRAINING = ("monteclora_config", "velora_config")
"""Fields whose tensors only training uses."""
_TIED = ("embed_tokens", "lm_head")
"""Modules whose whole weight, which peft saves beside their factors, servers leave out without a word."""
_NOT_SAID: Mapping[str, Any] = {
    "modules_to_save": None,
    "trainable_token_indices": None,
    "bias": "none",
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    **dict.fromkeys(_OF_TRAINING),
}
"""Fields about what is left out or folded, and what they say then."""


def fitted(adapter: Adapter, target: Target, rounding: Rounding) -> Fitted:
    """The adapter as the server takes it: LoRA on linear layers and embeddings, of one rank and one scale.

    Raises `CannotRepresent` for what the server refuses or would apply wrongly and nothing here can rewrite.
    """
    server = SERVERS[target.reader]
    _refuse_changed_base(adapter, server)
    source, dropped = _held(adapter, server, target.allow_drop)
    if not any(u.method == "lora" for u in source):
        left = f" ({dropped[0]})" if dropped else ""
        raise errors.CannotRepresent(f"{adapter.provenance.path}: nothing is left that {server.title} serves{left}")
    experts = any(".experts." in u.module for u in source)
    even = uniform(
        list(source),
        f"--for {server.name}: one scale for all modules",
        rslora=server.rslora and (server.rslora_experts or not experts),
        scale=1.0 if rounding.fold_alpha else None,
        dtype=rounding.dtype,
    )
    _insist_on_rank(source, even.rank, server)
    updates, added = _with_parts(even.updates, target, server)
    alpha = next(u.alpha.value for u in even.updates if u.method == "lora" and u.alpha is not None)
    said = {**_NOT_SAID, "r": even.rank, "lora_alpha": number(alpha or 0.0), "use_rslora": even.rslora}
    config = {
        component: {name: said.get(name, value) for name, value in own.items()}
        for component, own in source.config.items()
    }
    result = replace(source, config=config).with_updates(updates)
    notes = [*_notes(source, even, server), *added]
    if dropped:
        notes.append(f"{server.title} cannot load what is left out; peft computes something else with it than without")
    return Fitted(source, result, bool(even.scaled), tuple(dropped), tuple(notes))


def _refuse_changed_base(adapter: Adapter, server: Server) -> None:
    if adapter.mutated_init:
        raise errors.CannotRepresent(
            f"{adapter.provenance.path}: was trained from {adapter.mutated_init}, which changed the base weights, and "
            f"{server.title} takes no notice of init_lora_weights: on the published base its deltas are wrong. Make a LoRA of "
            "the published base with adapterops to-lora SRC --initial INIT; or, if the changed base is what is served, say "
            "--set init_lora_weights=true"
        )


def _held(adapter: Adapter, server: Server, allow_drop: bool) -> tuple[Adapter, list[str]]:
    """The adapter without what the server cannot be told of, and what that was."""
    kept: list[Update] = []
    dropped: list[str] = []
    for update in adapter:
        why = _unserved(update, server)
        if why is not None and not allow_drop:
            raise errors.CannotRepresent(f"{_where(update)}{update.name}: {why}; --allow-drop leaves it out")
        if why is not None:
            keys = ", ".join(tensor.key for tensor in update.tensors.values())
            dropped.append(f"{update.name}: {why} (left out: {keys})")
            continue
        surplus = {role: t for role, t in update.tensors.items() if role not in _FACTORS}
        if update.method == "lora" and surplus:
            first = next(iter(surplus.values()))
            what = "a bias (lora_bias)" if "bias" in surplus else "tensors of its training"
            why = f"has {what} beside its factors, which {server.title} does not read"
            if not allow_drop:
                raise errors.CannotRepresent(
                    f"{first.where}: {update.name} {why}; --allow-drop leaves that out, or merge the adapter into the base"
                )
            dropped.append(f"{update.name}: {why} (left out: {', '.join(t.key for t in surplus.values())})")
            rest = {role: t for role, t in update.tensors.items() if role in _FACTORS}
            options = {name: value for name, value in update.options.items() if name not in _OF_TRAINING}
            update = replace(update, tensors=rest, options=options)
        kept.append(update)
    return adapter.with_updates(kept), dropped


def _where(update: Update) -> str:
    first = next(iter(update.tensors.values()), None)
    return f"{first.where}: " if first is not None else ""


def _unserved(update: Update, server: Server) -> str | None:
    """Why the server does not serve an update; None where it does, its biases aside."""
    title = server.title
    if update.component != "model":
        return f"{title} serves language models, and this is for a {update.component}"
    if update.method in ("saved", "trainable_tokens"):
        return None if _is_tied_weight(update) else _saved(update, title)
    if update.method == "lora_parameters":
        return (
            f"acts on bare parameters (target_parameters), whose factors {title} applies transposed or leaves out; merge "
            "the adapter into the base and serve that"
        )
    if update.method != "lora":
        way = "; adapterops to-lora makes a plain LoRA of it" if METHODS[update.method].linear else ""
        return f"is {METHODS[update.method].title}, and {title} reads LoRA only{way}"
    if "magnitude" in update.tensors:
        return (
            f"has a DoRA magnitude, and {title} refuses DoRA; adapterops merge SRC --method svd --rank R --base-weights BASE "
            "folds it into a plain LoRA"
        )
    if update.options.get("layer_replication"):
        return f"is for a base with replicated layers (layer_replication), which {title} does not build"
    if "mid" in update.tensors or max(len(update.tensors[role].shape) for role in "AB") > 2:
        return f"is on a convolution, and {title} adapts linear layers and embeddings only"
    if server.layers and not re.search(server.layers, update.module):
        return f"{title} finds modules in layers.N, embed_tokens and lm_head only, and leaves others out in silence"
    return None


def _is_tied_weight(update: Update) -> bool:
    return (
        update.options.get("kind") == "wrapped" and set(update.tensors) == {"weight"} and update.module.endswith(_TIED)
    )


def _saved(update: Update, title: str) -> str:
    if update.method == "trainable_tokens":
        return f"holds trained rows of an embedding, which {title} does not read"
    if set(update.tensors) == {"bias"}:
        return f"is a trained bias, and {title} takes adapters with bias none only"
    return f"is saved whole (modules_to_save), and {title} takes factors only; merge the adapter into the base and serve that"


def _insist_on_rank(adapter: Adapter, rank: int, server: Server) -> None:
    if server.largest is not None and rank > server.largest:
        raise errors.CannotRepresent(
            f"{adapter.provenance.path}: has rank {rank}, and {server.title} cannot be started for more than "
            f"{server.largest}; adapterops to-lora SRC --rank {server.largest} makes the nearest LoRA of that rank"
        )


def _with_parts(updates: Sequence[Update], target: Target, server: Server) -> tuple[list[Update], list[str]]:
    """The updates with zeros where the server insists on a part of a packed projection, and a note.

    Raises `CannotRepresent` where that part's size is not known.
    """
    base = target.architecture.components.get("model") if target.architecture is not None else None
    present = {u.module for u in updates if u.method == "lora"}
    out, added = list(updates), list[str]()
    for update in updates:
        parent, _, own = update.module.rpartition(".")
        if update.method != "lora" or update.options.get("kind") == "embedding":
            continue
        for having, wanted in server.packed:
            for part in wanted if own in having else ():
                module = f"{parent}.{part}" if parent else part
                if module in present:
                    continue
                spec = base.spec(module) if base is not None else None
                if base is not None and spec is None:
                    continue  # there is nothing to pack
                if spec is None:
                    raise errors.CannotRepresent(
                        f"{_where(update)}{update.name}: {server.title} packs {own} with {part}, which this adapter leaves "
                        "alone, and fails without it; zeros stand for it where its size is known: --base CONFIG says it"
                    )
                present.add(module)
                added.append(module)
                out.append(nothing(update, module, spec.shape[0]))
    return out, [_listed(added, f"stand as zeros, since {server.title} packs them with others")] if added else []


def _notes(source: Adapter, even: Any, server: Server) -> list[str]:
    """What was done, and what the server must be started with."""
    notes: list[str] = []
    if even.scaled:
        notes.append(
            _listed(
                even.scaled, f"have another scale than {even.scale:g}, the one that {server.title} applies to all: B"
            )
            + " holds the difference"
        )
    if even.filled:
        notes.append(_listed(even.filled, f"are filled up with zeros to rank {even.rank}"))
    if any(u.rslora for u in source) and not even.rslora:
        notes.append(f"alpha/√r is stated as alpha/r, which is what {server.title} applies to this adapter")
    if server.rank_option and even.rank > 16:
        notes.append(f"{server.title} has to be started for rank {even.rank} ({server.rank_option})")
    tied = [u.name for u in source if u.method == "saved"]
    if tied:
        notes.append(
            _listed(
                tied, f"hold the base's own weight, which {server.title} leaves out: right where no tokens were added"
            )
        )
    heads = [u.name for u in source if u.method == "lora" and u.module.endswith(_TIED)]
    if heads:
        notes.append(_listed(heads, f"are adapted, which {server.title} allows for some models only"))
    return notes


def _listed(names: Sequence[str], what: str) -> str:
    shown = ", ".join(dict.fromkeys(names[:2]))
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"{shown}{more} {what}"


def listed_targets(config: Mapping[str, Any], updates: Iterable[Update], base: Base) -> dict[str, Any]:
    """The config with `target_modules` as a list, which servers read: short endings where they are exact, else full names.

    Raises `CannotRepresent` where the full name of an adapted module ends that of another one of the base.
    """
    if isinstance(config.get("target_modules"), list):
        return dict(config)
    modules = {u.module for u in updates if u.method == "lora"}
    endings = exact_endings([modules], base)
    names = endings[0] if endings is not None else sorted(modules)
    other = next((n for n in sorted(base.names or ()) if n not in modules and named(n, names)), None)
    if other is not None:
        raise errors.CannotRepresent(
            f"no list of names means the adapted modules and not {other}; servers read no target_modules that is a pattern"
        )
    return {**config, "target_modules": names, **dict.fromkeys(n for n in _NARROWING if n in config)}


_NARROWING = ("layers_to_transform", "layers_pattern", "exclude_modules")
"""Fields that leave out some of the modules that a pattern means."""
