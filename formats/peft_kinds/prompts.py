"""Soft prompts in PEFT configs.

A table of input embeddings is saved by prompt tuning, P-tuning and CPT under one name and does the same for all three; so is
a table of keys and values by prefix tuning and cartridges.  Without a config it is taken for prompt tuning's, which fails
loudly where it is keys and values: their width is not that of the base's embeddings.

peft fills in `num_layers`, `token_dim` and `num_attention_heads` from the base where a config has null.  Which class of model
the prompt is put before, `task_type` alone says: without one, peft loads the tensors and leaves them unused.

Source: huggingface/peft 0.21.2 `tuners/{prompt_tuning,p_tuning,prefix_tuning,multitask_prompt_tuning,cpt,cartridge,
adaption_prompt}/config.py`, `config.py` (`PromptLearningConfig`), `utils/other.py` (`_prepare_prompt_learning_config`),
`peft_model.py` (`get_prompt`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from adapterops_formats.peft_kinds.odd import alike, contradiction, number
from adapterops_formats.peft_kinds.row import PeftMethod, Setting, defaults
from adapterops_formats.peft_patterns import Base

from adapterops.plugin import Certainty, Group, Update, errors

_TASK = Setting(
    "task_type",
    (str,),
    asked=True,
    about="without it peft loads a prompt and never uses it; CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS and so on",
)
_MODEL = ("num_attention_heads", "num_layers")
"""Fields that peft takes from the base where they are null."""


def _rows(update: Update) -> tuple[int, int]:
    table = update.tensors["prompt_embeddings"]
    return table.shape[0], table.shape[1]


def _parts(task: Any) -> int:
    """How many parts of a model have a prompt each."""
    return 2 if task == "SEQ_2_SEQ_LM" else 1


def _input_fields(updates: Sequence[Update], base: Base) -> dict[str, Any]:
    """`num_virtual_tokens`, `num_transformer_submodules`, `token_dim`.

    Raises `CannotRepresent` for an odd number of rows where an encoder and a decoder share them.
    """
    rows, width = _rows(updates[0])
    parts = _parts(updates[0].options.get("task_type"))
    if rows % parts:
        raise errors.CannotRepresent(
            f"{updates[0].tensors['prompt_embeddings'].where}: {rows} rows are not those of an encoder and a decoder "
            "(task_type SEQ_2_SEQ_LM)"
        )
    return {"num_virtual_tokens": rows // parts, "num_transformer_submodules": parts, "token_dim": width}


def _input_problems(view: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    for update in updates:
        rows, width = _rows(update)
        parts = number(view, "num_transformer_submodules", _parts(view.fields.get("task_type")))
        tokens = number(view, "num_virtual_tokens")
        if tokens is None or tokens * parts != rows:
            yield contradiction(update, view, "num_virtual_tokens", rows // max(1, parts))
        if view.fields.get("token_dim") not in (None, width):
            yield contradiction(update, view, "token_dim", width)
        words = {shape[-1] for name, shape in base.shapes.items() if base.kinds.get(name) == "embedding"}
        if words and width not in words:
            yield (
                f"{update.tensors['prompt_embeddings'].where}: is {width} wide, and the base's embeddings are "
                f"{' or '.join(map(str, sorted(words)))}: another base's, or keys and values (--set peft_type=PREFIX_TUNING)"
            )


def _multitask_fields(updates: Sequence[Update], base: Base) -> dict[str, Any]:
    tasks, _, ranks = updates[0].tensors["prefix_task_cols"].shape
    return {**_input_fields(updates, base), "num_tasks": tasks, "num_ranks": ranks}


def _multitask_problems(view: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    yield from _input_problems(view, updates, base)
    for update in updates:
        tasks, _, ranks = update.tensors["prefix_task_cols"].shape
        for name, has in (("num_tasks", tasks), ("num_ranks", ranks)):
            if view.fields.get(name, 1) != has:
                yield contradiction(update, view, name, has)


def _prefix_fields(updates: Sequence[Update], base: Base) -> dict[str, Any]:
    task = updates[0].options.get("task_type")
    return {"num_virtual_tokens": _rows(updates[0])[0], "num_transformer_submodules": _parts(task)}


def _prefix_problems(view: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    for update in updates:
        rows, width = _rows(update)
        if view.fields.get("num_virtual_tokens") != rows:
            yield contradiction(update, view, "num_virtual_tokens", rows)
        layers, size = number(view, "num_layers"), number(view, "token_dim")
        if layers and size and 2 * layers * size != width:
            name, other = ("num_layers", size) if width % (2 * size) == 0 else ("token_dim", layers)
            yield contradiction(update, view, name, width // (2 * other))


def _untold(entry: Group, config: Any) -> str:
    """What is said of a table whose config is not there."""
    if config is not None and (config.certainty is Certainty.READ or "peft_type" in config.fields):
        return ""
    return (
        "no config says which type of prompt it is: prompt tuning is assumed, which does what P-tuning and CPT do with the "
        "same table; keys and values, which are wider than the base's embeddings, are --set peft_type=PREFIX_TUNING"
    )


def _row(kind: str, method: str, title: str, **rest: Any) -> PeftMethod:
    options: dict[str, Any] = {
        "shaping": ("num_virtual_tokens", "num_transformer_submodules", "token_dim"),
        "fields": _input_fields,
        "problems": _input_problems,
        "settings": (_TASK,),
        "known": (),
        "lost": (),
    } | rest
    options["known"] = (*_MODEL, *options["known"])
    options["lost"] = ("task_type", *options["lost"])
    return PeftMethod(
        kind,
        method,
        title,
        rank="",
        narrowing=(),
        targeted=False,
        defaults=defaults(kind, modules_to_save=None),
        **options,
    )


_TEXT = ("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs")
PROMPT_TUNING = _row(
    "PROMPT_TUNING",
    "prompt_tuning",
    "prompt tuning",
    known=_TEXT,
    shown=(("prefix_task_cols", "MULTITASK_PROMPT_TUNING"), ("prefix_task_rows", "MULTITASK_PROMPT_TUNING")),
    today=_untold,
)
P_TUNING = _row(
    "P_TUNING",
    "p_tuning",
    "P-tuning",
    known=("encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"),
)
CPT = _row(
    "CPT",
    "cpt",
    "CPT",
    settings=(
        _TASK,
        Setting("cpt_token_ids", (list,), asked=True, about="peft insists on as many as the prompt has rows"),
    ),
    known=(
        *(
            "cpt_mask",
            "cpt_tokens_type_mask",
            "opt_weighted_loss_type",
            "opt_loss_decay_factor",
            "tokenizer_name_or_path",
        ),
        *("opt_projection_epsilon", "opt_projection_format_epsilon"),
    ),
    lost=("cpt_token_ids",),
)
MULTITASK_PROMPT_TUNING = _row(
    "MULTITASK_PROMPT_TUNING",
    "multitask_prompt_tuning",
    "multitask prompt tuning",
    shaping=("num_virtual_tokens", "num_transformer_submodules", "token_dim", "num_tasks", "num_ranks"),
    fields=_multitask_fields,
    problems=_multitask_problems,
    known=(*_TEXT, "prompt_tuning_init_state_dict_path", "prompt_tuning_init_task"),
)
_PREFIX: dict[str, Any] = {
    "shaping": ("num_virtual_tokens", "num_transformer_submodules"),
    "fields": _prefix_fields,
    "problems": _prefix_problems,
}
PREFIX_TUNING = _row(
    "PREFIX_TUNING",
    "prefix_tuning",
    "prefix tuning",
    known=("token_dim", "encoder_hidden_size", "prefix_projection", "init_weights"),
    **_PREFIX,
)
CARTRIDGE = _row("CARTRIDGE", "cartridge", "cartridge", known=("token_dim", "num_frozen_tokens"), **_PREFIX)


# ---- adaption prompts ---------------------------------------------------------------------------------------


def _attention_fields(updates: Sequence[Update], base: Base) -> dict[str, Any]:
    """The attentions' own name, their number and the length of their prompts.

    Raises `CannotRepresent` where the prompts are not on the last attentions of the base, which is all that peft can say.
    """
    name = alike(updates, "target_modules", {u.module: u.module.rpartition(".")[2] for u in updates})
    modules = {u.module for u in updates}
    for module in sorted(modules):
        if base.names is not None and module not in _last(base, name, len(modules)):
            raise errors.CannotRepresent(
                f"{module} has an adaption prompt and is none of the last {len(modules)} modules called {name}; a PEFT config "
                "says how many of the last ones have"
            )
    length = alike(updates, "adapter_len", {u.module: u.tensors["prompt"].shape[1] for u in updates})
    return {"target_modules": name, "adapter_layers": len(modules), "adapter_len": length}


def _last(base: Base, name: str, count: int) -> list[str]:
    """The last modules of that name, by the numbers in their paths."""
    from adapterops_formats.peft_patterns import with_parents

    found = [module for module in with_parents(base.names or ()) if module.endswith("." + name)]
    return sorted(found, key=lambda m: [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in m.split(".")])[-count:]


def _attention_problems(view: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    if not updates:
        return
    name, count = view.fields.get("target_modules"), view.fields.get("adapter_layers")
    if count != len(updates):
        yield contradiction(updates[0], view, "adapter_layers", len(updates))
    for update in updates:
        if view.fields.get("adapter_len") != update.tensors["prompt"].shape[1]:
            yield contradiction(update, view, "adapter_len", update.tensors["prompt"].shape[1])
        if name is not None and not update.module.endswith(f".{name}"):
            yield contradiction(update, view, "target_modules", update.module.rpartition(".")[2])


ADAPTION_PROMPT = PeftMethod(
    "ADAPTION_PROMPT",
    "adaption_prompt",
    "adaption prompt",
    rank="",
    narrowing=(),
    targeted=False,
    saves=False,
    shaping=("target_modules", "adapter_len", "adapter_layers"),
    defaults=defaults("ADAPTION_PROMPT"),
    fields=_attention_fields,
    problems=_attention_problems,
)
