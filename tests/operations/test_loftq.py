"""LoftQ against peft's own and against bitsandbytes; on small models whose weights are quantised; and what is refused."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import loftq_utils
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import adapterops as ao
from adapterops import errors
from adapterops.cli.main import run
from adapterops.linalg.loftq import split
from adapterops.linalg.quant import BLOCK_SIZES, Quantiser, quantiser
from adapterops.methods import METHODS

pytestmark = pytest.mark.usefixtures("one_thread", "quiet")

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the extra `quant`)")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
TOKENS = torch.arange(24).reshape(2, 12) % 32
NF4 = Quantiser("nf4", 64)


def llama(tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=tied, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=32, n_positions=32, n_embd=64, n_layer=2, n_head=2, initializer_range=0.2,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


TARGETS = {llama: ["q_proj", "v_proj", "down_proj"], gpt2: ["c_attn", "mlp.c_proj", "attn.c_proj"]}
KINDS: dict[Any, dict[str, Any]] = {
    base: {"target_modules": targets, "fan_in_fan_out": base is gpt2} for base, targets in TARGETS.items()
}


def make(base: Callable[[], nn.Module], folder: Path, **options: Any) -> Path:
    """A fresh adapter's folder; the base's weights are beside it, in `base`."""
    model = base()
    with redirect_stderr(StringIO()):  # a bar
        model.save_pretrained(folder / "base", max_shard_size=options.pop("max_shard_size", "1GB"))
    options = {"r": 8, "lora_alpha": 8, **KINDS.get(base, {}), **options}
    torch.manual_seed(1)
    get_peft_model(model, LoraConfig(**options)).save_pretrained(folder / "fresh")
    return folder / "fresh"


def run_loftq(folder: Path, **options: Any) -> ao.LoftqResult:
    options = {"base_weights": folder / "base", **options}
    return ao.loftq(folder / "fresh", folder / "out", **options)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """A base's tensors, a Conv1D's turned to (out, in)."""
    tensors = load_file(folder / "model.safetensors")
    return {k: v.T if ".c_" in k and v.dim() == 2 else v for k, v in tensors.items()}


def weight(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    return next(v for k, v in tensors.items() if k.endswith(f"{module}.weight")).float().contiguous()


def delta(folder: Path, module: str) -> torch.Tensor:
    update = next(u for u in ao.load(folder) if u.module.endswith(module))
    return METHODS["lora"].delta(update)


def quantised_by_bitsandbytes(matrix: torch.Tensor, how: Quantiser) -> torch.Tensor:
    if how.kind == "int8":
        own = bnb.nn.Int8Params(matrix.clone(), requires_grad=False).to("cpu")
        return bnb.functional.int8_vectorwise_dequant(own.data, own.SCB)
    own = bnb.nn.Params4bit(
        matrix.clone(),
        requires_grad=False,
        compress_statistics=how.double,
        quant_type=how.kind,
        blocksize=how.block_size,
    ).to("cpu")
    # As one row of numbers: where blocks do not end with a matrix's rows, bitsandbytes 0.50 takes other blocks' scales on
    # CPUs with AVX-512 (CUDA does not).
    own.quant_state.shape = torch.Size([matrix.numel()])
    return bnb.functional.dequantize_4bit(own.data, own.quant_state).reshape(matrix.shape)


def quantised_model(base: Callable[[], nn.Module], how: Quantiser, only: Callable[[str], bool]) -> nn.Module:
    """The model with some of its linear layers' weights as bitsandbytes makes them."""
    model = base()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and only(name):
            own = module.weight.data
            turned = own.T.contiguous() if isinstance(module, Conv1D) else own
            made = quantised_by_bitsandbytes(turned, how)
            module.weight.data = made.T.contiguous() if isinstance(module, Conv1D) else made
    return model


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


QUANTISERS = [
    *(Quantiser(kind, size, double) for kind in ("nf4", "fp4") for size in BLOCK_SIZES[:6] for double in (False, True)),
    Quantiser("int8"),
]


@pytest.mark.parametrize("how", QUANTISERS, ids=str)
def test_quantises_bit_for_bit_as_bitsandbytes(how: Quantiser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterops.linalg.quant._PART", 4096)
    for shape in ((96, 128), (70, 300), (3, 34)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        matrix[1] = 0
        assert torch.equal(how.apply_(matrix.clone()), quantised_by_bitsandbytes(matrix, how))


@pytest.mark.parametrize("how", [Quantiser("nf4", 64, True), Quantiser("int8")], ids=str)
def test_parts_in_any_number_of_threads(how: Quantiser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterops.linalg.quant._PART", 4096)
    matrix, before = torch.randn(300, 256, generator=torch.Generator().manual_seed(3)), torch.get_num_threads()
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        rest = torch.empty_like(matrix)
        found.append((how.apply_(matrix.clone()), rest, how.left_over(matrix, matrix, rest)))
    torch.set_num_threads(before)
    for made, rest, norm in found:
        assert torch.equal(made, found[0][0])
        assert torch.equal(rest, matrix - made)
        assert norm == pytest.approx(float(rest.double().square().sum()), rel=1e-6)


def pefts_loftq() -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """peft's own function, with `cpu` in the place of the `cuda` that it insists on."""
    text = inspect.getsource(loftq_utils.loftq_init)
    assert '"cuda"' in text
    names = dict(vars(loftq_utils))
    exec(text.replace('"cuda"', '"cpu"'), names)
    found: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = names["loftq_init"]
    return found


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4), ("int8", 8)])
@pytest.mark.parametrize("iterations", [1, 5])
@pytest.mark.parametrize("shape", [(256, 192), (160, 512), (640, 576)])
def test_residual_is_that_of_peft(kind: str, bits: int, iterations: int, shape: tuple[int, int]) -> None:
    matrix = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(4))
    q, a, b = pefts_loftq()(matrix, bits, 16, iterations)
    theirs = float((matrix - q - b @ a).norm())
    made = split(matrix, 16, quantiser(kind), iterations)
    ours = float((made.residual - made.left @ made.right).norm())
    assert ours == pytest.approx(theirs, rel=0.01)
    assert ours < made.before
    if iterations == 1:
        assert torch.equal(matrix - made.residual, matrix - (matrix - q))
        assert ours == pytest.approx(theirs, rel=1e-4)
        # The root of the singular values is in both factors, as in peft's.
        assert torch.allclose(made.left.norm(dim=0), b.norm(dim=0), rtol=1e-2)
        assert torch.allclose(made.right.norm(dim=1), a.norm(dim=1), rtol=1e-2)


def test_a_white_residual_is_decomposed_to_the_optimum() -> None:
    matrix = torch.randn(1200, 1000, generator=torch.Generator().manual_seed(5))
    for rank in (16, 64):
        made = split(matrix, rank, NF4)
        values = torch.linalg.svdvals(made.residual.double())
        best = float(values[rank:].norm())
        assert float((made.residual - made.left @ made.right).double().norm()) / best - 1 < 1e-4


SCALES = {
    "alpha is r": {},
    "alpha is not r": {"lora_alpha": 32},
    "rslora": {"lora_alpha": 5, "use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 4, "c_attn": 4}, "alpha_pattern": {"v_proj": 3, "mlp.c_proj": 3}},
    "negative": {"lora_alpha": -4},
}


@pytest.mark.parametrize("base", [llama, gpt2])
@pytest.mark.parametrize("options", SCALES.values(), ids=SCALES)
def test_quantised_model_with_the_adapter_is_nearer(
    base: Callable[[], nn.Module], options: dict[str, Any], tmp_path: Path
) -> None:
    make(base, tmp_path, **options)
    result = run_loftq(tmp_path)
    quantised = quantised_model(base, NF4, lambda name: any(name.endswith(t) for t in TARGETS[base]))
    wanted, plain = outputs(base()), outputs(quantised)
    with_adapter = outputs(PeftModel.from_pretrained(quantised, str(tmp_path / "out")).eval())
    assert float((with_adapter - wanted).norm()) < 0.9 * float((plain - wanted).norm())
    assert all(m.replaced for m in result.modules)
    own = weights_of(tmp_path / "base")
    for module in result.modules:
        w = weight(own, module.module.removeprefix("transformer."))
        rest = w - quantised_by_bitsandbytes(w, NF4)
        values = torch.linalg.svdvals(rest)
        assert module.before == pytest.approx(float(rest.norm()), rel=1e-5)
        assert module.after == pytest.approx(float(values[module.rank :].norm()), rel=1e-4)
        assert float((rest - delta(tmp_path / "out", module.module)).norm()) == pytest.approx(module.after, rel=1e-4)
    assert result.after < result.before
    assert result.before == pytest.approx(sum(m.before**2 for m in result.modules if m.before) ** 0.5)


@pytest.mark.parametrize("alpha", [8, 32])
def test_peft_leaves_the_scale_out(alpha: int, tmp_path: Path) -> None:
    """peft's factors are right where alpha is r (8); elsewhere they are off by the scale, and worse than none."""
    make(llama, tmp_path, lora_alpha=alpha)
    result = run_loftq(tmp_path)
    own = weights_of(tmp_path / "base")
    for module in result.modules:
        w = weight(own, module.module)
        q, a, b = pefts_loftq()(w, 4, 8)
        theirs = float((w - q - alpha / 8 * b @ a).norm())
        assert module.before is not None
        if alpha == 8:
            assert module.after == pytest.approx(theirs, rel=1e-3)
        else:
            assert theirs > module.before > (module.after or 0)


def test_layers_of_another_number_stay(tmp_path: Path) -> None:
    fresh = make(llama, tmp_path)
    path = fresh / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layer_replication": [[0, 1], [0, 1]]}))
    with pytest.raises(errors.CannotRepresent, match="its config has layer_replication"):
        run_loftq(tmp_path)


def test_linear4bit_of_bitsandbytes_itself_is_nearer(tmp_path: Path) -> None:
    make(llama, tmp_path, lora_alpha=24)
    run_loftq(tmp_path)
    model, wanted = llama(), outputs(llama())
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(tuple(TARGETS[llama])):
            new = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32,
                compress_statistics=False,
            )  # fmt: skip
            new.weight = bnb.nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=False, module=new
            )
            model.set_submodule(name, new.to("cpu"))
    plain = outputs(model)
    with_adapter = outputs(PeftModel.from_pretrained(model, str(tmp_path / "out")).eval())
    assert float((with_adapter - wanted).norm()) < 0.9 * float((plain - wanted).norm())


@pytest.mark.parametrize(
    ("options", "how"),
    [
        ({"quant": "fp4", "block_size": 128}, Quantiser("fp4", 128)),
        ({"quant": "int8"}, Quantiser("int8")),
        ({"double_quant": True}, Quantiser("nf4", 64, True)),
    ],
)
def test_other_ways_to_quantise(options: dict[str, Any], how: Quantiser, tmp_path: Path) -> None:
    make(llama, tmp_path)
    result = run_loftq(tmp_path, **options)
    assert result.quant == str(how)
    own = weights_of(tmp_path / "base")
    for module in result.modules:
        w = weight(own, module.module)
        rest = w - quantised_by_bitsandbytes(w, how)
        assert module.before == pytest.approx(float(rest.norm()), rel=1e-5)
        assert float((rest - delta(tmp_path / "out", module.module)).norm()) == pytest.approx(module.after, rel=1e-4)
        assert module.after < module.before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", [llama, gpt2])
def test_more_iterations_write_their_base(base: Callable[[], nn.Module], dtype: torch.dtype, tmp_path: Path) -> None:
    make(lambda: base().to(dtype), tmp_path, lora_alpha=16, max_shard_size="40KB", **KINDS[base])
    index = json.loads((tmp_path / "base/model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    one = run_loftq(tmp_path)
    five = ao.loftq(
        tmp_path / "fresh", tmp_path / "five", base_weights=tmp_path / "base", iterations=5, write_base=tmp_path / "new"
    )
    assert five.after < one.after
    assert json.loads((tmp_path / "new/model.safetensors.index.json").read_text())["weight_map"] == index
    assert (tmp_path / "new/config.json").read_text() == (tmp_path / "base/config.json").read_text()
    before, after = (
        {k: v for f in sorted(set(index.values())) for k, v in load_file(tmp_path / n / f).items()}
        for n in ("base", "new")
    )
    assert {k: (v.shape, v.dtype) for k, v in before.items()} == {k: (v.shape, v.dtype) for k, v in after.items()}
    names = [m.module.removeprefix("transformer.") for m in five.modules]
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert len(changed) == len(names)
    assert all(any(k.endswith(f"{n}.weight") for n in names) for k in changed)
    for module in five.modules:
        key = next(k for k in changed if k.endswith(module.module.removeprefix("transformer.") + ".weight"))
        w, new = ((t[key].T if base is gpt2 else t[key]).float().contiguous() for t in (before, after))
        rest = w - quantised_by_bitsandbytes(new, NF4)
        assert float((rest - delta(tmp_path / "five", module.module)).norm()) == pytest.approx(module.after, rel=1e-4)
        q, a, b = pefts_loftq()(w, 4, 8, 5)
        assert module.after == pytest.approx(float((w - q - b @ a).norm()), rel=0.01)
    config = json.loads((tmp_path / "five/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "new")
    fresh = type(base()).from_pretrained(tmp_path / "new", dtype=torch.float32)
    assert outputs(PeftModel.from_pretrained(fresh, str(tmp_path / "five"))).isfinite().all()


def test_written_base_of_one_file(tmp_path: Path) -> None:
    make(llama, tmp_path)
    result = run_loftq(tmp_path, write_base=tmp_path / "new/base")
    assert sorted(p.name for p in (tmp_path / "new/base").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    assert result.base_path == str(tmp_path / "new/base")
    written = weights_of(tmp_path / "new/base")
    for key, value in weights_of(tmp_path / "base").items():
        wanted = (
            quantised_by_bitsandbytes(value, NF4)
            if key.endswith(tuple(f"{t}.weight" for t in TARGETS[llama]))
            else value
        )
        assert torch.equal(written[key], wanted)


def test_rank_is_another(tmp_path: Path) -> None:
    make(llama, tmp_path, lora_alpha=16)
    result = run_loftq(tmp_path, rank=3)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 16)
    own = weights_of(tmp_path / "base")
    for module in result.modules:
        w = weight(own, module.module)
        rest = w - quantised_by_bitsandbytes(w, NF4)
        assert module.after == pytest.approx(float(torch.linalg.svdvals(rest)[3:].norm()), rel=1e-4)
        assert float((rest - delta(tmp_path / "out", module.module)).norm()) == pytest.approx(module.after, rel=1e-4)


def test_rank_above_the_weights_is_filled_up(tmp_path: Path) -> None:
    make(llama, tmp_path)
    result = run_loftq(tmp_path, rank=80)
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    a = next(t for k, t in tensors.items() if k.endswith("q_proj.lora_A.weight"))
    assert a.shape == (80, 64)
    assert all(m.after < 1e-4 * (m.before or 0) for m in result.modules if m.after is not None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    fresh = make(llama, tmp_path)
    tensors = load_file(fresh / "adapter_model.safetensors")
    save_file({k: v.to(dtype) for k, v in tensors.items()}, fresh / "adapter_model.safetensors", {"format": "pt"})
    result = run_loftq(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "out/adapter_model.safetensors").values()} == {dtype}
    own = weights_of(tmp_path / "base")
    for module in result.modules:
        w = weight(own, module.module)
        left = w - quantised_by_bitsandbytes(w, NF4) - delta(tmp_path / "out", module.module)
        assert float(left.norm()) == pytest.approx(module.after, rel=1e-4)
    ao.loftq(fresh, tmp_path / "wide", base_weights=tmp_path / "base", dtype="float32")
    assert {t.dtype for t in load_file(tmp_path / "wide/adapter_model.safetensors").values()} == {torch.float32}


def test_same_input_same_bytes(tmp_path: Path) -> None:
    make(llama, tmp_path)
    run_loftq(tmp_path)
    ao.loftq(tmp_path / "fresh", tmp_path / "again", base_weights=tmp_path / "base")
    one, two = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("out", "again"))
    assert one == two


def test_a_callback_may_reject(tmp_path: Path) -> None:
    make(llama, tmp_path, lora_alpha=16)
    seen: list[str] = []

    def callback(proposal: ao.LoftqProposal) -> bool:
        seen.append(proposal.module)
        assert proposal.scale == 2
        left = proposal.residual - proposal.scale * proposal.b @ proposal.a
        assert float(left.norm()) == pytest.approx(proposal.after, rel=1e-4)
        assert float(proposal.residual.norm()) == pytest.approx(proposal.before, rel=1e-4)
        assert torch.allclose(
            proposal.weight - proposal.residual, quantised_by_bitsandbytes(proposal.weight, NF4), atol=1e-6
        )
        return "v_proj" not in proposal.module

    result = run_loftq(tmp_path, callback=callback, write_base=tmp_path / "new")
    assert len(seen) == 6
    before, after = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("fresh", "out"))
    for key, value in before.items():
        assert torch.equal(value, after[key]) is ("v_proj" in key)
    assert {m.module for m in result.modules if not m.replaced} == {m for m in seen if "v_proj" in m}
    assert {m.note for m in result.modules} == {"", "rejected"}
    base, new = (weights_of(tmp_path / n) for n in ("base", "new"))
    assert torch.equal(weight(base, "layers.0.self_attn.v_proj"), weight(new, "layers.0.self_attn.v_proj"))
    assert result.after**2 == pytest.approx(
        sum((m.after if m.replaced else m.before) ** 2 for m in result.modules)  # type: ignore[operator]
    )


def test_a_module_that_quantises_exactly_stays(tmp_path: Path) -> None:
    make(llama, tmp_path)
    tensors = load_file(tmp_path / "base/model.safetensors")
    key = "model.layers.1.self_attn.q_proj.weight"
    tensors[key] = quantised_by_bitsandbytes(tensors[key], NF4)
    save_file(tensors, tmp_path / "base/model.safetensors")
    result = run_loftq(tmp_path)
    module = next(m for m in result.modules if m.module in key)
    assert (module.replaced, module.before, module.note) == (False, 0.0, "the residual would not fall")
    assert not load_file(tmp_path / "out/adapter_model.safetensors")[
        "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    ].any()


def test_loftq_says_nothing_of_loftq_to_peft(tmp_path: Path) -> None:
    """With `init_lora_weights: loftq` peft would quantise the base again as it loads the adapter."""
    fresh = make(llama, tmp_path)
    path = fresh / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}))
    run_loftq(tmp_path)
    made = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert made["init_lora_weights"] is True
    assert not made["loftq_config"]


def test_what_a_trained_adapter_has_learnt_is_said_to_be_replaced(tmp_path: Path) -> None:
    fresh = make(llama, tmp_path)
    assert not any("had been trained" in note for note in run_loftq(tmp_path).written.notes)
    tensors = load_file(fresh / "adapter_model.safetensors")
    save_file({k: v + 0.1 for k, v in tensors.items()}, fresh / "adapter_model.safetensors", {"format": "pt"})
    result = run_loftq(tmp_path, overwrite=True)
    assert any("had been trained (6 modules" in note for note in result.written.notes)


@pytest.mark.parametrize("tied", [True, False])
def test_what_bitsandbytes_leaves_alone_stays(tied: bool, tmp_path: Path) -> None:
    """Output heads (tied or not) and embeddings; saved modules are carried."""
    targets = ["q_proj", "embed_tokens", "lm_head"]
    make(lambda: llama(tied), tmp_path, target_modules=targets, modules_to_save=["norm"])
    result = run_loftq(tmp_path)
    notes = {m.module.rpartition(".")[2]: m.note for m in result.modules}
    assert notes["q_proj"] == ""
    assert "output head" in notes["lm_head"]
    assert "embedding" in notes["embed_tokens"]
    assert notes["norm"] == "saved whole"
    before, after = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("fresh", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) is ("q_proj" not in k) for k in before)


def test_dora_stays(tmp_path: Path) -> None:
    make(llama, tmp_path, use_dora=True)
    with pytest.raises(errors.CannotRepresent, match=r"nothing in it is a plain LoRA .*_proj: DoRA"):
        run_loftq(tmp_path)
    assert not (tmp_path / "out").exists()


def test_square_conv1d_of_a_quantised_model(tmp_path: Path) -> None:
    """peft writes fan_in_fan_out: false for a quantised GPT-2, whose files have the weights as (in, out)."""
    fresh = make(gpt2, tmp_path)
    wanted = run_loftq(tmp_path).modules
    path = fresh / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fan_in_fan_out": False}))
    with pytest.raises(errors.UsageError, match=r"is square, and the base keeps others as \(in, out\).*--base CONFIG"):
        run_loftq(tmp_path, overwrite=True)
    result = run_loftq(tmp_path, overwrite=True, reading={"base": tmp_path / "base"})
    assert [m.after for m in result.modules] == [m.after for m in wanted]


def test_names_of_the_authors_own_and_fused_projections(tmp_path: Path) -> None:
    """SD 3 in the authors' names: `attn.qkv` is three modules of diffusers'."""
    generator = torch.Generator().manual_seed(0)
    size, name = 1536, "joint_blocks.0.x_block.attn.qkv"
    lora = {
        f"lora_unet_{name.replace('.', '_')}.lora_down.weight": torch.randn(4, size, generator=generator),
        f"lora_unet_{name.replace('.', '_')}.lora_up.weight": torch.zeros(3 * size, 4),
        f"lora_unet_{name.replace('.', '_')}.alpha": torch.tensor(2.0),
    }
    save_file(lora, tmp_path / "lora.safetensors")
    matrix = 0.02 * torch.randn(3 * size, size, generator=generator)
    parts = {
        f"transformer_blocks.0.attn.{part}.weight": own
        for part, own in zip(("to_q", "to_k", "to_v"), matrix.split(size), strict=True)
    }
    save_file({f"{name}.weight": matrix.bfloat16()}, tmp_path / "whole.safetensors")
    save_file({k: v.bfloat16().contiguous() for k, v in parts.items()}, tmp_path / "parts.safetensors")
    after = []
    for base in ("whole", "parts"):
        result = ao.loftq(
            tmp_path / "lora.safetensors", tmp_path / f"{base}-out.safetensors",
            base_weights=tmp_path / f"{base}.safetensors", reading={"arch": "sd3"},
        )  # fmt: skip
        assert [m.replaced for m in result.modules] == [True]
        after.append(result.after)
    assert after[0] == after[1]
    one, two = ((tmp_path / f"{base}-out.safetensors").read_bytes() for base in ("whole", "parts"))
    assert one == two
    with pytest.raises(errors.CannotRepresent, match=r"keeps this projection in parts.*--write-base"):
        ao.loftq(
            tmp_path / "lora.safetensors", tmp_path / "no.safetensors", base_weights=tmp_path / "parts.safetensors",
            write_base=tmp_path / "new", reading={"arch": "sd3"},
        )  # fmt: skip


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = 0
    try:
        run([str(a) for a in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(llama, tmp_path, target_modules=["q_proj", "lm_head"])
    start = ("loftq", tmp_path / "fresh", "--base-weights", tmp_path / "base")
    code, out, err = command(capsys, *start, "-o", tmp_path / "out")
    assert (code, err) == (0, "")
    assert "nf4, blocks of 64: 2 modules replaced, rank 8" in out
    assert "as it was: model: lm_head: an output head" in out
    assert "proved" in out
    code, out, err = command(
        capsys, *start, "-o", tmp_path / "two", "--iterations", 2, "--rank", 4, "--quant", "fp4", "--block-size", 128,
        "--double-quant", "--write-base", tmp_path / "new", "--json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert said["quant"] == "fp4, blocks of 128, double"
    assert said["after"] < said["before"]
    assert {m["rank"] for m in said["modules"] if m["replaced"]} == {4}
    assert (tmp_path / "new/model.safetensors").exists()


def _quantised(folder: Path) -> None:
    tensors = load_file(folder / "base/model.safetensors")
    key = "model.layers.0.self_attn.q_proj.weight"
    tensors[key] = bnb.functional.quantize_4bit(tensors[key])[0]
    save_file(tensors, folder / "base/model.safetensors")


def _gptq(folder: Path) -> None:
    tensors = load_file(folder / "base/model.safetensors")
    own = tensors.pop("model.layers.0.self_attn.q_proj.weight")
    tensors["model.layers.0.self_attn.q_proj.qweight"] = own.int()
    save_file(tensors, folder / "base/model.safetensors")


def _smaller(folder: Path) -> None:
    tensors = load_file(folder / "base/model.safetensors")
    save_file({k: v[:32].contiguous() for k, v in tensors.items()}, folder / "base/model.safetensors")


def _without(folder: Path) -> None:
    tensors = load_file(folder / "base/model.safetensors")
    save_file({k: v for k, v in tensors.items() if "layers.1" not in k}, folder / "base/model.safetensors")


def _broken(folder: Path) -> None:
    tensors = load_file(folder / "base/model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "base/model.safetensors")


def _huge(folder: Path) -> None:
    tensors = load_file(folder / "base/model.safetensors")
    tensors["model.layers.0.self_attn.v_proj.weight"][0, 0] = 1e6
    save_file(tensors, folder / "base/model.safetensors")


def _pissa(folder: Path) -> None:
    path = folder / "fresh/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": "pissa"}))


def _no_bitsandbytes(folder: Path) -> None:
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]


def _nothing(folder: Path) -> None:
    pass


BAD: list[tuple[Callable[[Path], None], list[str], str]] = [
    (_quantised, [], r"q_proj.weight': has dtype U8; the base must not be quantised"),
    (_gptq, [], r"q_proj is quantised \(it has a `qweight`"),
    (_smaller, [], r"is \[.*\], and the base's weight \[.*\]: it is for another base model"),
    (_without, [], r"has no tensor model.layers.1.*weight; is it the base model"),
    (_broken, [], r"down_proj.weight': holds NaN or infinity; the base weights are damaged"),
    (_huge, ["--quant", "int8"], r"v_proj.weight': holds numbers beyond float16.*--quant nf4"),
    (_pissa, [], r"was trained from pissa, which changed the base weights.*adapterops to-lora"),
    (_no_bitsandbytes, [], r"bitsandbytes, which cannot be imported .*pip install 'adapterops\[quant\]'"),
    (_nothing, ["--quant", "nf5"], r"--quant nf5: is none of nf4, fp4, int8"),
    (_nothing, ["--block-size", "48"], r"--block-size 48: is none of 32, 64"),
    (_nothing, ["--quant", "int8", "--block-size", "64"], r"--block-size: is for nf4 and fp4"),
    (_nothing, ["--quant", "int8", "--double-quant"], r"--double-quant: is for nf4 and fp4"),
    (_nothing, ["--iterations", "3"], r"--iterations 3: .*--write-base DIR"),
    (_nothing, ["--iterations", "0"], r"--iterations 0: 1 or more"),
    (_nothing, ["--rank", "0"], r"--rank 0: a rank is 1 or more"),
    (_nothing, ["--device", "tpu9"], r"--device 'tpu9' is none of auto, cpu"),
    (_nothing, ["--dtype", "float3"], r"unknown dtype 'float3'"),
    (_nothing, ["--write-base", "{base}"], r"holds the base itself, which is never changed"),
    (_nothing, ["--write-base", "{out}"], r"the base and the adapter .* each need a folder of their own"),
]


@pytest.mark.parametrize(("spoil", "options", "message"), BAD, ids=[f"{s.__name__} {' '.join(o)}" for s, o, _ in BAD])
def test_bad_input_is_one_message_and_nothing_is_written(
    spoil: Callable[[Path], None],
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make(llama, tmp_path)
    monkeypatch.setitem(sys.modules, "bitsandbytes", bnb)
    spoil(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    options = [o.format(base=tmp_path / "base", out=tmp_path / "out") for o in options]
    code, out, err = command(
        capsys, "loftq", tmp_path / "fresh", "--base-weights", tmp_path / "base", "-o", tmp_path / "out", *options
    )
    assert (code, out) == (2, "")
    assert err.count("error:") == 1
    assert re.search(message, " ".join(err.split())), err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_existing_base_is_not_replaced_and_no_adapter_left(tmp_path: Path) -> None:
    make(llama, tmp_path)
    (tmp_path / "new").mkdir()
    (tmp_path / "new/model.safetensors").write_bytes(b"mine")
    with pytest.raises(errors.OutputExists, match="--overwrite"):
        run_loftq(tmp_path, write_base=tmp_path / "new")
    (tmp_path / "new/model.safetensors").rename(tmp_path / "new/model-00001-of-00002.safetensors")
    with pytest.raises(errors.OutputExists, match="would take it for part of the base"):
        run_loftq(tmp_path, write_base=tmp_path / "new", overwrite=True)
    assert not (tmp_path / "out").exists()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["model-00001-of-00002.safetensors"]


def test_no_base_without_its_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any, **options: Any) -> None:
        raise errors.ProofFailed("it differs")

    make(llama, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("adapterops.api.save", fails)
    with pytest.raises(errors.ProofFailed):
        run_loftq(tmp_path, write_base=tmp_path / "deep/new")
    assert sorted(tmp_path.rglob("*")) == before


def test_importing_it_imports_neither_torch_nor_bitsandbytes() -> None:
    import subprocess

    text = "import sys, adapterops as ao; ao.loftq; print([m for m in ('torch', 'numpy', 'bitsandbytes') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@CUDA
@pytest.mark.parametrize("how", [NF4, Quantiser("fp4", 64), Quantiser("int8")], ids=str)
def test_a_gpu_quantises_as_well(how: Quantiser) -> None:
    matrix = torch.randn(300, 256, generator=torch.Generator().manual_seed(6))
    here, there = how.apply_(matrix.clone()), how.apply_(matrix.cuda()).cpu()
    one, two = (float((matrix - q).norm()) for q in (here, there))
    assert one == pytest.approx(two, rel=1e-3)


@CUDA
@pytest.mark.parametrize("iterations", [1, 5])
def test_a_gpu_splits_as_the_cpu_does(iterations: int, tmp_path: Path) -> None:
    make(llama, tmp_path)
    norms = []
    for device in ("cpu", "cuda"):
        result = ao.loftq(
            tmp_path / "fresh", tmp_path / device, base_weights=tmp_path / "base", iterations=iterations, device=device,
            write_base=tmp_path / f"{device}-base" if iterations > 1 else None,
        )  # fmt: skip
        norms.append(result.after)
    assert norms[1] == pytest.approx(norms[0], rel=0.01 if iterations > 1 else 1e-3)
