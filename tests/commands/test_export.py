"""``export``: what is written loads in plain transformers and peft with the policy's logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_align.__main__ import main
from lit_align.commands.serving import VLLM_RANKS, vllm_flags, vllm_problems
from lit_align.models import load_base
from lit_align.settings import PairSettings
from tests.commands.conftest import fit


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.fixture
def ids(base: str) -> Tensor:
    return AutoTokenizer.from_pretrained(base)("Q001 yes! And more.", return_tensors="pt").input_ids


@pytest.fixture
def policy(base: str, trained: Path, ids: Tensor) -> Tensor:
    """Logits of the policy as plain peft loads it."""
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), trained / "adapter"), ids)


def test_the_exported_adapter_is_the_policy(base: str, trained: Path, place: Path, ids: Tensor, policy: Tensor) -> None:
    assert main(["export", str(trained), "--out", "out", "--check", "vllm", "--base_model", "me/base"]) == 0
    plain = AutoModelForCausalLM.from_pretrained(base)
    untrained = logits(plain, ids)
    assert torch.equal(logits(PeftModel.from_pretrained(plain, "out"), ids), policy)
    assert (policy - untrained).abs().max() > 0.1
    assert AutoTokenizer.from_pretrained("out")("Q1").input_ids == AutoTokenizer.from_pretrained(base)("Q1").input_ids
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/base"
    card = Path("out/README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "me/base"
    assert "not on the Hub" not in card
    assert "'me/base'" in card


def test_what_is_printed_loads_the_policy_where_the_files_have_another_type(
    base: str, trained: Path, place: Path, ids: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers takes the type of the file unless it is told; training on a CPU is in float32."""
    AutoModelForCausalLM.from_pretrained(base).bfloat16().save_pretrained("half")
    held = AutoModelForCausalLM.from_pretrained("half", dtype=torch.float32)
    policy = logits(PeftModel.from_pretrained(held, trained / "adapter"), ids)
    assert json.loads((trained / "adapter" / "base.json").read_text())["dtype"] == "float32"
    assert main(["export", str(trained), "--out", "out", "--check", "vllm"]) == 0
    out = capsys.readouterr().out
    assert "--lora-modules policy=out\n" in out
    lines = [line.strip() for line in out.splitlines() if line.startswith(("  from peft", "  base = ", "  model = "))]
    names: dict[str, Any] = {}
    exec("\n".join(lines).replace(repr(base), "'half'"), names)
    assert torch.equal(logits(names["model"], ids), policy)
    assert 'dtype="float32"' in Path("out/README.md").read_text()


def test_nothing_of_this_machine_is_exported(base: str, trained: Path, place: Path) -> None:
    assert main(["export", str(trained), "--out", "out"]) == 0
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == Path(base).name
    assert "base_model" not in yaml.safe_load(Path("out/README.md").read_text().split("---\n")[1])


@pytest.mark.parametrize(("dtype", "share"), [("float32", 1e-5), ("bfloat16", 5e-2), ("float16", 1e-2)])
def test_the_merged_model_is_the_policy(
    trained: Path,
    place: Path,
    ids: Tensor,
    policy: Tensor,
    capsys: pytest.CaptureFixture[str],
    dtype: str,
    share: float,
) -> None:
    assert main(["export", str(trained), "--out", "out", "--merge", dtype]) == 0
    model = AutoModelForCausalLM.from_pretrained("out", dtype="auto")
    assert model.dtype == getattr(torch, dtype)
    assert {tensor.dtype for tensor in load_file("out/model.safetensors").values()} == {getattr(torch, dtype)}
    gap = (logits(model.float(), ids) - policy).abs().max()
    assert gap < share * policy.abs().max()
    assert "logits differ by at most" in capsys.readouterr().out
    front = yaml.safe_load(Path("out/README.md").read_text().split("---\n")[1])
    assert front["library_name"] == "transformers"
    assert "lora" not in front["tags"]


def test_a_quantized_base_is_dequantized_before_it_is_merged(
    base: str, place: Path, ids: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    """Merged into the original weights the policy would be another one."""
    run = fit(base, place, model__pair__quantization="nf4")
    assert main(["export", str(run), "--out", "out", "--merge", "float32"]) == 0
    plain = AutoModelForCausalLM.from_pretrained(base)
    quantized = load_base(PairSettings(base, quantization="nf4"), torch.device("cpu"))
    policy = logits(PeftModel.from_pretrained(quantized, run / "adapter"), ids)
    merged = logits(AutoModelForCausalLM.from_pretrained("out"), ids)
    other = logits(PeftModel.from_pretrained(plain, run / "adapter"), ids)
    assert (merged - policy).abs().max() < 1e-3
    assert (other - policy).abs().max() > 0.05
    assert json.loads((run / "adapter" / "base.json").read_text())["quantization"] == "nf4"


def test_a_base_quantized_in_16_bits_is_merged_without_rounding_the_sum(base: str, place: Path) -> None:
    """The weights are those that bfloat16 has, and B A is added to them in the type that is asked for."""
    from lit_align.commands.merging import merge
    from lit_align.commands.runs import find_run

    run = fit(base, place, model__pair__quantization="nf4", model__pair__dtype="bfloat16")
    merged, _ = merge(find_run(str(run)), "float32", torch.device("cpu"))
    held = load_base(PairSettings(base, quantization="nf4", dtype="bfloat16"), torch.device("cpu")).dequantize()
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    about = json.loads((run / "adapter" / "adapter_config.json").read_text())
    name = "model.layers.0.mlp.up_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
    expected = held.get_submodule(name).weight.float() + about["lora_alpha"] / about["r"] * b @ a
    found = merged.get_submodule(name).weight
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-6)
    assert (found - found.bfloat16().float()).abs().max() > 1e-5


def test_auto_means_what_it_meant_in_training(base: str, trained: Path, place: Path) -> None:
    from lit_align.commands.runs import find_run

    shutil.copytree(trained / "adapter", "adapter")
    about = json.loads(Path("adapter/base.json").read_text())
    assert about["quantization"] == "none"
    Path("adapter/base.json").write_text(json.dumps(about | {"quantization": "nf4", "dtype": "bfloat16"}))
    found = find_run("adapter").settings
    assert (found.quantization, found.dtype) == ("nf4", "bfloat16")
    found = find_run(str(trained)).settings
    assert (found.quantization, found.dtype) == ("none", "float32")
    Path("adapter/base.json").unlink()
    found = find_run("adapter").settings
    assert (found.quantization, found.dtype) == ("auto", "auto")


def test_a_merge_that_went_wrong_is_not_written(
    trained: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft.tuners.lora.layer import Linear

    own = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: -own(self, name))
    assert main(["export", str(trained), "--out", "out", "--merge", "float32"]) == 2
    assert "is not the policy" in capsys.readouterr().err
    assert not Path("out").exists()


GOOD = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": ["q_proj"], "bias": "none"}
NAMES = [f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight" for x in "AB"]


@pytest.mark.parametrize(
    ("changes", "names", "words"),
    [
        ({}, [], []),
        ({"use_rslora": True}, [], []),
        ({"r": 1024}, [], ["1024", "512"]),
        ({"bias": "all"}, [], ["bias"]),
        ({"use_dora": True}, [], ["use_dora"]),
        ({"modules_to_save": ["lm_head"]}, [], ["modules_to_save"]),
        ({}, ["base_model.model.lm_head.weight"], ["lm_head"]),
        ({}, ["base_model.model.lm_head.lora_A.weight"], ["lm_head", "must have none"]),
        ({"rank_pattern": {"q_proj": 4}}, [], ["rank_pattern"]),
        ({"peft_type": "IA3"}, [], ["IA3"]),
    ],
)
def test_vllms_constraints(place: Path, changes: dict[str, Any], names: list[str], words: list[str]) -> None:
    save_file({name: torch.zeros(1) for name in NAMES + names}, "adapter_model.safetensors")
    problems = vllm_problems(GOOD | changes, Path("adapter_model.safetensors"))
    assert bool(problems) == bool(words)
    assert all(word in problems[0] for word in words)


def test_vllm_is_told_of_a_rank_above_its_default() -> None:
    assert "--max-lora-rank" not in vllm_flags(GOOD, Path("a"))
    flags = vllm_flags(GOOD | {"r": 33}, Path("a"))
    assert flags[flags.index("--max-lora-rank") + 1] == "64"
    assert list(VLLM_RANKS) == sorted(VLLM_RANKS)


def test_a_check_alone_writes_nothing_and_a_full_folder_stays(
    trained: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(trained), "--check", "vllm"]) == 0
    assert "vLLM serves this adapter" in capsys.readouterr().out
    assert list(place.iterdir()) == []
    Path("full").mkdir()
    Path("full/mine").touch()
    assert main(["export", str(trained), "--out", "full"]) == 2
    assert [path.name for path in Path("full").iterdir()] == ["mine"]
    assert main(["export", str(trained)]) == 2
    assert "--out" in capsys.readouterr().err


def test_a_pickled_adapter_is_refused(trained: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(trained / "adapter", "adapter")
    Path("adapter/adapter_model.safetensors").rename("adapter/adapter_model.bin")
    assert main(["export", "adapter", "--out", "out"]) == 2
    assert "pickled" in capsys.readouterr().err


def test_an_adapter_of_another_kind_is_exported_and_not_for_vllm(
    base: str, place: Path, ids: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    made = get_peft_model(AutoModelForCausalLM.from_pretrained(base), tuned)
    made.save_pretrained("prompts")
    assert main(["export", "prompts", "--check", "vllm"]) == 2
    assert "peft_type is PROMPT_TUNING; it serves LORA only" in capsys.readouterr().err
    assert main(["export", "prompts", "--out", "out"]) == 0
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "out")
    assert torch.equal(logits(loaded, ids), logits(made, ids))
