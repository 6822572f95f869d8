"""Algorithm 1 with Lightning's own loops: when buffers are drawn, from which prompts, and what resumes."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lit_align import objectives
from lit_align.batch import CompletionBatch, Rollout, Sampling
from lit_align.checks import check_groups
from lit_align.data import OnPolicyData
from lit_align.data.buffer import BufferLoader
from lit_align.data.fresh import prompt_positions
from lit_align.data.rows import DataError
from lit_align.errors import UserError
from tests.data.conftest import byte_tokenizer, pair_rows, write_jsonl
from tests.objectives.contract import random_groups

PROMPTS = 12


def letters(prompts: list[str], completions: list[str]) -> list[float]:
    """A reward that tells completions apart."""
    return [float(sum(map(ord, text))) for text in completions]


class Actor(LightningModule):
    """Draws letters that depend on the seed, on what it is given as row, and on how far it has trained."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer = byte_tokenizer()
        self.drawn: list[tuple[int, list[int]]] = []
        self.annotated: list[CompletionBatch] = []
        self.seen: list[Rollout] = []

    def generate(self, prompts: CompletionBatch, completions: int, sampling: Sampling) -> Rollout:
        self.drawn.append((self.trainer.global_step, prompts.row.tolist()))
        rows = []
        for place in prompts.row.tolist():
            for column in range(completions):
                seed = hash((sampling.seed, place, column, self.trainer.global_step))
                generator = torch.Generator().manual_seed(seed)
                rows.append(torch.randint(40, 60, (sampling.max_new_tokens,), generator=generator))
        ids = torch.stack(rows).view(len(prompts.row), completions, -1)
        there = torch.ones(ids.shape[:2], dtype=torch.bool)
        batch = prompts._replace(
            completion_ids=ids, completion_mask=torch.ones_like(ids, dtype=torch.bool), present=there
        )
        return Rollout(batch, drawn_at=torch.full_like(batch.row, self.trainer.global_step))

    def observe(self, rollout: Rollout, seconds: float) -> None:
        assert seconds > 0

    def annotate(self, rollout: Rollout) -> Rollout:
        self.annotated.append(rollout.completions)
        reward = rollout.completions.reward
        assert reward is not None
        return rollout._replace(advantage=reward[..., None])

    def training_step(self, batch: Rollout, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch)
        return (self.weight * batch.completions.completion_mask.sum()).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in pair_rows(PROMPTS)])


def fit(source: Path, resume: Path | None = None, trainer: dict[str, Any] | None = None, **data: Any) -> Actor:
    actor = Actor()
    options: dict[str, Any] = {"max_epochs": 3, "enable_checkpointing": False, **(trainer or {})}
    sizes = {"completions": 2, "buffer": 8, "minibatch": 4, "max_new_tokens": 3, "validation_size": 0}
    module = OnPolicyData(str(source), **{"reward": letters, **sizes, **data})
    Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, **options).fit(
        actor, module, ckpt_path=resume, weights_only=True
    )
    return actor


@pytest.mark.parametrize(
    ("buffer", "completions", "passes", "minibatch", "accumulate"),
    [(8, 2, 1, 4, 1), (8, 2, 2, 4, 1), (4, 4, 3, 4, 1), (12, 3, 2, 6, 2), (16, 1, 1, 4, 4), (8, 2, 1, 8, 2)],
)
def test_a_buffer_is_drawn_after_exactly_the_steps_that_the_one_before_gave(
    source: Path, buffer: int, completions: int, passes: int, minibatch: int, accumulate: int
) -> None:
    sizes = {"buffer": buffer, "completions": completions, "passes": passes, "minibatch": minibatch}
    actor = fit(source, trainer={"accumulate_grad_batches": accumulate, "max_epochs": 4}, **sizes)
    each = passes * buffer // minibatch
    assert [step for step, _ in actor.drawn] == [0, each, 2 * each, 3 * each]
    assert all(len(places) == buffer // completions for _, places in actor.drawn)
    assert actor.trainer.global_step == 4 * each
    assert all(rollout.completions.present.sum() == minibatch // accumulate for rollout in actor.seen)
    # Each sweep is the whole buffer, once.
    for number in range(4 * passes):
        sweep = actor.seen[number * len(actor.seen) // (4 * passes) : (number + 1) * len(actor.seen) // (4 * passes)]
        rows = torch.cat([rollout.completions.row for rollout in sweep])
        assert len(rows) == buffer // completions
    ages = [int(at) for rollout in actor.seen for at in rollout.drawn_at.unique()]  # type: ignore[union-attr]
    assert ages == [step for step, _ in actor.drawn for _ in range(each * accumulate)]


def test_a_run_bounded_inside_an_iteration_and_one_cut_short_each_epoch_draw_in_time(source: Path) -> None:
    assert [step for step, _ in fit(source, trainer={"max_steps": 3, "max_epochs": -1}).drawn] == [0, 2]
    assert [step for step, _ in fit(source, trainer={"limit_train_batches": 1}).drawn] == [0, 1, 2]


def test_prompts_are_dealt_in_turn_and_anew_when_they_are_used_up(source: Path) -> None:
    actor = fit(source, trainer={"max_epochs": 6})
    dealt = [row for batch in actor.annotated for row in batch.row.tolist()]
    assert sorted(dealt[:PROMPTS]) == sorted(dealt[PROMPTS:]) == list(range(PROMPTS))
    assert dealt[:PROMPTS] != dealt[PROMPTS:]
    places = [place for _, places in actor.drawn for place in places]
    assert places == list(range(2 * PROMPTS))  # so that no draw has the seed of another


def test_ranks_deal_the_same_stream_between_them() -> None:
    stream = prompt_positions(5, 3, 0, 20)
    assert stream == [p for start in range(0, 20, 4) for p in prompt_positions(5, 3, start, 4)]
    assert all(sorted(stream[start : start + 5]) == list(range(5)) for start in range(0, 20, 5))
    assert stream != prompt_positions(5, 4, 0, 20)


@pytest.mark.parametrize(
    ("select", "columns", "groups"), [("ranked", 3, 4), ("best", 1, 4), ("best_and_worst", 2, 4), ("all_pairs", 2, 12)]
)
def test_selected_columns_keep_what_belongs_to_them(source: Path, select: str, columns: int, groups: int) -> None:
    actor = fit(source, select=select, completions=3, buffer=12, minibatch=12, trainer={"max_epochs": 1})
    (rollout,), (whole,) = actor.seen, actor.annotated
    batch = rollout.completions
    assert batch.reward is not None
    assert whole.reward is not None
    assert rollout.advantage is not None
    assert batch.present.shape == (groups, columns)
    torch.testing.assert_close(rollout.advantage[..., 0], batch.reward)
    texts = byte_tokenizer().batch_decode(batch.completion_ids.flatten(0, 1))
    assert batch.reward.flatten().tolist() == letters([], texts)
    if columns > 1:
        assert (batch.reward[:, :-1] >= batch.reward[:, 1:]).all()
    best = {int(row): value for row, value in zip(whole.row, whole.reward.max(1).values.tolist(), strict=True)}
    if select != "all_pairs":
        assert {int(row): value for row, value in zip(batch.row, batch.reward[:, 0].tolist(), strict=True)} == best


def test_groups_of_equal_rewards_are_left_out_where_two_are_compared(source: Path) -> None:
    def partly(prompts: list[str], completions: list[str]) -> list[float]:
        return [
            0.0 if int(prompt[1:]) % 2 else value
            for prompt, value in zip(prompts, letters([], completions), strict=True)
        ]

    # Draws that leave fewer groups than minibatches are followed by another; the buffer is never a mixture.
    actor = fit(source, reward=partly, select="best_and_worst", buffer=24, minibatch=4, trainer={"max_epochs": 1})
    assert sorted(int(row) for rollout in actor.seen for row in rollout.completions.row) == [0, 2, 4, 6, 8, 10]
    assert [len(rollout.completions.row) for rollout in actor.seen] == [1] * 6
    kept = fit(source, reward=partly, select="ranked", buffer=24, minibatch=4, trainer={"max_epochs": 1})
    assert sum(len(rollout.completions.row) for rollout in kept.seen) == 12


def test_a_reward_that_never_tells_completions_apart_stops_the_run(source: Path) -> None:
    with pytest.raises(DataError, match="8 times in a row fewer than 2 of 4 prompts"):
        fit(source, reward=lambda prompts, completions: [1.0] * len(completions), select="best_and_worst")


def test_a_policy_with_nothing_left_to_learn_ends_the_run_in_order(
    source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def satisfied(prompts: list[str], completions: list[str]) -> list[float]:
        calls.append(len(completions))
        return letters(prompts, completions) if len(calls) <= 2 else [1.0] * len(completions)

    with caplog.at_level(logging.WARNING, logger="lit_align"):
        actor = fit(source, reward=satisfied, select="best_and_worst", trainer={"max_epochs": 9})
    assert actor.trainer.global_step == 4
    assert len(calls) == 2 + 8
    assert "training ends after 2 iterations" in caplog.text
    assert not actor.trainer.interrupted


class Faulty:
    """A reward that fails for some prompts, in some way."""

    def __init__(self, *prompts: str, value: float | None = None) -> None:
        self.prompts, self.value = prompts, value

    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        found = letters(prompts, completions)
        for place, prompt in enumerate(prompts):
            if prompt in self.prompts:
                if self.value is None:
                    raise ConnectionError("the judge is away")
                found[place] = self.value
        return found


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_a_group_whose_reward_fails_is_left_out_and_counted(
    source: Path, value: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="lit_align"):
        actor = fit(source, reward=Faulty("Q003", "Q007", value=value), buffer=24, trainer={"max_epochs": 1})
    rows = sorted(int(row) for rollout in actor.seen for row in rollout.completions.row)
    assert rows == [row for row in range(PROMPTS) if row not in (3, 7)]
    (whole,) = actor.annotated
    assert whole.row[~whole.present.any(1)].sort().values.tolist() == [3, 7]
    assert "2 of 12 groups are left out" in caplog.text
    assert ("the judge is away" in caplog.text) == (value is None)


def test_a_reward_that_fails_for_all_is_an_error_with_its_cause(source: Path) -> None:
    names = [row["prompt"] for row in pair_rows(PROMPTS)]
    with pytest.raises(DataError, match=r"failed for all of 4 groups.*the judge is away"):
        fit(source, reward=Faulty(*names))
    with pytest.raises(DataError, match="none of its values is a finite number"):
        fit(source, reward=Faulty(*names, value=float("nan")))
    with pytest.raises(DataError, match="gave 1 values for 8 completions"):
        fit(source, reward=lambda prompts, completions: [1.0])


class KeepAll(Callback):
    """Checks that the state is plain enough to be loaded without pickled code."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        assert "ranks" in str(checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"][0].keys())


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5])
def test_a_resumed_run_goes_on_with_the_same_buffer(source: Path, tmp_path: Path, at: int) -> None:
    options = {"max_epochs": 3, "accumulate_grad_batches": 2}
    whole = fit(source, passes=2, minibatch=8, buffer=8, trainer=options)
    folder = tmp_path / "kept"
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    kept = {"enable_checkpointing": True, "callbacks": [saver, KeepAll()]}
    fit(source, passes=2, minibatch=8, buffer=8, trainer=options | kept)
    resumed = fit(source, resume=folder / f"step={at}.ckpt", passes=2, minibatch=8, buffer=8, trainer=options)
    expected = whole.seen[2 * at :]
    assert len(resumed.seen) == len(expected)
    for own, other in zip(resumed.seen, expected, strict=True):
        for name in ("row", "completion_ids", "reward"):
            assert torch.equal(getattr(own.completions, name), getattr(other.completions, name))
        assert torch.equal(own.drawn_at, other.drawn_at)  # type: ignore[arg-type]
    assert resumed.drawn == [draw for draw in whole.drawn if draw[0] >= at]


def test_a_buffer_of_other_sizes_is_not_gone_on_with(source: Path, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(source, passes=2, trainer={"enable_checkpointing": True, "callbacks": [saver]})
    with pytest.raises(DataError, match="minibatch was 4, is 8"):
        fit(source, resume=tmp_path / "step=1.ckpt", passes=2, minibatch=8)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"minibatch": 5}, "data.minibatch=5 must be a multiple of data.completions=2"),
        ({"buffer": 6}, "data.buffer=6 must be a multiple of data.minibatch=4"),
        ({"completions": 0}, "data.completions=0 must be at least 1"),
        ({"completions": 1, "select": "best_and_worst"}, "data.completions=1 must be at least 2"),
        ({"passes": 0}, "data.passes=0 must be at least 1"),
        ({"top_p": 0.0}, "data.top_p=0.0 must be greater than 0"),
        ({"temperature": 0.0}, "data.temperature=0.0 must be greater than 0"),
        ({"reward": None}, "data.reward is not set"),
        ({"trainer": {"accumulate_grad_batches": 4}}, "make it a multiple of 8"),
        ({"batch_size": 1}, "set trainer.accumulate_grad_batches to 2"),
        ({"max_length": 258}, "data.max_length=258 must be at least 259"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_remedy(source: Path, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says.replace(".", r"\.")):
        fit(source, **arguments)


def test_every_sweep_has_an_order_of_its_own() -> None:
    loader = BufferLoader(lambda place: (None, place), 3, 2, 0, 0, lambda value: [value], {}, lambda: None)  # type: ignore[arg-type,return-value]
    orders = []
    for loader.iteration in (1, 2):
        found = torch.cat(loader._order(12)).tolist()
        orders += [found[:12], found[12:]]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len({str(order) for order in orders}) == 4


PLACES = [([6, 6], [12]), ([7], [4, 4]), ([4, 5], [4, 4, 4]), ([4, 5], [4, 5]), ([3] * 4, [4] * 3)]
"""Of the ranks that were, and of those that are: as many entries as any of the former can have had are dealt, over the
number of the latter and rounded up. As many ranks as before go on each where it was."""


@pytest.mark.parametrize(("before", "after"), PLACES)
def test_no_entry_of_the_stream_comes_again_on_another_number_of_ranks(before: list[int], after: list[int]) -> None:
    saved = {"iteration": 3, "position": 0, "for": {"devices": len(before)}}
    saved["ranks"] = [{"buffer": None, "place": place} for place in before]
    for rank, expected in enumerate(after):
        settings = {"devices": len(after)}
        loader = BufferLoader(lambda place: (None, place), 3, 2, 0, rank, list, settings, lambda: None)  # type: ignore[arg-type,return-value]
        loader.load_state_dict(saved)
        assert loader.place == expected


def test_pairs_that_may_be_ties_are_refused(source: Path) -> None:
    data = OnPolicyData(str(source), reward=letters, completions=2, buffer=4, minibatch=4)
    groups = random_groups(2, 2)
    for kind in (objectives.DPO, objectives.EpsilonDPO, objectives.SimPO):
        with pytest.raises(UserError, match=r"set data\.select to best_and_worst"):
            check_groups(kind, data, groups)
    check_groups(objectives.IPO, data, groups)  # compares the rewards themselves
    data.select = "best_and_worst"
    check_groups(objectives.DPO, data, groups)


def test_two_ranks_deal_the_prompts_of_one_and_keep_both_buffers(source: Path, tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(
        "import sys, torch\n"
        "from lightning import Trainer\n"
        "from lightning.pytorch.callbacks import ModelCheckpoint\n"
        "from lit_align.data import OnPolicyData\n"
        "from tests.data.test_on_policy import Actor, letters\n"
        "if __name__ == '__main__':\n"
        "    source, folder, resume = sys.argv[1], sys.argv[2], sys.argv[3] or None\n"
        "    sizes = dict(completions=2, buffer=8, minibatch=4, passes=2, max_new_tokens=3, validation_size=0)\n"
        "    actor, data = Actor(), OnPolicyData(source, reward=letters, **sizes)\n"
        "    saver = ModelCheckpoint(folder, filename='{step}', every_n_train_steps=3, save_top_k=-1)\n"
        "    trainer = Trainer(accelerator='cpu', devices=2, strategy='ddp', max_epochs=2, logger=False,\n"
        "        enable_progress_bar=False, enable_model_summary=False, callbacks=[saver],\n"
        "        num_sanity_val_steps=0, use_distributed_sampler=False)\n"
        "    trainer.fit(actor, data, ckpt_path=resume, weights_only=True)\n"
        '    name = f\'{folder}/{trainer.global_rank}{"r" if resume else ""}.pt\'\n'
        "    seen = [rollout.completions.completion_ids for rollout in actor.seen]\n"
        "    torch.save({'drawn': actor.drawn, 'seen': seen}, name)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    for resume in ("", str(tmp_path / "step=3.ckpt")):
        command = [sys.executable, str(script), str(source), str(tmp_path), resume]
        subprocess.run(command, check=True, env=environment, cwd=tmp_path, timeout=240, capture_output=True)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    alone = fit(source, passes=2, trainer={"max_epochs": 2})
    assert [step for step, _ in ranks[0]["drawn"]] == [step for step, _ in ranks[1]["drawn"]] == [0, 4]
    together = [sorted(a + b) for (_, a), (_, b) in zip(ranks[0]["drawn"], ranks[1]["drawn"], strict=True)]
    assert together == [sorted(places) for _, places in alone.drawn]
    assert not set(ranks[0]["drawn"][0][1]) & set(ranks[1]["drawn"][0][1])
    for rank, whole in enumerate(ranks):
        resumed = torch.load(tmp_path / f"{rank}r.pt")
        assert len(resumed["seen"]) == 5
        assert all(map(torch.equal, resumed["seen"], whole["seen"][3:]))


def test_the_middle_of_a_buffer_is_judged_by_the_length_it_had() -> None:
    """After 4 of 4 batches nothing is left, also where a pass now has 6; after 3 of 4 something was, also where it
    now has 2."""

    def loader(sweeps: int) -> BufferLoader:
        made = {"data.passes": sweeps, "devices": 1}
        return BufferLoader(lambda place: (None, place), 2, sweeps, 0, 0, lambda value: [value], made, lambda: None)  # type: ignore[arg-type,return-value]

    before = loader(2)
    before.position = 4
    loader(3).load_state_dict(before.state_dict())
    before.position = 3
    with pytest.raises(DataError, match="in the middle of a buffer"):
        loader(1).load_state_dict(before.state_dict())
