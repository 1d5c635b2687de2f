"""What the loaders named by --targets drop, misread or refuse; and the load test.

The facts stand in tables, one file for each kind of loader: `loader_llm` (peft, vLLM, mlx-lm, llama.cpp),
`loader_sglang`, `loader_diffusers`, `loader_comfy`.
"""

from __future__ import annotations

from collections.abc import Iterator

from adapterops.validation.registry import Checker, checker
from adapterops.validation.rule import Finding, Needs, Rule, Severity
from adapterops.validation.rules import loader_comfy, loader_diffusers, loader_llm, loader_sglang
from adapterops.validation.subject import Subject

LEFT_OUT = Rule(
    "L590",
    "load-test-left-out",
    Severity.ERROR,
    why="The library was made to load the adapter, and some of its modules got nothing.",
    remedy="Ask for the loader's rules (--targets), which know the reasons; adapterops convert FILE --to peft (or diffusers) "
    "writes the names that it reads.",
    fires="--load-test: diffusers left lora_unet_img_in without an adapter",
    passes="--load-test: every module of the adapter has one in the model, and no other",
    needs=Needs.TENSORS,
)
OTHER_SCALE = Rule(
    "L591",
    "load-test-other-scale",
    Severity.ERROR,
    why="The library loads the adapter and applies it with another strength than it was trained with.",
    remedy="Run adapterops convert FILE --to FORMAT --fold-alpha, which leaves scale 1 everywhere.",
    fires="--load-test: scaling is 0.5 in peft's layer, alpha/rank of the file is 0.25",
    passes="--load-test: every layer has the adapter's own scale",
    needs=Needs.TENSORS,
)
REFUSED = Rule(
    "L592",
    "load-test-refused",
    Severity.ERROR,
    why="The library was made to load the adapter, and raised an error.",
    remedy="Mend what the message names; adapterops convert FILE --to peft (or diffusers) writes what the library reads.",
    fires="--load-test: ValueError: Target modules {'q'} not found in the base model",
    passes="--load-test: the adapter loads",
    needs=Needs.TENSORS,
)
NOT_TRIED = Rule(
    "L593",
    "load-test-not-tried",
    Severity.INFO,
    why="A load test was asked for and could not be made, so that nothing is proven.",
    remedy="pip install 'adapterops[diffusers]' brings both libraries; a base that is not built in is named by its config: "
    "--base CONFIG.",
    fires="--load-test of a LoRA for an unknown base, without --base",
    passes="--load-test of a PEFT folder with peft installed",
    needs=Needs.TENSORS,
)
OTHER_UPDATE = Rule(
    "L594",
    "load-test-other-update",
    Severity.ERROR,
    why="The library loads the adapter, and what some of its modules then add is no multiple of what was trained: rows or "
    "factors stand where they do not belong.",
    remedy="Run adapterops convert FILE --to diffusers, which writes the names that need no conversion; ask for the loader's "
    "rules (--targets), which know the reasons.",
    fires="--load-test: diffusers has shift and scale of final_layer.adaLN_modulation.1 the wrong way round",
    passes="--load-test: every layer adds what the file says",
    needs=Needs.TENSORS,
)

FACTS = (*loader_llm.FACTS, *loader_sglang.FACTS, *loader_diffusers.FACTS, *loader_comfy.FACTS)


@checker(LEFT_OUT, OTHER_SCALE, REFUSED, NOT_TRIED, OTHER_UPDATE)
def load_test(subject: Subject) -> Iterator[Finding]:
    """What really loading the adapter shows; only where that is asked for."""
    if not subject.options.load_test or subject.recognised is None:
        return
    from adapterops.validation.load_test import run  # with it come torch and the libraries

    for library, outcome in run(subject):
        if outcome.not_tried:
            yield NOT_TRIED.found(subject.weights, f"{library}: {outcome.not_tried}")
        if outcome.refused:
            yield REFUSED.found(subject.weights, f"{library} refuses the adapter: {outcome.refused}")
        if outcome.left_out or outcome.empty:
            yield LEFT_OUT.found(subject.weights, f"{library}: {outcome.said_left_out}", outcome.left_out)
        if outcome.scales:
            yield OTHER_SCALE.found(subject.weights, f"{library}: {outcome.said_scales}", outcome.scales)
        if outcome.others:
            yield OTHER_UPDATE.found(subject.weights, f"{library}: {outcome.said_others}", outcome.others)


RULES: tuple[Rule, ...] = (*(fact.rule for fact in FACTS), LEFT_OUT, OTHER_SCALE, REFUSED, NOT_TRIED, OTHER_UPDATE)
CHECKERS: tuple[Checker, ...] = (*(Checker((fact.rule,), fact.find) for fact in FACTS), load_test)
