"""The real command line, from a config file to an adapter that loads, and what it says to bad input."""

from __future__ import annotations

import csv
import json
import math
import signal
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_align import objectives
from lit_align.__main__ import INTERRUPTED, main
from lit_align.cli import AlignCLI
from lit_align.module import AlignModule
from lit_align.parser import own_rules, register

ROOT = Path(__file__).parent.parent
CONFIGS = {path.stem: path for path in sorted((ROOT / "configs").glob("*.yaml"))}
ARTIFACTS = {
    "README.md",
    "adapter",
    "checkpoints",
    "config.yaml",
    "curves.png",
    "data_report.json",
    "metrics.csv",
    "samples.json",
    "samples.jsonl",
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random Llama that reads and writes characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    vocabulary = {token: i for i, token in enumerate(["</s>", "<unk>", *sorted(string.printable)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), eos_token_id=0, **sizes)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with twenty pairs; Ctrl-C works again afterwards, which Lightning switches off."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Story {i}:", "chosen": " good" * (i % 3 + 1), "rejected": " bad"} for i in range(20)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    handler = signal.getsignal(signal.SIGINT)
    yield tmp_path
    signal.signal(signal.SIGINT, handler)


def arguments(tiny: str, config: str = "dpo", steps: int = 2, **options: object) -> list[str]:
    chosen: dict[str, object] = {"model.pair.model": tiny, "data.dataset": "pairs.jsonl", "data.batch_size": 4}
    chosen |= {"data.validation_size": 4, "trainer.max_steps": steps, "trainer.log_every_n_steps": 1}
    chosen |= {"trainer.accelerator": "cpu", "samples.prompts": 2, "samples.max_new_tokens": 8, "run_dir": "run"}
    chosen |= {key.replace("__", "."): value for key, value in options.items()}
    return ["fit", "--config", str(CONFIGS[config]), *(f"--{key}={value}" for key, value in chosen.items())]


def tensors(folder: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(f"{folder}/adapter/adapter_model.safetensors")


def letters(prompts: list[str], completions: list[str]) -> list[float]:
    """A reward that tells random texts apart."""
    return [float(sum(map(ord, text)) % 101) for text in completions]


def fresh_arguments(tiny: str, config: str) -> list[str]:
    """Four steps on completions the policy draws: two buffers of two minibatches."""
    sizes = {"completions": 3, "buffer": 12, "minibatch": 6, "passes": 1, "max_new_tokens": 8}
    options = {f"data__{name}": size for name, size in sizes.items()}
    given = arguments(tiny, config, 4, data__reward="tests.test_fit.letters", **options)
    given += ["--model.quantile=0.2"] if config == "rest" else []  # or a minibatch may have none to learn from
    return [flag for flag in given if not flag.startswith("--data.batch_size")]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_runs_and_leaves_a_whole_run_folder(tiny: str, place: Path, config: str) -> None:
    rows = [
        {
            "prompt": f"Story {i}:",
            "completions": [" good", " so so", " bad", " worse"],
            "rewards": [1.0, 0.2, -0.3, -1.0],
        }
        for i in range(20)
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    described = yaml.safe_load(CONFIGS[config].read_text())
    fresh = described["data"]["class_path"] == "OnPolicyData"
    assert (
        main(fresh_arguments(tiny, config) if fresh else arguments(tiny, config, 4, trainer__val_check_interval=2)) == 0
    )
    files = {path.name for path in Path("run").iterdir() if not path.name.startswith("events.out")}
    objective = getattr(objectives, described["model"]["class_path"])
    assert files == ARTIFACTS - (set() if objective.generates else {"samples.json", "samples.jsonl"})
    assert len(list(Path("run").glob("events.out*"))) == 1
    assert sorted(path.name for path in place.iterdir()) == ["pairs.jsonl", "run"]
    logged = list(csv.DictReader(Path("run/metrics.csv").read_text().splitlines()))
    losses = {int(row["step"]): float(row["train/loss"]) for row in logged if row["train/loss"]}
    assert list(losses) == [0, 1, 2, 3]
    assert all(math.isfinite(loss) for loss in losses.values())
    assert "rollout/reward" in logged[0] if fresh else "val/loss" in logged[0]
    assert any(value.abs().max() > 0 for name, value in tensors("run").items() if "lora_B" in name)


@pytest.mark.parametrize("config", ["ppo", "ppo_bandit"])
def test_ratios_begin_at_one_in_mixed_precision(tiny: str, place: Path, config: str) -> None:
    """The buffer is scored in the precision of the steps that learn from it: one step for each buffer here."""
    args = [*fresh_arguments(tiny, config), "--data.minibatch=12", "--trainer.precision=bf16-mixed"]
    assert main(args) == 0
    with Path("run/metrics.csv").open() as file:
        ratios = [float(row["train/ratio"]) for row in csv.DictReader(file) if row["train/ratio"]]
    assert ratios == [1.0] * 4


@pytest.mark.parametrize("overlay", sorted((ROOT / "configs" / "hardware").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_config_trains_under_each_hardware_overlay(tiny: str, place: Path, overlay: Path) -> None:
    """On this machine's processor; what the overlay says of memory and precision of the base stays."""
    args = arguments(tiny, "eps_dpo", trainer__accumulate_grad_batches=2)
    assert main([*args[:3], "--config", str(overlay), *args[3:]]) == 0
    assert Path("run/adapter/adapter_model.safetensors").is_file()


def test_what_a_user_watches_is_logged(tiny: str, place: Path) -> None:
    assert main(arguments(tiny, "eps_dpo", steps=4)) == 0
    names = ["loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "logratio_margin", "kl", "beta"]
    header = Path("run/metrics.csv").read_text().splitlines()[0].split(",")
    assert {f"{part}/{name}" for part in ("train", "val") for name in names} <= set(header)
    assert "train/tokens_per_second" in header


def test_the_config_that_ships_runs_on_what_ships(place: Path) -> None:
    options = ["--trainer.max_steps=2", "--data.max_rows=32", "--samples.prompts=2", "--trainer.accelerator=cpu"]
    assert main(["fit", "--config", str(CONFIGS["eps_dpo"]), *options]) == 0
    (folder,) = Path("runs/eps_dpo").iterdir()
    draws = json.loads((folder / "samples.json").read_text())["draws"]
    assert all(-1 <= draw["reward"]["mean"] <= 1 for draw in draws)  # the oracle of this dataset
    assert str(ROOT) not in (folder / "README.md").read_text()


def test_the_adapter_loads_in_peft_with_the_logits_of_training(tiny: str, place: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    register()
    with own_rules():
        cli = AlignCLI(arguments(tiny, steps=4))
    base = AutoModelForCausalLM.from_pretrained(tiny)
    ids = AutoTokenizer.from_pretrained("run/adapter")("Story 3:", return_tensors="pt").input_ids
    with torch.no_grad():
        plain = base(ids).logits
        trained = cli.model.pair.policy.eval()(ids).logits
        loaded = PeftModel.from_pretrained(base, "run/adapter").eval()(ids).logits
    torch.testing.assert_close(loaded, trained, rtol=0, atol=0)
    assert not torch.equal(loaded, plain)


def test_the_written_config_repeats_the_run(tiny: str, place: Path) -> None:
    assert main(arguments(tiny, "eps_dpo", steps=3)) == 0
    assert main(["fit", "--config", "run/config.yaml"]) == 0
    (again,) = Path("runs/eps_dpo").iterdir()
    first, second = tensors("run"), tensors(str(again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_objective_on_the_command_line_is_what_runs(tiny: str, place: Path) -> None:
    args = [arg for arg in arguments(tiny, "eps_dpo") if not arg.startswith("--run_dir")]
    assert main([*args, "--model", "IPO"]) == 0
    (folder,) = Path("runs/ipo").iterdir()
    model = yaml.safe_load((folder / "config.yaml").read_text())["model"]
    assert model["class_path"].endswith(".IPO")
    assert model["init_args"]["pair"]["model"] == tiny
    assert not {"beta", "epsilon"} & model["init_args"].keys()


def test_the_rows_are_written_beside_a_logger_of_the_users(tiny: str, place: Path) -> None:
    own = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": "own", "name": "", "version": ""},
    }
    assert main(arguments(tiny, trainer__logger=json.dumps(own), samples__prompts=0)) == 0
    losses = []
    for file in ("run/metrics.csv", "own/metrics.csv"):
        with Path(file).open() as rows:
            losses.append([float(row["train/loss"]) for row in csv.DictReader(rows) if row.get("train/loss")])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2
    assert not list(Path("run").glob("events*"))


def test_without_loggers_the_working_directory_stays_clean(tiny: str, place: Path) -> None:
    assert main(arguments(tiny, trainer__logger="false", samples__prompts=0)) == 0
    assert sorted(path.name for path in place.iterdir()) == ["pairs.jsonl", "run"]
    names = {path.name for path in Path("run").iterdir()}
    assert {"config.yaml", "adapter", "README.md"} <= names
    assert not {"metrics.csv", "samples.jsonl"} & names


def test_a_trial_run_writes_nothing(tiny: str, place: Path) -> None:
    assert main(arguments(tiny, trainer__fast_dev_run="true")) == 0
    assert [path.name for path in place.iterdir()] == ["pairs.jsonl"]


def test_a_run_is_validated_by_its_own_config_and_checkpoint(
    tiny: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tiny, steps=4)) == 0
    before = sorted(place.rglob("*"))
    assert main(["validate", "--config", "run/config.yaml", "--ckpt_path", "run/checkpoints/last.ckpt"]) == 0
    out = capsys.readouterr().out
    assert "val/loss" in out
    assert "chosen/rejected" in out  # the report of the data
    assert "Validate metric" not in out  # Lightning's own table
    assert sorted(place.rglob("*")) == before


def test_the_step_size_chosen_by_the_models_size_is_on_record(tiny: str, place: Path) -> None:
    assert main(arguments(tiny, steps=2)) == 0
    assert "train/learning_rate" in Path("run/metrics.csv").read_text().splitlines()[0]
    assert "| model.optim.learning_rate | 0.0005 |" in Path("run/README.md").read_text()


def test_a_broken_file_on_top_of_another_is_the_one_named(
    tiny: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("base.yaml").write_text(CONFIGS["dpo"].read_text(encoding="utf-8"), encoding="utf-8")
    Path("sub").mkdir()
    Path("sub/top.yaml").write_text("model: {init_args: {beta: 0.1}\n")
    assert main(["fit", "--config", "base.yaml", "--config", "sub/top.yaml"]) == 2
    assert "sub/top.yaml:2: not YAML" in capsys.readouterr().err


def test_an_interrupted_run_saves_and_says_so_in_its_exit_code(
    tiny: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = AlignModule.training_step

    def stop(self: AlignModule, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx == 2:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(AlignModule, "training_step", stop)
    assert main(arguments(tiny, steps=4)) == INTERRUPTED
    assert "interrupted" in Path("run/README.md").read_text()
    assert tensors("run")


BAD_ROWS = {
    "wrong.jsonl": '{"question": "a", "good": "b", "bad": "c"}\n',
    "broken.jsonl": '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen":\n',
    "same.jsonl": '{"prompt": "a", "chosen": "b", "rejected": "b"}\n' * 5,
    "empty.jsonl": "",
}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data__dataset": "none.jsonl"}, ["none.jsonl"]),
        ({"data__dataset": "wrong.jsonl"}, ["wrong.jsonl", "question", "good", "bad"]),
        ({"data__dataset": "broken.jsonl"}, ["broken.jsonl:2"]),
        ({"data__dataset": "same.jsonl"}, ["same.jsonl"]),
        ({"data__dataset": "empty.jsonl"}, ["empty.jsonl"]),
        ({"data__columns": "{prompt: question}"}, ["question", "prompt", "chosen", "rejected"]),
        ({"data__batch_size": 0}, ["batch_size", "0"]),
        ({"model__beta": 0}, ["model.beta", "greater than 0"]),
        ({"model__pair__model": "./none"}, ["model.pair.model", "none"]),
        ({"model__pair__model": "owner/none"}, ["model.pair.model", "owner/none"]),
        ({"model__pair__lora__target_modules": "[nothing]"}, ["target_modules", "q_proj"]),
        ({"model__pair__lora__adapter": "."}, ["model.pair.lora.adapter", "adapter_model.safetensors"]),
    ],
)
def test_bad_input_gets_one_message_and_no_run_folder(
    tiny: str, place: Path, capsys: pytest.CaptureFixture[str], options: dict[str, object], words: list[str]
) -> None:
    for name, text in BAD_ROWS.items():
        Path(name).write_text(text)
    before = sorted(place.rglob("*"))
    assert main(arguments(tiny, **options)) == 2
    (message,) = capsys.readouterr().err.split("error: ")[1:]
    assert all(word in message for word in words), message
    assert "Traceback" not in message
    assert sorted(place.rglob("*")) == before


def test_quantization_without_bitsandbytes_names_the_package(
    tiny: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_align.settings.find_spec", lambda name: None)
    assert main(arguments(tiny, model__pair__quantization="nf4")) == 2
    assert "pip install bitsandbytes" in capsys.readouterr().err


def test_a_base_in_four_bits_trains_on_the_cpu(tiny: str, place: Path) -> None:
    assert main(arguments(tiny, model__pair__quantization="nf4")) == 0
    assert tensors("run")
