"""Prompts as peft saves them: read whole, and refused where a weight delta is asked for."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from method_updates import lazy, update
from odd_models import saved_by_peft
from peft import (
    AdaptionPromptConfig,
    CartridgeConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods import METHODS

CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "prompt_tuning": (PromptTuningConfig, {"num_virtual_tokens": 5}),
    "p_tuning": (PromptEncoderConfig, {"num_virtual_tokens": 5, "encoder_hidden_size": 7}),
    "prefix_tuning": (PrefixTuningConfig, {"num_virtual_tokens": 5}),
    "cartridge": (CartridgeConfig, {"num_virtual_tokens": 5, "num_frozen_tokens": 2}),
    "multitask_prompt_tuning": (
        MultitaskPromptTuningConfig,
        {"num_virtual_tokens": 5, "num_tasks": 3, "num_ranks": 2},
    ),
    "cpt": (CPTConfig, {"cpt_token_ids": [1, 2, 3], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]}),
}


def config(method: str, **fields: Any) -> PeftConfig:
    kind, usual = CONFIGS[method]
    made: PeftConfig = kind(task_type="CAUSAL_LM", **(usual | fields))
    return made


@cache
def saved(method: str) -> Update:
    state = saved_by_peft(config(method))
    return replace(update(method, state), module="")


@pytest.mark.parametrize("method", CONFIGS)
def test_what_peft_saves_is_whole(method: str) -> None:
    one = saved(method)
    METHODS[method].check(one)
    table = one.tensors["prompt_embeddings"]
    tokens = 3 if method == "cpt" else 5
    # The tiny model has 2 layers, 4 heads of 8 and 2 of them for keys and values.
    assert table.shape == (tokens, 2 * 2 * 16 if method in ("prefix_tuning", "cartridge") else 32)
    assert METHODS[method].error(one, one) == 0.0


@pytest.mark.parametrize("options", [{"prefix_projection": True, "encoder_hidden_size": 7}, {}])
def test_a_projected_prefix_is_saved_as_it_comes_out(options: dict[str, Any]) -> None:
    one = replace(update("prefix_tuning", saved_by_peft(config("prefix_tuning", **options))), module="")
    METHODS["prefix_tuning"].check(one)
    assert one.tensors["prompt_embeddings"].shape == (5, 64)


def test_a_p_tuning_is_saved_as_it_comes_out() -> None:
    lstm = {"encoder_reparameterization_type": "LSTM"}
    for one in (saved_by_peft(config("p_tuning")), saved_by_peft(config("p_tuning", **lstm))):
        assert {key: tuple(t.shape) for key, t in one.items()} == {"prompt_embeddings": (5, 32)}


@pytest.mark.parametrize("method", [*CONFIGS, "adaption_prompt"])
def test_every_use_but_carrying_is_refused(method: str) -> None:
    one = adaption() if method == "adaption_prompt" else saved(method)
    kind = METHODS[method]
    assert not kind.linear
    assert kind.norm(one) is None
    assert kind.low_rank(one) is kind.exact_rank(one) is kind.weight_shape(one) is None
    uses: list[Any] = [kind.delta, kind.change, kind.matrix]
    for use in uses:
        with pytest.raises(CannotRepresent, match=r"no weight delta: it .*--to peft"):
            use(one)
    with pytest.raises(CannotRepresent):
        kind.take_rows(one, [(0, 1)])
    with pytest.raises(CannotRepresent):
        kind.folded(one, None)


def adaption() -> Update:
    state = saved_by_peft(AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1))
    prefix = "base_model.model.model.layers.1.self_attn.adaption_"
    assert all(key.startswith(prefix) for key in state)
    return update("adaption_prompt", {key.removeprefix(prefix): t for key, t in state.items()})


def test_adaption_prompts() -> None:
    one, kind = adaption(), METHODS["adaption_prompt"]
    kind.check(one)
    assert {role: t.shape for role, t in one.tensors.items()} == {"gate": (1,), "prompt": (1, 3, 32)}
    assert kind.is_nothing(one)  # until the gate opens
    opened = replace(one, tensors={**one.tensors, "gate": lazy(torch.ones(1))})
    assert not kind.is_nothing(opened)
    for change, said in (
        ({"gate": torch.ones(2)}, "gate"),
        ({"prompt": torch.ones(3, 32)}, r"\(1, tokens, hidden_size\)"),
    ):
        with pytest.raises(BrokenAdapter, match=said):
            kind.check(replace(one, tensors={**one.tensors, **{role: lazy(t) for role, t in change.items()}}))
    with pytest.raises(BrokenAdapter, match="gate is missing"):
        kind.check(replace(one, tensors={"prompt": one.tensors["prompt"]}))


@pytest.mark.parametrize("shape", [(5,), (0, 32), (1, 5, 32)], ids=str)
@pytest.mark.parametrize("method", CONFIGS)
def test_a_table_has_one_row_a_token(method: str, shape: tuple[int, ...]) -> None:
    one = saved(method)
    with pytest.raises(BrokenAdapter, match="one row a virtual token"):
        METHODS[method].check(replace(one, tensors={**one.tensors, "prompt_embeddings": lazy(torch.ones(shape))}))
    rest = {role: t for role, t in one.tensors.items() if role != "prompt_embeddings"}
    with pytest.raises(BrokenAdapter, match="prompt_embeddings"):
        METHODS[method].check(replace(one, tensors=rest or {"other": lazy(torch.ones(1))}))


def test_tasks_that_do_not_fit_their_prompt() -> None:
    one, kind = saved("multitask_prompt_tuning"), METHODS["multitask_prompt_tuning"]
    for role, t, said in (
        ("prefix_task_cols", torch.ones(5, 2), "one matrix a task"),
        ("prefix_task_cols", torch.ones(2, 5, 2), "3 tasks"),
        ("prefix_task_cols", torch.ones(3, 5, 4), "rank 2"),
        ("prefix_task_cols", torch.ones(3, 6, 2), "element by element"),
        ("prefix_task_rows", torch.ones(3, 2, 31), "element by element"),
    ):
        with pytest.raises(BrokenAdapter, match=said):
            kind.check(replace(one, tensors={**one.tensors, role: lazy(t)}))


def test_what_a_config_says_of_a_prefix_must_fit() -> None:
    one, kind = saved("prefix_tuning"), METHODS["prefix_tuning"]
    kind.check(replace(one, options={"num_layers": 2, "token_dim": 16}))
    kind.check(replace(one, options={"num_layers": 2}))
    for options in ({"num_layers": 3}, {"num_layers": 2, "token_dim": 32}):
        with pytest.raises(BrokenAdapter, match="64 numbers a token"):
            kind.check(replace(one, options=options))
    with pytest.raises(BrokenAdapter, match="even width"):
        kind.check(replace(one, tensors={"prompt_embeddings": lazy(torch.ones(5, 63))}))


def test_the_tokens_of_cpt_are_its_rows() -> None:
    one, kind = saved("cpt"), METHODS["cpt"]
    kind.check(replace(one, options={"cpt_token_ids": [1, 2, 3]}))
    with pytest.raises(BrokenAdapter, match="3 rows, but cpt_token_ids lists 2"):
        kind.check(replace(one, options={"cpt_token_ids": [1, 2]}))
