"""OFT, BOFT, HRA, RoAd, PSOFT, GLoRA, and (IA)³ where its family has no case."""

from __future__ import annotations

from typing import Any

from peft import BOFTConfig, GloraConfig, HRAConfig, IA3Config, OFTConfig, PsoftConfig, RoadConfig
from peft_zoo import IMAGE, LINE, VOLUME, WORDS, Case, llama

_LINE = ["wide", "tall", "square"]
_SAID: dict[str, Any] = {"use_cayley_neumann": False}


def oft(**options: Any) -> OFTConfig:
    return OFTConfig(**{"target_modules": _LINE, "oft_block_size": 4, **options})


def road(variant: str, size: int) -> Case:
    said = {"variant": variant, "group_size": size}
    return Case(LINE, RoadConfig(target_modules=_LINE, **said), said=said)  # type: ignore[arg-type]


def psoft(said: dict[str, Any], **shown: Any) -> Case:
    return Case(LINE, PsoftConfig(r=4, target_modules=_LINE, **said, **shown), assumed=said)


def glora(ab: str, c: str, de: str, **options: Any) -> Case:
    config = GloraConfig(
        config_A_B=ab,  # type: ignore[arg-type]
        config_C=c,  # type: ignore[arg-type]
        config_D_E=de,  # type: ignore[arg-type]
        **{"r": 3, "target_modules": _LINE, **options},
    )
    return Case(LINE, config, noise=0.2)


CASES: dict[str, Case] = {
    "oft, linear": Case(LINE, oft()),
    "oft, exact": Case(LINE, oft(use_cayley_neumann=False), assumed=_SAID),
    "oft, terms": Case(LINE, oft(num_cayley_neumann_terms=3), assumed={"num_cayley_neumann_terms": 3}),
    "oft, number of blocks": Case(LINE, oft(r=4, oft_block_size=0)),
    "oft, number of blocks that is adjusted": Case(LINE, oft(r=5, oft_block_size=0, target_modules=["wide", "tall"])),
    "oft, size that is adjusted": Case(LINE, oft(oft_block_size=7)),
    "oft, one block": Case(LINE, oft(r=1, oft_block_size=0)),
    "oft, shared": Case(LINE, oft(block_share=True)),
    "oft, shared number": Case(LINE, oft(block_share=True, r=4, oft_block_size=0), base_needed=True),
    "oft, coft": Case(LINE, oft(coft=True, eps=0.2), assumed={"coft": True, "eps": 0.2}),
    "oft, point": Case(IMAGE, oft(target_modules=["point"])),
    "oft, kernel": Case(IMAGE, oft(target_modules=["conv"], oft_block_size=6), change=False),
    "oft, embedding": Case(WORDS, oft(target_modules=["words"], use_cayley_neumann=False), assumed=_SAID),
    "oft, embedding and linear": Case(WORDS, oft(target_modules=["words", "other"])),
    "oft, saved": Case(LINE, oft(target_modules=["wide", "tall"], modules_to_save=["other"]), change=True),
    "oft, llama": Case(llama, oft(target_modules=["q_proj", "down_proj"], oft_block_size=8)),
    "boft, linear": Case(LINE, BOFTConfig(target_modules=_LINE, boft_block_size=4)),
    "boft, number of blocks": Case(LINE, BOFTConfig(target_modules=_LINE, boft_block_size=0, boft_block_num=8)),
    "boft, convolution": Case(IMAGE, BOFTConfig(target_modules=["conv", "point"], boft_block_size=4)),
    "hra, linear": Case(LINE, HRAConfig(target_modules=_LINE, r=3)),
    "hra, orthogonal": Case(LINE, HRAConfig(target_modules=_LINE, r=4, apply_GS=True), assumed={"apply_GS": True}),
    "hra, convolution": Case(IMAGE, HRAConfig(target_modules=["conv", "point"], r=4)),
    "road, 1": road("road_1", 4),
    "road, 2": road("road_2", 8),
    "road, 4": road("road_4", 2),
    "psoft, linear": psoft({}),
    "psoft, pissa": psoft({"ab_svd_init": "pissa_init"}),
    "psoft, sketch": psoft({"psoft_svd": "lowrank", "random_seed": 3, "psoft_svd_lowrank_niter": 2}),
    "psoft, series": psoft(
        {"use_cayley_neumann": True, "num_cayley_neumann_terms": 4, "cayley_neumann_eps": 0.6}, psoft_mag_a=False
    ),
    "psoft, free": psoft({}, psoft_orth=False, psoft_mag_b=False, psoft_alpha=7),
    "glora, factors": glora("lora", "lora", "vector"),
    "glora, vectors": glora("vector", "vector", "constant"),
    "glora, constants": glora("constant", "none", "vector"),
    "glora, bias alone": glora("none", "vector", "constant", target_modules=["wide", "square"]),
    "glora, weight alone": glora("lora", "none", "none"),
    "ia3, volume": Case(
        VOLUME, IA3Config(target_modules=["conv"], feedforward_modules=["conv"]), said={"feedforward_modules": ["conv"]}
    ),
}
