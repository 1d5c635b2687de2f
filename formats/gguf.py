"""LoRA in GGUF, as llama.cpp reads it.

    blk.0.attn_q.weight.lora_a   (r, in)        blk.0.attn_q.weight.lora_b   (out, r)
    token_embd.weight.lora_a     (tokens, r)    token_embd.weight.lora_b     (dim, r)
    blk.0.ffn_up_exps.weight.lora_a  (experts, r, in), lora_b (experts, out, r)

in numpy's order of axes; the header states them the other way round.  The header also says `general.type` (adapter),
`general.architecture`, `adapter.type` (lora), `adapter.lora.alpha` and, for aLoRA, `adapter.alora.invocation_tokens`.

llama.cpp adds s · b·a with s = alpha / r, r being the columns of that tensor's b, or with s = 1 where alpha is missing or zero.
So one alpha serves modules of several ranks; where their alphas differ too (alpha_pattern, rsLoRA over several ranks), the most
frequent alpha / scale is kept, and what others have more or less is multiplied into their b.

Names are those of llama.cpp's architecture, and some weights' rows stand in another order there: the base says which and how
(`--base CONFIG`), `gguf_table` what llama.cpp makes of it.  Files that are written here hold the numbers of heads
(`ARCH.attention.head_count`, `…_kv`, as models have them), and are read without a base; others need it where rows moved.

What llama.cpp's own `convert_lora_to_gguf.py` does otherwise: it leaves rank_pattern, alpha_pattern and rsLoRA out of account;
and it exchanges the factors of GPT-2's layers, whose weights transformers stores transposed, but not peft's factors: what it
writes has the wrong shape for llama.cpp, or, of square weights, the wrong delta.  Here they are as llama.cpp applies them.

Sources: https://github.com/ggml-org/llama.cpp `src/llama-adapter.cpp`, `src/llama-adapter.h` (`get_scale`),
`src/llama-graph.cpp` (`build_lora_mm`, `build_lora_mm_id`, `build_inp_embd`), `convert_lora_to_gguf.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from adapterops_formats.gguf_entries import ALPHA, EXPERTS, HEADS, OWN, alpha_of, entries_of
from adapterops_formats.peft_config import refuse_scale

from adapterops.plugin import (
    Adapter,
    AlphaIn,
    Certainty,
    Dialect,
    Format,
    LazyTensor,
    Output,
    OutputFile,
    Place,
    Reading,
    Request,
    ScaleRule,
    Source,
    Suffix,
    Target,
    Update,
    errors,
    read_by_table,
    write_by_table,
    write_gguf,
)

_SUFFIXES = (
    # A key reads as plain LoRA's, which stands last; the others are told by the tensor's name and the header.
    *(Suffix(f".weight.lora_{r.lower()}", "lora", r, {"kind": "embedding"}) for r in "AB"),
    *(Suffix(f".weight.lora_{r.lower()}", method, r) for method in ("alora", EXPERTS, "lora") for r in "AB"),
)
GGUF = Dialect(
    name="gguf",
    format="gguf",
    title="GGUF LoRA",
    places=(Place("model", "", _SUFFIXES, sure=True),),
    alpha=AlphaIn.CONFIG,
    convention="rank",
    example="blk.0.attn_q.weight.lora_a",
)


class Gguf(Format):
    """llama.cpp's adapter files."""

    name = "gguf"
    title = "GGUF LoRA (llama.cpp)"
    limits = (
        "Methods other than LoRA, DoRA, saved modules, biases: `adapterops to-lora` makes a LoRA of the first.",
        "More than one alpha: the commonest scale is kept, and what others have more or less is multiplied into "
        "their second factor, rounded once, and said.",
        "Modules that llama.cpp does not apply LoRA to, and an update of a tied embedding by itself.",
        "Names and orders of rows without the base: `--base CONFIG`.",
    )
    dialects = (GGUF,)
    file_name = "adapter.gguf"
    suffixes = (".gguf",)
    foreign = {
        r"^direction\.\d+$": "is a control vector of llama.cpp, which is added to hidden states: no change of weights",
        r"^(blk\.\d+\.\w+|output|token_embd)_norm\.weight$": (
            "is a norm's weight, as mergekit's extracted adapters have them; llama.cpp leaves it out, and so does --allow-drop"
        ),
    }

    def recognise(self, source: Source, dialects: Sequence[Dialect]) -> list[Reading]:
        return super().recognise(source, dialects) if source.metadata.get("general.type") == "adapter" else []

    def read(self, source: Source, reading: Reading, request: Request) -> Adapter:
        from adapterops_formats.gguf_read import Names  # other files are read without llama.cpp's names

        refuse_scale(request.fields, self.title)
        kind = source.metadata.get("adapter.type")
        if kind != "lora":
            raise errors.UnsupportedFormat(
                f"{source.path}: adapter.type is {kind!r:.60} in its header, where lora is known"
            )
        alpha, where = alpha_of(source), f"{source.path}: {ALPHA}"
        names = Names(source, request)

        def rule(component: str, module: str, rank: int) -> ScaleRule:
            times = names.widened.get(module, 1)
            if not alpha or times == 1:
                return ScaleRule(alpha or None, certainty=Certainty.READ, source=where)
            return ScaleRule(alpha * times, certainty=Certainty.DERIVED, source=f"{where}, over the rank of one stack")

        adapter = read_by_table(reading, source, request, rule, None, names.settle)
        kept = {k: v for k, v in adapter.metadata.items() if k not in OWN and not k.endswith(HEADS)}
        types = {k: t for k, t in getattr(source.metadata, "types", {}).items() if k in kept}
        notes = [*adapter.provenance.notes, f"general.architecture: {source.metadata.get('general.architecture')}"]
        notes += names.notes
        if not alpha:
            notes.append(f"{ALPHA} is {'missing' if alpha is None else 'zero'}: llama.cpp applies scale 1")
        provenance = adapter.provenance
        spelling = {**provenance.spelling, **({"types": types} if types else {})}
        carried = provenance.carried._replace(spelling={**provenance.carried.spelling, GGUF.name: spelling})
        return replace(
            adapter,
            metadata=kept,
            provenance=replace(provenance, spelling=spelling, carried=carried, notes=tuple(notes)),
        )

    def write(self, adapter: Adapter, target: Target) -> Output:
        from adapterops_formats.gguf_write import Base, common_alpha, in_place, insist, is_idle, with_alpha

        base = Base.of(adapter, target)
        dropped: list[str] = []
        kept: list[Update] = []
        for update in adapter:
            try:
                insist(update, base)
            except errors.CannotRepresent as error:
                if not target.allow_drop:
                    raise
                keys = ", ".join(tensor.key for tensor in update.tensors.values())
                dropped.append(f"{error} (left out: {keys})")
            else:
                kept.append(update)
        alpha, exact = common_alpha(kept)
        updates: list[Update] = []
        names: dict[str, str] = {}
        folded = idle = 0
        for update in kept:
            scaled = with_alpha(update, alpha, exact)
            folded += scaled.tensors["B"] is not update.tensors["B"]
            idle += is_idle(update)
            for part in in_place(scaled, base):
                updates.append(part)
                names[f"{part.component}.{part.module}"] = base.spelled(part.module)
        spelled = write_by_table(GGUF, adapter.with_updates(updates), None, {"names": names}, False)
        entries = entries_of(adapter, updates, base.row.name, base.heads, alpha)
        write = partial(_write, base.row.name, entries, spelled.tensors)
        notes = list(spelled.notes)
        if folded:
            notes.append(
                f"the scale of {folded} module{'s' if folded > 1 else ''} is not alpha {alpha:g} over the rank, and GGUF has one "
                "alpha: the difference is multiplied into lora_b"
            )
        if idle:
            notes.append(
                f"{idle} module{'s' if idle > 1 else ''} of alpha 0: to llama.cpp that is scale 1, so lora_b is zeros there"
            )
        if not exact:
            notes.append(f"alpha is rounded to float32, as GGUF has it: {alpha!r}")
        file = OutputFile("", spelled.tensors, write=write)
        return Output((file,), tuple(kept), tuple(dropped), tuple(notes), rounded=bool(folded) or not exact)


def _write(
    architecture: str, entries: dict[str, tuple[str, Any]], tensors: dict[str, LazyTensor], path: str, progress: Any
) -> None:
    write_gguf(path, architecture, entries, tensors, progress)


FORMAT = Gguf()
