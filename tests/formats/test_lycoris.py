"""Files that lycoris-lora wrote, against lycoris-lora: what they do to a model, and what survives a conversion.

The truth is lycoris' forward, which trains.  Its 4.1.3 merges apply the scale of LoHa and LoKr twice, which is tested;
where they do not, they must agree with us too.
"""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import lycoris_models as lm
import peft_models as pm
import pytest
import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from meta_models import build
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adapterops as ao
from adapterops import architectures, errors
from adapterops.adapter import Adapter, Certainty, Fact, Update
from adapterops.methods import METHODS
from adapterops.methods.difference import Difference

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 1e-5


_from_config = functools.cache(architectures.from_config)


@pytest.fixture(autouse=True)
def _bases_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same few bases are given hundreds of times."""
    monkeypatch.setattr(architectures, "from_config", lambda path: _from_config(Path(path)))


def weight_after(update: Update, weight: Tensor) -> Tensor:
    """W' by the formulas of the methods' docstrings, in float64."""
    if update.method == "ia3":
        axis = 1 if update.options["on_input"] else 0
        factor = update.tensors["vector"].torch().double().reshape(-1) + 1 - update.options["initial"]
        return weight * factor.reshape([-1 if at == axis else 1 for at in range(weight.dim())])
    made = weight + METHODS[update.method].delta(update).double().reshape(weight.shape)
    magnitude = update.tensors.get("magnitude")
    if magnitude is None:
        return made
    kept = 0 if update.options["dora_axis"] == "out" else 1
    axes = [axis for axis in range(made.dim()) if axis != kept]
    norm = torch.linalg.vector_norm(made, dim=axes, keepdim=True)
    return made * magnitude.torch().double().reshape(norm.shape) / norm


def apply(adapter: Adapter, models: lm.Models) -> None:
    """Puts the adapter into the models' weights."""
    for update in adapter:
        module: Any = models[update.component].get_submodule(update.module)
        if update.method == "diff" and (change := Difference().bias_delta(update)) is not None:
            module.bias.data += change.double()
        module.weight.data = weight_after(update, module.weight.data)


@functools.cache
def forward_of_lycoris(path: Path) -> list[Tensor]:
    models = lm.models_of(path)
    for lora in lm.network_of(path, models):
        lora.apply_to()
    return lm.outputs(models)


_shared = functools.cache(lm.build)


def outputs_of(adapter: Adapter | None, path: Path) -> list[Tensor]:
    """What the file's models do with the adapter in their weights; one set of models for all, put back afterwards."""
    models = {name: _shared(config) for name, config in lm.configs_of(path).items()}
    before = {name: {key: t.clone() for key, t in model.state_dict().items()} for name, model in models.items()}
    try:
        if adapter is not None:
            apply(adapter, models)
        return lm.outputs(models)
    finally:
        for name, model in models.items():
            model.load_state_dict(before[name])


def load(path: Path, **options: Any) -> Adapter:
    return ao.load(path, base=lm.base_of(path), **options)


def test_the_fixtures_are_there() -> None:
    assert len(lm.FILES) > 80
    assert {path.parent.name for path in lm.FILES} == {"lycoris-sd15", "lycoris-sdxl", "lycoris-flux"}
    methods = {update.method for path in lm.FILES for update in load(path)}
    assert methods == {"lora", "loha", "lokr", "ia3", "diff"}


@pytest.mark.parametrize("path", lm.RUNNABLE, ids=lm.label)
def test_outputs_are_those_of_lycoris(path: Path) -> None:
    truth = forward_of_lycoris(path)
    assert pm.apart(truth, outputs_of(None, path)) > 0.05, "the file does nothing"
    assert pm.apart(truth, outputs_of(load(path), path)) <= TOLERANCE


SCALED_TWICE = ("loha", "lokr", "mixed")


@pytest.mark.parametrize("path", [p for p in lm.RUNNABLE if not p.stem.startswith("kohya-")], ids=lm.label)
def test_merges_of_lycoris(path: Path) -> None:
    """The same weights; for LoHa and LoKr, those that come of applying the scale a second time."""
    models = lm.models_of(path)
    for lora in lm.network_of(path, models):
        lora.merge_to(1.0)
    merged, adapter = lm.outputs(models), load(path)
    if any(word in path.stem for word in SCALED_TWICE) and path.stem != "lycoris-lokr-full":
        assert pm.apart(merged, outputs_of(adapter, path)) > 0.01
        adapter = adapter.with_updates(scaled_again(update) for update in adapter)
    assert pm.apart(merged, outputs_of(adapter, path)) <= TOLERANCE


def scaled_again(update: Update) -> Update:
    if update.method not in ("loha", "lokr"):
        return update
    scale = METHODS[update.method].scale(update)
    assert scale is not None
    assert update.alpha is not None
    assert update.alpha.value is not None
    return replace(update, alpha=Fact(update.alpha.value * scale, Certainty.GIVEN))


# The modules of diffusers that the authors' fused ones hold, and how many rows each has.
FUSED = {
    "double_blocks.0.img_attn.qkv": [(f"transformer_blocks.0.attn.to_{x}", 16) for x in "qkv"],
    "double_blocks.0.txt_attn.qkv": [(f"transformer_blocks.0.attn.add_{x}_proj", 16) for x in "qkv"],
    "double_blocks.0.img_attn.proj": [("transformer_blocks.0.attn.to_out.0", 16)],
    "double_blocks.0.img_mlp.0": [("transformer_blocks.0.ff.net.0.proj", 64)],
    "single_blocks.0.linear1": [
        *((f"single_transformer_blocks.0.attn.to_{x}", 16) for x in "qkv"),
        ("single_transformer_blocks.0.proj_mlp", 64),
    ],
    "single_blocks.0.linear2": [("single_transformer_blocks.0.proj_out", 16)],
}


def authors_model(model: nn.Module) -> nn.Module:
    """Fused modules with the weights of `model`, under the authors' names."""
    root = nn.Module()
    for name, parts in FUSED.items():
        layers: list[Any] = [model.get_submodule(part) for part, _ in parts]
        fused = nn.Linear(layers[0].in_features, sum(rows for _, rows in parts)).double()
        fused.weight.data = torch.cat([layer.weight.data for layer in layers])
        fused.bias.data = torch.cat([layer.bias.data for layer in layers])
        module = root
        *way, last = name.split(".")
        for step in way:
            if step not in dict(module.named_children()):
                module.add_module(step, nn.Module())
            module = module.get_submodule(step)
        module.add_module(last, fused)
    return root


@pytest.mark.parametrize("path", lm.AUTHORS, ids=lm.label)
def test_fused_projections_are_split_as_lycoris_trained_them(path: Path, tmp_path: Path) -> None:
    models = lm.models_of(path)
    plain = lm.outputs(models)
    fused = authors_model(models["transformer"])
    network = lm.network_of(path, models, fused)
    assert {lora.lora_name for lora in network} == {"lora_unet_" + name.replace(".", "_") for name in FUSED}
    for lora in network:
        lora.merge_to(1.0) if not isinstance(lora, (LohaModule, LokrModule)) else _merge_by_forward(lora)
    for name, parts in FUSED.items():
        whole: Any = fused.get_submodule(name)
        start = 0
        for part, rows in parts:
            layer: Any = models["transformer"].get_submodule(part)
            layer.weight.data = whole.weight.data[start : start + rows]
            layer.bias.data = whole.bias.data[start : start + rows]
            start += rows
    truth = lm.outputs(models)
    assert pm.apart(truth, plain) > 0.05
    if path.stem == "authors-lokr-uncut":
        with pytest.raises(errors.CannotRepresent, match=r"to_qkv: its LoKr has blocks of 24 rows.*--to kohya"):
            ao.save(load(path), tmp_path / "x.safetensors", format="lycoris")
        return
    ao.save(load(path), tmp_path / "x.safetensors", format="lycoris")
    split = ao.load(tmp_path / "x.safetensors", base=path.parent)
    assert pm.apart(truth, outputs_of(split, path)) <= TOLERANCE


def _merge_by_forward(lora: Any) -> None:
    layer = lora.org_module[0]
    with torch.no_grad():
        changed = lora(torch.eye(layer.in_features, dtype=torch.double)) - layer.bias
    layer.weight.data = changed.T.contiguous()


def holders(path: Path, adapter: Adapter) -> set[str]:
    """The targets that can hold a file, by what each can say (not by trying)."""
    parts, methods = set(adapter.components), {update.method for update in adapter}
    roles = {role for update in adapter for role in update.tensors}
    flux, authors = parts == {"transformer"}, path in lm.AUTHORS
    # Some of q, k and v have no counterpart here, and neither a Kronecker product nor a norm is put together of parts.
    whole = not flux or authors or not ({"lokr"} & methods or "magnitude" in roles)
    separate = path.stem != "authors-lokr-uncut"
    per_input = any(update.options.get("dora_axis") == "in" for update in adapter)
    out = set()
    if parts == {"model"}:
        out.add("lycoris")
    else:
        out |= {"kohya"} if whole else set()
        out |= {"kohya-diffusers"} if separate else set()
        out |= {"onetrainer"} if separate and flux else set()
        out |= {"lycoris"} if separate and len(parts) == 1 else set()
        # Comfy's names for text encoders are those of known pipelines, and its readers know no (IA)³.
        if parts <= {"unet", "transformer"} and whole and "ia3" not in methods:
            out |= {"comfy-down"} if "mid" in roles else {"comfy", "comfy-down"}
        if methods == {"lora"} and "mid" not in roles and not per_input:
            out.add("diffusers")
    if refused_by_peft(path) is None:
        out.add("peft")
    return out


PEFT_REFUSES = {
    r"-ia3$": r"\(IA\)³ vector .* kept as the factor minus one.*--to kohya",
    r"(kohya|lycoris|authors)-full$": r"full, norm and bias differences.*--to kohya",
    r"-locon-norm$": r"full, norm and bias differences.*--to kohya",
    r"-loha-dora(-in)?$": r"DoRA magnitude .*peft's LoHa has none; write it as --to kohya",
    r"-lokr-dora(-in)?$": r"DoRA magnitude .*peft's LoKr has none; write it as --to kohya",
    r"-locon-dora-in$": r"DoRA magnitude is per input",
    r"-locon-(tucker|dora)$": r": mid, tensor.*--to kohya",
    r"-lokr-unbalanced$": r"no decompose_factor makes peft cut.*--to kohya",
    r"flux/(kohya|lycoris)-lokr-(factor|full)$": r"no decompose_factor makes peft cut.*--to kohya",
    r"authors-lokr$": r"no decompose_factor makes peft cut.*--to kohya",
    r"authors-lokr-uncut$": r"to_qkv: its LoKr has blocks of 24 rows.*--to kohya",
    r"-mixed$": r"(a PEFT config is for one method|full, norm and bias differences).*--to kohya",
}
"""What no PEFT config can say, by the files' labels, and why."""


def refused_by_peft(path: Path) -> str | None:
    return next((reason for pattern, reason in PEFT_REFUSES.items() if re.search(pattern, lm.label(path))), None)


TARGETS = ("kohya-diffusers", "kohya", "onetrainer", "lycoris", "comfy", "comfy-down", "diffusers", "peft")


def tensors_of(path: str | Path) -> dict[str, Tensor]:
    return load_file(Path(path))


def same_file(one: str | Path, other: str | Path) -> None:
    """Every tensor with its dtype, shape and bits."""
    found, wanted = tensors_of(one), tensors_of(other)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("path", lm.FILES, ids=lm.label)
def test_there_and_back(path: Path, tmp_path: Path) -> None:
    adapter = load(path)
    able = holders(path, adapter)
    assert adapter.provenance.dialect in able
    # To a base without names of its authors, Kohya's two dialects are one.
    targets = TARGETS if adapter.components == ("transformer",) else TARGETS[1:]
    for target in targets:
        place = tmp_path / target
        if target not in able:
            with pytest.raises(errors.CannotRepresent, match=rf"{path.name}: [a-z_0-9]+: [a-z]"):
                ao.save(adapter, place, format=target)
            assert not place.exists()
            continue
        result = ao.save(adapter, place, format=target)
        assert result.proof is not None
        assert result.proof.largest_error == 0.0
        back = ao.convert(
            result.path, adapter.provenance.dialect, tmp_path / f"back-{target}", base=lm.base_of(path), format=target
        )
        assert back.proof is not None
        assert back.proof.largest_error == 0.0
        same_file(back.path, path)


@pytest.mark.parametrize("path", [p for p in lm.FILES if refused_by_peft(p)], ids=lm.label)
def test_peft_refusals_say_why_and_what_works(path: Path, tmp_path: Path) -> None:
    reason = refused_by_peft(path)
    with pytest.raises(errors.CannotRepresent, match=rf"{path.name}: [a-z_0-9]+: [a-z].*{reason}"):
        ao.save(load(path), tmp_path / "x", format="peft")


def for_peft(path: Path) -> bool:
    """SD 1.5 holds the same tensors under two prefixes; most of Kohya's are left out for time."""
    twin = path.parent.name == "lycoris-sd15" and path.stem.startswith("kohya-")
    return refused_by_peft(path) is None and not (
        twin and path.stem.endswith(("-scalar", "-both", "-factor", "-tucker"))
    )


@pytest.mark.parametrize("path", [path for path in lm.RUNNABLE if for_peft(path)], ids=lm.label)
def test_peft_makes_of_it_what_lycoris_does(path: Path, tmp_path: Path) -> None:
    truth = forward_of_lycoris(path)
    result = ao.save(load(path), tmp_path / "x", format="peft")
    models = {name: model.float() for name, model in lm.models_of(path).items()}
    for name, model in models.items():
        part = Path(result.path) / name
        folder = part if part.is_dir() else Path(result.path)
        models[name] = pm.load(model, folder).base_model.model
    size = max(float(output.abs().max()) for output in truth)
    assert pm.apart(lm.outputs(models), truth) <= TOLERANCE * max(1.0, size)


@pytest.mark.parametrize("name", ["lycoris-locon", "lycoris-locon-tucker", "lycoris-locon-dora", "lycoris-locon-norm"])
def test_lycoris_loads_what_comes_back(name: str, tmp_path: Path) -> None:
    """Through Comfy's spelling and home: `create_lycoris_from_weights` finds every module, and merges the same."""
    from lycoris import create_lycoris_from_weights

    path = lm.FIXTURES / "lycoris-sd15" / f"{name}.safetensors"
    ao.save(load(path), tmp_path / "comfy.safetensors", format="comfy-down")
    home = ao.convert(tmp_path / "comfy.safetensors", "lycoris", tmp_path / "home.safetensors", base=path.parent)
    models = lm.models_of(path)
    network, _ = create_lycoris_from_weights(1.0, home.path, models["unet"])
    assert len(network.loras) == len(load(path))
    for lora in network.loras:
        lora.double().merge_to(1.0)
    assert pm.apart(lm.outputs(models), forward_of_lycoris(path)) <= TOLERANCE


class Modules:
    """Adapters of lycoris for some modules of a real base, on the meta device: real names and shapes, few of them."""

    def __init__(self, model: nn.Module, prefix: str, seed: int = 0) -> None:
        self.model, self.prefix, self.tensors = model, prefix, dict[str, Tensor]()
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, kind: Any, name: str, rank: int = 2, alpha: float = 1.0, spelled: str = "", **options: Any) -> None:
        stem = f"{self.prefix}_{(spelled or name).replace('.', '_')}"
        module = kind(stem, self.model.get_submodule(name), 1.0, rank, alpha, **options)
        for parameter in module.parameters():
            parameter.data = torch.randn(parameter.shape, generator=self.generator) * 0.1
        self.tensors |= {f"{stem}.{key}": tensor.detach().half() for key, tensor in module.state_dict().items()}

    def save(self, path: Path) -> Path:
        save_file(self.tensors, path)
        return path


SD1_NAMES = (
    "down_blocks.0.attentions.0.proj_in",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    "down_blocks.0.resnets.0.conv1",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_v",
)


@pytest.mark.parametrize("kind", [LoConModule, LohaModule, LokrModule])
@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("prefix", ["lycoris", "lora_unet"])
def test_a_real_sd1_is_told_without_base(kind: Any, tucker: bool, prefix: str, tmp_path: Path) -> None:
    made = Modules(build("sd1")["unet"], prefix)
    for name in SD1_NAMES:
        made.add(kind, name, use_tucker=tucker)
    adapter = ao.load(made.save(tmp_path / "x.safetensors"))
    assert (adapter.architecture.value, adapter.architecture.certainty) == ("sd1", Certainty.DERIVED)
    assert {(u.component, u.module) for u in adapter} == {("unet", name) for name in SD1_NAMES}
    assert adapter.provenance.dialect == {"lycoris": "lycoris", "lora_unet": "kohya"}[prefix]


SDXL_NAMES = {
    "down_blocks.1.attentions.0.proj_in": "input_blocks.4.1.proj_in",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
    "mid_block.attentions.0.transformer_blocks.5.attn2.to_v": "middle_block.1.transformer_blocks.5.attn2.to_v",
    "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.2": "output_blocks.3.1.transformer_blocks.0.ff.net.2",
}


@pytest.mark.parametrize("kind", [LohaModule, LokrModule])
def test_a_real_sdxl_is_told_by_the_authors_names(kind: Any, tmp_path: Path) -> None:
    """As sd-scripts has its UNet, and both text encoders beside it; there and back by diffusers' names."""
    models = build("sdxl")
    made = Modules(models["unet"], "lora_unet")
    for name, original in SDXL_NAMES.items():
        made.add(kind, name, spelled=original)
    encoder = Modules(models["text_encoder_2"], "lora_te2")
    encoder.add(kind, "text_model.encoder.layers.31.mlp.fc1")
    made.tensors |= encoder.tensors
    path = made.save(tmp_path / "x.safetensors")
    adapter = ao.load(path)
    assert adapter.architecture.value == "sdxl"
    assert {u.module for u in adapter.of("unet")} == set(SDXL_NAMES)
    assert [u.module for u in adapter.of("text_encoder_2")] == ["text_model.encoder.layers.31.mlp.fc1"]
    there = ao.save(adapter, tmp_path / "y.safetensors", format="kohya-diffusers")
    same_file(ao.convert(there.path, "kohya", tmp_path / "z.safetensors").path, path)


def flux_modules(prefix: str) -> Modules:
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    made = Modules(model, prefix)
    for name in (
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.to_out.0",
        "single_transformer_blocks.0.proj_out",
    ):
        made.add(LokrModule, name, factor=64, full_matrix=True)
    return made


@pytest.mark.parametrize(("prefix", "dialect"), [("lycoris", "lycoris"), ("lora_transformer", "onetrainer")])
def test_a_real_flux_is_told_without_base(prefix: str, dialect: str, tmp_path: Path) -> None:
    """As SimpleTuner writes it; and under OneTrainer's prefix, with the same names behind it."""
    adapter = ao.load(flux_modules(prefix).save(tmp_path / "x.safetensors"))
    assert (adapter.architecture.value, adapter.provenance.dialect) == ("flux", dialect)
    assert adapter.components == ("transformer",)
    other = "onetrainer" if dialect == "lycoris" else "lycoris"
    there = ao.save(adapter, tmp_path / "y.safetensors", format=other)
    same_file(ao.convert(there.path, dialect, tmp_path / "z.safetensors").path, tmp_path / "x.safetensors")


@pytest.mark.parametrize("lost", ["", "text_model."])
def test_a_text_encoder_alone(lost: str, tmp_path: Path) -> None:
    """With and without the beginning that transformers 5 dropped; nothing says what the prefix stands for but a base."""
    path = lm.FIXTURES / "lycoris-sd15" / "encoder-lokr.safetensors"
    flat = lost.replace(".", "_")
    tensors = {key.replace("lycoris_text_model_", f"lycoris_{flat}"): t for key, t in tensors_of(path).items()}
    save_file(tensors, tmp_path / "x.safetensors")
    adapter = ao.load(tmp_path / "x.safetensors", base=path.parent / "text_encoder")
    assert pm.apart(outputs_of(adapter, path), forward_of_lycoris(path)) <= TOLERANCE
    with pytest.raises(errors.UnknownArchitectureOfFile, match=r"x\.safetensors: (module|tensor) .*--base CONFIG"):
        ao.convert(tmp_path / "x.safetensors", "diffusers", tmp_path / "y")


def variant(tmp_path: Path, **changes: Tensor | None) -> Path:
    """A LoHa file with other tensors (or none) under some suffixes of every module."""
    path = lm.FIXTURES / "lycoris-sd15" / "lycoris-loha.safetensors"
    tensors = tensors_of(path)
    stems = {key.partition(".")[0] for key in tensors}
    for suffix, tensor in changes.items():
        for stem in stems:
            tensors.pop(f"{stem}.{suffix}", None)
            if tensor is not None:
                tensors[f"{stem}.{suffix}"] = tensor.clone()
    out = tmp_path / "variant.safetensors"
    save_file(tensors, out)
    return out


@pytest.mark.parametrize(
    "alpha",
    [
        torch.tensor([2.0]), torch.tensor(2.0, dtype=torch.bfloat16), torch.tensor(2), torch.tensor([[2.0]]).half(),
        torch.tensor(2.0, dtype=torch.double),
    ],
    ids=lambda t: f"{t.dtype} {list(t.shape)}",
)  # fmt: skip
def test_alphas_of_every_form(alpha: Tensor, tmp_path: Path) -> None:
    path = variant(tmp_path, alpha=alpha)
    base = lm.FIXTURES / "lycoris-sd15"
    adapter = ao.load(path, base=base)
    assert {u.alpha.value for u in adapter if u.alpha is not None} == {2.0}
    there = ao.save(adapter, tmp_path / "x.safetensors", format="kohya")
    same_file(ao.convert(there.path, "lycoris", tmp_path / "y.safetensors", base=base).path, path)


def test_no_alpha_is_scale_one(tmp_path: Path) -> None:
    """lycoris itself cannot load such a file; Comfy and A1111 take scale 1."""
    base = lm.FIXTURES / "lycoris-sd15"
    adapter = ao.load(variant(tmp_path, alpha=None), base=base)
    assert {METHODS["loha"].scale(u) for u in adapter} == {1.0}
    assert {u.alpha.certainty for u in adapter if u.alpha is not None} == {Certainty.ASSUMED}
    there = ao.save(adapter, tmp_path / "x.safetensors", format="kohya")
    home = ao.convert(there.path, "lycoris", tmp_path / "y.safetensors", base=base)
    same_file(home.path, tmp_path / "variant.safetensors")


def test_a_scalar_of_its_own_is_refused_by_name(tmp_path: Path) -> None:
    """lycoris 4.1.3 folds it when it saves and takes it for one when it loads, so what such a file does is not settled."""
    path = variant(tmp_path, scalar=torch.tensor(0.5))
    base = lm.FIXTURES / "lycoris-sd15"
    with pytest.raises(errors.UnsupportedFormat, match=r"variant.*\.scalar': is a learnt factor"):
        ao.load(path, base=base)
    module = LohaModule("x", nn.Linear(4, 4), use_scalar=True)
    state = {**module.state_dict(), "scalar": torch.tensor(0.5)}
    module.load_state_dict(state, strict=False)
    assert module.scalar.item() == 1.0


def test_a_lokr_of_whole_factors_may_have_any_alpha_in_its_header() -> None:
    """Two whole factors have no scale: lycoris writes the rank for alpha, whatever the header says was asked for."""
    path = lm.FIXTURES / "lycoris-sd15" / "kohya-lokr-full.safetensors"
    adapter = load(path)
    assert adapter.metadata["ss_network_alpha"] == "0.5"
    assert {u.alpha.value for u in adapter if u.alpha is not None} == {1.0}
    assert {METHODS["lokr"].scale(u) for u in adapter} == {1.0}


@pytest.mark.parametrize(
    ("lost", "said"), [("on_input", "flag on_input of .*attn2.to_k is missing"), ("weight", "without its vector")]
)
def test_half_an_ia3_is_refused(lost: str, said: str, tmp_path: Path) -> None:
    path = lm.FIXTURES / "lycoris-sd15" / "lycoris-ia3.safetensors"
    tensors = {key: t for key, t in tensors_of(path).items() if not key.endswith(f"attn2_to_k.{lost}")}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(errors.BrokenAdapter, match=rf"attn2[._]to_k.*{said}"):
        ao.load(tmp_path / "x.safetensors", base=path.parent)


@pytest.mark.parametrize("on_input", [0, 1])
def test_an_ia3_vector_must_fit_the_side_that_it_multiplies(on_input: int, tmp_path: Path) -> None:
    """The flag is a tensor while the base is looked up, and must count there."""
    key = "lycoris_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"  # 12 inputs, 16 outputs
    tensors = {f"{key}.weight": torch.ones(16 if on_input else 12), f"{key}.on_input": torch.tensor(on_input)}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(errors.BrokenAdapter, match=r"cannot act on .*attn2\.to_k, whose weight .* \[16, 12\]"):
        ao.load(tmp_path / "x.safetensors", base=lm.FIXTURES / "lycoris-sd15")
