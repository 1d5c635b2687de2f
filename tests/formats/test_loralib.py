"""loralib's state dicts: its layers stated again from their definition, read, written, and made PEFT's.

Also PEFT's own first releases, which kept loralib's grouped layer and its names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft_models as pm
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_peft_methods import architecture_of
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import adapterops as ao
from adapterops import errors
from adapterops.methods import METHODS
from adapterops.operations.triplets import reallocate

R, ALPHA = 4, 6.0
FLAGS = {
    "all": [True, True, True],
    "some": [True, False, True],
    "one": [False, True, False],
    "first of two": [True, False],
}


def plain(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """What loralib's Linear adds to its output."""
    return x @ a.T @ b.T * (ALPHA / R)


def merged(x: Tensor, a: Tensor, b: Tensor, flags: list[bool], groups: int) -> Tensor:
    """What its MergedLinear adds: a grouped 1×1 convolution over the factor's rows, its result in the parts that are on."""
    weight = F.conv1d(a.unsqueeze(0), b.reshape(len(b), -1, 1), groups=groups).squeeze(0)
    parts = list(weight.chunk(sum(flags)))
    full = torch.cat([parts.pop(0) if flag else torch.zeros(len(weight) // sum(flags), a.shape[1]) for flag in flags])
    return x @ full.T * (ALPHA * sum(flags) / len(a))


def triplets(x: Tensor, a: Tensor, b: Tensor, e: Tensor, count: float) -> Tensor:
    """What the AdaLoRA authors' SVDLinear adds."""
    return x @ (a * e).T @ b.T * (ALPHA / (count + 1e-5))


class Line(nn.Module):
    def __init__(self, out: int = 12) -> None:
        super().__init__()
        self.one, self.two, self.words = nn.Linear(10, out), nn.Linear(out, 8), nn.Embedding(20, 10)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def stored(path: Path, tensors: Mapping[str, Tensor], kind: str = "pt") -> Path:
    path = path.with_suffix(f".{kind}")
    if kind == "pt":
        torch.save(dict(tensors), path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def delta(adapter: ao.Adapter, module: str) -> Tensor:
    update = next(u for u in adapter if u.module == module and u.method != "saved")
    return METHODS[update.method].delta(update)


def linear() -> dict[str, Tensor]:
    return {
        "one.lora_A": random(R, 10), "one.lora_B": random(12, R), "one.bias": random(12),
        "two.lora_A": random(R, 12, seed=1), "two.lora_B": random(8, R, seed=1),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_linear_layers(kind: str, tmp_path: Path) -> None:
    tensors = linear()
    path = stored(tmp_path / "lora", tensors, kind)
    adapter = ao.load(path, alpha=ALPHA)
    assert (adapter.provenance.format, adapter.components) == ("loralib", ("model",))
    x = random(5, 10)
    torch.testing.assert_close(x @ delta(adapter, "one").T, plain(x, tensors["one.lora_A"], tensors["one.lora_B"]))
    result = ao.convert(path, to="loralib", output=tmp_path / "again.safetensors", alpha=ALPHA)
    assert result.proof is not None
    assert result.proof.exact
    assert any("lora_alpha=6" in note for note in result.notes)
    pm.same_tensors(load_file(tmp_path / "again.safetensors"), tensors)
    # What was written says its alpha itself, and comes back through PEFT as it was.
    ao.convert(tmp_path / "again.safetensors", to="peft", output=tmp_path / "peft", base=architecture_of(Line()))
    config = pm.config_of(tmp_path / "peft")
    assert (config["r"], config["lora_alpha"], config["bias"]) == (R, ALPHA, "lora_only")
    loaded = pm.load(Line(), tmp_path / "peft")
    assert pm.adapted(loaded) == {"one", "two"}
    torch.testing.assert_close(loaded.base_model.model.one.base_layer.bias, tensors["one.bias"])
    ao.convert(tmp_path / "peft", to="loralib", output=tmp_path / "back.safetensors")
    pm.same_tensors(load_file(tmp_path / "back.safetensors"), tensors)


def test_an_unknown_alpha_is_asked_for(tmp_path: Path) -> None:
    path = stored(tmp_path / "lora", linear())
    with pytest.raises(errors.UnknownFact, match=r"lora_alpha that the layers were built with.*--alpha"):
        ao.convert(path, to="peft", output=tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def grouped(flags: list[bool], out: int = 12) -> dict[str, Tensor]:
    on = sum(flags)
    return {"one.lora_A": random(R * on, 10), "one.lora_B": random(out // len(flags) * on, R)}


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("name", FLAGS)
def test_merged_layers(name: str, known: bool, tmp_path: Path) -> None:
    flags = FLAGS[name]
    tensors = grouped(flags)
    path = stored(tmp_path / "lora", tensors)
    base = architecture_of(Line()) if known else None
    said = {"enable_lora": flags}
    adapter = ao.load(path, alpha=ALPHA, fields=said, base=base)
    x = random(5, 10)
    wanted = merged(x, tensors["one.lora_A"], tensors["one.lora_B"], flags, sum(flags))
    torch.testing.assert_close(x @ delta(adapter, "one").T, wanted)
    [update] = adapter
    assert (update.method, METHODS[update.method].rank(update)) == ("lora_merged", R)
    # Written again with what no key says, it needs no more telling; as PEFT's LoRA it has the zeros written out.
    ao.save(adapter, tmp_path / "again.safetensors", format="loralib")
    pm.same_tensors(load_file(tmp_path / "again.safetensors"), tensors)
    torch.testing.assert_close(x @ delta(ao.load(tmp_path / "again.safetensors"), "one").T, wanted)
    ao.convert(path, to="peft", output=tmp_path / "peft", alpha=ALPHA, fields=said, base=base)
    config = pm.config_of(tmp_path / "peft")
    assert (config["r"], config["lora_alpha"]) == (R * sum(flags), ALPHA * sum(flags))
    assert "enable_lora" not in config
    model = Line()
    before = model.one(x)
    torch.testing.assert_close(pm.load(model, tmp_path / "peft").base_model.model.one(x) - before, wanted)
    # And by to-lora.
    ao.to_lora(path, tmp_path / "lora", to="peft", reading={"alpha": ALPHA, "fields": said, "base": base})
    model = Line()
    before = model.one(x)
    torch.testing.assert_close(pm.load(model, tmp_path / "lora").base_model.model.one(x) - before, wanted)


def test_the_base_tells_that_all_parts_are_adapted(tmp_path: Path) -> None:
    tensors = grouped(FLAGS["all"])
    path = stored(tmp_path / "lora", tensors)
    x = random(5, 10)
    wanted = merged(x, tensors["one.lora_A"], tensors["one.lora_B"], FLAGS["all"], 3)
    adapter = ao.load(path, alpha=ALPHA, base=architecture_of(Line()))
    torch.testing.assert_close(x @ delta(adapter, "one").T, wanted)
    for target in ("peft", "kohya"):
        with pytest.raises(
            errors.AdapterOpsError, match=r"--set enable_lora|lora_merged|known base|components of pipelines"
        ):
            ao.convert(path, to=target, output=tmp_path / "out", alpha=ALPHA)


@pytest.mark.parametrize("name", ["some", "one", "first of two"])
def test_which_parts_are_adapted_is_asked_for(name: str, tmp_path: Path) -> None:
    path = stored(tmp_path / "lora", grouped(FLAGS[name]))
    with pytest.raises(errors.UnknownFact, match=rf"of the {len(FLAGS[name])} equal parts of one.*--set enable_lora"):
        ao.load(path, alpha=ALPHA, base=architecture_of(Line()))


def test_a_grouped_layer_without_a_base_asks_when_it_is_written_out(tmp_path: Path) -> None:
    path = stored(tmp_path / "lora", grouped(FLAGS["some"]))
    with pytest.raises(errors.CannotRepresent, match="--set enable_lora"):
        ao.convert(path, to="peft", output=tmp_path / "peft", alpha=ALPHA)
    # The same spelling needs no answer.
    ao.convert(path, to="loralib", output=tmp_path / "again.safetensors", alpha=ALPHA)
    pm.same_tensors(load_file(tmp_path / "again.safetensors"), grouped(FLAGS["some"]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([True, True], r"of 3 parts.*turns 2 on"),
        ([True, True, True, False], r"cannot act on one"),
        ([], "as many true and false"),
        ("all", "as many true and false"),
        ([False, False, False], "as many true and false"),
    ],
)
def test_flags_that_cannot_be(flags: Any, message: str, tmp_path: Path) -> None:
    path = stored(tmp_path / "lora", grouped(FLAGS["all"]))
    with pytest.raises(errors.AdapterOpsError, match=message):
        ao.load(path, alpha=ALPHA, fields={"enable_lora": flags}, base=architecture_of(Line()))


def test_embeddings(tmp_path: Path) -> None:
    """loralib spells an embedding's factors as a linear layer's; ΔW is (B·A)ᵀ."""
    tensors = {"words.lora_A": random(R, 20), "words.lora_B": random(10, R)}
    path = stored(tmp_path / "lora", tensors)
    wanted = (tensors["words.lora_B"] @ tensors["words.lora_A"]).T * (ALPHA / R)
    adapter = ao.load(path, alpha=ALPHA, base=architecture_of(Line()))
    torch.testing.assert_close(delta(adapter, "words"), wanted)
    ao.save(adapter, tmp_path / "again.safetensors", format="loralib")
    torch.testing.assert_close(delta(ao.load(tmp_path / "again.safetensors"), "words"), wanted)
    ao.convert(path, to="peft", output=tmp_path / "peft", alpha=ALPHA, base=architecture_of(Line()))
    model = Line()
    before = model.words.weight.detach().clone()
    after = pm.load(model, tmp_path / "peft").base_model.model.words(torch.arange(20))
    torch.testing.assert_close(after - before, wanted)


def adalora(count: float | None = None) -> dict[str, Tensor]:
    tensors = {"one.lora_A": random(R, 10), "one.lora_B": random(12, R), "one.lora_E": random(R, 1)}
    tensors["one.lora_E"][1] = 0
    return tensors | ({} if count is None else {"one.ranknum": torch.tensor([count])})


@pytest.mark.parametrize("count", [None, 4.0, 3.0])
def test_the_authors_adalora(count: float | None, tmp_path: Path) -> None:
    tensors = adalora(count)
    path = stored(tmp_path / "lora", tensors)
    adapter = ao.load(path, alpha=ALPHA)
    x = random(5, 10)
    factors = [tensors[f"one.lora_{role}"] for role in "ABE"]
    wanted = triplets(x, *factors, count or R)
    torch.testing.assert_close(x @ delta(adapter, "one").T, wanted)
    if count != 3.0:
        ao.convert(path, to="peft", output=tmp_path / "peft", alpha=ALPHA)
        config = pm.config_of(tmp_path / "peft")
        assert (config["peft_type"], config["init_r"], config["lora_alpha"]) == ("ADALORA", R, ALPHA)
        model = Line()
        before = model.one(x)
        torch.testing.assert_close(pm.load(model, tmp_path / "peft").base_model.model.one(x) - before, wanted)
        ao.convert(tmp_path / "peft", to="loralib", output=tmp_path / "back.safetensors")
        back = load_file(tmp_path / "back.safetensors")
        assert back.pop("one.ranknum").tolist() == [R]
        pm.same_tensors(back, {name: tensor for name, tensor in tensors.items() if name != "one.ranknum"})
    else:
        # peft takes triplets away only from what it began with, so n cannot be less than what is there.
        with pytest.raises(errors.AdapterOpsError, match=r"init_r|began with"):
            ao.convert(path, to="peft", output=tmp_path / "peft", alpha=ALPHA)
    ao.convert(path, to="loralib", output=tmp_path / "again.safetensors", alpha=ALPHA)
    again = load_file(tmp_path / "again.safetensors")
    assert again.pop("one.ranknum").tolist() == [count or R]
    pm.same_tensors(again, {name: tensor for name, tensor in tensors.items() if name != "one.ranknum"})
    # As plain LoRA, the masked triplet is gone.
    ao.to_lora(path, tmp_path / "lora", to="peft", reading={"alpha": ALPHA})
    assert pm.config_of(tmp_path / "lora")["r"] == R - 1
    model = Line()
    before = model.one(x)
    torch.testing.assert_close(pm.load(model, tmp_path / "lora").base_model.model.one(x) - before, wanted)


def test_a_budget_over_all_modules(tmp_path: Path) -> None:
    tensors = adalora() | {"two.lora_A": random(R, 12), "two.lora_B": random(8, R), "two.lora_E": random(R, 1) * 9}
    path = stored(tmp_path / "lora", tensors)
    adapter = ao.load(path, alpha=ALPHA)
    less = adapter.with_updates(reallocate(list(adapter), 2.5))
    assert {u.module: METHODS[u.method].rank(u) for u in less} == {"one": 1, "two": 4}
    ao.save(less, tmp_path / "peft", format="peft")
    config = pm.config_of(tmp_path / "peft")
    assert config["init_r"] == R
    assert {name: sum(mask) for name, mask in config["rank_pattern"].items()} == {"one.lora_E": 1, "two.lora_E": 4}
    x, model = random(5, 10), Line()
    before = model.one(x)
    loaded = pm.load(model, tmp_path / "peft").base_model.model
    torch.testing.assert_close(loaded.one(x) - before, x @ delta(less, "one").T)


def test_what_loralib_cannot_hold(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 8, 1)), LoraConfig(r=2, target_modules=["0", "1"])
    )
    folder = pm.saved(model, tmp_path / "peft")
    with pytest.raises(errors.CannotRepresent, match="has a kernel"):
        ao.convert(folder, to="loralib", output=tmp_path / "out.safetensors")
    result = ao.convert(folder, to="loralib", output=tmp_path / "out.safetensors", allow_drop=True)
    assert load_file(tmp_path / "out.safetensors").keys() == {"1.lora_A", "1.lora_B"}
    assert any("has a kernel" in line for line in result.dropped)


@pytest.mark.parametrize(
    "entry", ["{", "[]", '{"lora_alpha":"6"}', '{"lora_alpha":{"one":null}}', '{"enable_lora":{"one":[1,0]}}']
)
def test_a_header_that_nobody_wrote_so(entry: str, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(linear(), path, metadata={"loralib": entry})
    with pytest.raises(errors.InvalidHeader, match="entry loralib"):
        ao.load(path)


def test_alphas_that_differ_stand_by_module(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=6, alpha_pattern={"two": 3}, use_rslora=True, target_modules=["one", "two"])
    model = get_peft_model(Line(), config)
    pm.fill(model, 3)
    folder = pm.saved(model, tmp_path / "peft")
    ao.convert(folder, to="loralib", output=tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert json.loads(file.metadata()["loralib"])["lora_alpha"] == {"one": 12, "two": 6}
    one, two = ao.load(folder), ao.load(tmp_path / "out.safetensors")
    for module in ("one", "two"):
        torch.testing.assert_close(delta(one, module), delta(two, module))


# ---- PEFT's first releases --------------------------------------------------------------------------------------


def folder_of(path: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    path.mkdir()
    torch.save({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, path / "adapter_model.bin")
    old = {
        "base_model_name_or_path": "gpt2", "bias": "none", "enable_lora": None, "fan_in_fan_out": False,
        "inference_mode": True, "lora_alpha": ALPHA, "lora_dropout": 0.1, "merge_weights": False, "modules_to_save": None,
        "peft_type": "LORA", "r": R, "target_modules": ["one"], "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps({**old, **config}))
    return path


@pytest.mark.parametrize("name", FLAGS)
def test_peft_02_grouped_its_layer_by_two(name: str, tmp_path: Path) -> None:
    """`MergedLinear` of PEFT 0.1 and 0.2: nn.Linear and nn.Conv1d with groups=2, whatever `enable_lora` is."""
    flags = FLAGS[name]
    on = sum(flags)
    tensors = {
        "one.lora_A.weight": random(R * on, 10),
        "one.lora_B.weight": random(12 // len(flags) * on, R * on // 2, 1),
    }
    folder = folder_of(tmp_path / "old", tensors, enable_lora=flags)
    x = random(5, 10)
    # As its forward does it: the convolution over the tokens, then the parts.
    after = F.conv1d((x @ tensors["one.lora_A.weight"].T).T.unsqueeze(0), tensors["one.lora_B.weight"], groups=2)[0].T
    parts = list(after.chunk(on, dim=1))
    zeros = torch.zeros(5, 12 // len(flags))
    wanted = torch.cat([parts.pop(0) if flag else zeros for flag in flags], dim=1) * (ALPHA / R)
    torch.testing.assert_close(x @ delta(ao.load(folder), "one").T, wanted)
    ao.convert(folder, to="peft", output=tmp_path / "new")
    config = pm.config_of(tmp_path / "new")
    assert not {"enable_lora", "merge_weights"} & config.keys()
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", "gpt2")
    model = Line()
    before = model.one(x)
    loaded = peft_of(model, tmp_path / "new")
    torch.testing.assert_close(loaded.one(x) - before, wanted)


@pytest.mark.parametrize("name", FLAGS)
def test_peft_02s_layer_becomes_loralibs_where_the_groups_agree(name: str, tmp_path: Path) -> None:
    flags, on = FLAGS[name], sum(FLAGS[name])
    a, b = random(R * on, 10), random(12 // len(flags) * on, R * on // 2, 1)
    tensors = {"one.lora_A.weight": a, "one.lora_B.weight": b}
    folder, file = folder_of(tmp_path / "old", tensors, enable_lora=flags), tmp_path / "new.safetensors"
    if on != 2:
        with pytest.raises(errors.CannotRepresent, match=rf"2 groups for {on} adapted parts .* adapterops to-lora"):
            ao.convert(folder, to="loralib", output=file)
        assert not file.exists()
        return
    ao.convert(folder, to="loralib", output=file)
    written, x = load_file(file), random(5, 10)
    assert written["one.lora_B"].shape == (12 // len(flags) * on, R)
    torch.testing.assert_close(
        merged(x, written["one.lora_A"], written["one.lora_B"], flags, on), merged(x, a, b, flags, 2)
    )
    torch.testing.assert_close(delta(ao.load(file), "one"), delta(ao.load(folder), "one"))


def peft_of(model: nn.Module, folder: Path) -> Any:
    """The model inside what peft loads, for a base that is none of transformers' (the config names a task)."""
    config = pm.config_of(folder)
    config["task_type"] = None
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return pm.load(model, folder).base_model.model


def test_a_transposed_projection_of_the_first_releases(tmp_path: Path) -> None:
    """GPT-2's c_attn, with the query and the value adapted: what PEFT 0.2's examples train."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=64, n_embd=8, n_layer=1, n_head=2))
    name, flags = "transformer.h.0.attn.c_attn", [True, False, True]
    tensors = {f"{name}.lora_A.weight": random(R * 2, 8), f"{name}.lora_B.weight": random(16, R, 1)}
    folder = folder_of(tmp_path / "old", tensors, enable_lora=flags, fan_in_fan_out=True, target_modules=["c_attn"])
    x, attention = random(1, 5, 8), model.transformer.h[0].attn
    before = attention.c_attn(x).detach()
    wanted = merged(x, tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"], flags, 2)
    ao.convert(folder, to="peft", output=tmp_path / "new", base=architecture_of(model))
    after = peft_of(model, tmp_path / "new").transformer.h[0].attn.c_attn(x)
    torch.testing.assert_close(after - before, wanted)


@pytest.mark.parametrize("ending", ["", ".default"])
def test_bare_names_in_a_peft_folder(ending: str, tmp_path: Path) -> None:
    """`lora_A` without `.weight` under PEFT's prefix."""
    tensors = {f"one.lora_A{ending}": random(R, 10), f"one.lora_B{ending}": random(12, R)}
    folder = folder_of(tmp_path / "old", tensors)
    ao.convert(folder, to="peft", output=tmp_path / "new")
    assert pm.weights_of(tmp_path / "new").keys() >= {"base_model.model.one.lora_A.weight"}
    x, model = random(5, 10), Line()
    before = model.one(x)
    wanted = plain(x, tensors[f"one.lora_A{ending}"], tensors[f"one.lora_B{ending}"])
    torch.testing.assert_close(peft_of(model, tmp_path / "new").one(x) - before, wanted)


def test_a_published_file(corpus: Path, tmp_path: Path) -> None:
    path = corpus / "files" / "bert-lora-xiaoshutong" / "lora_weights.pt"
    with pytest.raises(errors.UnknownFact, match="--alpha"):
        ao.convert(path, to="peft", output=tmp_path / "peft")
    result = ao.convert(path, to="peft", output=tmp_path / "peft", alpha=16.0)
    assert result.proof is not None
    assert result.proof.exact
    config = pm.config_of(tmp_path / "peft")
    assert (config["r"], len(pm.weights_of(tmp_path / "peft"))) == (16, 48)
    ao.convert(tmp_path / "peft", to="loralib", output=tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    pm.same_tensors(back, torch.load(path, weights_only=True, map_location="cpu"))
