"""What the studies share: resuming, the search, standard errors, failures; and the bandit from end to end."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_align.batch import CompletionBatch

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "tools" / "reproduce"


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    """The modules of the studies."""
    sys.path.insert(0, str(STUDIES))
    import bandit_arms
    import bandit_claims
    import bandit_world
    from trials import command, results, statistics, study, trial, workers

    parts = {
        "world": bandit_world,
        "arms": bandit_arms,
        "claims": bandit_claims,
        "results": results,
        "statistics": statistics,
    }
    yield SimpleNamespace(**parts, study=study, trial=trial, workers=workers, command=command)
    sys.path.remove(str(STUDIES))


def fake(args: list[str]) -> int:
    """In the place of lit_align: writes its learning rate and seed; one of 9 is refused, one of 8 kills itself."""
    given = dict(arg.removeprefix("--").split("=", 1) for arg in args if "=" in arg)
    if given["rate"] == "9":
        print("error: the rate is too large")
        return 2
    if given["rate"] == "8":
        os.kill(os.getpid(), signal.SIGKILL)
    folder = Path(given["run_dir"])
    folder.mkdir()
    (folder / "seen.json").write_text(json.dumps([float(given["rate"]), int(given["seed_everything"])]))
    with (folder.parent.parent / "runs.txt").open("a") as file:
        file.write(f"{given['rate']} {given['seed_everything']}\n")
    return 0


def read(arm: Any, folder: Path) -> Mapping[str, Any]:
    """The reward is larger the nearer the rate is to 3, and depends on the seed."""
    rate, seed = json.loads((folder / "seen.json").read_text())
    return {"final": {"reward": -abs(rate - 3) + seed % 10}, "curve": {"step": [1.0], "reward": [seed % 10]}}


def conduct(tool: Any, folder: Path, rates: tuple[str, ...] = ("1", "3", "5"), **changed: Any) -> Any:
    config = folder / "any.yaml"
    config.write_text("model: none\n")
    arms = [tool.study.Arm("one", "table"), tool.study.Arm("two", "figure", {"more": 1}, like="one")]
    grid = {f"rate {rate}": {"rate": rate} for rate in rates}
    study = tool.study.Study("any", config, arms, grid, "reward", lambda arm, seed: {}, read)
    settings = {"seeds": 3, "search_seeds": 2, "workers": 2, "call": fake, **changed}
    return tool.study.Conduct(study, tool.results.Results(folder / "results.json"), folder / "runs", **settings)


def begun(folder: Path) -> list[str]:
    path = folder / "runs.txt"
    return sorted(path.read_text().splitlines()) if path.exists() else []


def test_the_best_mean_of_the_search_is_reported_on_other_seeds(tool: Any, tmp_path: Path) -> None:
    running = conduct(tool, tmp_path)
    running.all(running.study.arms)
    search = [f"{rate} {seed}" for rate in (1, 3, 5) for seed in (1000, 1001)]
    report = [f"3 {seed}" for seed in (0, 1, 2)] * 2  # both arms take the rate that the first has searched
    assert begun(tmp_path) == sorted(search + report)
    found = running.report(running.study.arms)
    assert found["search"]["one"]["chosen"] == "rate 3"
    assert found["search"]["one"]["tried"]["rate 5"] == [-2.0, -1.0]
    reward = found["arms"]["two"]["final"]["reward"]
    assert reward["values"] == [0.0, 1.0, 2.0]
    assert reward["standard_error"] == pytest.approx(1 / math.sqrt(3))
    assert found["failed"] == {}


def test_an_arm_may_want_more_seeds_than_the_study_is_asked_for(tool: Any, tmp_path: Path) -> None:
    running = conduct(tool, tmp_path, seeds=1)
    first, second = running.study.arms
    wanting = [tool.study.Arm(first.name, first.part, first.options, least=3), second]
    running.all(wanting)
    found = running.report(wanting)["arms"]
    assert [found[name]["final"]["reward"]["n"] for name in ("one", "two")] == [3, 1]


def test_a_study_goes_on_where_it_was(tool: Any, tmp_path: Path) -> None:
    whole = conduct(tool, tmp_path)
    whole.all(whole.study.arms)
    before = begun(tmp_path)
    again = conduct(tool, tmp_path)
    again.all(again.study.arms)
    assert begun(tmp_path) == before
    more = conduct(tool, tmp_path, seeds=4)
    more.all(more.study.arms)
    assert len(begun(tmp_path)) == len(before) + 2
    (tmp_path / "any.yaml").write_text("model: another\n")  # is another run
    other = conduct(tool, tmp_path)
    other.study.config.write_text("model: another\n")
    other.all(other.study.arms)
    assert len(begun(tmp_path)) == 2 * len(before) + 2


def test_parts_that_were_run_before_are_reported_with_the_one_at_hand(tool: Any, tmp_path: Path) -> None:
    first = conduct(tool, tmp_path)
    table, figure = first.study.arms
    assert first.study.chosen_parts(["figure"]) == [table, figure]
    assert first.done() == []
    first.all([table])
    assert [arm.name for arm in first.done()] == ["one"]
    first.all([table, figure])
    assert conduct(tool, tmp_path).done() == [table, figure]
    assert conduct(tool, tmp_path, seeds=4).done() == []
    base = first.study.trial(table, "rate 3", 1).key
    first.results.found.pop(base)  # such as one that failed
    assert first.done() == []


def test_an_arm_is_done_though_a_run_of_its_search_has_failed(tool: Any, tmp_path: Path) -> None:
    running = conduct(tool, tmp_path, rates=("1", "3", "9"))
    running.all(running.study.arms)
    assert running.failed
    assert running.done() == list(running.study.arms)


def test_a_part_that_there_is_not_is_told_with_those_there_are(
    tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        conduct(tool, tmp_path).study.chosen_parts(["table", "figur"])
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: --parts figur: there are table, figure\n"


def test_nothing_touches_a_gpu_before_the_fork() -> None:
    """A GPU that says it is there, and is never to be asked for more."""
    code = (
        "import sys, pathlib, torch\n"
        f"sys.path.insert(0, {str(STUDIES)!r})\n"
        "def touched(*args): raise AssertionError('a GPU was touched')\n"
        "torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1\n"
        "torch.cuda._lazy_init = torch.cuda.get_device_capability = touched\n"
        "from trials.workers import import_all\n"
        f"import_all(pathlib.Path({str(STUDIES / 'sentiment.yaml')!r}))\n"
        "assert 'transformers' in sys.modules and 'bitsandbytes' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_what_a_killed_run_left_is_begun_again_and_its_checkpoint_gone_on_with(tool: Any, tmp_path: Path) -> None:
    running = conduct(tool, tmp_path)
    trial = running.study.trial(running.study.arms[0], "rate 3", 0)
    folder = trial.folder(tmp_path / "runs")
    folder.mkdir(parents=True)
    (folder / "seen.json").write_text("half of")
    assert "--resume" not in tool.trial.start_of(trial, folder)
    assert not folder.exists()
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").touch()
    assert tool.trial.start_of(trial, folder)[-1] == "--resume"


def test_runs_that_fail_are_named_and_stop_no_other(tool: Any, tmp_path: Path) -> None:
    running = conduct(tool, tmp_path, rates=("3", "8", "9"), search_seeds=1)
    running.all(running.study.arms)
    assert set(running.failed) == {"one/rate 8/seed 1000", "one/rate 9/seed 1000"}
    refused, killed = running.failed["one/rate 9/seed 1000"], running.failed["one/rate 8/seed 1000"]
    assert "exit code 2: error: the rate is too large" in refused["problem"]
    assert "exit code -9" in killed["problem"]
    assert refused["command"].startswith(f"PYTHONPATH={STUDIES} python -m lit_align fit --config")
    assert "--rate=9 --run_dir=" in refused["command"]
    assert "too large" in Path(refused["log"]).read_text()
    assert running.report(running.study.arms)["arms"]["one"]["final"]["reward"]["n"] == 3
    again = conduct(tool, tmp_path, rates=("3", "8", "9"), search_seeds=1)
    again.all(again.study.arms)
    assert set(again.failed) == set(running.failed)  # tried again, and only they
    assert len(begun(tmp_path)) == 1 + 3 + 3


def test_nothing_is_reported_of_an_arm_whose_search_failed_throughout(tool: Any, tmp_path: Path) -> None:
    running = conduct(tool, tmp_path, rates=("9",))
    running.all(running.study.arms)
    found = running.report(running.study.arms)
    assert found["arms"] == {}
    assert found["failed"]["one"]["stage"] == "choice"


def test_results_that_cannot_be_read_are_a_failure(tool: Any, tmp_path: Path) -> None:
    running = conduct(tool, tmp_path, call=lambda args: 0)
    running.all(running.study.arms)
    assert "cannot be read" in running.failed["one/rate 3/seed 1000"]["problem"]
    assert not (tmp_path / "results.json").exists()


def test_an_interrupted_study_ends_its_runs_and_keeps_what_is_done(tool: Any, tmp_path: Path) -> None:
    def slow(args: list[str]) -> int:
        if "--seed_everything=1000" not in args:
            (tmp_path / f"pid{os.getpid()}").touch()
            time.sleep(60)
        return fake(args)

    running = conduct(tool, tmp_path, rates=("3",), workers=1, call=slow)
    trials = [running.study.trial(running.study.arms[0], "rate 3", seed) for seed in (1000, 1001)]
    ended = tool.workers.run_all(trials, tmp_path / "runs", 1, slow)
    assert next(ended).code == 0
    ended.close()
    running.run("search", [(running.study.arms[0], "rate 3", 1000)])
    assert len(begun(tmp_path)) == 2
    for left in tmp_path.glob("pid*"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(left.name.removeprefix("pid")), 0)


def test_mean_and_standard_error_by_hand(tool: Any) -> None:
    """1, 2, 6: mean 3, squared deviations 4 + 1 + 9, sd² 7, error √(7/3)."""
    found = tool.statistics.summary([1.0, 2.0, 6.0])
    assert (found["mean"], found["n"]) == (3.0, 3)
    assert found["standard_error"] == pytest.approx(math.sqrt(7 / 3))
    assert tool.statistics.plus_minus(found) == "3.000 ± 1.528 (3)"
    assert tool.statistics.summary([4.0])["standard_error"] is None


def test_curves_are_means_step_by_step_up_to_the_shortest(tool: Any) -> None:
    runs = [{"step": [1, 2, 3], "y": [0.0, 2.0, 4.0]}, {"step": [1, 2], "y": [2.0, 6.0]}]
    assert tool.statistics.curve(runs) == {"step": [1, 2], "y": [1.0, 4.0], "y error": [1.0, 2.0]}


def test_the_search_takes_the_largest_mean_and_the_first_of_equals(tool: Any) -> None:
    best = tool.statistics.best
    assert best({"a": [1.0, 2.0], "b": [0.0, 4.0], "c": [2.0, 2.0]}) == "b"
    assert best({"a": [1.0], "b": [None], "c": [0.5]}) == "a"
    assert best({"a": [9.0, None], "b": [0.0, 0.0]}) == "b"
    with pytest.raises(ValueError, match="every run"):
        best({"a": [None], "b": []})


def test_files_are_replaced_whole_and_lists_of_numbers_take_one_line(tool: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    tool.results.write_json(path, {"x": [1.0, 2.123456789, None], "y": {"z": ["[1]", 2]}})
    assert json.loads(path.read_text()) == {"x": [1.0, 2.1235, None], "y": {"z": ["[1]", 2]}}
    assert '"x": [ 1.0, 2.1235, null ]' in path.read_text()
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]


def test_rewards_count_the_prompt_or_not(tool: Any) -> None:
    """exp(0) at the centre, exp(-1) ten tokens off."""
    near = math.exp(-1)
    assert tool.world.Peak(70)(["20"], ["70 80 60"]) == pytest.approx([(1 + 2 * near) / 3])
    assert tool.world.Peak(70, with_prompt=True)(["60"], ["70 80 60"]) == pytest.approx([(1 + 3 * near) / 4])
    ids = torch.tensor([[[70, 80, 60], [70, 70, 70]]])
    there, one = torch.ones_like(ids, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool)
    batch = CompletionBatch(torch.tensor([[60]]), one, ids, there, None, one.expand(1, 2), torch.zeros(1))
    assert tool.world.Peak(70).on_tokens(batch, None)[0].tolist() == pytest.approx([(1 + 2 * near) / 3, 1.0])
    counted = tool.world.Peak(70, with_prompt=True).on_tokens(batch, None)[0].tolist()
    assert counted == pytest.approx([(1 + 3 * near) / 4, (3 + near) / 4])


def test_the_ceiling_of_a_reward_that_counts_the_prompt_is_that_of_the_paper(tool: Any) -> None:
    """0.9 + 0.1 E[R1 of a uniform prompt] = 0.918, which is what Table 3 prints for its best methods."""
    prompts = [str(number) for number in range(100)]
    rewards = tool.world.Peak(70, with_prompt=True)(prompts, [" ".join(["70"] * 9)] * 100)
    assert sum(rewards) / 100 == pytest.approx(0.918, abs=5e-4)


def test_the_token_distribution_is_a_squashed_or_clipped_cauchy(tool: Any) -> None:
    """Bins of probability F(b) - F(a), F(x) = 1/2 + atan((x + 0.7) / 0.4) / π, within the noise of 10,000 draws."""

    def below(x: float) -> float:
        return 0.5 + math.atan((x + 0.7) / 0.4) / math.pi

    squashed, clipped = tool.world.target("tanh"), tool.world.target("clip")
    for bins in (slice(0, 20), slice(20, 50), slice(50, 100)):
        low, high = -1 + bins.start / 50, -1 + bins.stop / 50
        ends = [below(math.atanh(x)) if abs(x) < 1 else float(x > 0) for x in (low, high)]
        assert squashed[bins].sum().item() == pytest.approx(ends[1] - ends[0], abs=0.02)
    assert clipped[0].item() == pytest.approx(below(-0.98), abs=0.02)
    assert clipped.sum().item() == pytest.approx(1)


def test_every_arm_takes_the_settings_of_one_that_searches(tool: Any) -> None:
    own = tool.arms.Own.read(STUDIES / "bandit.yaml")
    arms = {arm.name: arm for arm in tool.arms.arms(own)}
    assert len(arms) == len(tool.arms.arms(own))
    for arm in arms.values():
        assert arm.like is None or arms[arm.like].like is None
    claims = tool.claims.claims()
    assert {name for claim in claims for side in claim.sides for name in side} <= set(arms)
    assert len({(claim.measure, *map(tuple, claim.sides)) for claim in claims}) == len(claims)
    steps = {(own.epochs // times) * own.buffer * times for times in tool.arms.TIMES_B}
    assert steps == {own.epochs * own.buffer}  # larger collections, as many completions


def test_the_bandit_runs_from_end_to_end_and_redraws(quick_study: Callable[..., str], tmp_path: Path) -> None:
    printed = quick_study("bandit")
    found = json.loads((tmp_path / "bandit.json").read_text())
    assert set(found["arms"]) == {"R1 on-policy PPO", "R1 offline IPO"}
    for arm in found["arms"].values():
        assert arm["final"]["reward"]["n"] == 2
        assert arm["final"]["reward"]["values"] == pytest.approx(arm["final"]["without prompt"]["values"], abs=1e-4)
        assert all(0 < value < 1 for value in arm["final"]["with prompt"]["values"])
        assert arm["curve"]["kl"][0] == 0 < arm["curve"]["kl"][-1]
    assert "| offline IPO |" in printed
    assert (tmp_path / "bandit_figure16.png").stat().st_size > 1000
