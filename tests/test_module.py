"""What AlignModule promises: exact reduction over ranks, an adapter-only checkpoint, a checked start."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_align.adapters import START
from lit_align.batch import CompletionBatch, Loss, Sampling
from lit_align.errors import UserError
from lit_align.module import AlignModule
from lit_align.objectives.beta_dpo import BetaDPO
from lit_align.objectives.dpo import DPO
from lit_align.objectives.eps_dpo import EpsilonDPO
from lit_align.objectives.kto import KTO
from lit_align.objectives.sft import SFT
from lit_align.objectives.tr_dpo import TRDPO
from lit_align.settings import LoraSettings, OptimSettings, PairSettings, usual_learning_rate
from tests.families import ragged_batch, save_tiny
from tests.objectives.contract import Groups, random_groups, same_start, train


def build(tmp_path: Path, kind: type[AlignModule] = EpsilonDPO, **options: object) -> AlignModule:
    if not (tmp_path / "config.json").exists():
        save_tiny("llama", tmp_path)
    optim = OptimSettings(learning_rate=1e-2, warmup=0.0, schedule="constant")
    return kind(pair=PairSettings(str(tmp_path)), optim=optim, **options)


class KeepState(Callback):
    """Writes the trained state of rank 0 to a file, so that another process can read it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            torch.save(trained_state(pl_module), self.path)


ADAPTIVE: list[tuple[type[AlignModule], dict[str, float]]] = [
    (EpsilonDPO, {"beta": 0.2, "epsilon": 0.1}),
    (BetaDPO, {"a": 0.0, "keep": 1.0}),  # what else it does belongs to the micro-batch
    (TRDPO, {"alpha": 0.5}),
]


def trained_state(module: LightningModule) -> dict[str, torch.Tensor]:
    """The adapters but the one that stays as it was, and adaptive state beside them."""
    state = module.state_dict()
    adapters = {k for k in state if "lora" in k and f".{START}." not in k}
    return {k: v for k, v in state.items() if k in adapters | {"beta", "running", "corrected"}}


@pytest.mark.parametrize(("kind", "options"), ADAPTIVE, ids=lambda value: getattr(value, "__name__", ""))
def test_two_ranks_train_as_one_with_twice_the_accumulation(
    tmp_path: Path, kind: type[AlignModule], options: dict[str, float]
) -> None:
    """Micro-batches of unequal size, so that averaging over ranks or micro-batches would show."""
    groups, sizes = random_groups(22, 2), [4, 1, 2, 5, 6, 4]
    states = []
    for name, accumulate, ranks in (("one", 2, {}), ("two", 1, {"strategy": "ddp_spawn", "devices": 2})):
        module = build(tmp_path, kind, **options)
        train(module, groups, sizes, accumulate, callbacks=[KeepState(tmp_path / name)], **ranks)
        states.append(torch.load(tmp_path / name))
    one, two = states
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    if kind is EpsilonDPO:
        assert one["beta"] != 0.2


class TokenMean(AlignModule):
    """A loss for each token, weighted by tokens: the gradient must be that of the mean over all tokens of a step."""

    def loss(self, batch: CompletionBatch) -> Loss:
        scores = self.score(batch, reference=False)
        return Loss(-scores.token_logps, batch.completion_mask.float(), None, {})


def test_the_gradient_of_a_step_is_that_of_the_mean_over_all_its_tokens(tmp_path: Path) -> None:
    groups = random_groups(7, 3)
    module = build(tmp_path, TokenMean)
    gradients: dict[str, torch.Tensor] = {}

    class Record(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args) -> None:  # type: ignore[no-untyped-def]
            if trainer.global_step == 1:
                gradients.update({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})

    train(module, groups, [1, 4, 2], 3, callbacks=[Record()])
    fresh = build(tmp_path, TokenMean)
    fresh.configure_model()
    same_start(fresh)
    scores = fresh.pair.score(groups, reference=False)  # type: ignore[union-attr]
    (-scores.token_logps.sum() / groups.completion_mask.sum()).backward()
    expected = {name: p.grad for name, p in fresh.named_parameters() if p.grad is not None}
    assert expected.keys() == gradients.keys() != set()
    for name, value in expected.items():
        assert value is not None
        torch.testing.assert_close(gradients[name], value, atol=1e-6, rtol=1e-4)


def test_checkpoints_hold_what_is_trained_and_never_the_base(tmp_path: Path) -> None:
    groups = random_groups(12, 2)
    saver = ModelCheckpoint(dirpath=tmp_path / "saved", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    module = build(tmp_path, beta=0.2, epsilon=0.1)
    train(module, groups, [4, 4, 4], 1, callbacks=[saver], enable_checkpointing=True)
    saved = torch.load(tmp_path / "saved" / "step=2.ckpt", weights_only=True)
    pair = {name for name in saved["state_dict"] if name.startswith("pair.")}
    assert pair == {f"pair.{name}" for name in module.pair.state_names()}  # type: ignore[union-attr]
    assert "beta" in saved["state_dict"]

    resumed = build(tmp_path, beta=0.2, epsilon=0.1)
    seen: list[tuple[int, float]] = []

    class Watch(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            seen.append((trainer.global_step, pl_module.beta.item()))  # type: ignore[operator, union-attr]

    trainer = Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, callbacks=[Watch()],
        enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(resumed, datamodule=Groups(groups, [4, 4, 4]), ckpt_path=tmp_path / "saved" / "step=2.ckpt")
    assert seen == [(2, saved["state_dict"]["beta"].item())]
    assert seen[0][1] != 0.2


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path: Path) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path / "saved", every_n_train_steps=1)
    train(build(tmp_path, DPO), random_groups(4, 2), [4], 1, callbacks=[saver], enable_checkpointing=True)
    other = DPO(pair=PairSettings(str(tmp_path), lora=LoraSettings(r=4)))
    trainer = Trainer(accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False)
    with pytest.raises(UserError, match=r"the checkpoint does not fit this model: \d+ of \d+ trained tensors"):
        trainer.fit(other, datamodule=Groups(random_groups(4, 2), [4]), ckpt_path=saver.best_model_path)


def test_a_checkpoint_made_under_other_settings_or_by_another_objective_is_refused(tmp_path: Path) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path / "saved", every_n_train_steps=1)
    train(build(tmp_path, DPO), random_groups(4, 2), [4], 1, callbacks=[saver], enable_checkpointing=True)
    pair = PairSettings(str(tmp_path), lora=LoraSettings(alpha=4))
    for other, message in (
        (DPO(pair=pair), r"lora.alpha 32, and this run has 4"),
        (build(tmp_path, EpsilonDPO), r"objective DPO, and this run has EpsilonDPO"),
    ):
        trainer = Trainer(accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False)
        with pytest.raises(UserError, match=message):
            trainer.fit(other, datamodule=Groups(random_groups(4, 2), [4]), ckpt_path=saver.best_model_path)


def test_a_run_that_only_time_ends_keeps_its_step_size(tmp_path: Path) -> None:
    rates: list[float] = []

    class Rates(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args) -> None:  # type: ignore[no-untyped-def]
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])
            trainer.should_stop = len(rates) == 6

    optim = OptimSettings(learning_rate=1e-3, schedule="cosine")
    module = DPO(pair=PairSettings(save_tiny("llama", tmp_path)), optim=optim)
    options = {"max_epochs": None, "max_time": {"minutes": 5}, "callbacks": [Rates()]}
    train(module, random_groups(8, 2), [4, 4], 1, **options)
    assert rates == [1e-3] * 6


def test_sixteen_bit_adapters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trainer.precision=bf16-true .*model.pair.dtype"):
        train(build(tmp_path, DPO), random_groups(4, 2), [4], 1, precision="bf16-true")


def test_a_reference_that_is_not_the_start_stops_the_run(tmp_path: Path) -> None:
    module = build(tmp_path, DPO)
    module.configure_model()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    with pytest.raises(UserError, match="before the first step policy and reference differ"):
        train(module, random_groups(4, 2), [4], 1)


class OneCompletion(Groups):
    def examples(self, n: int) -> CompletionBatch:
        return random_groups(n, 1)


def test_data_an_objective_cannot_learn_from_is_refused_before_the_model_loads(tmp_path: Path) -> None:
    trainer = Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False)
    module = DPO(pair=PairSettings(str(tmp_path / "absent")))
    with pytest.raises(UserError, match=r"DPO learns from groups of 2 completions, and OneCompletion gives 1"):
        trainer.fit(module, datamodule=OneCompletion(random_groups(4, 1), [4]))
    worse = OneCompletion(random_groups(4, 1), [4])
    worse.comparing = True  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"SFT imitates every completion"):
        trainer.fit(SFT(pair=PairSettings(str(tmp_path / "absent"))), datamodule=worse)
    with pytest.raises(UserError, match=r"KTO needs a reward for each completion"):
        trainer.fit(
            KTO(pair=PairSettings(str(tmp_path / "absent"))), datamodule=OneCompletion(random_groups(4, 1), [4])
        )


def test_validation_reads_the_scores_of_its_own_batch(tmp_path: Path) -> None:
    module = build(tmp_path, DPO)
    module.configure_model()
    first, second = random_groups(4, 2), random_groups(2, 2, seed=9)
    for batch in (first, second):
        module.validation_step(batch, 0)
    found = module.monitor.validation.compute()["val/lengths/chosen"].item()
    assert found == pytest.approx((first.lengths[:, 0].sum() + second.lengths[:, 0].sum()).item() / 6)


class LastLogged(Callback):
    """What was logged of the last optimizer step."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.values = {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_the_first_logged_loss_is_ln_2(tmp_path: Path) -> None:
    last = LastLogged()
    train(build(tmp_path, DPO), random_groups(4, 2), [4], 1, callbacks=[last])
    logged = last.values
    assert logged["train/loss"] == pytest.approx(math.log(2))
    assert logged["train/rewards/margins"] == 0
    assert logged["train/rewards/accuracies"] == 0.5
    assert logged["train/kl"] == 0
    assert logged["train/tokens_per_second"] > 0


def test_the_logged_rate_is_the_one_the_step_was_taken_at(tmp_path: Path) -> None:
    """Linear from 0.3 to 0 over three steps: the third is at 0.1."""
    optim = OptimSettings(learning_rate=0.3, warmup=0.0, schedule="linear")
    module, last = DPO(pair=PairSettings(save_tiny("llama", tmp_path)), optim=optim), LastLogged()
    train(module, random_groups(6, 2), [2, 2, 2], 1, callbacks=[last])
    assert last.values["train/learning_rate"] == pytest.approx(0.1)


def test_the_padding_of_a_step_is_the_share_of_cells_without_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups, logged = random_groups(5, 2), LastLogged()
    monkeypatch.setattr("lit_align.pair.shares_prompts", lambda config: False)
    train(build(tmp_path, DPO), groups, [3, 2], 2, callbacks=[logged])
    lengths = groups.prompt_mask.sum(-1)[:, None] + groups.lengths  # one row for each completion
    cells = sum(part.numel() * int(part.max()) for part in lengths.split([3, 2]))
    assert logged.values["train/padding"] == pytest.approx(1 - int(lengths.sum()) / cells)
    assert logged.values["train/padding"] > 0


def test_a_group_alone_leaves_no_cell_empty(tmp_path: Path) -> None:
    logged = LastLogged()
    train(build(tmp_path, DPO), random_groups(2, 2), [1, 1], 2, callbacks=[logged])
    assert logged.values["train/padding"] == 0


def test_the_schedule_rises_and_falls_as_named() -> None:
    linear = OptimSettings(warmup=0.2, schedule="linear")
    assert [linear.factor(step, 10) for step in (0, 1, 2, 6, 10)] == pytest.approx([1 / 3, 2 / 3, 1.0, 0.5, 0.0])
    cosine = OptimSettings(warmup=0.0, schedule="cosine")
    assert [cosine.factor(step, 8) for step in (0, 2, 4, 8)] == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, 0])
    assert OptimSettings(warmup=0.0, schedule="constant").factor(99, 100) == 1


def test_the_learning_rate_follows_the_size_of_the_model() -> None:
    found = [usual_learning_rate(size) for size in (10**6, 4 * 10**6, 10**8, 10**9, 7 * 10**10)]
    assert found == pytest.approx([5e-4, 5e-4, 1e-4 * math.sqrt(10), 1e-4, 1e-4])


@pytest.mark.parametrize(("name", "value"), [("learning_rate", 0.0), ("weight_decay", -1.0), ("warmup", 1.0)])
def test_optimizer_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"model.optim.{name} is {value}"):
        OptimSettings(**{name: value})


@pytest.mark.parametrize("sampling", [Sampling(6), Sampling(6, top_k=3), Sampling(6, temperature=0.5)])
def test_the_log_probs_of_a_draw_are_those_of_the_policy(tmp_path: Path, sampling: Sampling) -> None:
    module = DPO(pair=PairSettings(save_tiny("llama", tmp_path), temperature=0.8))
    module.configure_model()
    assert module.pair is not None
    rollout = module.generate(ragged_batch(), 3, sampling)
    expected = module.pair.score(rollout.completions, reference=False).token_logps
    assert rollout.old_logps is not None
    torch.testing.assert_close(rollout.old_logps, expected.detach(), atol=1e-5, rtol=1e-4)
    assert rollout.drawn_at is not None
    assert rollout.drawn_at.tolist() == [0] * 4
