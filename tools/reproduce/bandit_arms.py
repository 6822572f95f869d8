"""The arms of the bandit: which settings make which line of which table or figure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from trials.study import Arm, Study
from trials.trial import Options

CENTRES = {"R1": 70, "R2": 20}
OFFLINE_PROMPTS = 100
TABLE_SEEDS = 5
"""Of Table 3, as in the paper; the figures take as many as are asked for."""
PASSES = 100
"""Over the completions of an offline run, all of them in each step."""
END = 5
"""The last steps of an offline run over which log-ratios of its pairs are averaged."""
OBJECTIVES: dict[str, Options] = {
    "PPO": {"model": "BanditPPO"},
    "RWR": {"model": "RWR", "model.beta": 1.0},
    "IPO": {"model": "IPO", "model.tau": 0.05, "data.select": "ranked"},
    "best-of-N": {"model": "BestOfN", "data.select": "best"},
    "best-of-N, negative gradient": {"model": "BestOfN", "model.negative_coef": 1.0},
    "best-of-N, mean negative gradient": {"model": "BestOfN", "model.negative_coef": 1 / 9},
}
FRESH = ("PPO", "RWR", "IPO")
FIXED = ("RWR", "best-of-N", "best-of-N, negative gradient")
MEAN = "best-of-N, mean negative gradient"
"""Over the nine others, which bounds the loss; the authors' code has it as well, and no claim is about it."""
SHOWN = (*FIXED, MEAN)
"""In Figure 16, beside IPO."""
TIMES_B = (5, 20, 100)
"""|D|/M, beside 1; the last is one collection for the whole run."""
PASSES_T = (1, 5, 20)
PROMPTS = (5, 10, 20, 50, 200, 500)


@dataclass(frozen=True)
class Own:
    """What the study's YAML says, and what it leaves to the study.

    Attributes:
        model: None for the bandit's own.
        dataset: Rows with prompts; None for the 100 contexts.
        judged: Whether it names a reward.
        completions: Of each prompt.
        buffer: Completions of a collection.
        epochs: Collections.
        tokens: Budget of a completion.
        prompt_tokens: Budget of a prompt.
    """

    model: str | None
    dataset: str | None
    judged: bool
    completions: int
    buffer: int
    epochs: int
    tokens: int
    prompt_tokens: int

    @classmethod
    def read(cls, config: Path) -> Own:
        """From the YAML."""
        text = yaml.safe_load(config.read_text(encoding="utf-8"))
        data, pair = text["data"]["init_args"], text["model"]["init_args"]["pair"]
        sizes = (data[key] for key in ("completions", "buffer"))
        rest = text["trainer"]["max_epochs"], data["max_new_tokens"], data["max_prompt_length"]
        return cls(pair.get("model"), data.get("dataset"), "reward" in data, *sizes, *rest)

    @property
    def prompts(self) -> int:
        """Contexts of on-policy training: each collection draws from all of them."""
        return self.buffer // self.completions


def arms(own: Own) -> list[Arm]:
    """All arms; with a reward of the YAML's own, of that alone."""
    rewards = {"": None} if own.judged else CENTRES
    return [arm for reward, centre in rewards.items() for arm in of_reward(own, reward, centre)]


def of_reward(own: Own, reward: str, centre: int | None) -> Iterator[Arm]:
    """The arms of one reward."""
    first = reward != "R2"
    part, least = ("table3", TABLE_SEEDS) if first else ("table3-R2", 1)
    judged: Options = {} if centre is None else {"data.reward": "bandit_world.Peak", "data.reward.centre": centre}
    bases = [Arm(f"on-policy {name}", part, {**OBJECTIVES[name], **judged}, least=least) for name in FRESH]
    bases.append(replace(offline(own, "IPO", part, judged, OFFLINE_PROMPTS), least=least))
    found = [*bases, *(offline(own, name, "figure16", judged, OFFLINE_PROMPTS) for name in SHOWN)]
    for base in bases[:3]:
        found += [like(base, f"B {k}M", "figure4", buffer(own, k)) for k in TIMES_B if own.epochs % k == 0]
        found += [like(base, f"T {passes}", "figure14", {"data.passes": passes}) for passes in PASSES_T]
    if first:
        found += [like(bases[3], f"{n} prompts", "figure18", {"data.batch_size": n}, offline=n) for n in PROMPTS]
    if first and centre is not None:
        found += [like(base, "prompt counted", "prompt-counted", counted(base)) for base in bases]
        found += [like(base, "clipped", "clipped", {}, squash="clip") for base in bases if own.model is None]
    for arm in found:
        name = f"{reward} {arm.name}".strip()
        of = None if arm.like is None else f"{reward} {arm.like}".strip()
        yield replace(arm, name=name, like=of, facts={"centre": centre, "reward": reward, **arm.facts})


def offline(own: Own, method: str, part: str, judged: Options, prompts: int) -> Arm:
    """An arm that learns from completions the reference drew, all of them in each step."""
    kind = {"data": "ScoredGroups", "data.max_length": own.prompt_tokens + own.tokens, "data.batch_size": prompts}
    length: dict[str, object] = {
        "trainer.max_epochs": PASSES,
        "trainer.limit_val_batches": 0,
        "data.max_dropped": 1,
        "samples.every_n_steps": 10,
    }
    facts: dict[str, object] = {"offline": prompts, "pairs": method == "IPO"}
    if facts["pairs"]:
        length["trainer.log_every_n_steps"] = END
    return Arm(f"offline {method}", part, {**OBJECTIVES[method], **judged, **kind, **length}, facts=facts)


def like(base: Arm, what: str, part: str, options: Options, **facts: object) -> Arm:
    """An arm with other settings and the learning rate of its base."""
    changed = {**base.options, **options}
    return Arm(f"{base.name}, {what}", part, changed, base.name, facts={**base.facts, **facts, "what": what})


def buffer(own: Own, times: int) -> Options:
    """Larger collections, as much fewer of them: as many completions and as many steps in all."""
    return {"data.buffer": own.buffer * times, "trainer.max_epochs": own.epochs // times}


def counted(base: Arm) -> Options:
    """As the authors' code: 9 tokens are drawn, and the prompt's is averaged into the reward."""
    budget = {"data.max_length": 10} if "offline" in base.facts else {"data.max_new_tokens": 9}
    return {"data.reward.with_prompt": True, "samples.max_new_tokens": 9, **budget}


def quick(study: Study) -> Study:
    """The same in a few seconds: two arms, two learning rates, two collections, few samples."""
    fresh, fixed = (next(arm for arm in study.arms if arm.name.endswith(name)) for name in ("PPO", "offline IPO"))
    short = {"trainer.max_epochs": 2, "trainer.log_every_n_steps": 1, "samples.prompts": 8, "samples.completions": 1}
    first = replace(fresh, options={**fresh.options, **short, "data.passes": 2}, least=1)
    second = replace(fixed, options={**fixed.options, **short}, like=first.name, least=1)
    grid = {label: study.grid[label] for label in list(study.grid)[3:5]}
    return replace(study, arms=[first, second], grid=grid)
