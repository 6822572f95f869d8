"""The command line: what it answers, how configs combine, and what it says when something is wrong."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import Namespace

from lit_align import objectives
from lit_align.__main__ import SUBCOMMANDS, main
from lit_align.cli import AlignCLI, fresh_folder, run
from lit_align.commands import COMMANDS
from lit_align.errors import UserError
from lit_align.mistakes import class_names, for_the_user
from lit_align.module import AlignModule
from lit_align.parser import classes_first, own_rules, register

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
OVERLAYS = sorted((ROOT / "configs" / "hardware").glob("*.yaml"))

BASE = """
model:
  class_path: EpsilonDPO
  init_args:
    beta: 0.02
    epsilon: 0.03
    pair: {model: some/model, lora: {r: 8}}
    optim: {learning_rate: 0.5}
data:
  class_path: PreferenceData
  init_args: {dataset: some/data, max_length: 256}
trainer:
  max_steps: 3
"""


class ParseOnly(AlignCLI):
    """The command line up to the finished configuration."""

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A config file in the working directory, which is empty otherwise."""
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(BASE)
    return "base.yaml"


def parse(*args: str) -> Namespace:
    register()
    with own_rules():
        return ParseOnly(["fit", *args]).config.fit


def overlay(text: str, name: str = "top.yaml") -> str:
    Path(name).write_text(text)
    return name


def refusal(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What ``fit`` says when it refuses; the working directory must stay as it was."""
    before = sorted(Path().rglob("*"))
    assert main(["fit", *args]) == 2
    assert sorted(Path().rglob("*")) == before
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    return captured.err.removeprefix("error: ").strip()


def python(code: str) -> str:
    """Output of a fresh interpreter."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return done.stdout


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"], ["--version"], ["fti"]])
def test_the_top_level_answers_at_once_without_torch(args: list[str]) -> None:
    begin = time.perf_counter()
    out = python(f"import sys; from lit_align.__main__ import main; main({args}); print('torch' in sys.modules)")
    assert out.splitlines()[-1] == "False"
    assert time.perf_counter() - begin < 1.0


def test_the_top_level_help_names_every_subcommand_and_the_configs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in [*SUBCOMMANDS, "configs/hardware/cpu.yaml", "--print_config"])
    assert set(SUBCOMMANDS) == set(AlignCLI.subcommands()) | set(COMMANDS)


def test_an_unknown_subcommand_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validat"]) == 2
    assert "did you mean validate?" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["fit", "--help"], ["fit", "--config", str(CONFIGS[0]), "--print_config"]])
def test_help_and_print_config_import_no_model_library(args: list[str]) -> None:
    heavy = ["transformers", "peft", "bitsandbytes", "datasets"]
    code = f"""
import sys
from lit_align.__main__ import main
try:
    main({args})
except SystemExit as end:
    print("exit", end.code)
print([name for name in {heavy} if name in sys.modules])
"""
    assert python(code).splitlines()[-2:] == ["exit 0", "[]"]


def test_interpolation_follows_the_command_line(base: str) -> None:
    top = overlay("data: {init_args: {batch_size: '${trainer.max_steps}'}}")
    assert parse("--config", base, "--config", top).data.init_args.batch_size == 3
    assert parse("--config", base, "--config", top, "--trainer.max_steps", "7").data.init_args.batch_size == 7


def test_a_later_file_and_then_the_command_line_win(base: str) -> None:
    top = overlay("model: {init_args: {beta: 0.3, pair: {lora: {r: 4}}}}")
    config = parse("--config", base, "--config", top, "--model.pair.lora.r=2")
    arguments = config.model.init_args
    assert config.model.class_path.endswith(".EpsilonDPO")
    assert (arguments.beta, arguments.epsilon) == (0.3, 0.03)
    assert (arguments.pair.lora.r, arguments.pair.model) == (2, "some/model")


def default(objective: str, name: str) -> float:
    return inspect.signature(getattr(objectives, objective)).parameters[name].default


@pytest.mark.parametrize("way", ["command line", "file"])
@pytest.mark.parametrize(("objective", "own"), [("DPO", "beta"), ("IPO", "tau")])
def test_another_objective_keeps_the_shared_arguments_only(base: str, way: str, objective: str, own: str) -> None:
    top = overlay(f"model: {{class_path: {objective}}}")
    config = parse("--config", base, *(["--config", top] if way == "file" else ["--model", objective]))
    arguments = config.model.init_args
    assert config.model.class_path.endswith(f".{objective}")
    assert arguments[own] == default(objective, own) != 0.02
    assert "epsilon" not in arguments
    assert (arguments.pair.model, arguments.pair.lora.r, arguments.optim.learning_rate) == ("some/model", 8, 0.5)


def test_the_same_objective_named_again_keeps_its_arguments(base: str) -> None:
    assert parse("--config", base, "--model", "EpsilonDPO").model.init_args.beta == 0.02


@pytest.mark.parametrize("args", [["--model=DPO", "--model.beta=0.7"], ["--model.beta", "0.7", "--model", "DPO"]])
def test_what_is_given_for_the_new_objective_wins_in_any_order(base: str, args: list[str]) -> None:
    assert parse("--config", base, *args).model.init_args.beta == 0.7


def test_a_file_may_give_the_new_objective_its_arguments(base: str) -> None:
    top = overlay("model: {class_path: DPO, init_args: {beta: 0.7}}")
    assert parse("--config", base, "--config", top).model.init_args.beta == 0.7


def test_flags_before_a_file_stay_before_it() -> None:
    args = ["fit", "--model", "IPO", "--config", "a.yaml", "--model.beta", "1", "--data=D", "--model", "DPO"]
    assert classes_first(args) == [*args[:5], "--data=D", "--model", "DPO", "--model.beta", "1"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model.bta", "0.1"], ["--model.bta", "EpsilonDPO", "did you mean model.beta?"]),
        (["--model", "IPO", "--model.epsilon", "0.1"], ["--model.epsilon", "no option of IPO", "--model.help"]),
        (["--model.pair.modl=x"], ["--model.pair.modl", "did you mean model.pair.model?"]),
        (["--model.pair.lora.rr=3"], ["--model.pair.lora.rr", "did you mean model.pair.lora.r?"]),
        (["--data.max_lenght", "3"], ["--data.max_lenght", "did you mean data.max_length?"]),
        (["--trainer.max_step", "1"], ["--trainer.max_step", "did you mean trainer.max_steps?"]),
        (["--samples.prompt", "1"], ["--samples.prompt", "did you mean samples.prompts?"]),
        (["--modl", "DPO"], ["--modl", "did you mean model?"]),
        (["--model", "IPOO"], ["--model", "'IPOO'", "did you mean IPO?"]),
        (["--model", "ipo"], ["did you mean IPO?"]),
        (["--model", "nowhere.Nothing"], ["'nowhere.Nothing'", "DPO", "EpsilonDPO", "IPO"]),
        (["--data", "PreferenceDat"], ["--data", "did you mean PreferenceData?"]),
        (["--model.beta", "much"], ["--model.beta", "'much'", "float"]),
        (["--model.pair.dtype", "float16"], ["--model.pair.dtype", "'float16'", "'float32'", "'bfloat16'"]),
        (["--trainer.max_steps", "many"], ["--trainer.max_steps", "'many'", "int"]),
        (["--trainer.callbacks", "LearningRateMonitr"], ["trainer.callbacks", "did you mean LearningRateMonitor?"]),
        (["--config", "bas.yaml"], ["bas.yaml", "did you mean base.yaml?"]),
        (["--ckpt_path", "none.ckpt"], ["none.ckpt", "no such file"]),
        (["--model.beta", "-1"], ["model.beta", "-1", "greater than 0"]),
        (["--model.epsilon", "1"], ["model.epsilon", "[0, 1)"]),
        (["--model.pair.lora.r", "0"], ["model.pair.lora.r", "1 or more"]),
        (["--trainer.devices", "two"], ["trainer", "devices"]),
    ],
)
def test_a_mistake_on_the_command_line_gets_one_short_message(
    base: str, capsys: pytest.CaptureFixture[str], args: list[str], words: list[str]
) -> None:
    message = refusal(capsys, "--config", base, *args)
    assert all(word in message for word in words), message
    assert len(message.splitlines()) <= 2
    assert "usage" not in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trainr:\n  max_steps: 1", ["top.yaml:2: trainr.max_steps", "did you mean trainer.max_steps?"]),
        ("trainer:\n  max_step: 1", ["top.yaml:2: trainer.max_step", "did you mean trainer.max_steps?"]),
        ("model:\n  init_args:\n    bta: 1", ["top.yaml:3: model.bta", "did you mean model.beta?"]),
        ("model:\n  init_args:\n    pair:\n      modl: x", ["top.yaml:4: model.pair.modl", "model.pair.model?"]),
        ("model:\n  clas_path: DPO", ["top.yaml:2: model.clas_path", "did you mean model.class_path?"]),
        ("model:\n  class_path: DP0", ["top.yaml:1: model", "'DP0'", "did you mean DPO?"]),
        ("data:\n  init_args:\n    max_length: long", ["top.yaml:3: data.max_length", "'long'", "int"]),
        ("seed_everything: 1\nmodel: {init_args: {", ["top.yaml:2", "not YAML"]),
    ],
)
def test_a_mistake_in_a_file_is_found_there(
    base: str, capsys: pytest.CaptureFixture[str], text: str, words: list[str]
) -> None:
    top = overlay(text)
    message = refusal(capsys, "--config", base, "--config", top)
    assert all(word in message for word in words), message
    assert len(message.splitlines()) <= 2


def test_a_missing_class_is_asked_for(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "--model", "DPO")
    assert "--data" in message
    assert "PreferenceData" in message
    assert "--model" in refusal(capsys, "--model.beta", "0.1")


def test_a_gpu_that_is_not_there_is_refused_with_the_remedy(
    base: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    message = refusal(capsys, "--config", base, "--trainer.accelerator", "gpu")
    assert "no GPU" in message
    assert "--trainer.accelerator cpu" in message


def test_an_apple_gpu_is_refused_where_it_is_asked_for_and_else_left_alone(
    base: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for name in ("gpu", "mps"):
        message = refusal(capsys, "--config", base, "--trainer.accelerator", name)
        assert "float64" in message
        assert "--trainer.accelerator cpu" in message
    assert parse("--config", base).trainer.accelerator == "cpu"
    assert "the CPU is used" in caplog.text
    assert parse("--config", base, "--trainer.accelerator", "cpu").trainer.accelerator == "cpu"


def test_the_traceback_is_there_for_who_asks(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_ALIGN_TRACEBACK", "1")
    with pytest.raises(ValueError, match="greater than 0"):
        main(["fit", "--config", base, "--model.beta", "-1"])


def test_a_checkpoint_does_not_replace_the_users_configuration(base: str) -> None:
    other = {"_class_path": "lit_align.objectives.DPO", "beta": 0.9}
    torch.save({"hyper_parameters": other, "state_dict": {}}, "other.ckpt")
    config = parse("--config", base, "--ckpt_path", "other.ckpt")
    assert config.model.class_path.endswith(".EpsilonDPO")
    assert config.model.init_args.beta == 0.02


def test_one_epoch_is_the_default_only_where_nothing_else_ends_the_run(base: str) -> None:
    assert parse("--config", base).trainer.max_epochs is None
    assert parse("--config", base, "--trainer.max_steps=-1").trainer.max_epochs == 1
    assert parse("--config", base, "--trainer.max_steps=-1", "--trainer.max_epochs=4").trainer.max_epochs == 4


def test_a_folder_that_holds_a_run_is_not_used_again(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("old").mkdir()
    Path("old/config.yaml").touch()
    assert "run_dir=old" in refusal(capsys, "--config", base, "--run_dir", "old")


def test_runs_of_one_second_get_folders_of_their_own(tmp_path: Path) -> None:
    folders = set()
    for _ in range(3):
        folders.add(fresh_folder(tmp_path))
        max(folders).mkdir()
    assert len(folders) == 3


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("top", OVERLAYS, ids=lambda path: path.stem)
def test_every_hardware_overlay_goes_on_every_config(config: Path, top: Path) -> None:
    parsed = parse("--config", str(config), "--config", str(top), "--trainer.accelerator", "cpu")
    below, above = (yaml.safe_load(path.read_text()) for path in (config, top))
    assert parsed.model.class_path.endswith(f".{below['model']['class_path']}")
    for name, value in above["model"]["init_args"]["pair"].items():
        assert parsed.model.init_args.pair[name] == value
    for name, value in (above.get("data") or {"init_args": {}})["init_args"].items():
        assert parsed.data.init_args[name] == value


def test_every_file_of_an_objective_is_known_by_its_class_name() -> None:
    register()
    files = {path.stem for path in (ROOT / "lit_align" / "objectives").glob("[!_]*.py")}
    known = [cls for cls in AlignModule.__subclasses__() if cls.__module__.startswith("lit_align.objectives.")]
    assert {cls.__module__.rsplit(".", 1)[-1] for cls in known} == files
    assert {cls.__name__ for cls in known} <= set(class_names("model"))


def test_only_errors_of_the_user_lose_their_traceback() -> None:
    def caught(call: object, *args: object) -> BaseException:
        try:
            call(*args)  # type: ignore[operator]
        except Exception as error:
            return error
        raise AssertionError("nothing was raised")

    assert for_the_user(UserError("so")) == "so"
    assert for_the_user(caught(int, "x")) is None  # a library's ValueError may be a defect of ours
    assert "batch_size" in str(for_the_user(torch.OutOfMemoryError("CUDA out of memory")))
    wrapped = ValueError("around")
    wrapped.__cause__ = UserError("inside")
    assert for_the_user(wrapped) == "inside"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_config_of_an_objective_is_short(config: Path) -> None:
    assert len(config.read_text(encoding="utf-8").splitlines()) <= 25


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("Vader", "'Vader' names no reward; give the dotted name"),
        ("json.nothing", "'json.nothing' names no reward (module 'json' has no attribute 'nothing')"),
        ("no_such_module.score", "names no reward (No module named 'no_such_module')"),
    ],
)
def test_a_reward_that_cannot_be_found_is_named_with_what_may_be_given(given: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        run(["fit", "--config", str(ROOT / "configs" / "on_policy_dpo.yaml"), "--data.reward", given])
    assert says in str(caught.value)
    assert "lit_align.rewards.TrainedReward" in str(caught.value)
