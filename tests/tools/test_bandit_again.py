"""A run of the committed evidence, made again: the figures on the page are those that the code gives."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "tools" / "reproduce"
FOUND = json.loads((ROOT / "docs" / "evidence" / "bandit.json").read_text(encoding="utf-8"))["arms"]
ARM = "R1 on-policy PPO"


@pytest.fixture
def bandit(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the study."""
    monkeypatch.syspath_prepend(str(STUDIES))
    import bandit

    return bandit


@pytest.mark.longer
@pytest.mark.skipif(sys.platform != "linux", reason="the studies fork")
def test_a_run_of_table_3_gives_the_committed_reward_and_kl(bandit: Any, tmp_path: Path) -> None:
    """Another machine sums in another order, which a thousand steps make large: within the spread of the seeds."""
    from trials.workers import run_all

    study = bandit.whole(STUDIES / "bandit.yaml", tmp_path)
    arm = next(arm for arm in study.arms if arm.name == ARM)
    (ended,) = run_all([study.trial(arm, FOUND[ARM]["settings"], seed=0)], tmp_path / "runs", workers=1)
    assert ended.code == 0, ended.last_words
    final = study.measure(arm, ended.folder)["final"]
    for name in ("reward", "kl"):
        seeds = FOUND[ARM]["final"][name]["values"]
        spread = 4 * statistics.stdev(seeds) + 0.01 * max(seeds)
        assert final[name] == pytest.approx(statistics.fmean(seeds), abs=spread)
