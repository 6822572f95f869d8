"""The arms of the study of ε-DPO: which settings make which row of a table or point of a figure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from trials.study import Arm, Study
from trials.trial import Options

EPSILON = "ε-DPO"
GROUPS: Options = {"data.select": "ranked", "data.batch_size": 8}
SINGLES: Options = {"data": "UnpairedData", "data.batch_size": 32}
BETA = 0.01
"""Of every method whose β multiplies a log-ratio to the reference: ε-DPO's own, so that none is held closer to it.

R-DPO's α is half of it, as by default: a token costs half a nat of the margin. And what a nat costs where rates are
chosen, since the judge alone would choose text without sense.
"""
METHODS: dict[str, Options] = {
    "DPO": {"model": "DPO", "model.beta": BETA},
    "RRHF": {"model": "RRHF", **GROUPS},
    "SLiC-HF": {"model": "SLiC"},
    "IPO": {"model": "IPO"},
    "CPO": {"model": "CPO"},
    "KTO": {"model": "KTO", "model.beta": BETA, **SINGLES},
    "ORPO": {"model": "ORPO"},
    "R-DPO": {"model": "RDPO", "model.beta": BETA, "model.alpha": BETA / 2},
    "SimPO": {"model": "SimPO"},
    "β-DPO": {"model": "BetaDPO", "model.beta": BETA},
    "TR-DPO": {"model": "TRDPO", "model.beta": BETA, "model.alpha": 0.6, "model.tau": 1},
    EPSILON: {"model": "EpsilonDPO", "model.beta": BETA, "model.epsilon": 0.01},
}
"""One table of all, other settings at lit_align's defaults; 32 completions a step, singles and groups alike."""
HARD = "TR-DPO, hard"
FRONTIERS = ("DPO", EPSILON, "TR-DPO", HARD, "β-DPO")
BETAS = (0.5, 0.1, 0.05, 0.01)
EPSILONS = (0.005, 0.01, 0.02)
PRECISIONS = ("float32", "bf16 weights", "bf16 logits", "bf16 throughout")
"""In which a trained policy's decisions are looked at again.

Logits formed in float32 from weights of either kind; then logits of a bf16 model, all after them in float32, as under
autocast; then mixtures, log-probs and sums in bf16 as well.
"""
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Of the margins."""
TAU = 8
"""Of hard updates: the usual 128 steps are four times a run here."""


def arms() -> list[Arm]:
    """All arms."""
    return [*table(), *frontier(), *epsilons()]


def table() -> Iterator[Arm]:
    """Every method, each with a search of its own."""
    for name, options in METHODS.items():
        facts = {"path": True} if name in FRONTIERS else {}
        yield Arm(name, "table", options, facts={"epsilon": 0.01, **facts} if name == EPSILON else facts)


def at_beta(method: str, beta: float) -> str:
    """The arm of a method at some β: that of the table where it is the default."""
    default = METHODS.get(method, {}).get("model.beta")
    return method if default == beta else f"{method}, beta {beta:g}"


def frontier() -> Iterator[Arm]:
    """Figure 5: the methods that have a β, at others, with the learning rate of the table.

    Hard updates are not in the table and search at the same β as the soft ones there, which train other parameters.
    """
    for method in FRONTIERS:
        options = METHODS["TR-DPO"] | {"model.alpha": 1.0, "model.tau": TAU} if method == HARD else METHODS[method]
        own = at_beta(method, METHODS["TR-DPO"]["model.beta"]) if method == HARD else method
        for beta in BETAS:
            if (name := at_beta(method, beta)) != method:
                like = None if name == own else own
                yield Arm(name, "frontier", {**options, "model.beta": beta}, like, {"path": True})


def at_epsilon(epsilon: float) -> str:
    """The arm of some ε."""
    return EPSILON if epsilon == METHODS[EPSILON]["model.epsilon"] else f"{EPSILON}, epsilon {epsilon:g}"


def epsilons() -> Iterator[Arm]:
    """Figures 3 and 4: ε-DPO at other ε."""
    for epsilon in EPSILONS:
        if (name := at_epsilon(epsilon)) != EPSILON:
            facts = {"epsilon": epsilon}
            yield Arm(name, "epsilon", {**METHODS[EPSILON], "model.epsilon": epsilon}, EPSILON, facts)


def quick(study: Study) -> Study:
    """The same in a few seconds: two arms, one learning rate, two steps."""
    wanted = {EPSILON, at_beta(EPSILON, 0.1)}
    short = {"trainer.max_steps": 2, "trainer.log_every_n_steps": 1, "data.max_rows": 16, "data.batch_size": 4}
    small = [replace(arm, options={**arm.options, **short}) for arm in study.arms if arm.name in wanted]
    label = list(study.grid)[-1]
    return replace(study, arms=small, grid={label: study.grid[label]})


def seconds(arm: Arm) -> float:
    """CPU seconds of a run with the settings that come along, as measured."""
    return 40.0 if "epsilon" in arm.facts else 33.0
