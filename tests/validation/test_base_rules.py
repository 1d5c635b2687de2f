"""Modules against the base model: named by the user, told by its weights, or declared by the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import serving
from safetensors.torch import load_file, save_file
from sound import Tensors, codes, diffusers_file, edit, found, kohya_file, peft_folder, set_config

from adapterops import architectures
from adapterops.architectures import BadBaseConfig
from adapterops.validation import registry
from adapterops.validation.rule import Finding

Broken = Callable[[Path], Path | tuple[Path, dict[str, Any]]]
FIRST = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CROSS = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key.replace(old, new): t for key, t in tensors.items()}


def wider(tensors: Tensors) -> Tensors:
    """The cross attention of Stable Diffusion 2, which takes 1024 inputs, in one module."""
    key = f"{CROSS}.lora_down.weight"
    return tensors | {key: torch.cat([tensors[key], tensors[key][:, :256] * 0.5], 1)}


def llama_weights(folder: Path, layers: int = 2, tied: bool = True, shards: int = 1) -> Path:
    """The weights of a Llama of the sound adapter's size, as transformers saves it."""
    folder.mkdir(parents=True)
    tensors: Tensors = {"model.embed_tokens.weight": torch.zeros(32, 64), "model.norm.weight": torch.ones(64)}
    for layer in range(layers):
        stem = f"model.layers.{layer}"
        for name, out in (("q_proj", 64), ("k_proj", 32), ("v_proj", 32), ("o_proj", 64)):
            tensors[f"{stem}.self_attn.{name}.weight"] = torch.zeros(out, 64)
        tensors |= {f"{stem}.{norm}.weight": torch.ones(64) for norm in ("input_layernorm", "post_attention_layernorm")}
    if not tied:
        tensors["lm_head.weight"] = torch.zeros(32, 64)
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    index: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names[shard::shards]}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(names[shard::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def with_weights(change: Callable[[Path], Any], **options: Any) -> Broken:
    """A sound PEFT folder, changed, against a base that is given by its weights."""

    def make(path: Path) -> tuple[Path, dict[str, Any]]:
        folder = peft_folder(path)
        change(folder)
        return folder, {"base": llama_weights(path / "base", **options)}

    return make


def kohya(change: Callable[[Tensors], Tensors] | None = None, **metadata: str) -> Broken:
    """A sound Kohya file with other tensors, and entries of its header (`__` stands for a dot)."""
    return lambda path: edit(kohya_file(path), change, {k.replace("__", "."): v for k, v in metadata.items()})


def nobodys(path: Path) -> Path:
    """Flat names of a model that is not known."""
    return edit(
        kohya_file(path),
        lambda tensors: {
            key: t for key, t in renamed("down_blocks", "some_stage")(tensors).items() if "some_stage" in key
        },
    )


def sdxl_unet(path: Path) -> Path:
    """A file of diffusers whose folder's config says another base."""
    file = peft_folder(path) / "adapter_model.safetensors"
    stem = "base_model.model.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    seed = torch.Generator().manual_seed(3)
    save_file(
        {
            f"{stem}.lora_A.weight": torch.randn(4, 768, generator=seed),
            f"{stem}.lora_B.weight": torch.randn(640, 4, generator=seed),
        },
        file,
        {"format": "pt"},
    )
    mapping = {
        "base_model_class": "UNet2DConditionModel",
        "parent_library": "diffusers.models.unets.unet_2d_condition",
    }
    name = "stabilityai/stable-diffusion-xl-base-1.0"
    folder = set_config(
        file.parent, target_modules=["to_k"], auto_mapping=mapping, task_type=None, base_model_name_or_path=name
    )
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("meta-llama/Llama-3.2-1B", name))
    return folder


BROKEN: dict[str, Broken] = {
    "B301": with_weights(lambda folder: None, layers=1),
    "B302": kohya(wider),
    "B303": nobodys,
    "B304": kohya(modelspec__architecture="stable-diffusion-xl-v1-base/lora", ss_base_model_version="sdxl_base_v1-0"),
}
MORE_BROKEN: list[tuple[str, Broken]] = [
    ("B301", lambda path: (kohya_file(path), {"arch": "sd3"})),
    ("B301", kohya(renamed("down_blocks_1", "down_blocks_7"))),
    ("B302", lambda path: (edit(kohya_file(path), wider), {"arch": "sd1"})),
    ("B304", kohya(ss_base_model_version="sdxl_base_v1-0")),
    ("B304", sdxl_unet),
]
SOUND: dict[str, Broken] = {
    "sd1": lambda path: (kohya_file(path), {"arch": "sd1"}),
    "header of a fine-tune": kohya(ss_base_model_version="my own", modelspec__architecture="something/lora"),
    "diffusers": lambda path: (diffusers_file(path), {"arch": "sd1"}),
    "weights": with_weights(lambda folder: None),
    "weights with a head": with_weights(lambda folder: None, tied=False),
    "shards": with_weights(lambda folder: None, shards=3),
}


def examined(broken: Broken, path: Path) -> list[Finding]:
    made = broken(path)
    file, options = made if isinstance(made, tuple) else (made, {})
    return list(found(file, **options))


def test_every_rule_is_broken() -> None:
    assert sorted(BROKEN) == [rule.code for rule in registry.rules() if rule.group == "B"]


@pytest.mark.parametrize("code", sorted(BROKEN))
def test_broken(code: str, tmp_path: Path) -> None:
    findings = examined(BROKEN[code], tmp_path)
    assert [f.code for f in findings] == [code], [(f.code, f.message) for f in findings]
    rule = findings[0].rule
    assert all((findings[0].message, rule.why, rule.remedy, rule.fires, rule.passes))


@pytest.mark.parametrize("number", range(len(MORE_BROKEN)))
def test_more_broken(number: int, tmp_path: Path) -> None:
    code, broken = MORE_BROKEN[number]
    findings = examined(broken, tmp_path)
    assert [f.code for f in findings] == [code], [(f.code, f.message) for f in findings]


@pytest.mark.parametrize("name", sorted(SOUND))
def test_sound(name: str, tmp_path: Path) -> None:
    findings = examined(SOUND[name], tmp_path)
    assert not findings, [(f.code, f.message) for f in findings]


def test_all_modules_are_named(tmp_path: Path) -> None:
    (finding,) = examined(BROKEN["B301"], tmp_path)
    assert len(finding.where) == 4
    assert all(".layers.1." in key for key in finding.where)


# ---- the base's own weights ---------------------------------------------------------------------------------


def test_the_weights_tell_what_the_config_does(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=20, n_positions=8)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    told = architectures.from_weights(tmp_path / "base").components["model"]
    known = architectures.from_config(tmp_path / "base").components["model"]
    # GPT-2 stores (in, out); its head is tied to its embedding, and not in the file.
    names = [name for name, spec in known.modules.items() if spec.shape]
    assert {n: told.modules[n].shape for n in names} == {n: known.modules[n].shape for n in names}
    assert {n for n in names if told.modules[n].transposed} == {n for n in names if known.modules[n].transposed}
    assert {n: told.modules[n].kind for n in names} == {n: known.modules[n].kind for n in names}


def test_weights_of_diffusers(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    model.save_pretrained(tmp_path / "pipeline" / "unet")
    known = architectures.from_config(tmp_path / "pipeline" / "unet").components["unet"]
    for path in (tmp_path / "pipeline" / "unet", tmp_path / "pipeline"):
        told = architectures.from_weights(path).components["unet"]
        assert {n: s.shape for n, s in told.modules.items()} == {n: s.shape for n, s in known.modules.items()}
        assert {n for n, s in told.modules.items() if s.kind == "conv"} == {
            n for n, s in known.modules.items() if s.kind == "conv"
        }


def test_one_file_of_weights(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path)
    base = llama_weights(tmp_path / "base", layers=1) / "model.safetensors"
    assert codes(folder, base=base) == ["B301"]


def test_a_config_goes_before_weights(tmp_path: Path) -> None:
    base = llama_weights(tmp_path / "base")
    (base / "config.json").write_text("{}")
    with pytest.raises(BadBaseConfig, match=r"config\.json"):
        architectures.from_base(base)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4)}, "authors' own checkpoint"),
        ({"model.layers.0.q.weight": torch.zeros(8, 1, dtype=torch.uint8)}, "quantised"),
    ],
)
def test_weights_that_tell_nothing(tensors: Tensors, said: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(BadBaseConfig, match=said):
        architectures.from_weights(tmp_path / "model.safetensors")


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    with pytest.raises(BadBaseConfig, match="part of an adapter"):
        architectures.from_weights(kohya_file(tmp_path))


def test_a_folder_with_neither(tmp_path: Path) -> None:
    with pytest.raises(BadBaseConfig, match="holds neither"):
        architectures.from_base(tmp_path)


def test_of_a_base_on_the_hub_only_the_header_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = peft_folder(tmp_path)
    base = llama_weights(tmp_path / "base")
    large = tmp_path / "large.safetensors"
    tensors = load_file(base / "model.safetensors") | {"model.embed_tokens.weight": torch.zeros(80_000, 64)}
    save_file(tensors, large, {"format": "pt"})
    with serving(monkeypatch, tmp_path / "cache") as server:
        server.files = {"model.safetensors": large.read_bytes(), "README.md": b"# A model"}
        assert codes(folder, base="hf://me/style") == []
        assert 0 < sum(server.sent.values()) < 200_000 < large.stat().st_size
