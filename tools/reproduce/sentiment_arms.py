"""The arms of controlled sentiment: which settings make which line of which figure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from sentiment_world import MOST, Own
from trials.study import Arm, Study
from trials.trial import Options

COMPLETIONS = 32
"""In each optimizer step, of every method."""
BETA_PI, BETA_R = 0.1, 0.1
"""Of arXiv 2402.00856, controlled sentiment."""
BETA = BETA_PI * BETA_R
"""What a nat costs: the optimum of EXO's and DPO-rw's losses is π_ref exp(r/β), β = β_π β_r."""
MILD_PI, MILD_R = 1.0, 0.3
"""Of the arms whose optimum a few dozen answers of the reference can show."""
RATIO = 0.3
SWEPT = (BETA_R * RATIO, BETA_R / RATIO)

PAIRS: Options = {"data.select": "all_pairs", "data.max_completions": 4, "data.batch_size": COMPLETIONS // 2}
ONE_BETA: dict[str, Options] = {
    "DPO": {"model": "DPO", "model.beta": BETA_PI, **PAIRS},
    "EXO-pref": {"model": "EXOPref", "model.beta": BETA_PI, **PAIRS},
}
FRESH: Options = {
    "data": "OnPolicyData",
    "data.batch_size": "null",
    "data.completions": 4,
    "data.minibatch": COMPLETIONS,
    "data.buffer": 2 * COMPLETIONS,
    "data.passes": 2,
    "data.max_prompt_length": 128,
    "data.max_length": "null",
}
PPO: Options = {"model": "PPO", "model.kl_coef": BETA, "model.kl_target": "null", "model.standardize": False, **FRESH}
GROUPS = {"EXO-rw": "EXORw", "DPO-rw": "DPORw"}
SIZES = (4, MOST)
METHODS = ("DPO", "EXO-pref", *(f"{name}, K {k}" for name in GROUPS for k in SIZES), "PPO")


def arms(own: Own) -> list[Arm]:
    """All arms."""
    return [*frontier(own), *judged(own), *sweep(), *mild()]


def grouped(name: str, size: int, beta: float = BETA_PI, reward_beta: float = BETA_R) -> Options:
    """A method on all K scored completions at once."""
    data = {"data.max_completions": size, "data.batch_size": COMPLETIONS // size}
    return {"model": GROUPS[name], "model.beta": beta, "model.reward_beta": reward_beta, **data}


def frontier(own: Own) -> Iterator[Arm]:
    """Every method on the oracle's rewards; those that learn from pairs are also judged against SFT and chosen."""
    for name, options in ONE_BETA.items():
        yield Arm(name, "frontier", options, facts={"judged": True})
    for name in GROUPS:
        for size in SIZES:
            yield Arm(f"{name}, K {size}", "frontier", grouped(name, size))
    yield Arm("PPO", "frontier", {**PPO, "data.max_new_tokens": own.tokens})


def judged(own: Own) -> Iterator[Arm]:
    """Methods that maximize the reward model, with the learning rate they have on the oracle's rewards."""
    facts = {"judged": True, "proxy": True}
    for name in GROUPS:
        yield Arm(f"{name}, reward model", "tables", grouped(name, 4), f"{name}, K 4", facts)
    fresh = {**PPO, "data.max_new_tokens": own.tokens}
    yield Arm("PPO, reward model", "tables", fresh, "PPO", {**facts, "fresh": True})


def sweep() -> Iterator[Arm]:
    """EXO-rw at other β_r, at other β_π, and at others of the same product; the one between is "EXO-rw, K 4"."""
    for what, places in {
        "beta_r": [(BETA_PI, other) for other in SWEPT],
        "beta_pi": [(other, BETA_R) for other in SWEPT],
        "product": [(BETA / other, other) for other in SWEPT],
    }.items():
        for beta, reward_beta in places:
            facts = {"beta": beta * reward_beta}
            options = grouped("EXO-rw", 4, beta, reward_beta)
            yield Arm(f"{what} {beta:.3g} {reward_beta:.3g}", "sweep", options, "EXO-rw, K 4", facts)


def mild() -> Iterator[Arm]:
    """The density ratios: an optimum so near that the reference's own answers estimate it."""
    facts = {"beta": MILD_PI * MILD_R, "ratio": True}
    for name in GROUPS:
        for size in SIZES:
            options = {**grouped(name, size, MILD_PI, MILD_R), "samples.every_n_steps": 0}
            yield Arm(f"{name}, K {size}, mild", "ratio", options, facts=facts)


def quick(study: Study) -> Study:
    """The same in a few seconds: an arm of each kind, one learning rate, two steps."""
    wanted = {"EXO-rw, K 4", "EXO-rw, reward model", "EXO-rw, K 4, mild"}
    short = {"samples.max_new_tokens": 12, "data.batch_size": 2}
    small = [replace(arm, options={**arm.options, **short}) for arm in study.arms if arm.name in wanted]
    label = list(study.grid)[1]
    return replace(study, arms=small, grid={label: study.grid[label]})


def seconds(arm: Arm) -> float:
    """CPU seconds of a run with the settings that come along, as measured."""
    kinds = {"frontier": 38.0, "tables": 44.0, "sweep": 34.0, "ratio": 46.0}
    return kinds[arm.part]
