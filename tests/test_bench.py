"""The benchmark's own machinery, with tiny workloads: their jobs, the check of their outputs, its tables.  No timing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from benchmarks import check, convert, jobs, lora, measure
from benchmarks.flux import FLUX
from benchmarks.report import report
from benchmarks.samples import Sample
from benchmarks.sdxl import SDXL
from benchmarks.workload import Measured, Workload

# Of each text encoder an `out_proj` is among every 29th: diffusers tells the spelling by it.
_FLUX = ("double_blocks.0.img_attn.qkv", "double_blocks.7.txt_attn.qkv", "double_blocks.0.txt_mlp.2",
         "double_blocks.18.img_mod.lin", "single_blocks.5.linear1", "single_blocks.37.linear2")  # fmt: skip
_FEW: dict[str, Callable[[list[lora.Module]], list[lora.Module]]] = {
    "sdxl": lambda modules: modules[::29],
    "flux": lambda modules: [module for module in modules if module.original in _FLUX],
}
_JOBS = [(name, job) for name, workload in convert.WORKLOADS.items() for job in workload.jobs]


@dataclass(frozen=True)
class Tiny:
    """A workload of a few modules, of rank 2."""

    workload: Workload
    source: Path
    wanted: list[lora.Module]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tiny]:
    out = {}
    for name, workload in convert.WORKLOADS.items():
        wanted = _FEW[name](workload.modules())
        path = tmp_path_factory.mktemp("bench") / f"{name}.safetensors"
        lora.make(path, workload.lora, wanted, rank=2)
        out[name] = Tiny(workload, path, wanted)
    return out


def _numbers(workload: Workload) -> int:
    return sum(sum(module.shape) for module in workload.modules()) * workload.lora.rank


def test_one_workload_is_an_sdxl_lora_of_sd_scripts() -> None:
    everything = SDXL.modules()
    assert len(everything) == 986
    assert 225e6 < 2 * _numbers(SDXL) < 230e6
    keys = {module.key for module in everything}
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q" in keys
    assert "lora_te1_text_model_encoder_layers_0_mlp_fc1" in keys
    assert "lora_te2_text_model_encoder_layers_31_self_attn_out_proj" in keys


def test_the_other_is_a_flux_lora_of_sd_scripts_with_fused_projections() -> None:
    everything = {module.key: module for module in FLUX.modules()}
    assert len(everything) == 304
    assert 150e6 < 2 * _numbers(FLUX) < 155e6
    assert sum(bool(module.parts) for module in everything.values()) == 76
    assert sum(len(module.pieces) for module in everything.values()) == 494
    qkv = everything["lora_unet_double_blocks_18_txt_attn_qkv"]
    assert [rows for _, rows in qkv.pieces] == [3072, 3072, 3072]
    assert everything["lora_unet_single_blocks_37_linear1"].pieces[-1] == (
        "single_transformer_blocks.37.proj_mlp",
        12288,
    )


def test_a_file_is_made_as_the_workload_says(tmp_path: Path) -> None:
    module = next(module for module in FLUX.modules() if module.parts)
    workload = replace(FLUX, modules=lambda: [module])
    path = workload.file(tmp_path)
    tensors = load_file(path)
    assert {key.removeprefix(module.key): tuple(t.shape) for key, t in tensors.items()} == {
        ".lora_down.weight": (16, 3072),
        ".lora_up.weight": (9216, 16),
        ".alpha": (),
    }
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    # A scale of 1 would give folding nothing to do.
    assert float(tensors[f"{module.key}.alpha"]) == 8.0
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["ss_network_alpha"] == "8.0"
    made = path.stat().st_mtime_ns
    assert workload.file(tmp_path).stat().st_mtime_ns == made


@pytest.mark.parametrize(("name", "job"), _JOBS)
def test_every_job_does_what_it_is_timed_for(name: str, job: str, tiny: dict[str, Tiny], tmp_path: Path) -> None:
    few = tiny[name]
    sample = jobs.run(few.workload.jobs[job], few.source, tmp_path, few.wanted)
    assert sample.peak > 0
    assert (sample.copy is not None) == few.workload.jobs[job].inside


def test_a_wrong_output_is_not_timed(tiny: dict[str, Tiny], tmp_path: Path) -> None:
    few, wrong = tiny["sdxl"], tmp_path / "wrong.safetensors"
    job = SDXL.jobs["kohya"]
    measure.run(job.command(few.source, wrong))
    tensors = load_file(wrong)
    alpha = next(key for key in tensors if key.endswith(".alpha"))
    tensors[alpha] = 2 * tensors[alpha]
    save_file(tensors, wrong)
    with pytest.raises(check.WrongOutput, match="delta"):
        check.check(few.source, wrong, job.spelling, few.wanted, samples=len(few.wanted))
    del tensors[alpha.replace(".alpha", ".lora_down.weight")]
    save_file(tensors, wrong)
    with pytest.raises(check.WrongOutput, match=f"adapts {len(few.wanted) - 1} modules"):
        check.check(few.source, wrong, job.spelling, few.wanted)


_PART = "transformer.single_transformer_blocks.5.attn.to_{}.lora_B.weight"


def _swap(tensors: dict[str, torch.Tensor]) -> None:
    q, k = _PART.format("q"), _PART.format("k")
    tensors[q], tensors[k] = tensors[k], tensors[q]


def _whole(tensors: dict[str, torch.Tensor]) -> None:
    tensors[_PART.format("q")] = torch.cat([tensors[_PART.format("q")], tensors[_PART.format("k")]])


def _last(tensors: dict[str, torch.Tensor]) -> None:
    tensors[_PART.format("v")][-1] *= 2


def _shared(tensors: dict[str, torch.Tensor]) -> None:
    key = _PART.format("v").replace("lora_B", "lora_A")
    tensors[key] = tensors[key].flip(0)


def _renamed(tensors: dict[str, torch.Tensor]) -> None:
    for end in (".lora_A.weight", ".lora_B.weight"):
        tensors[f"transformer.elsewhere{end}"] = tensors.pop(f"transformer.transformer_blocks.18.norm1.linear{end}")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_swap, r"delta of single_transformer_blocks\.5\.attn\.to_q"),
        (_whole, "attn.to_q has 6144 rows, not 3072"),
        (_last, r"delta of single_transformer_blocks\.5\.attn\.to_v"),
        (_shared, r"delta of single_transformer_blocks\.5\.attn\.to_v"),
        (_renamed, r"does not adapt transformer_blocks\.18\.norm1\.linear"),
        # The tensors alone, without the header that holds the scale.
        (lambda tensors: None, "delta"),
    ],
)
def test_a_wrong_split_is_not_timed(
    spoil: Callable[[dict[str, torch.Tensor]], None], says: str, split: Path, tiny: dict[str, Tiny], tmp_path: Path
) -> None:
    tensors, wrong = load_file(split), tmp_path / "wrong.safetensors"
    spoil(tensors)
    with safe_open(split, framework="pt") as file:
        save_file(tensors, wrong, file.metadata() if says != "delta" else None)
    with pytest.raises(check.WrongOutput, match=says):
        check.check(tiny["flux"].source, wrong, "diffusers", tiny["flux"].wanted)


@pytest.fixture(scope="module")
def split(tiny: dict[str, Tiny], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("split") / "d.safetensors"
    measure.run(FLUX.jobs["diffusers"].command(tiny["flux"].source, path))
    return path


def test_a_scale_that_is_not_folded_is_not_timed(tiny: dict[str, Tiny], tmp_path: Path) -> None:
    few, out = tiny["flux"], tmp_path / "c.safetensors"
    measure.run(FLUX.jobs["comfy"].command(few.source, out))
    check.check(few.source, out, "comfy", few.wanted)
    with pytest.raises(check.WrongOutput, match="a scale of 4 to apply"):
        check.check(few.source, out, "comfy", few.wanted, folded=True)


def test_some_of_every_kind_of_module_are_looked_at() -> None:
    found = check.sampled(FLUX.modules(), 12)
    assert {len(module.pieces) for module in found} == {1, 3, 4}
    assert {module.original.split(".")[0] for module in found} == {"double_blocks", "single_blocks"}
    assert {module.component for module in check.sampled(SDXL.modules(), 12)} == {
        "unet",
        "text_encoder",
        "text_encoder_2",
    }


def test_a_failing_command_is_an_error() -> None:
    with pytest.raises(measure.CommandFailed, match="exited with 3"):
        measure.run([sys.executable, "-c", "raise SystemExit(3)"])


def test_the_peak_is_the_command_s_own() -> None:
    ballast = bytearray(300 << 20)
    assert measure.run([sys.executable, "-I", "-S", "-c", "pass"]).peak < 100
    del ballast
    assert measure.run([sys.executable, "-I", "-S", "-c", "bytearray(b'x') * (300 << 20)"]).peak > 300


GOOD = Sample(wall=1.0, cpu=0.2, peak=30.0, copy=1.2, flush=0.1, proof=0.1)


def _measured(workload: Workload, changed: dict[str, Sample]) -> Measured:
    """Two equal rounds that keep every promise, but for the jobs that are changed."""
    each = {**dict.fromkeys(workload.jobs, GOOD), "peer": replace(GOOD, wall=12.0), **changed}
    samples = {name: [sample, sample] for name, sample in each.items()}
    return Measured(workload, samples, 228_000_000, workload.modules())


@pytest.mark.parametrize(
    ("workload", "changed", "broken"),
    [
        (SDXL, {}, []),
        (SDXL, {"inspect": replace(GOOD, cpu=0.3)}, ["inspect"]),
        (SDXL, {"diffusers-proof": replace(GOOD, copy=1.7)}, ["diffusers-proof"]),
        (FLUX, {}, []),
        (FLUX, {"comfy-proof": replace(GOOD, peak=61.0, wall=1.3)}, ["comfy-proof", "comfy-proof"]),
        (FLUX, {"peft": replace(GOOD, copy=4.1)}, ["peft"]),
        (FLUX, {"diffusers": replace(GOOD, copy=3.9), "folded": replace(GOOD, copy=4.1)}, ["folded"]),
    ],
)
def test_the_tables_say_what_was_promised_and_what_was_not_met(
    workload: Workload, changed: dict[str, Sample], broken: list[str]
) -> None:
    measured = _measured(workload, changed)
    assert [target.job for target in measured.targets if not target.met] == broken
    text = report([measured])
    assert text.count("**not met**") == len(broken)
    assert text.count("| met") == len(workload.promises) - len(broken)
    assert "**" not in report([measured], markdown=False)


def test_the_tables_name_every_job_and_what_is_compared() -> None:
    text = report([_measured(SDXL, {}), _measured(FLUX, {})])
    assert all(job.title in text for workload in convert.WORKLOADS.values() for job in workload.jobs.values())
    assert "304 modules, rank 16, alpha 8, bfloat16" in text
    assert text.count("Machine: ") == 1


def test_the_command_runs_the_workload_asked_for(
    tiny: dict[str, Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = tiny["flux"]
    # Without its promises: how long a tiny file takes is no matter.
    quick = {name: job for name, job in FLUX.jobs.items() if name in ("cp", "comfy")}
    workload = replace(FLUX, modules=lambda: few.wanted, jobs=quick, promises=())
    monkeypatch.setitem(convert.WORKLOADS, "flux", workload)
    done = CliRunner().invoke(
        convert.command,
        ["--workload", "flux", "--runs", "1", "--file", str(few.source), "--dir", str(tmp_path), "--json"],
    )
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert list(document["workloads"]) == ["flux"]
    assert document["workloads"]["flux"]["bytes"] == few.source.stat().st_size
    assert {name: len(taken) for name, taken in document["workloads"]["flux"]["samples"].items()} == dict.fromkeys(
        quick, 1
    )
    assert not list(tmp_path.iterdir())


def test_a_promise_that_is_not_met_is_exit_status_1(
    tiny: dict[str, Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "run", lambda workload, *_: _measured(workload, {"peer": GOOD}))
    arguments = ["--workload", "flux", "--file", str(tiny["flux"].source), "--dir", str(tmp_path)]
    done = CliRunner().invoke(convert.command, arguments)
    assert done.exit_code == 1
    assert done.stdout.count("not met") == 1


def test_a_file_needs_the_name_of_its_workload(tiny: dict[str, Tiny]) -> None:
    done = CliRunner().invoke(convert.command, ["--file", str(tiny["flux"].source)])
    assert done.exit_code == 2
    assert "--workload sdxl|flux" in done.output
