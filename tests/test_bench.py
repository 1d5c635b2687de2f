"""The benchmark's own machinery, with a tiny workload: its jobs, the check of their outputs, its tables.  No timing."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from benchmarks import convert, measure, workload


@pytest.fixture(scope="module")
def wanted() -> list[workload.Module]:
    # Of each text encoder an `out_proj` is among them: diffusers tells the spelling by it.
    return workload.modules(every=29)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, wanted: list[workload.Module]) -> Path:
    path = tmp_path_factory.mktemp("bench") / "source.safetensors"
    workload.make(path, wanted, rank=2)
    return path


def test_the_workload_is_an_sdxl_lora_of_sd_scripts() -> None:
    everything = workload.modules()
    assert len(everything) == 986
    values = sum(sum(module.shape) for module in everything) * workload.RANK
    assert 225e6 < 2 * values < 230e6
    keys = {module.key for module in everything}
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q" in keys
    assert "lora_te1_text_model_encoder_layers_0_mlp_fc1" in keys
    assert "lora_te2_text_model_encoder_layers_31_self_attn_out_proj" in keys


@pytest.mark.parametrize("name", convert.JOBS)
def test_every_job_does_what_it_is_timed_for(
    name: str, source: Path, tmp_path: Path, wanted: list[workload.Module]
) -> None:
    sample = convert.run_job(convert.JOBS[name], source, tmp_path, wanted)
    assert sample.peak > 0
    assert (sample.copy is not None) == (name in convert.OURS)


def test_a_wrong_output_is_not_timed(source: Path, tmp_path: Path, wanted: list[workload.Module]) -> None:
    job = convert.JOBS["kohya"]
    wrong = tmp_path / "wrong.safetensors"
    measure.run(job.command(source, wrong))
    tensors = load_file(wrong)
    alpha = f"{wanted[0].diffusers_key}.alpha"
    tensors[alpha] = np.array(2 * workload.ALPHA, dtype=np.float16)
    save_file(tensors, wrong)
    with pytest.raises(workload.WrongOutput, match="delta"):
        workload.check(source, wrong, job.kind, wanted)
    del tensors[f"{wanted[0].diffusers_key}.lora_down.weight"]
    save_file(tensors, wrong)
    with pytest.raises(workload.WrongOutput, match="modules"):
        workload.check(source, wrong, job.kind, wanted)


def test_a_failing_command_is_an_error() -> None:
    with pytest.raises(measure.CommandFailed, match="exited with 3"):
        measure.run([sys.executable, "-c", "raise SystemExit(3)"])


def test_the_peak_is_the_command_s_own() -> None:
    ballast = bytearray(300 << 20)
    assert measure.run([sys.executable, "-I", "-S", "-c", "pass"]).peak < 100
    del ballast
    assert measure.run([sys.executable, "-I", "-S", "-c", "bytearray(b'x') * (300 << 20)"]).peak > 300


def test_the_tables_say_what_was_promised_and_what_was_not_met() -> None:
    good = convert.Sample(wall=1.0, cpu=0.2, peak=30.0, copy=1.2, flush=0.1, proof=0.1)
    samples = {name: [good, good] for name in convert.JOBS}
    samples["peer"] = [replace(good, wall=12.0)] * 2
    assert all(target.met for target in convert.targets(samples))
    samples["inspect"] = [replace(good, cpu=0.3)] * 2
    assert [target.met for target in convert.targets(samples)] == [True, True, True, False]
    assert convert.report(samples, 228_000_000, 986).count("**not met**") == 1
    assert "**" not in convert.report(samples, 228_000_000, 986, markdown=False)
