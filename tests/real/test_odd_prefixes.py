"""What stands before modules' names in files that trainers and readers of Wan and others have: read, or refused with what helps.

The readers: kijai/ComfyUI-WanVideoWrapper `nodes_model_loading.py` (`standardize_lora_key_format`); Comfy-Org/ComfyUI
`comfy/lora.py` (`model_lora_keys_unet`), `comfy/lora_convert.py` (`convert_lora_wan_fun`), `comfy/weight_adapter/lora.py`
(`LoRAAdapter.load`).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checks import same
from safetensors.torch import load_file
from trainers import DEFAULT, DOWN_UP, Tensors, lokr, pairs, write

import adapterops as ao
from adapterops.errors import UnknownFact, UnknownModule, UnsupportedFormat

WIDTH = 1536
AUTHORS = {
    **{f"blocks.{i}.self_attn.{p}": (WIDTH, WIDTH) for i in (0, 29) for p in "qkvo"},
    "blocks.0.ffn.0": (8960, WIDTH),
}
OURS = {
    **{f"blocks.{i}.attn1.to_{p}": (WIDTH, WIDTH) for i in (0, 29) for p in ("q", "k", "v", "out.0")},
    "blocks.0.ffn.net.0.proj": (8960, WIDTH),
}
NAMES = dict(zip(AUTHORS, OURS, strict=True))
"""The same modules by Wan's authors' names and by diffusers'."""
FIXTURES = Path(__file__).parents[2] / "fixtures" / "lycoris-sdxl"
FLUX = {"double_blocks.0.img_attn.proj": (3072, 3072), "single_blocks.37.linear2": (3072, 15360)}


def kohyas(prefix: str, names: dict[str, tuple[int, int]] = AUTHORS) -> Tensors:
    return pairs(names, prefix, DOWN_UP, 2.0, flat=True)


READ: dict[str, tuple[Tensors, str]] = {
    # modelscope/DiffSynth-Studio without `--remove_prefix_in_ckpt`; UniAnimate-DiT.
    "pipe.dit. with a name": (pairs(AUTHORS, "pipe.dit.", DEFAULT), "diffsynth"),
    "pipe.dit2.": (pairs(AUTHORS, "pipe.dit2."), "diffsynth"),
    "dit.": (pairs(AUTHORS, "dit."), "diffsynth"),
    "nothing, with a name": (pairs(AUTHORS, "", DEFAULT), "diffsynth"),
    "nothing, Kohya's factors": (pairs(AUTHORS, "", DOWN_UP), "original-down"),
    "nothing, Kohya's factors and alphas": (pairs(AUTHORS, "", DOWN_UP, 2.0), "original-down"),
    "as a checkpoint calls it": (pairs(AUTHORS, "model.diffusion_model."), "comfy"),
    "as a checkpoint calls it, Kohya's factors": (pairs(AUTHORS, "model.diffusion_model.", DOWN_UP, 2.0), "comfy-down"),
    "peft's wrapper behind Comfy's": (pairs(AUTHORS, "diffusion_model.base_model.model."), "comfy"),
    "Comfy's with a name": (pairs(AUTHORS, "diffusion_model.", DEFAULT), "comfy"),
    "Comfy's before diffusers' names": (pairs(OURS, "diffusion_model.", alpha=2.0), "comfy-diffusers"),
    "diffusers' before the authors' names": (pairs(AUTHORS, "transformer."), "wan-transformer"),
    "the second expert's": (pairs(OURS, "transformer_2."), "diffusers"),
    "VideoX-Fun's": (kohyas("lora_unet__"), "kohya"),
    "VideoX-Fun's, peft's factors": (pairs(AUTHORS, "lora_unet__", flat=True), "kohya-peft"),
    "Kohya's, peft's factors": (pairs(AUTHORS, "lora_unet_", alpha=2.0, flat=True), "kohya-peft"),
    "Kohya's, peft's factors with a name": (pairs(AUTHORS, "lora_unet_", DEFAULT, flat=True), "kohya-peft"),
    "Kohya's before diffusers' names, peft's factors": (pairs(OURS, "lora_unet_", flat=True), "kohya-diffusers-peft"),
    "LyCORIS' before the authors' names": (kohyas("lycoris_"), "lycoris-original"),
    "LyCORIS' before diffusers' names": (kohyas("lycoris_", OURS), "lycoris"),
}


A_ENDS = ("lora_A.weight", "lora_A.default.weight", "lora_down.weight")
B_ENDS = ("lora_B.weight", "lora_B.default.weight", "lora_up.weight")


@pytest.mark.parametrize("name", READ)
def test_it_is_read_and_kept(name: str, tmp_path: Path) -> None:
    tensors, dialect = READ[name]
    path = write(tmp_path / "a.safetensors", tensors)
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == (dialect, "wan_1_3b")
    scale = 0.5 if any(key.endswith(".alpha") for key in tensors) else 1.0
    assert [list(component.scales) for component in found.components] == [[scale]]
    # What it says is what the same tensors say under the usual names.
    ao.convert(path, "comfy-down", tmp_path / "b.safetensors")
    usual = pairs(AUTHORS, "diffusion_model.", DOWN_UP, scale * 4)
    made = load_file(tmp_path / "b.safetensors")
    assert made.keys() - {f"diffusion_model.{name}.alpha" for name in AUTHORS} == {k for k in usual if "lora" in k}
    for module, name in NAMES.items():
        spelled = (module, name, module.replace(".", "_"), name.replace(".", "_"))
        stem = f"diffusion_model.{module}"
        for end, ends in (("lora_down.weight", A_ENDS), ("lora_up.weight", B_ENDS)):
            (own,) = (t for key, t in tensors.items() if key.endswith(tuple(f"{n}.{e}" for n in spelled for e in ends)))
            assert torch.equal(made[f"{stem}.{end}"], own)
        assert float(made.get(f"{stem}.alpha", torch.tensor(4 * scale))) == 4 * scale
    # And the file is written again as it was, where its spelling is one that is written.
    if dialect != "wan-transformer":
        ao.save(ao.load(path), tmp_path / "c.safetensors")
        same(load_file(tmp_path / "c.safetensors"), tensors)


def test_lycoris_around_the_authors_flux(tmp_path: Path) -> None:
    dots = lokr(FLUX, "lycoris#", 16, 4, 2.0)
    stems = {f"lycoris#{name}": "lycoris_" + name.replace(".", "_") for name in FLUX}
    tensors = {stems[key.rpartition(".")[0]] + "." + key.rpartition(".")[2]: t for key, t in dots.items()}
    path = write(tmp_path / "a.safetensors", tensors)
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == ("lycoris-original", "flux")
    ao.convert(path, "kohya", tmp_path / "b.safetensors")
    same(
        load_file(tmp_path / "b.safetensors"), {key.replace("lycoris_", "lora_unet_"): t for key, t in tensors.items()}
    )


def test_the_second_experts_file_says_so(tmp_path: Path) -> None:
    for prefix, tensors in (
        ("transformer_2.", pairs(OURS, "transformer_2.")),
        ("pipe.dit2.", pairs(AUTHORS, "pipe.dit2.")),
    ):
        path = write(tmp_path / "a.safetensors", tensors)
        assert any(note.startswith(prefix) and "load_into_transformer_2" in note for note in ao.inspect(path).notes)
        ao.convert(path, "diffusers", tmp_path / "b.safetensors", overwrite=True)
        assert load_file(tmp_path / "b.safetensors").keys() == pairs(OURS, "transformer.").keys()


def test_two_experts_in_a_file_are_told_apart(tmp_path: Path) -> None:
    """The remedies that the message names work."""
    first, second = pairs(OURS, "transformer."), pairs(OURS, "transformer_2.", rank=2)
    path = write(tmp_path / "a.safetensors", first | second)
    with pytest.raises(UnsupportedFormat, match="second expert") as caught:
        ao.convert(path, "comfy", tmp_path / "b.safetensors")
    rules = [text.strip("'") for text in str(caught.value).split() if text.startswith("'^")]
    assert len(rules) == 2
    for rule, rank in zip(rules, (2, 4), strict=True):
        done = ao.convert(path, "comfy", tmp_path / "b.safetensors", rename=[rule], allow_drop=True, overwrite=True)
        assert len(done.dropped) == 2 * len(OURS)
        made = load_file(tmp_path / "b.safetensors")
        assert {t.shape[0] for key, t in made.items() if key.endswith("lora_A.weight")} == {rank}


def test_a_pair_in_a_folder_is_named(tmp_path: Path) -> None:
    for name in ("style_high_noise", "style_low_noise"):
        write(tmp_path / f"{name}.safetensors", pairs(AUTHORS, "diffusion_model."))
    with pytest.raises(
        ao.AdapterOpsError, match=r"style_high_noise\.safetensors, style_low_noise\.safetensors.*name one"
    ):
        ao.load(tmp_path)


def test_pefts_prefix_alone_tells_no_scale(tmp_path: Path) -> None:
    """WanVideoWrapper reads these at scale 1, or as rsLoRA by a guess; here the user says which."""
    path = write(tmp_path / "a.safetensors", pairs(AUTHORS, "base_model.model."))
    with pytest.raises(UnknownFact, match="--alpha"):
        ao.convert(path, "comfy", tmp_path / "b.safetensors")
    with pytest.raises(UnknownModule, match=r"the authors call \S+ in the transformer of wan_14b so.*--rename"):
        ao.convert(path, "comfy", tmp_path / "b.safetensors", alpha=4, arch="wan_1_3b")
    ao.convert(path, "comfy", tmp_path / "b.safetensors", rename=[r"^base_model\.model\.=diffusion_model."])
    same(load_file(tmp_path / "b.safetensors"), pairs(AUTHORS, "diffusion_model."))


@pytest.mark.parametrize("name", ["kohya-full", "kohya-ia3", "kohya-locon-dora"])
def test_the_base_that_has_a_files_components_is_named(name: str, tmp_path: Path) -> None:
    """SD 1 has more of these names, and no second text encoder."""
    tensors = load_file(FIXTURES / f"{name}.safetensors")
    narrow = {key: t[..., :-1].contiguous() if t.dim() > 1 else t for key, t in tensors.items()}
    with pytest.raises(ao.AdapterOpsError, match="module names are those of sdxl"):
        ao.load(write(tmp_path / "a.safetensors", narrow))
