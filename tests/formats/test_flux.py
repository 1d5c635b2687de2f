"""Flux.1 in every spelling: what a file does to each module, read by `flux_files`, is what its source does."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flux_files as ff
import pytest
import torch
from corpus_files import skeletons
from peft.tuners.tuners_utils import BaseTunerLayer
from raw import load_tensors
from safetensors.torch import save_file

import adapterops as ao
from adapterops import registry
from adapterops.errors import BrokenAdapter, CannotRepresent, UnknownModule, UsageError

OTHERS = {"miss", "mlx", "gguf", "tfew", "sam-lora", "diffusion-pipe", "comfy-hunyuan", "comfy-down-hunyuan"}
OTHERS |= {"tencent", "kohya-hunyuan", "genmo", "sd-scripts-oft", "sd-scripts-oft-flux", "animatediff"}
"""Spellings of other methods, or of other models, alone."""
DIALECTS = [d.name for form in registry.formats().values() for d in form.dialects if d.written and d.name not in OTHERS]
UNETS = {
    "diffusers-lora",
    "diffusers-mixed",
    "diffusers-attn",
    "diffusers-attn-bare",
    "cloneofsimo",
    "cloneofsimo-0.15",
}
"""Spellings that UNets and text encoders alone have."""
NO_ALPHA = {"bfl", "bfl-peft", "xlabs", "diffsynth"}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ff.base(tmp_path_factory.mktemp("base"))


def place(folder: Path, dialect: str) -> Path:
    return folder / (dialect if dialect == "peft" else f"{dialect}.safetensors")


def write(path: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    save_file({key: t.contiguous() for key, t in tensors.items()}, path)
    return path


def same(one: Tensors, two: Tensors) -> None:
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert tensor.dtype == two[key].dtype, key
        assert torch.equal(tensor, two[key]), key


def all_dialects(source: Path, folder: Path, refused: Mapping[str, str], **options: Any) -> None:
    """The same deltas in every dialect, and the same bytes back from it, but for the dialects that refuse."""
    wanted = ff.read(source)
    home = ao.load(source, base=options.get("base")).provenance.dialect
    for dialect in DIALECTS:
        reason = "has no such component" if dialect in UNETS else refused.get(dialect)
        at = place(folder, dialect)
        if reason is not None:
            with pytest.raises(CannotRepresent, match=re.escape(reason)):
                ao.convert(source, dialect, at, **options)
            assert not at.exists()
            continue
        result = ao.convert(source, dialect, at, **options)
        ff.assert_same(ff.read(at), wanted)
        assert result.proof is not None
        back = ao.convert(at, home, folder / f"{dialect}-back.safetensors", base=options.get("base"))
        same(load_tensors(Path(back.path)), load_tensors(source))


_ATTENTION = r"double.*(qkv|proj)$|linear2$"
_NO_MAGNITUDE = dict.fromkeys(("bfl", "bfl-peft", "xlabs", "loralib"), "magnitude")
_NO_MAGNITUDE["diffsynth"] = "its scale is 0.5"
_NO_SCALE = dict.fromkeys(NO_ALPHA, "its scale is 0.5")
_TAILS = {"xlabs": "can hold only modules that end in"}
CASES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "scaled": ({}, _NO_SCALE),
    "plain": ({"alpha": 4.0}, _TAILS),
    "no alpha": ({"alpha": None}, _TAILS),
    "attention": ({"alpha": 4.0, "only": _ATTENTION}, {}),
    "outside of blocks": ({"alpha": 4.0, "only": r"^(?!.*blocks)"}, _TAILS),
    "dora": ({"dora": True}, _NO_MAGNITUDE),
}


@pytest.mark.parametrize("name", CASES)
def test_every_spelling_says_the_same(name: str, base: Path, tmp_path: Path) -> None:
    made, refused = CASES[name]
    all_dialects(ff.kohya(tmp_path / "source.safetensors", **made), tmp_path, refused, base=base)


def test_a_control_adapter_goes_where_biases_and_norms_can(base: Path, tmp_path: Path) -> None:
    held = {"bfl", "diffusers", "diffusers-alpha", "diffusers-bundled", "peft"}
    # Where a bias can stand as a difference, what is left is the wider input.
    words = dict.fromkeys(DIALECTS, "norm_k") | {"loralib": "bias"}
    words |= dict.fromkeys(("comfy", "comfy-down", "comfy-diffusers"), "more inputs than the base has")
    source = ff.control(tmp_path / "control.safetensors")
    all_dialects(source, tmp_path, {d: w for d, w in words.items() if d not in held}, base=base)


def test_only_targets_that_widen_take_a_wider_input(base: Path, tmp_path: Path) -> None:
    tensors = {k: t for k, t in load_tensors(ff.control(tmp_path / "c.safetensors")).items() if k.startswith("img_in")}
    del tensors["img_in.lora_B.bias"]
    source = write(tmp_path / "img_in.safetensors", tensors)
    refused = {
        d: "more inputs than the base has"
        for d in DIALECTS
        if d not in ("bfl", "diffusers", "diffusers-alpha", "diffusers-bundled", "peft")
    }
    all_dialects(source, tmp_path, refused, base=base)


# Published files: the skeletons' keys with real numbers at a small rank.

_PUBLISHED: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "flux_lora_aitoolkit": (_TAILS, {}),
    "flux_lora_diffusers_base_model": (_TAILS, {"alpha": 2.0}),
    "flux_lora_diffusers_format": (_TAILS, {}),
    "flux_lora_kohya": (_NO_SCALE, {}),
}


@pytest.mark.parametrize("name", _PUBLISHED)
def test_published_files_say_the_same_in_every_spelling(name: str, corpus: Path, tmp_path: Path) -> None:
    refused, options = _PUBLISHED[name]
    skeleton = next(path for stem, path in skeletons(corpus) if name in stem)
    source = ff.from_skeleton(skeleton, tmp_path / "source.safetensors")
    wanted, names = ff.read(source), {"comfy", "kohya", "diffusers", "peft", "bfl-peft", *refused}
    assert all(module.delta is not None and module.delta.any() for module in wanted.values())
    for dialect in sorted(names):
        at = place(tmp_path, dialect)
        if dialect in refused:
            with pytest.raises(CannotRepresent, match=re.escape(refused[dialect])):
                ao.convert(source, dialect, at, **options)
            continue
        ao.convert(source, dialect, at, **options)
        ff.assert_same(ff.read(at), wanted)


def test_the_published_control_adapter(corpus: Path, tmp_path: Path) -> None:
    skeleton = next(path for stem, path in skeletons(corpus) if "control" in stem)
    source = ff.from_skeleton(skeleton, tmp_path / "source.safetensors", rank=1, whole=True)
    wanted = ff.read(source)
    assert len([m for m in wanted.values() if "norm" in m.rows]) == 4 * 19 + 2 * 38
    assert wanted["x_embedder"].delta is not None
    result = ao.convert(source, "diffusers", tmp_path / "out.safetensors")
    assert result.proof is not None
    assert result.proof.exact
    ff.assert_same(ff.read(tmp_path / "out.safetensors"), wanted)


def test_impossible_published_files_are_refused(corpus: Path, tmp_path: Path) -> None:
    skeleton = next(path for stem, path in skeletons(corpus) if "flux_lokr_bfl" in stem)
    source = ff.from_skeleton(skeleton, tmp_path / "source.safetensors")
    with pytest.raises(ao.AdapterOpsError, match="fits none of the known base models"):
        ao.convert(source, "diffusers", tmp_path / "out.safetensors")
    with pytest.raises(BrokenAdapter, match=r"whose weight in flux is \[3072, 3072\]"):
        ao.convert(source, "diffusers", tmp_path / "out.safetensors", arch="flux")


@pytest.mark.parametrize("factor", [4, 16])
def test_published_lokr(factor: int, corpus: Path, tmp_path: Path) -> None:
    name = f"lycoris-lokr-falcon-{factor}"
    source = corpus / "files" / name / f"smart_falcon_{factor}_lokr.safetensors"
    result = ao.convert(source, "comfy", tmp_path / "out.safetensors")
    assert result.proof is not None
    assert result.proof.exact
    found, wanted = load_tensors(tmp_path / "out.safetensors"), load_tensors(source)
    assert len(found) == len(wanted) == 1750
    roles = ("w1_a", "w1_b", "w2_a", "w2_b")
    # What belongs together in the output is found by the bytes of a factor, not by our names.
    stems = {bits(t): key.removesuffix("lokr_w1_a") for key, t in found.items() if key.endswith("lokr_w1_a")}
    assert len(stems) == 350, "two modules have one factor, so it names neither"
    trained = 0
    for key, first in wanted.items():
        if not key.endswith("lokr_w1_a"):
            continue
        stem, twin = key.removesuffix("lokr_w1_a"), stems[bits(first)]
        one, two = ([file[f"{at}lokr_{r}"].float() for r in roles] for file, at in ((wanted, stem), (found, twin)))
        scales = [
            float(file[f"{at}alpha"]) / len(file[f"{at}lokr_w2_b"]) for file, at in ((wanted, stem), (found, twin))
        ]
        before, after = (torch.kron(a @ b, c @ d) * s for (a, b, c, d), s in zip((one, two), scales, strict=True))
        trained += bool(before.any())
        assert torch.equal(before, after), key
    assert trained > 200  # The others were left as they began, at zero.


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


# What diffusers makes of the result.


def adapted(model: torch.nn.Module) -> set[str]:
    return {name for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}


_LOADED = {
    "scaled": lambda path: ff.kohya(path),
    "dora": lambda path: ff.kohya(path, dora=True),
    "split_qkv": lambda path: ff.split_qkv(path),
}


@pytest.mark.parametrize("through", ["diffusers", "peft"])
@pytest.mark.parametrize("name", _LOADED)
def test_diffusers_adapts_every_module(name: str, through: str, base: Path, tmp_path: Path) -> None:
    source = _LOADED[name](tmp_path / "source.safetensors")
    first = ao.convert(source, through, place(tmp_path, through), base=base)
    final = ao.convert(first.path, "diffusers", tmp_path / "final.safetensors", base=base)
    model, by_hand = ff.transformer(), ff.transformer()
    wanted = ff.read(source, dense=True)
    before = ff.output(model)
    ff.pipeline(model).load_lora_weights(final.path, adapter_name="x")
    assert adapted(model) == wanted.keys()
    if name != "split_qkv":
        outside = {"x_embedder", "context_embedder", "norm_out.linear", "proj_out"}
        assert outside <= wanted.keys()
        assert len([n for n in wanted if n.startswith("time_text_embed.")]) == 6
    ff.fuse(by_hand, wanted)
    expected = ff.output(by_hand)
    assert (ff.output(model) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (before - expected).abs().max() > 1e-2 * expected.abs().max()


def test_diffusers_widens_the_input_for_a_control_adapter(base: Path, tmp_path: Path) -> None:
    source = ff.control(tmp_path / "control.safetensors")
    final = ao.convert(source, "diffusers", tmp_path / "final.safetensors", base=base)
    model, wider = ff.transformer(), ff.transformer(in_channels=16, out_channels=8)
    weights = ff.transformer().state_dict()
    narrow = weights["x_embedder.weight"]
    weights["x_embedder.weight"] = torch.cat([narrow, torch.zeros_like(narrow)], dim=1)
    wider.load_state_dict(weights)
    wanted = ff.read(source, dense=True)
    ff.fuse(wider, wanted)
    ff.pipeline(model).load_lora_weights(final.path, adapter_name="x")
    norms = {name for name, module in wanted.items() if "norm" in module.rows}
    assert len(norms) == 12
    assert adapted(model) == wanted.keys() - norms
    expected = ff.output(wider)
    assert (ff.output(model) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["flux_lora_kohya", "flux_lora_diffusers_format", "flux_lora_aitoolkit"])
def test_diffusers_adapts_every_module_of_published_files(name: str, corpus: Path, tmp_path: Path) -> None:
    skeleton = next(path for stem, path in skeletons(corpus) if name in stem)
    source = ff.from_skeleton(skeleton, tmp_path / "source.safetensors", rank=1, whole=True)
    final = ao.convert(source, "diffusers", tmp_path / "final.safetensors")
    with torch.device("meta"):
        model = ff.FluxTransformer2DModel(guidance_embeds=True)
    ff.pipeline(model).load_lora_weights(final.path, adapter_name="x", low_cpu_mem_usage=True)
    wanted = ff.read(source)
    assert len(wanted) > 300
    assert adapted(model) == wanted.keys()


# sd-scripts' split_qkv.


@pytest.mark.parametrize("to", ["diffusers", "kohya-diffusers", "peft"])
@pytest.mark.parametrize("alpha", [1.0, 8.0])
def test_split_qkv_files_keep_the_scale_that_readers_apply(to: str, alpha: float, base: Path, tmp_path: Path) -> None:
    source = ff.split_qkv(tmp_path / "source.safetensors", rank=2, alpha=alpha)
    result = ao.convert(source, to, place(tmp_path, to), base=base)
    assert any("block-diagonal" in note and "--alpha trained" in note for note in result.notes)
    ff.assert_same(ff.read(Path(result.path)), ff.read(source))
    tensors = load_tensors(Path(result.path) / "adapter_model.safetensors" if to == "peft" else Path(result.path))
    downs = [t for key, t in tensors.items() if key.endswith(("lora_A.weight", "lora_down.weight"))]
    assert len(downs) == 24
    assert {len(t) for t in downs} == {2}
    for module in ("transformer_blocks.0.attn.to_k", "single_transformer_blocks.1.proj_mlp"):
        assert scale_of(ao.load(result.path, base=base), module) == pytest.approx(
            alpha / 2 / (4 if "mlp" in module else 3)
        )
    back = ao.convert(result.path, "kohya", tmp_path / "back.safetensors", base=base)
    same(load_tensors(Path(back.path)), load_tensors(source))


def scale_of(adapter: ao.Adapter, module: str) -> float:
    update = adapter.updates["transformer", module, "lora"]
    assert update.alpha is not None
    assert update.alpha.value is not None
    return update.alpha.value / update.tensors["A"].shape[0]


def test_split_qkv_files_can_have_the_scale_they_were_trained_with(base: Path, tmp_path: Path) -> None:
    source = ff.split_qkv(tmp_path / "source.safetensors", rank=2, alpha=1.0)
    result = ao.convert(source, "diffusers", tmp_path / "out.safetensors", base=base, alpha="trained")
    found, stored = ff.read(Path(result.path)), ff.read(source)
    for name, module in stored.items():
        blocks = (
            4
            if "single" in name and not name.endswith("proj_out")
            else 3
            if re.search(r"to_[qkv]$|add_._proj", name)
            else 1
        )
        one, other = found[name].delta, module.delta
        assert one is not None
        assert other is not None
        assert (one - other * blocks).norm() <= 1e-12 * one.norm(), name
    loaded = ao.load(result.path, base=base)
    assert {scale_of(loaded, name) for name in stored} == {0.5}


def test_the_trained_scale_needs_a_block_diagonal(base: Path, tmp_path: Path) -> None:
    source = ff.kohya(tmp_path / "source.safetensors")
    with pytest.raises(UsageError, match=r"source\.safetensors: --alpha trained, but no fused projection"):
        ao.load(source, base=base, alpha="trained")


# Parts of one projection, each with factors of its own.

Q, K, V = (f"transformer_blocks.0.attn.to_{p}" for p in "qkv")
FUSED = {"kohya": "lora_unet_double_blocks_0_img_attn_qkv", "comfy": "diffusion_model.double_blocks.0.img_attn.qkv",
         "bfl": "double_blocks.0.img_attn.qkv"}  # fmt: skip


def parts(
    path: Path, ranks: Mapping[str, int], alphas: Mapping[str, float] | None = None, shared: bool = False, seed: int = 9
) -> Path:
    """OneTrainer's spelling of a LoRA on some of q, k and v."""
    numbers, tensors = ff.Numbers(seed), {}
    down = numbers(4, ff.INNER)
    for name, rank in ranks.items():
        stem = "lora_transformer_" + name.replace(".", "_")
        tensors[f"{stem}.lora_down.weight"] = down.clone() if shared else numbers(rank, ff.INNER)
        tensors[f"{stem}.lora_up.weight"] = numbers(ff.INNER, rank)
        tensors[f"{stem}.alpha"] = torch.tensor((alphas or {}).get(name, float(rank)))
    return write(path, tensors)


@pytest.mark.parametrize("to", FUSED)
@pytest.mark.parametrize(
    ("ranks", "shared", "rank"),
    [
        ({Q: 4, K: 2}, False, 6),
        ({Q: 4, K: 2, V: 1}, False, 7),
        ({K: 4, V: 4}, False, 8),
        ({Q: 4, K: 4, V: 4}, False, 12),
        ({Q: 4, K: 4, V: 4}, True, 4),
        ({V: 4, Q: 4}, True, 4),
        ({K: 3}, False, 3),
    ],
)
def test_separate_factors_are_joined_and_come_apart(
    to: str, ranks: dict[str, int], shared: bool, rank: int, base: Path, tmp_path: Path
) -> None:
    source = parts(tmp_path / "source.safetensors", ranks, shared=shared)
    joined = ao.convert(source, to, tmp_path / "joined.safetensors", base=base)
    tensors = load_tensors(Path(joined.path))
    assert {key.removeprefix(FUSED[to]).split(".")[1] for key in tensors} <= {
        "lora_down",
        "lora_up",
        "lora_A",
        "lora_B",
        "alpha",
    }
    down = next(t for key, t in tensors.items() if re.search("lora_(A|down)", key))
    assert down.shape == (rank, ff.INNER)
    ff.assert_same(ff.read(Path(joined.path)), ff.read(source))
    back = ao.convert(joined.path, "onetrainer", tmp_path / "back.safetensors", base=base)
    same(load_tensors(Path(back.path)), load_tensors(source))


@pytest.mark.parametrize("to", FUSED)
@pytest.mark.parametrize("zero", [(Q, K, V), (Q,), (K, V)])
def test_untrained_parts_come_apart_as_they_were(to: str, zero: Sequence[str], base: Path, tmp_path: Path) -> None:
    """A new LoRA's second factor is zero, and so shows no blocks."""
    source = parts(tmp_path / "source.safetensors", {Q: 4, K: 4, V: 4})
    tensors = load_tensors(source)
    for name in zero:
        tensors[f"lora_transformer_{name.replace('.', '_')}.lora_up.weight"].zero_()
    write(source, tensors)
    joined = ao.convert(source, to, tmp_path / "joined.safetensors", base=base)
    back = ao.convert(joined.path, "onetrainer", tmp_path / "back.safetensors", base=base)
    same(load_tensors(Path(back.path)), tensors)


@pytest.mark.parametrize("to", ["kohya", "comfy"])
def test_different_scales_are_joined_once_folded(to: str, base: Path, tmp_path: Path) -> None:
    source = parts(tmp_path / "source.safetensors", {Q: 4, K: 4}, {Q: 4.0, K: 1.0})
    with pytest.raises(CannotRepresent, match=r"to_q and .*to_k are one fused projection.*1\.0; 0\.25\): --fold-alpha"):
        ao.convert(source, to, tmp_path / "out.safetensors", base=base)
    result = ao.convert(source, to, tmp_path / "out.safetensors", base=base, fold_alpha=True)
    ff.assert_same(ff.read(Path(result.path)), ff.read(source))


def with_magnitudes(path: Path, names: Sequence[str], axis: str = "out") -> None:
    tensors, numbers = load_tensors(path), ff.Numbers(8)
    for name in names:
        stem = "lora_transformer_" + name.replace(".", "_")
        tensors[f"{stem}.dora_scale"] = numbers(*((ff.INNER, 1) if axis == "out" else (1, ff.INNER))).abs()
    write(path, tensors)


def test_magnitudes_are_joined_where_every_part_has_one(base: Path, tmp_path: Path) -> None:
    source = parts(tmp_path / "source.safetensors", {Q: 4, K: 4, V: 4})
    with_magnitudes(source, (Q, K, V))
    result = ao.convert(source, "kohya", tmp_path / "out.safetensors", base=base)
    ff.assert_same(ff.read(Path(result.path)), ff.read(source))
    back = ao.convert(result.path, "onetrainer", tmp_path / "back.safetensors", base=base)
    same(load_tensors(Path(back.path)), load_tensors(source))


@pytest.mark.parametrize("ranks", [{Q: 4, K: 4, V: 4}, {Q: 4, K: 4}])
def test_magnitudes_on_some_parts_are_refused(ranks: dict[str, int], base: Path, tmp_path: Path) -> None:
    source = parts(tmp_path / "source.safetensors", ranks)
    with_magnitudes(source, (Q, K) if len(ranks) == 2 else (Q,))
    words = "attn.to_v has no DoRA magnitude" if len(ranks) == 2 else "magnitude"
    with pytest.raises(CannotRepresent, match=words) as caught:
        ao.convert(source, "kohya", tmp_path / "out.safetensors", base=base)
    assert "transformer_blocks.0.attn.to_q" in str(caught.value)


def test_magnitudes_per_input_are_not_joined(base: Path, tmp_path: Path) -> None:
    source = parts(tmp_path / "source.safetensors", {Q: 4, K: 4, V: 4})
    with_magnitudes(source, (Q, K, V), "in")
    with pytest.raises(CannotRepresent, match=r"attn\.to_q: its DoRA magnitude .* is per input"):
        ao.convert(source, "kohya", tmp_path / "out.safetensors", base=base)


def fused(path: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """A Kohya file with one update on the image's q, k and v."""
    return write(path, {f"{FUSED['kohya']}.{suffix}": t for suffix, t in tensors.items()})


def test_magnitudes_per_input_are_not_split(base: Path, tmp_path: Path) -> None:
    numbers = ff.Numbers()
    source = fused(tmp_path / "source.safetensors", {
        "lora_down.weight": numbers(4, 16), "lora_up.weight": numbers(48, 4), "dora_scale": numbers(1, 16).abs(),
    })  # fmt: skip
    with pytest.raises(CannotRepresent, match=r"per input: .*(--to kohya, --to comfy)"):
        ao.convert(source, "onetrainer", tmp_path / "out.safetensors", base=base)
    ao.convert(source, "comfy", tmp_path / "out.safetensors", base=base)


# The other methods.


@pytest.mark.parametrize("to", ["onetrainer", "kohya-diffusers", "lycoris", "diffusers-down"])
@pytest.mark.parametrize("whole", [True, False])
def test_lokr_is_split_where_its_blocks_end_with_the_parts(to: str, whole: bool, base: Path, tmp_path: Path) -> None:
    numbers = ff.Numbers()
    w2 = {"lokr_w2": numbers(8, 4)} if whole else {"lokr_w2_a": numbers(8, 2), "lokr_w2_b": numbers(2, 4)}
    source = fused(tmp_path / "source.safetensors", {"lokr_w1": numbers(6, 4), **w2, "alpha": torch.tensor(1.0)})
    result = ao.convert(source, to, tmp_path / "out.safetensors", base=base)
    assert len(ff.read(Path(result.path))) == 3
    ff.assert_same(ff.read(Path(result.path)), ff.read(source))
    back = ao.convert(result.path, "kohya", tmp_path / "back.safetensors", base=base)
    same(load_tensors(Path(back.path)), load_tensors(source))


def test_lokr_is_not_cut_inside_a_block(base: Path, tmp_path: Path) -> None:
    numbers = ff.Numbers()
    source = fused(tmp_path / "source.safetensors", {"lokr_w1": numbers(2, 4), "lokr_w2": numbers(24, 4)})
    with pytest.raises(CannotRepresent, match=r"attn\.to_qkv: its LoKr has blocks of 24 rows.*--to kohya, --to comfy"):
        ao.convert(source, "onetrainer", tmp_path / "out.safetensors", base=base)
    result = ao.convert(source, "comfy", tmp_path / "out.safetensors", base=base)
    ff.assert_same(ff.read(Path(result.path)), ff.read(source))


def test_lokr_of_separate_factors_is_not_joined(base: Path, tmp_path: Path) -> None:
    numbers, tensors = ff.Numbers(), {}
    for name in (Q, K, V):
        tensors["lora_transformer_" + name.replace(".", "_") + ".lokr_w1"] = numbers(4, 4)
        tensors["lora_transformer_" + name.replace(".", "_") + ".lokr_w2"] = numbers(4, 4)
    source = write(tmp_path / "source.safetensors", tensors)
    with pytest.raises(CannotRepresent, match=r"attn\.to_q: LoKr.*a target with separate projections holds it"):
        ao.convert(source, "kohya", tmp_path / "out.safetensors", base=base)


_OTHERS = {
    "loha": {"hada_w1_a": (48, 2), "hada_w1_b": (2, 16), "hada_w2_a": (48, 2), "hada_w2_b": (2, 16)},
    "difference": {"diff": (48, 16), "diff_b": (48,)},
}


@pytest.mark.parametrize("name", _OTHERS)
@pytest.mark.parametrize("dora", [False, True])
def test_loha_and_differences_are_split_and_joined(name: str, dora: bool, base: Path, tmp_path: Path) -> None:
    numbers = ff.Numbers()
    tensors = {suffix: numbers(*shape) for suffix, shape in _OTHERS[name].items()}
    if name == "loha":
        tensors["alpha"] = torch.tensor(1.0)
    if dora and name == "loha":
        tensors["dora_scale"] = numbers(48, 1).abs()
    source = fused(tmp_path / "source.safetensors", tensors)
    split = ao.convert(source, "onetrainer", tmp_path / "split.safetensors", base=base)
    assert len(ff.read(Path(split.path))) == 3
    ff.assert_same(ff.read(Path(split.path)), ff.read(source))
    for to in ("kohya", "comfy-down"):
        joined = ao.convert(split.path, to, place(tmp_path, to), base=base)
        ff.assert_same(ff.read(Path(joined.path)), ff.read(source))
    same(load_tensors(place(tmp_path, "kohya")), load_tensors(source))


def test_loha_of_separate_factors_is_joined(base: Path, tmp_path: Path) -> None:
    numbers, tensors = ff.Numbers(), {}
    for name, rank in ((Q, 2), (V, 3)):
        for half in ("1", "2"):
            stem = "lora_transformer_" + name.replace(".", "_")
            tensors[f"{stem}.hada_w{half}_a"], tensors[f"{stem}.hada_w{half}_b"] = numbers(16, rank), numbers(rank, 16)
        tensors[f"{stem}.alpha"] = torch.tensor(float(rank))
    source = write(tmp_path / "source.safetensors", tensors)
    joined = ao.convert(source, "kohya", tmp_path / "joined.safetensors", base=base)
    assert load_tensors(Path(joined.path))[f"{FUSED['kohya']}.hada_w1_b"].shape == (5, 16)
    ff.assert_same(ff.read(Path(joined.path)), ff.read(source))
    back = ao.convert(joined.path, "onetrainer", tmp_path / "back.safetensors", base=base)
    same(load_tensors(Path(back.path)), load_tensors(source))


# Text encoders, bundled embeddings, mixed names: at the sizes of the published models.


def pairs(path: Path, modules: Mapping[str, tuple[int, int]], more: Mapping[str, torch.Tensor] | None = None) -> Path:
    numbers, tensors = ff.Numbers(5), dict(more or {})
    for stem, (out, inputs) in modules.items():
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = numbers(1, inputs), numbers(out, 1)
        tensors[f"{stem}.alpha"] = torch.tensor(1.0)
    return write(path, tensors)


T5, CLIP = "encoder_block_0_layer_0_SelfAttention_q", "lora_te1_text_model_encoder_layers_0_mlp_fc1"


@pytest.mark.parametrize(("prefix", "writer"), [("lora_te3_", "kohya"), ("lora_te2_", "OneTrainer")])
def test_t5_has_two_prefixes(prefix: str, writer: str, tmp_path: Path) -> None:
    image = "lora_unet_double_blocks_0_img_attn_proj"
    if writer == "OneTrainer":
        image = "lora_transformer_transformer_blocks_0_attn_to_out_0"
    modules = {image: (3072, 3072), CLIP: (3072, 768), prefix + T5: (4096, 4096)}
    source = pairs(tmp_path / "source.safetensors", modules)
    adapter = ao.load(source)
    assert adapter.architecture.value == "flux"
    assert set(adapter.components) == {"transformer", "text_encoder", "text_encoder_2"}
    for to, keys in {
        "diffusers": {"transformer.transformer_blocks.0.attn.to_out.0", "text_encoder.text_model.encoder.layers.0.mlp.fc1",
                      "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"},
        "kohya": {"lora_unet_double_blocks_0_img_attn_proj", CLIP, "lora_te3_" + T5},
        "onetrainer": {"lora_transformer_transformer_blocks_0_attn_to_out_0", CLIP, "lora_te2_" + T5},
        "comfy": {"diffusion_model.double_blocks.0.img_attn.proj",
                  "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
                  "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"},
    }.items():  # fmt: skip
        result = ao.convert(source, to, tmp_path / f"{to}.safetensors")
        tensors = load_tensors(Path(result.path))
        assert {re.sub(r"\.(lora_\w+\.weight|alpha)$", "", key) for key in tensors} == keys
        ups = {t.numpy().tobytes() for key, t in tensors.items() if re.search("lora_(up|B)", key)}
        assert ups == {t.numpy().tobytes() for key, t in load_tensors(source).items() if "lora_up" in key}


def test_t5_under_onetrainers_prefix_beside_sd_scripts_names(tmp_path: Path) -> None:
    modules = {"lora_unet_double_blocks_0_img_attn_proj": (3072, 3072), "lora_te2_" + T5: (4096, 4096)}
    source = pairs(tmp_path / "source.safetensors", modules)
    assert set(ao.load(source).components) == {"transformer", "text_encoder_2"}
    same_again = ao.save(ao.load(source), tmp_path / "again.safetensors")
    same(load_tensors(Path(same_again.path)), load_tensors(source))
    result = ao.convert(source, "kohya", tmp_path / "out.safetensors")
    assert f"lora_te3_{T5}.alpha" in load_tensors(Path(result.path))


_SGM = {"lora_unet_input_blocks_4_1_proj_in": (640, 640), "lora_unet_input_blocks_7_1_proj_out": (1280, 1280)}
_DIFFUSERS = {"lora_unet_down_blocks_1_attentions_1_proj_in": (640, 640)}


@pytest.mark.parametrize(("more", "fewer"), [(_SGM, _DIFFUSERS), (_DIFFUSERS, dict(list(_SGM.items())[:1]))])
def test_mixed_block_names_of_sdxl_are_never_half_dropped(
    more: dict[str, tuple[int, int]], fewer: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    source = pairs(tmp_path / "source.safetensors", more | fewer)
    with pytest.raises(ao.AdapterOpsError) as caught:
        ao.convert(source, "diffusers", tmp_path / "out.safetensors", arch="sdxl")
    assert isinstance(caught.value, UnknownModule)
    assert any(stem in str(caught.value) for stem in more | fewer)
    assert not (tmp_path / "out.safetensors").exists()
    result = ao.convert(source, "diffusers", tmp_path / "out.safetensors", arch="sdxl", allow_drop=True)
    kept = {key.rsplit(".lora_", 1)[0] for key in load_tensors(Path(result.path))}
    lost = {key.rsplit(".", 1)[0].removesuffix(".lora_down").removesuffix(".lora_up") for key in result.dropped}
    assert len(kept) + len(lost) == len(more | fewer)
    assert lost < (more | fewer).keys()


def test_bundled_embeddings_stay_where_they_are_known(tmp_path: Path) -> None:
    words = {"bundle_emb.cat.string_to_param.*": torch.randn(3, 768), "bundle_emb.dog.emb_params": torch.randn(2, 768)}
    source = pairs(tmp_path / "source.safetensors", {"lora_unet_down_blocks_1_attentions_0_proj_in": (640, 640)}, words)
    for to in ("kohya", "kohya-diffusers", "comfy", "diffusers-bundled"):
        result = ao.convert(source, to, tmp_path / f"{to}.safetensors", arch="sd2")
        assert words.keys() < load_tensors(Path(result.path)).keys()
        told = [note for note in result.notes if note.startswith("bundled embeddings (cat, dog): ")]
        assert len(told) == (0 if to.startswith("kohya") else 1)
    for to in ("diffusers", "peft"):
        with pytest.raises(CannotRepresent, match="embeddings: cat"):
            ao.convert(source, to, place(tmp_path, to), arch="sd2")
    result = ao.convert(source, "diffusers", tmp_path / "d.safetensors", arch="sd2", allow_drop=True)
    assert [re.match(r"embeddings: (\w+)", line)[1] for line in result.dropped] == ["cat", "dog"]  # type: ignore[index]
    assert all(key.startswith("unet.") for key in load_tensors(Path(result.path)))


def test_headers_are_kept(base: Path, tmp_path: Path) -> None:
    source = ff.kohya(tmp_path / "source.safetensors", only="qkv")
    tensors = load_tensors(source)
    save_file(tensors, source, {"ss_network_alpha": "2.0", "ss_base_model_version": "flux1", "modelspec.title": "x"})
    result = ao.convert(source, "comfy", tmp_path / "out.safetensors", base=base)
    header = ff.metadata(Path(result.path))
    assert header["ss_base_model_version"] == "flux1"
    assert header["modelspec.title"] == "x"
    carried = json.loads(header.get("adapterops", "{}"))
    assert isinstance(carried, dict)
