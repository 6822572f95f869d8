"""What the bandit is to decide."""

from __future__ import annotations

from bandit_arms import CENTRES, FIXED, FRESH, PASSES_T, PROMPTS, TIMES_B
from trials.claims import Claim, More

CLOSE = 0.05
"""Of a reward in [0, 1]: a difference that is too small to matter, set before any run."""


def claims() -> list[Claim]:
    """In the order of the paper's table and figures; they are about the paper's two rewards."""
    found = of_table("R1")
    for reward in CENTRES:
        found += [*of_buffers(reward), *of_passes(reward), *of_negative(reward), *of_sources(reward)]
    return [*found, *of_prompts()]


def more(text: str, reward: str, larger: str, smaller: str, measure: str = "reward") -> Claim:
    """About two arms of a reward."""
    return More(f"{reward}: {text}", measure, [f"{reward} {larger}"], [f"{reward} {smaller}"])


def reaches(text: str, reward: str, one: str, other: str) -> Claim:
    """The first has as much as the second, or less by ``CLOSE`` at most."""
    return More(f"{reward}: {text}, within {CLOSE}", "reward", [f"{reward} {one}"], [f"{reward} {other}"], -CLOSE)


def of_table(reward: str) -> list[Claim]:
    """Table 3, but what ``of_sources`` has."""
    ppo, rwr, ipo = (f"on-policy {name}" for name in FRESH)
    found = [more(f"{name} beats offline IPO", reward, name, "offline IPO") for name in (ppo, rwr)]
    found.append(more("on-policy PPO beats on-policy RWR", reward, ppo, rwr))
    return [*found, reaches("on-policy IPO reaches on-policy PPO", reward, ipo, ppo)]


def of_buffers(reward: str) -> list[Claim]:
    """Figure 4: old samples hurt where the reference does not go, and do not where it goes."""
    pairs = [(f"on-policy {name}", f"on-policy {name}, B {TIMES_B[-1]}M") for name in FRESH]
    if reward == "R1":
        return [
            more(f"{name}: fresh samples beat one collection for all steps", reward, name, other)
            for name, other in pairs
        ]
    return [reaches(f"{name}: one collection for all steps does as well", reward, other, name) for name, other in pairs]


def of_passes(reward: str) -> list[Claim]:
    """Figure 14: some reuse helps; much hurts, but not PPO."""
    few, some, much = PASSES_T
    found = []
    for name in FRESH:
        base = f"on-policy {name}"
        found.append(
            more(
                f"{base}: T {some} gets more of as many samples than T {few}",
                reward,
                f"{base}, T {some}",
                f"{base}, T {few}",
            )
        )
        if name == "PPO":
            found.append(
                reaches(f"{base} tolerates reuse: T {much} has no less than T 10", reward, f"{base}, T {much}", base)
            )
        else:
            found.append(
                more(f"{base}: too much reuse hurts, T {much} against T 10", reward, base, f"{base}, T {much}")
            )
    return found


def of_negative(reward: str) -> list[Claim]:
    """Figure 16: offline, what pushes down beats what only pulls up."""
    weighted, best, negative = (f"offline {name}" for name in FIXED)
    return [
        more("offline IPO beats offline RWR", reward, "offline IPO", weighted),
        more("offline IPO beats offline best-of-N", reward, "offline IPO", best),
        more("offline, best-of-N is better with a negative gradient", reward, negative, best),
    ]


def of_sources(reward: str) -> list[Claim]:
    """Figure 19: on-policy samples and the negative gradient help each other."""
    return [
        more("RWR is better on-policy", reward, "on-policy RWR", "offline RWR"),
        more("IPO is better on-policy", reward, "on-policy IPO", "offline IPO"),
        more("on-policy, IPO beats RWR", reward, "on-policy IPO", "on-policy RWR"),
    ]


def of_prompts() -> list[Claim]:
    """Figure 18: with many prompts the chosen completions lose likelihood too."""
    few, many = (f"offline IPO, {number} prompts" for number in (PROMPTS[0], PROMPTS[-1]))
    return [
        more(
            f"offline IPO: chosen completions rise more with {PROMPTS[0]} prompts than with {PROMPTS[-1]}",
            "R1",
            few,
            many,
            "chosen",
        ),
        more(f"offline IPO: {PROMPTS[-1]} prompts give more reward on all contexts than {PROMPTS[0]}", "R1", many, few),
    ]
