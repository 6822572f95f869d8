"""Write scored groups: completions sampled from a model, or those a dataset has, each with its reward.

    python tools/score.py --dataset stories --model stories --reward lit_align.rewards.Vader --out scored.jsonl
    python tools/score.py --dataset scored.jsonl --reward runs/reward_model/TIME/adapter --out judged.jsonl

With --model, completions are drawn for each distinct prompt, and prompts are all a dataset needs; without it, the
dataset's own are judged. The rows {"prompt", "completions", "rewards"} are what the data module ScoredGroups reads. A
group whose rewards cannot be computed or are not finite is left out and counted.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from scoring.arguments import parse
from scoring.groups import Group, Policy, content, given_groups, read

from lit_align.commands.rewarding import load_reward
from lit_align.data.report import SplitReport
from lit_align.errors import UserError
from lit_align.protocols import Reward
from lit_align.quiet import quiet_warnings

EVERY = 10.0
"""Seconds between two lines of progress."""


@dataclass
class Tally:
    """What became of the groups.

    Attributes:
        total: Prompts there are.
        seen: Prompts done.
        cut: Completions drawn that did not end.
        means: Mean reward of each row written.
        bests: Best reward of each row written.
        failures: What went wrong with the rewards of a row, so that it was left out.
    """

    total: int
    seen: int = 0
    cut: int = 0
    means: list[float] = field(default_factory=list)
    bests: list[float] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)
    begin: float = field(default_factory=time.monotonic)
    shown: float = field(default_factory=time.monotonic)

    def add(self, group: Group, rewards: list[float] | Exception) -> str:
        """Count a group; the line to write for it, which is empty if the reward failed."""
        self.seen += 1
        self.cut += group.cut
        if isinstance(rewards, Exception):
            self.failures.append(rewards)
            return ""
        self.means.append(statistics.fmean(rewards))
        self.bests.append(max(rewards))
        row = {"prompt": group.prompt, "completions": group.completions, "rewards": rewards}
        return json.dumps(row, ensure_ascii=False) + "\n"

    def show(self) -> None:
        """Say how far it is, every now and then."""
        if (now := time.monotonic()) - self.shown > EVERY:
            self.shown, left = now, (now - self.begin) / self.seen * (self.total - self.seen)
            print(f"{self.seen}/{self.total} prompts, {left:.0f} s left", file=sys.stderr, flush=True)

    def lines(self, report: SplitReport) -> list[str]:
        """The rewards, and what is not in them."""
        means, failed = self.means, self.failures
        error = f" ± {statistics.stdev(means) / math.sqrt(len(means)):.4f}" if len(means) > 1 else ""
        lines = [
            f"mean reward {statistics.fmean(means):.4f}{error}, best of each row {statistics.fmean(self.bests):.4f}"
        ]
        lines += [f"dropped, {reason}: {tally.count} rows" for reason, tally in report.dropped.items()]
        lines += [f"{what}: {tally.count} rows" for what, tally in report.noted.items()]
        lines += [f"left out, the reward failed: {len(failed)} rows, the last time: {failed[-1]}"] if failed else []
        return lines + ([f"{self.cut} completions filled --max_new_tokens without an end"] if self.cut else [])


def judge(reward: Reward, groups: Sequence[Group]) -> list[list[float] | Exception]:
    """The rewards of each group, or what went wrong with it; one at a time if they cannot be had together."""
    flat = [(group.asked, content(text)) for group in groups for text in group.completions]
    try:
        found = [float(value) for value in reward([asked for asked, _ in flat], [text for _, text in flat])]
        if len(found) != len(flat):
            raise ValueError(f"the reward gave {len(found)} numbers for {len(flat)} completions")
    except Exception as error:  # whatever a user's function raises
        return [error] if len(groups) == 1 else [one for group in groups for one in judge(reward, [group])]
    values = iter(found)
    split = [[next(values) for _ in group.completions] for group in groups]
    return [one if all(map(math.isfinite, one)) else ValueError(f"the rewards are {one}") for one in split]


def score(given: argparse.Namespace) -> str:
    """Write the rows and say in a few lines what was written.

    Raises:
        UserError: If nothing can be read, drawn or judged.
    """
    reward = load_reward(given.reward)
    examples, report = read(given)
    if given.model:
        parts = Policy(given).groups(examples, report, given.batch_size)
    else:
        parts = given_groups(examples, getattr(reward, "tokenizer", None), given.batch_size)
    tally = Tally(len(examples))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("x", encoding="utf-8") as file:
        for groups in parts:
            file.writelines(tally.add(*both) for both in zip(groups, judge(reward, groups), strict=True))
            tally.show()
    if not tally.means:
        given.out.unlink()
        failed = tally.failures
        dropped = "; ".join(f"{reason}: {count.count}" for reason, count in report.dropped.items())
        reason = f"the reward failed on every row, the last time: {failed[-1]}" if failed else f"no row left; {dropped}"
        raise UserError(f"{given.dataset}: {reason}")
    return "\n".join([f"wrote {len(tally.means)} rows to {given.out}", *tally.lines(report)])


def main(arguments: list[str] | None = None) -> int:
    """Score, and return the exit code: 0, or 2 for what the user can put right."""
    quiet_warnings()
    try:
        print(score(parse(arguments, (__doc__ or "").splitlines()[0])))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
