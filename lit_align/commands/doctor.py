"""Look at a run before it starts: versions, GPU, tokenizer and template, data, and what of each row is trained.

It takes the options of ``fit``, so that the same command line can be looked at first. No weights are loaded unless
--load_weights is given; then policy and reference are also scored on a few rows, where they must agree exactly.
"""

from __future__ import annotations

import platform
import tomllib
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import rich
import torch
from lightning.pytorch.cli import LightningArgumentParser
from packaging.requirements import Requirement
from rich.text import Text

from lit_align.batch import CompletionBatch, completions_of
from lit_align.callbacks.memory import plan
from lit_align.cli import AlignCLI
from lit_align.errors import UserError
from lit_align.parser import own_rules, register
from lit_align.places import remember_folder

PROMPT, TRAINED, END, CUT = "dim", "green", "bold reverse green", "bold red"
"""Styles of what is only read, what is trained, the end of sequence, and where one is missing."""


class DoctorCLI(AlignCLI):
    """The command line of ``fit`` up to its classes; there is no trainer, and nothing is run."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what is asked of the doctor alone."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--rows", type=int, default=3, help="Rows whose token masks are shown, >= 0.")
        parser.add_argument("--load_weights", type=bool, default=False, help="Load the model, and compare with it.")

    def instantiate_classes(self) -> None:
        """Build the objective and the data module."""
        self.config_init = self.parser.instantiate(self.config)
        self.datamodule = self._get(self.config_init, "data")
        self.model = self._get(self.config_init, "model")

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def run(args: Sequence[str]) -> None:
    """Examine, and print what was found.

    Raises:
        UserError: For what ``fit`` would refuse as well.
    """
    remember_folder()
    register()
    with own_rules():
        cli = DoctorCLI(["fit", *args])
    settings = cli.config.fit
    objective, data = cli.model, cli.datamodule
    if settings.rows < 0:
        raise UserError(f"rows is {settings.rows}; it must be 0 or more (3 is usual)")
    _print_lines("environment", environment())
    _print_lines("model", [*about_tokenizer(objective.tokenizer), about_reference(objective)])
    data.load(objective.tokenizer)
    print(f"\n{data.report.render()}")
    batch = objective.check_source(data)
    print(f"\n{type(objective).__name__} can learn from what {type(data).__name__} gives")
    print()
    trainer = settings.trainer
    on_gpu = trainer.accelerator in {"auto", "gpu", "cuda"} and torch.cuda.is_available()
    share = trainer.accumulate_grad_batches * trainer.num_nodes * _ranks(trainer.devices, on_gpu)
    device = torch.device("cuda" if on_gpu else "cpu")
    if plan(objective.pair_settings, data, device, share, objective.moves_reference) is None:
        print("memory: it cannot be told beforehand")
    show_rows(data.prompts(max(1, settings.rows)), objective.tokenizer, settings.rows)
    if settings.load_weights:
        _print_lines("weights", about_weights(objective, completions_of(batch).rows(slice(0, 4))))


def _ranks(devices: Any, on_gpu: bool) -> int:
    """How many ranks ``trainer.devices`` makes on one machine: a number, a list such as [0, 2] or "0,2", or all."""
    named = devices if isinstance(devices, list) else [one for one in str(devices).strip("[]").split(",") if one]
    if len(named) > 1 or isinstance(devices, list):
        return len(named)
    if str(devices) in {"-1", "auto"}:
        return torch.cuda.device_count() if on_gpu else 1
    return int(devices)


def _print_lines(title: str, lines: Sequence[str]) -> None:
    print("\n".join([f"\n{title}", *(f"  {line}" for line in lines)]))


def environment() -> list[str]:
    """Python, every required package with its floor, and the accelerator; what is too old is marked."""
    found = [f"python {platform.python_version()} on {platform.system()} {platform.machine()}"]
    wanted = [one for one in map(Requirement, required()) if not one.marker or one.marker.evaluate({"extra": ""})]
    found += map(about_package, wanted)
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            found.append(f"GPU {index}: {about.name}, {about.total_memory / 2**30:.0f} GiB")
    else:
        found.append(f"no GPU that PyTorch {torch.__version__} sees; {torch.get_num_threads()} threads of the CPU")
    return found


def required() -> list[str]:
    """What pyproject.toml asks for: of the checkout this runs from, else of the installed package."""
    checkout = Path(__file__).parents[2] / "pyproject.toml"
    if checkout.is_file():
        return list(tomllib.loads(checkout.read_text(encoding="utf-8"))["project"]["dependencies"])
    return requires("lit_align") or []


def about_package(requirement: Requirement) -> str:
    """A package's version beside what pyproject.toml asks for."""
    wanted = f" (wanted {requirement.specifier})" if str(requirement.specifier) else ""
    try:
        own = version(requirement.name)
    except PackageNotFoundError:
        return f"{requirement.name} IS MISSING{wanted}"
    sound = requirement.specifier.contains(own, prereleases=True)
    return f"{requirement.name} {own}{wanted}" + ("" if sound else "  <- DOES NOT FIT")


def about_tokenizer(tokenizer: Any) -> list[str]:
    """What the tokenizer adds to texts."""
    specials = ((name, getattr(tokenizer, name)) for name in ("bos_token", "eos_token", "pad_token"))
    listed = ", ".join(f"{name.removesuffix('_token')} {value!r}" for name, value in specials)
    template = "a chat template" if tokenizer.chat_template is not None else "no chat template, so rows must be text"
    return [f"tokenizer of {len(tokenizer)} tokens, {listed}; {template}"]


def about_reference(objective: Any) -> str:
    """What training starts from, which log-ratios and KL are measured against."""
    pair = objective.pair_settings
    start = pair.lora.adapter
    what = f"{pair.model} with the adapter off" if start is None else f"{pair.model} with the adapter {start}, frozen"
    return f"the policy starts at the reference, which is {what}"


def show_rows(batch: CompletionBatch, tokenizer: Any, rows: int) -> None:
    """Print rows with what is read and what is trained told apart, in colours and by labels."""
    console = rich.get_console()
    parts = (("prompt, only read", PROMPT), ("trained", TRAINED), ("end of sequence, trained", END), ("cut", CUT))
    if rows:
        console.print(Text("\ntokens: ") + Text(" | ").join(Text(*part) for part in parts))
    for index in range(min(rows, len(batch.row))):
        for line in row_lines(batch, index, tokenizer):
            console.print(line)


def row_lines(batch: CompletionBatch, index: int, tokenizer: Any) -> Iterator[Text]:
    """The prompt of a group, and each of its completions."""
    prompt = batch.prompt_ids[index][batch.prompt_mask[index]].tolist()
    label = f"\nrow {int(batch.row[index])}, {len(prompt)} tokens of prompt\n"
    yield Text(label, style="bold") + Text(tokenizer.decode(prompt), style=PROMPT)
    for column in range(batch.present.shape[1]):
        if not batch.present[index, column]:
            continue
        ids = batch.completion_ids[index, column][batch.completion_mask[index, column]].tolist()
        reward = "" if batch.reward is None else f", reward {float(batch.reward[index, column]):+.3g}"
        ended = ids[-1] == tokenizer.eos_token_id
        body, end = (ids[:-1], tokenizer.decode(ids[-1:])) if ended else (ids, "|cut")
        text = Text(f"completion {column + 1}, {len(ids)} tokens trained{reward}\n", style="bold")
        yield text + Text(tokenizer.decode(body), style=TRAINED) + Text(end, style=END if ended else CUT)


def about_weights(objective: Any, batch: CompletionBatch) -> list[str]:
    """Load the model and score a few rows with both models.

    Raises:
        UserError: If the model cannot be loaded, or policy and reference differ.
    """
    objective.configure_model()
    pair = objective.pair
    with torch.no_grad():
        scores = pair.score(batch)
    gap = (scores.token_logps - scores.reference_token_logps).abs().max().item()
    if gap:
        raise UserError(f"policy and reference differ by {gap:.3g} nats on a token, where they must agree exactly")
    trained = sum(parameter.numel() for parameter in pair.parameters() if parameter.requires_grad)
    adapters = sum(parameter.numel() for name, parameter in pair.named_parameters() if ".lora_" in name)
    size = sum(parameter.nbytes for parameter in pair.parameters()) / 2**20
    mean = (scores.token_logps.sum() / scores.lengths.sum()).item()
    shared = "one reading of each prompt" if pair.trees else "one reading of the prompt for each completion"
    return [
        f"{type(pair.base).__name__}, {pair.base.num_parameters() - adapters:,} parameters, {pair.base.dtype}, "
        f"quantization {pair.quantization}, {size:.0f} MiB with the adapter, on {pair.base.device}; {shared}",
        f"{trained:,} parameters are trained",
        f"policy and reference agree exactly on {int(scores.lengths.sum())} tokens, {mean:.2f} nats a token",
    ]
