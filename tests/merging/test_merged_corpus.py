"""`adapterops merge` on published adapters, against sums made by hand from the files' tensors; peft and diffusers load
what comes out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

sys.path.append(str(Path(__file__).parents[1] / "formats"))

import peft_models
import torch
import transformers
from meta_models import adapted_by_diffusers, module_names
from peft.utils import merge_utils
from raw import dotted_deltas, flat_names, kohya_deltas, load_tensors, probe
from safetensors.torch import save_file
from torch import Tensor, nn

import adapterops as ao
from adapterops.cli.main import run
from adapterops.linalg.random import Draw

pytestmark = pytest.mark.usefixtures("one_thread")

Printed = tuple[int, str, str]
PREFIX = "base_model.model."
LOKR = (
    "lora_te_text_model_encoder_layers_0_self_attn_",
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn",
    "lora_unet_down_blocks_0_resnets_1_time",
    "lora_unet_down_blocks_0_resnets_0_time",  # whose lokr_w2_a is all zeros in both files
)
CONVOLUTIONS = ("lora_unet_down_blocks_0_attentions_0_proj", "lora_unet_down_blocks_0_resnets_1_conv1")
KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te"}


@pytest.fixture
def merge(capsys: pytest.CaptureFixture[str]) -> Callable[..., Printed]:
    """`adapterops merge …` in this process: the exit status, stdout and stderr."""

    def call(*arguments: object) -> Printed:
        code = 0
        try:
            run(["merge", *map(str, arguments)])
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def masked(tensor: Tensor, density: float, *purpose: int | str) -> Tensor:
    kept = Draw(0, *purpose).keep(0, tensor.numel(), density)
    return tensor * torch.from_numpy(kept).reshape(tensor.shape) / density


def dare_ties(tensors: list[Tensor], weights: list[float], density: float, *purpose: str) -> Tensor:
    """DARE with our masks, then sign election and mean by peft's functions."""
    stacked = torch.stack([masked(t.double(), density, *purpose, n) for n, t in enumerate(tensors)])
    given = torch.tensor(weights).double().reshape(-1, *(1,) * tensors[0].ndim)
    return merge_utils.disjoint_merge(stacked * given, merge_utils.calculate_majority_sign_mask(stacked))


def factors_by_hand(one: dict[str, Tensor], two: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The merged factors of a PEFT file, weights 1, both scales `scale`."""
    out = {}
    for key in one:
        name, _, role = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".lora_")
        if name:
            root = [scale**0.5] * 2
            out[key] = dare_ties([one[key], two[key]], root, 0.5, "model", name, role)
    return out


def assert_close(found: dict[Any, Tensor], wanted: dict[Any, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert float((found[key].double() - tensor).norm()) <= tolerance * float(tensor.norm()), key


def gemma() -> nn.Module:
    config: Any = transformers.Gemma3TextConfig(
        vocab_size=32, max_position_embeddings=16, hidden_size=640, intermediate_size=8, num_hidden_layers=18,
        num_attention_heads=4, num_key_value_heads=1, head_dim=256,
    )  # fmt: skip
    return transformers.Gemma3ForCausalLM(config)


def roberta() -> nn.Module:
    config = transformers.RobertaConfig(vocab_size=32, max_position_embeddings=16, intermediate_size=8)
    config.num_labels = 4
    return transformers.RobertaForSequenceClassification(config)


def test_two_adapters_of_a_language_model(corpus: Path, merge: Callable[..., Printed], tmp_path: Path) -> None:
    sources = [corpus / "files" / f"gemma3-270m-svg-adapter{end}" for end in ("", "_curriculum_stage1")]
    code, out, _ = merge(*sources, "--method", "dare_ties", "--density", 0.5, "-o", tmp_path / "out")
    assert (code, "72 modules" in out, "proved" in out) == (0, True, True)
    one, two = (peft_models.weights_of(source) for source in sources)
    found = peft_models.weights_of(tmp_path / "out")
    assert_close(found, factors_by_hand(one, two, 16 / 4), 1e-6)
    model = peft_models.load(gemma(), tmp_path / "out")
    assert peft_models.adapted(model) == peft_models.modules_in(one)[0]
    peft_models.same_tensors(peft_models.loaded_tensors(model), found)


def test_two_classifiers(corpus: Path, merge: Callable[..., Printed], tmp_path: Path) -> None:
    """Both trained a head of their own."""
    sources = [corpus / "files" / f"agnews-subro-{steps}" for steps in (500, 2400)]
    asked = [*sources, "--method", "dare_ties", "--density", 0.5, "-o", tmp_path / "out"]
    code, _, err = merge(*asked)
    assert code == 2
    assert "--saved mean" in err
    assert "classifier" in err
    assert str(sources[0]) in err
    assert not (tmp_path / "out").exists()

    code, out, _ = merge(*asked, "--saved", "mean")
    assert code == 0
    assert "weighted mean of 2 adapters" in out
    one, two = (peft_models.weights_of(source) for source in sources)
    heads = {key: (one[key].double() + two[key].double()) / 2 for key in one if ".lora_" not in key}
    assert len(heads) == 4
    found = peft_models.weights_of(tmp_path / "out")
    assert_close(found, factors_by_hand(one, two, 4 / 2) | heads, 1e-6)


def test_classifiers_load_in_peft(corpus: Path, tmp_path: Path) -> None:
    sources = [corpus / "files" / f"agnews-subro-{steps}" for steps in (500, 2400)]
    ao.merge(sources, tmp_path / "out", "dare_ties", density=0.5, saved="mean")
    found = peft_models.weights_of(tmp_path / "out")
    model = peft_models.load(roberta(), tmp_path / "out")
    assert (peft_models.adapted(model), peft_models.wrapped(model)) == peft_models.modules_in(found)
    peft_models.same_tensors(peft_models.loaded_tensors(model), found)


PAIRS = [
    ("dyfuzja-filip-base", "dyfuzja-filip-dreambooth"),
    ("rafidreezwan-brain-mri-sd", "diffusers-pr-pokemon"),
]


@pytest.fixture
def kohya(corpus: Path, tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    """A published diffusers file, and the Kohya file made of it."""

    def make(name: str) -> tuple[Path, Path]:
        source = corpus / "files" / name / "pytorch_lora_weights.safetensors"
        ao.convert(source, to="kohya", output=tmp_path / f"{name}.safetensors")
        return source, tmp_path / f"{name}.safetensors"

    return make


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0])
def test_two_kohya_files(
    pair: tuple[str, str], kohya: Callable[[str], tuple[Path, Path]], merge: Callable[..., Printed], tmp_path: Path
) -> None:
    (source, one), (other, two) = (kohya(name) for name in pair)
    place = tmp_path / "merged.safetensors"
    code, out, _ = merge(one, two, "--method", "dare_ties", "--density", 0.5, "-o", place)
    assert (code, "128 modules" in out, "proved" in out) == (0, True, True)
    names = flat_names(module_names("sd1"), KOHYA)
    tensors = [load_tensors(path) for path in (source, other)]
    wanted = {}
    for module, delta in kohya_deltas(place, names).items():
        halves = []
        for role, half in (("B", "up"), ("A", "down")):
            own = [t[f"{'.'.join(module)}.lora.{half}.weight"] for t in tensors]
            halves.append(dare_ties(own, [1.0, 1.0], 0.5, *module, role))
        wanted[module] = halves[0] @ (halves[1] @ probe(halves[1].shape[1]))
        assert delta.shape == wanted[module].shape
    assert_close(kohya_deltas(place, names), wanted)
    assert adapted_by_diffusers("sd1", str(place)) == dict.fromkeys(wanted, 1.0)


@pytest.mark.parametrize(("method", "rank"), [("svd", 8), ("cat", None)])
def test_the_sum_of_a_kohya_and_a_diffusers_file(
    method: str,
    rank: int | None,
    kohya: Callable[[str], tuple[Path, Path]],
    merge: Callable[..., Printed],
    tmp_path: Path,
) -> None:
    """Exact, whatever the formats; the output is of the first one's unless told."""
    (source, one), (other, _) = (kohya(name) for name in PAIRS[0])
    place = tmp_path / "merged.safetensors"
    more = ["--rank", rank] if rank else []
    code, _, _ = merge(one, other, "--method", method, "--weights", "0.7,-0.4", *more, "-o", place)
    assert code == 0
    first, second = dotted_deltas(source), dotted_deltas(other)
    wanted = {key: 0.7 * first[key] - 0.4 * second[key] for key in first}
    assert_close(kohya_deltas(place, flat_names(module_names("sd1"), KOHYA)), wanted)
    assert adapted_by_diffusers("sd1", str(place)) == dict.fromkeys(wanted, 1.0)


def lokr_files(corpus: Path, folder: Path, parts: tuple[str, ...]) -> list[Path]:
    """Some modules of the published pair: all of them take the merge a minute."""
    out = []
    for rank in (4, 16):
        tensors = load_tensors(corpus / f"files/lycoris-lokr-falcon-{rank}/smart_falcon_{rank}_lokr.safetensors")
        out.append(folder / f"{rank}.safetensors")
        save_file({key: t for key, t in tensors.items() if key.startswith(parts)}, out[-1])
    return out


def lokr_deltas(path: Path) -> dict[tuple[str, str], Tensor]:
    """(w1_a·w1_b) ⊗ (w2_a·w2_b) · alpha / rank, the rank being w2_b's rows (lycoris `modules/lokr.py`)."""
    tensors, names = load_tensors(path), flat_names(module_names("sd1"), KOHYA)
    out = {}
    for stem in {key.split(".")[0] for key in tensors}:
        a, b, c, d = (tensors[f"{stem}.lokr_{part}"].double() for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
        out[names[stem]] = torch.kron(a @ b, c @ d) * (float(tensors[f"{stem}.alpha"]) / len(d))
    return out


def outcome(path: Path) -> dict[tuple[str, str], Tensor]:
    tensors, names = load_tensors(path), flat_names(module_names("sd1"), KOHYA)
    out = {}
    for stem in {key.split(".")[0] for key in tensors}:
        up, down = (tensors[f"{stem}.lora_{half}.weight"].double().flatten(1) for half in ("up", "down"))
        out[names[stem]] = up @ down * (float(tensors[f"{stem}.alpha"]) / len(down))
    return out


def test_two_lokr_files_become_a_lora(corpus: Path, merge: Callable[..., Printed], tmp_path: Path) -> None:
    """At rank 8 nothing can be nearer to what dare_ties makes of the dense deltas than 1e-5 of the least error."""
    one, two = lokr_files(corpus, tmp_path, LOKR)
    place = tmp_path / "merged.safetensors"
    asked = [one, two, "--method", "dare_ties", "--space", "delta", "--rank", 8, "--density", 0.5, "-o", place]
    code, out, _ = merge(*asked, "--dtype", "float32")
    assert (code, "proved" in out) == (0, True)
    first, second, found = lokr_deltas(one), lokr_deltas(two), outcome(place)
    assert found.keys() == first.keys() == second.keys()
    assert len(found) == 14
    for key, delta in found.items():
        dense = dare_ties([first[key], second[key]], [1.0, 1.0], 0.5, *key, "delta")
        if key[1].endswith("resnets.0.time_emb_proj"):
            assert not dense.any()
            assert not delta.any()
            continue
        least = float(torch.linalg.svdvals(dense)[8:].norm())
        assert least > 0.1 * float(dense.norm())
        assert float((dense - delta).norm()) <= least * (1 + 1e-4), key
    loaded = adapted_by_diffusers("sd1", str(place))
    assert loaded == dict.fromkeys(found, 1.0)


def test_the_sum_of_two_lokr_files(corpus: Path, merge: Callable[..., Printed], tmp_path: Path) -> None:
    one, two = lokr_files(corpus, tmp_path, LOKR[1:])
    place = tmp_path / "merged.safetensors"
    code, _, _ = merge(one, two, "--method", "svd", "--rank", 320, "--dtype", "float32", "-o", place)
    assert code == 0
    first, second, found = lokr_deltas(one), lokr_deltas(two), outcome(place)
    for key, delta in found.items():
        wanted = first[key] + second[key]
        assert float((delta - wanted).norm()) <= 1e-5 * float(wanted.norm()), key


def test_a_lokr_pair_needs_a_rank_and_deltas(corpus: Path, merge: Callable[..., Printed], tmp_path: Path) -> None:
    one, two = lokr_files(corpus, tmp_path, LOKR[2:3])
    code, _, err = merge(one, two, "--method", "dare_ties", "--density", 0.5, "-o", tmp_path / "x.safetensors")
    assert code == 2
    assert "lokr" in err
    assert "--space delta" in err
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(
    "target",
    [
        "kohya",
        "diffusers",
    ],
)
def test_convolutions_that_lycoris_flattened(
    target: str, corpus: Path, merge: Callable[..., Printed], tmp_path: Path
) -> None:
    """The LoKr files have in · 9 columns for a 3×3 kernel; diffusers takes factors of four dimensions only."""
    one, two = lokr_files(corpus, tmp_path, CONVOLUTIONS)
    place = tmp_path / "merged.safetensors"
    code, _, _ = merge(one, two, "--method", "svd", "--rank", 2, "--to", target, "-o", place)
    assert code == 0
    assert len(adapted_by_diffusers("sd1", str(place))) == 3
