"""litgpt's LoRA: `lit_model.pth.lora`, a checkpoint `{"model": state dict}` with `hyperparameters.yaml` beside it.

    transformer.h.0.attn.qkv.lora_A    (r · e, in_features), e of q, k and v adapted
    transformer.h.0.attn.qkv.lora_B    (rows of those, r), one below the other
    transformer.h.0.attn.proj.lora_A   o_proj
    transformer.h.0.mlp.fc_1.lora_A    gate_proj; fc_2 up_proj, proj down_proj
    lm_head.lora_A

The scale is alpha/r; alpha and which of q, k and v are adapted (`lora_query`, `lora_key`, `lora_value`) stand in
`hyperparameters.yaml`, and are read from there; else `--alpha` and `--set enable_lora='[true, false, true]'` say them.

litgpt keeps q, k and v in one weight, whose parts have as many rows as the model has heads; `--base CONFIG` says the heads, and
each part gets its own rows of both factors, bit for bit.  The rotary embedding is transformers', so no row moves.

Sources: Lightning-AI/litgpt `litgpt/lora.py` (`LoRAQKVLinear`, `CausalSelfAttention`, `LLaMAMLP`), `litgpt/finetune/lora.py`
(`save_lora_checkpoint`), `litgpt/scripts/merge_lora.py`, `litgpt/scripts/convert_hf_checkpoint.py` (`copy_weights_hf_llama`,
`copy_weights_gemma_2`, `copy_weights_qwen_2_5`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from adapterops_formats.torch_native import ReadOnly, decoder, family, heads, taken

from adapterops.plugin import (
    Adapter,
    AlphaIn,
    Certainty,
    Component,
    Dialect,
    Group,
    LazyTensor,
    Place,
    Reading,
    Request,
    ScaleRule,
    Source,
    Suffix,
    errors,
    is_number,
    read_by_table,
)

_KNOWN = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")
_QKV = ".self_attn.qkv"
"""A name of ours for what litgpt has in one: it is taken apart before anything is looked up."""
_OTHERS = (".mlp.fc", ".mlp.gate", ".fc_1", ".fc_2", ".proj")
"""How modules of other models than Llama's kin end (Pythia, Phi; experts), which are told of and not converted."""
_EARLIER = ".attn.attn"
"""What q, k and v were called by earlier releases, in one weight that had them by groups of heads; to which of its rows the
factors were added changed between these releases."""
_SETTINGS = "hyperparameters.yaml"
_FLAGS = ("lora_query", "lora_key", "lora_value")
_FACTORS = tuple(Suffix(f".lora_{role}", "lora", role) for role in "AB")
LITGPT = Dialect(
    name="litgpt",
    format="litgpt",
    title="litgpt",
    places=(
        Place(
            "model",
            "transformer.h.",
            _FACTORS,
            tails=(
                (_QKV, ".attn.qkv"),
                (".self_attn.o_proj", ".attn.proj"),
                (".mlp.gate_proj", ".mlp.fc_1"),
                (".mlp.up_proj", ".mlp.fc_2"),
                (".mlp.down_proj", ".mlp.proj"),
                *((end, end) for end in (_EARLIER, *_OTHERS)),
            ),
            sure=True,
        ),
        Place("model", "", _FACTORS, tails=(("lm_head", "lm_head"),), sure=True),
    ),
    alpha=AlphaIn.CONFIG,
    convention="unknown",
    exact_shapes=True,
    written=False,
    example="transformer.h.0.attn.qkv.lora_A",
)


class LitGpt(ReadOnly):
    """litgpt's state dicts."""

    name = "litgpt"
    title = "litgpt (lit_model.pth.lora)"
    limits = ("It is read and not written: the program loads pickles.",)
    dialects = (LITGPT,)
    file_name = "lit_model.safetensors"
    own_fields: ClassVar[frozenset[str]] = frozenset({"enable_lora"})
    why_not_written = "litgpt loads adapters from its own checkpoints, which are pickles; --to peft holds it"
    foreign: ClassVar = {
        r"^transformer\.h\.\d+\.attn\.(gating_factor|adapter_wte\.weight)$": "is LLaMA-Adapter in litgpt's names (a learned "
        "prompt in each layer), which this version does not convert",
        r"\.adapter_(bias|scale)$": "is LLaMA-Adapter v2 in litgpt's names; merge it into the base with litgpt",
    }

    def read(self, source: Source, reading: Reading, request: Request) -> Adapter:
        said, where = _settings(source)
        flags = _flags(said, where, request.fields)

        def rule(component: str, module: str, rank: int) -> ScaleRule:
            alpha = said.get("lora_alpha")
            return ScaleRule(float(alpha), certainty=Certainty.READ, source=where) if is_number(alpha) else ScaleRule()

        def settle(groups: list[Group]) -> list[Group]:
            return [
                part._replace(place=LITGPT.places[0])
                for entry in sorted(groups, key=lambda entry: not entry.name.endswith(_OTHERS))
                for part in self._settled(entry, flags, request)
            ]

        return read_by_table(reading, source, request, rule, component_of=settle)

    def _settled(self, entry: Group, flags: list[bool] | None, request: Request) -> list[Group]:
        """The group, or its parts, under transformers' names; told of, where they cannot be had."""
        component = decoder(request)
        if entry.name != "lm_head":
            entry = entry._replace(name=f"model.layers.{entry.name}")
        try:
            if entry.name.endswith(_OTHERS):
                raise errors.UnsupportedFormat(
                    f"{next(iter(entry.tensors.values())).where}: is of a model that litgpt builds otherwise than Llama "
                    "(Pythia, Phi, StableLM …, or one with experts); this version does not convert it"
                )
            if entry.name.endswith(_EARLIER):
                raise errors.UnsupportedFormat(
                    f"{next(iter(entry.tensors.values())).where}: is of an earlier litgpt, which kept q, k and v by groups of "
                    "heads and added the factors to rows that changed between its releases; merge it with the litgpt of its days"
                )
            if component is not None:
                family(component, _KNOWN, self.title)
            return list(_parts(entry, component, flags)) if entry.name.endswith(_QKV) else [entry]
        except errors.AdapterOpsError as error:
            request.wrong(error, (tensor.key for tensor in entry.tensors.values()))
            return []


def _settings(source: Source) -> tuple[Mapping[str, Any], str]:
    """What `hyperparameters.yaml` beside the weights says, and where that is.  Raises `UnreadableFile` for one that is none."""
    with source.settings(_SETTINGS) as found:
        if found is None:
            return {}, ""
        path, where = found
        import yaml

        try:
            with open(path, encoding="utf-8") as file:
                value = yaml.safe_load(file)
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            raise errors.UnreadableFile(
                f"{where}: {str(error).splitlines()[0][:200]}", fault="config-unreadable"
            ) from error
        if not isinstance(value, dict):
            raise errors.UnreadableFile(f"{where}: must be a table, not a {type(value).__name__}", fault="config-type")
        return value, where


def _flags(said: Mapping[str, Any], where: str, fields: Mapping[str, Any]) -> list[bool] | None:
    """Which of q, k and v are adapted; None where nothing says it.

    Raises `UsageError` for a `--set enable_lora` and `UnreadableFile` for settings that are none.
    """
    given = fields.get("enable_lora")
    if given is not None:
        if not (isinstance(given, list) and len(given) == len(_FLAGS) and all(type(flag) is bool for flag in given)):
            raise errors.UsageError(f"--set enable_lora={given!r:.60}: three of true and false, for q, k and v")
        return list(given)
    stated = [said.get(name) for name in _FLAGS]
    if all(flag is None for flag in stated):
        return None
    if not all(type(flag) is bool for flag in stated):
        raise errors.UnreadableFile(
            f"{where}: {', '.join(_FLAGS)} are {stated!r:.60}, not true or false", fault="config-type"
        )
    return [bool(flag) for flag in stated]


def _parts(entry: Group, component: Component | None, flags: list[bool] | None) -> Iterator[Group]:
    """A group for each of q, k and v that is adapted."""
    a, b = entry.tensors.get("A"), entry.tensors.get("B")
    if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2:
        yield entry
        return
    if component is None:
        raise errors.UnknownFact(
            f"{b.where}: litgpt keeps q, k and v in one weight, whose rows depend on the model's heads; give the base's config "
            "with --base CONFIG"
        )
    of = heads(component)
    sizes = (of.queries * of.size, of.keys * of.size, of.keys * of.size)
    rank = b.shape[1]
    flags = flags or _by_rows(b, a.shape[0] // max(1, rank), sizes)
    chosen = [(part, size) for part, size, flag in zip("qkv", sizes, flags, strict=True) if flag]
    if not rank or a.shape[0] != rank * len(chosen):
        raise errors.BrokenAdapter(
            f"{a.where}: shape {list(a.shape)} beside {b.key!r} {list(b.shape)} is not of {len(chosen)} parts, and q, k and v "
            f"are said to be adapted: {', '.join('no' if not flag else 'yes' for flag in flags)}",
            fault="ranks",
        )
    total, low = sum(size for _, size in chosen), 0
    for at, (part, size) in enumerate(chosen):
        module = entry.name.removesuffix(_QKV) + f".self_attn.{part}_proj"
        tensors = {
            "A": a.rows([(at * rank, (at + 1) * rank)]),
            "B": taken(b, [(low, low + size)], total, f"what holds {module}"),
        }
        low += size
        yield entry._replace(name=module, tensors=tensors)


def _by_rows(b: LazyTensor, count: int, sizes: tuple[int, int, int]) -> list[bool]:
    """Which parts are adapted, where the rows tell.  Raises `UnknownFact` where they do not."""
    if count == len(sizes):
        return [True] * count
    able = [flags for flags in _CHOICES if sum(flags) == count and _rows(flags, sizes) == b.shape[0]]
    if len(able) != 1:
        raise errors.UnknownFact(
            f"{b.where}: shape {list(b.shape)} adapts {count} of q, k and v, and nothing in the file says which; put litgpt's "
            f"{_SETTINGS} beside it, or say --set enable_lora='[true, false, true]'"
        )
    return list(able[0])


_CHOICES = [[q, k, v] for q in (True, False) for k in (True, False) for v in (True, False)]


def _rows(flags: list[bool], sizes: tuple[int, int, int]) -> int:
    return sum(size for size, flag in zip(sizes, flags, strict=True) if flag)


FORMAT = LitGpt()
