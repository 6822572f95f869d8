from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lit_align.objectives.sft import SFT, sft_loss
from lit_align.settings import PairSettings
from tests.families import save_tiny
from tests.objectives.contract import ObjectiveContract, random_groups


class TestSFT(ObjectiveContract):
    objective = SFT
    columns = 1

    def loss(self, logratio: Tensor) -> Tensor:
        return sft_loss(logratio[:, :, None])[:, 0, 0]

    def worked(self) -> Iterator[tuple[list[float], float]]:
        yield [math.log(0.25)], math.log(4)
        yield [0.0], 0.0

    def test_steps_raise_the_margin(self, model: str) -> None:
        """There is no margin: the likelihood must rise."""
        from tests.objectives.contract import same_start, train

        groups = self.groups(6)
        start = self.build(model)
        start.configure_model()
        same_start(start)
        module = train(self.build(model), groups, [6], accumulate=1, max_epochs=2)
        after, before = (m.pair.score(groups, reference=False).logps.sum() for m in (module, start))  # type: ignore[union-attr]
        assert after > before + 1e-3


def test_the_mean_over_tokens_is_the_models_own_cross_entropy(tmp_path_factory: pytest.TempPathFactory) -> None:
    module = SFT(pair=PairSettings(save_tiny("llama", tmp_path_factory.mktemp("m"))))
    module.configure_model()
    assert module.pair is not None
    groups = random_groups(3, 2)
    loss = module.loss(groups)
    total = count = 0.0
    for b in range(3):
        for k in range(2):
            prompt = groups.prompt_ids[b][groups.prompt_mask[b]]
            ids = torch.cat([prompt, groups.completion_ids[b, k][groups.completion_mask[b, k]]])
            labels = ids.clone()
            labels[: len(prompt)] = -100
            tokens = len(ids) - len(prompt)
            total += module.pair.policy(input_ids=ids[None], labels=labels[None]).loss.item() * tokens
            count += tokens
    assert ((loss.value * loss.weight).sum() / loss.weight.sum()).item() == pytest.approx(total / count, rel=1e-5)
