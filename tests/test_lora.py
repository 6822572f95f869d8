"""The update that is added in place, against peft's own layers."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lit_align.adapters import POLICY, REFERENCE
from lit_align.lora import add_in_place
from tests.families import tiny

IDS = torch.arange(12).view(2, 6)


def adapted(family: str = "llama", **options: Any) -> Any:
    config = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 12, "target_modules": "all-linear", **options}
    model = get_peft_model(tiny(family).double(), LoraConfig(**config))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 0, 0.2)
    return model


def spared(model: Any) -> int:
    return sum(isinstance(vars(layer).get("forward"), MethodType) for layer in model.modules())


def passed(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    out = model(input_ids=IDS).logits
    out.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out.detach(), grads


@pytest.mark.parametrize("rank", [4, 64])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox", "gpt2"])
def test_values_and_gradients_are_pefts(family: str, rank: int) -> None:
    """At a rank of 64, which is full, the update is added to the weights."""
    model = adapted(family, r=rank)  # qwen2 and gpt_neox have biases, gpt2 has weights that are transposed
    expected = passed(model)
    add_in_place(model)
    assert spared(model) == sum(hasattr(layer, "lora_A") for layer in model.modules()) > 0
    torch.testing.assert_close(passed(model), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_nothing_is_copied_for_being_changed_in_place(family: str) -> None:
    model = adapted(family)
    add_in_place(model)
    waiting, seen = [model(input_ids=IDS).logits.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    names = {node.name() for node in seen}
    assert "AddmmBackward0" in names
    assert not [name for name in names if "CopySlices" in name]


@pytest.mark.parametrize("options", [{"lora_bias": True}, {"use_dora": True}, {"use_rslora": True}])
def test_other_kinds_of_adapters_stay_what_they_are(options: dict[str, bool]) -> None:
    model = adapted(**options)
    expected = passed(model)
    add_in_place(model)
    torch.testing.assert_close(passed(model), expected)


def test_another_adapter_none_and_a_merged_one() -> None:
    model = adapted()
    model.add_adapter(REFERENCE, copy.deepcopy(model.peft_config[POLICY]))
    for name, parameter in model.named_parameters():
        if f".{REFERENCE}." in name:
            torch.nn.init.normal_(parameter, 0, 0.2)

    def outputs() -> list[torch.Tensor]:
        found = [model(input_ids=IDS).logits]
        with model.disable_adapter():
            found.append(model(input_ids=IDS).logits)
        model.set_adapter(REFERENCE)
        found.append(model(input_ids=IDS).logits)
        model.merge_adapter()
        found.append(model(input_ids=IDS).logits)
        model.unmerge_adapter()
        model.set_adapter(POLICY)
        return found

    with torch.no_grad():
        expected = outputs()
        add_in_place(model)
        torch.testing.assert_close(outputs(), expected)
    assert not torch.allclose(expected[0], expected[1])
    assert not torch.allclose(expected[0], expected[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [4, 64])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_update_of_zero_changes_no_bit(family: str, rank: int, dtype: torch.dtype) -> None:
    model = adapted(family, r=rank).to(dtype)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    add_in_place(model)
    with torch.no_grad():
        for tokens in (*range(1, 17), 33, 100):  # kernels differ by the number of rows
            ids = torch.arange(tokens)[None] % 61
            own = model(input_ids=ids).logits
            with model.disable_adapter():
                assert torch.equal(own, model(input_ids=ids).logits)


def test_under_autocast_peft_decides() -> None:
    model = adapted()
    with torch.autocast("cpu", torch.bfloat16):
        expected = passed(model)
        add_in_place(model)
        found = passed(model)
    torch.testing.assert_close(found, expected)


def test_a_copy_computes_with_its_own_weights() -> None:
    model = adapted()
    add_in_place(model)
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert twin(input_ids=IDS).logits.abs().max() > 0
