"""Prompts: vectors that stand before a model's inputs, or before the keys and values of its attention.

Those that peft calls prompt learning are one table for the whole model, at the top of the file: the update's module is "".
N is the number of virtual tokens, times two where an encoder and a decoder have their own (`num_transformer_submodules`).

| method | tensors |
| --- | --- |
| `prompt_tuning`, `p_tuning`, `cpt` | `prompt_embeddings` (N, token_dim): input embeddings |
| `multitask_prompt_tuning` | the same, and `prefix_task_cols` (tasks, N, ranks), `prefix_task_rows` (tasks, ranks, token_dim) |
| `prefix_tuning`, `cartridge` | `prompt_embeddings` (N, num_layers · 2 · token_dim): keys and values of every layer |
| `adaption_prompt` | on each adapted attention: `prompt` (1, N, hidden_size), `gate` (1,) |

peft saves the *outputs* of the networks that make prompts while training (P-tuning's, a prefix's projection), so a P-tuning
file does at inference what a prompt tuning file with the same tensor does, and a cartridge what a prefix does.  The networks
themselves are in no file: training cannot go on from it.

Sources: peft `tuners/prompt_tuning/model.py`, `tuners/p_tuning/model.py`, `tuners/prefix_tuning/model.py`,
`tuners/multitask_prompt_tuning/model.py`, `tuners/cpt/model.py`, `tuners/cartridge/model.py`,
`tuners/adaption_prompt/layer.py`; what is saved, `tuners/tuners_utils.py` (`BasePromptEncoder`).
"""

from __future__ import annotations

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter
from adapterops.methods.base import need
from adapterops.methods.no_delta import NoDelta
from adapterops.storage.tensor import LazyTensor, is_zero


class PromptTuning(NoDelta):
    """One table of input embeddings; the base of the other tables."""

    name = "prompt_tuning"
    title = "prompt tuning"
    source = "https://arxiv.org/abs/2104.08691"
    why = "it puts vectors before the model's inputs"

    def check(self, update: Update) -> None:
        self._table(update)

    def _table(self, update: Update) -> LazyTensor:
        need(update, "prompt_embeddings")
        table = update.tensors["prompt_embeddings"]
        if len(table.shape) != 2 or not table.numel:
            raise BrokenAdapter(
                f"{table.where}: shape {list(table.shape)}; a prompt is one row a virtual token: (tokens, width)"
            )
        return table


class PTuning(PromptTuning):
    """The input embeddings that P-tuning's network made."""

    name = "p_tuning"
    title = "P-tuning"
    source = "https://arxiv.org/abs/2103.10385"


class Cpt(PromptTuning):
    """Embeddings of example tokens, moved a little; `options["cpt_token_ids"]` are the tokens."""

    name = "cpt"
    title = "CPT (context-aware prompt tuning)"
    source = "https://arxiv.org/abs/2410.17222"

    def check(self, update: Update) -> None:
        table, tokens = self._table(update), update.options.get("cpt_token_ids")
        if tokens is not None and len(tokens) != table.shape[0]:
            raise BrokenAdapter(f"{table.where}: {table.shape[0]} rows, but cpt_token_ids lists {len(tokens)} tokens")


class MultitaskPromptTuning(PromptTuning):
    """A prompt that all tasks share, multiplied element by element by each task's own product cols·rows."""

    name = "multitask_prompt_tuning"
    title = "multitask prompt tuning"
    source = "https://arxiv.org/abs/2303.02861"
    why = "it puts vectors before the model's inputs, others for every task"

    def check(self, update: Update) -> None:
        need(update, "prefix_task_cols", "prefix_task_rows")
        table = self._table(update)
        cols, rows = update.tensors["prefix_task_cols"], update.tensors["prefix_task_rows"]
        for tensor in (cols, rows):
            if len(tensor.shape) != 3 or not tensor.numel:
                raise BrokenAdapter(
                    f"{tensor.where}: shape {list(tensor.shape)}; multitask prompt tuning has one matrix a task"
                )
        if (cols.shape[0], cols.shape[2]) != rows.shape[:2]:
            raise BrokenAdapter(
                f"{rows.where}: shape {list(rows.shape)} is of {rows.shape[0]} tasks and rank {rows.shape[1]}, but "
                f"{cols.key!r} {list(cols.shape)} of {cols.shape[0]} and rank {cols.shape[2]}"
            )
        if (cols.shape[1], rows.shape[2]) != table.shape:
            raise BrokenAdapter(
                f"{table.where}: shape {list(table.shape)}, but the tasks' products are {[cols.shape[1], rows.shape[2]]}; "
                "they cannot be multiplied element by element"
            )


class PrefixTuning(PromptTuning):
    """Keys and values before those of every layer's attention."""

    name = "prefix_tuning"
    title = "prefix tuning"
    source = "https://arxiv.org/abs/2101.00190"
    why = "it puts keys and values before those of every layer's attention"

    def check(self, update: Update) -> None:
        """`options` may have peft's `num_layers`, `token_dim` and `num_attention_heads`, which cut the rows up."""
        table = self._table(update)
        width, layers, size = table.shape[1], update.options.get("num_layers"), update.options.get("token_dim")
        if width % 2:
            raise BrokenAdapter(
                f"{table.where}: shape {list(table.shape)}; a key and a value a layer make an even width"
            )
        if layers is not None and (width % (2 * layers) or size not in (None, width // (2 * layers))):
            raise BrokenAdapter(
                f"{table.where}: shape {list(table.shape)}; {layers} layers with keys and values of {size or 'one size'} do not "
                f"make {width} numbers a token"
            )


class Cartridge(PrefixTuning):
    """A prefix whose first tokens (`options["num_frozen_tokens"]`) were not trained."""

    name = "cartridge"
    title = "cartridge (a trained cache of keys and values)"
    source = "https://arxiv.org/abs/2506.06266"


class AdaptionPrompt(NoDelta):
    """LLaMA-Adapter: a prompt that an attention attends to beside its own, its effect multiplied by a gate."""

    name = "adaption_prompt"
    title = "adaption prompt (LLaMA-Adapter)"
    blocks = True
    source = "https://arxiv.org/abs/2303.16199"
    why = "it adds what the attention makes of a prompt of its own"

    def check(self, update: Update) -> None:
        need(update, "prompt", "gate")
        prompt, gate = update.tensors["prompt"], update.tensors["gate"]
        if len(prompt.shape) != 3 or prompt.shape[0] != 1 or not prompt.numel:
            raise BrokenAdapter(
                f"{prompt.where}: shape {list(prompt.shape)}; an adaption prompt is (1, tokens, hidden_size)"
            )
        if gate.numel != 1:
            raise BrokenAdapter(f"{gate.where}: shape {list(gate.shape)}; the gate of an adaption prompt is one number")

    def is_nothing(self, update: Update) -> bool:
        return is_zero(update.tensors["gate"])
