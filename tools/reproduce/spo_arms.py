"""The arms of SPO against DPO: both over the grids of their hyperparameters, and SPO's two parts with and without."""

from __future__ import annotations

from dataclasses import replace

from trials.study import Arm, Study
from trials.trial import Options

ALPHA, BETA, DPO_BETA = 0.01, 0.01, 0.1
"""Where the learning rate is searched; all other arms take that of their method."""
ALPHAS = (0.003, 0.01, 0.03, 0.1)
BETAS = (0.003, 0.01, 0.03, 0.1)
DPO_BETAS = (0.01, 0.05, 0.1, 0.5)
GAMMAS = (0.01, 0.1)
SPO_BASE, DPO_BASE = f"SPO, α {ALPHA}, β {BETA}", f"DPO, β {DPO_BETA}"
PAIRS: Options = {"data": "PreferenceData"}


def arms() -> list[Arm]:
    """All arms."""
    found = [spo(ALPHA, BETA), dpo(DPO_BETA)]
    found += [spo(alpha, BETA) for alpha in ALPHAS if alpha != ALPHA]
    found += [spo(ALPHA, beta) for beta in BETAS if beta != BETA]
    found += [dpo(beta) for beta in DPO_BETAS if beta != DPO_BETA]
    found.append(replace(spo(ALPHA, 0.0), part="regularizer"))
    return found + [importance(gamma) for gamma in GAMMAS]


def spo(alpha: float, beta: float) -> Arm:
    """SPO; without the regularizer it reads pairs alone."""
    name = f"SPO, α {alpha}, β {beta:g}"
    options = {"model": "SPO", "model.alpha": alpha, "model.beta": beta, **({} if beta else PAIRS)}
    return Arm(name, "figure1", options, None if name == SPO_BASE else SPO_BASE)


def dpo(beta: float) -> Arm:
    """DPO."""
    name = f"DPO, β {beta}"
    return Arm(name, "figure1", {"model": "DPO", "model.beta": beta, **PAIRS}, None if name == DPO_BASE else DPO_BASE)


def importance(gamma: float) -> Arm:
    """SPO with SoftImportance, whose weights are ½ on average, and so the regularizer by half."""
    base = spo(ALPHA, BETA)
    return replace(
        base,
        name=f"{SPO_BASE}, γ {gamma}",
        part="importance",
        options={**base.options, "model.gamma": gamma, "model.beta": BETA / 2},
        like=SPO_BASE,
    )


def quick(study: Study) -> Study:
    """The same in a few seconds: both methods, one learning rate that one of them searches, two updates."""
    short: Options = {"trainer.max_steps": 2, "trainer.log_every_n_steps": 1, "samples.every_n_steps": 1}
    short = {**short, "samples.prompts": 4, "samples.max_new_tokens": 8, "data.max_rows": 32, "data.batch_size": 2}
    samples: Options = {"data.samples": 2, "data.max_new_tokens": 8}
    one, other = (arm for arm in study.arms if arm.name in (SPO_BASE, DPO_BASE))
    small = [replace(one, options={**one.options, **short, **samples}, like=DPO_BASE)]
    small.append(replace(other, options={**other.options, **short}))
    label = list(study.grid)[1]
    return replace(study, arms=small, grid={label: study.grid[label]})
