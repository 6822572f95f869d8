"""Find what a run left behind, and load its policy beside its reference."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from lit_align.adapters import REFERENCE, as_held
from lit_align.assets import resolve
from lit_align.commands.arguments import Loading
from lit_align.errors import UserError
from lit_align.models import load_tokenizer
from lit_align.pair import PolicyReferencePair
from lit_align.settings import LoraSettings, PairSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WEIGHTS = "adapter_model.safetensors"
MOST_CONTEXT = 32768
PACKAGED = ("lit_align", "assets")
"""Last folders of the path under which an adapter knows a base that comes along."""


@dataclass(frozen=True)
class Run:
    """A trained adapter and what is known of its training.

    Attributes:
        folder: The run folder, or that of the adapter where there is no run around it.
        adapter: The adapter's folder.
        settings: The base, with ``lora.adapter`` the adapter.
        start: The adapter that training started from, which is then the reference; None is the bare base.
        config: The run's configuration, with the keys ``model``, ``data`` and ``trainer``; empty without a run.
    """

    folder: Path
    adapter: Path
    settings: PairSettings
    start: str | None
    config: dict[str, Any]

    @property
    def objective(self) -> str:
        """Class name of the objective, or "" without a run."""
        return str((self.config.get("model") or {}).get("class_path", "")).rsplit(".", 1)[-1]


@dataclass(frozen=True)
class Opened:
    """What is known of a policy before its weights are loaded, so that mistakes show at once.

    Attributes:
        run: The run.
        settings: How the base is held.
        tokenizer: The base's.
        device: Where it will be.
        context: Tokens the model reads at once, as far as its config and tokenizer say; at most 32,768.
    """

    run: Run
    settings: PairSettings
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    context: int


@dataclass(frozen=True)
class Loaded:
    """What ``lit_align.callbacks.draws.draw`` draws from."""

    pair: PolicyReferencePair
    tokenizer: PreTrainedTokenizerBase
    device: torch.device


def find_run(path: str) -> Run:
    """What lies in a run folder or in the folder of an adapter.

    Args:
        path: A folder that ``fit`` wrote, its ``adapter``, or any adapter in peft's format.

    Raises:
        UserError: If there is no adapter in safetensors format there, with the likeliest place.
    """
    place = Path(path).expanduser()
    inner = place / "adapter"
    adapter = inner if (inner / "adapter_config.json").is_file() else place
    if not (adapter / "adapter_config.json").is_file() or not (adapter / WEIGHTS).is_file():
        raise UserError(_nothing_there(path, place, adapter))
    runs = ((folder, config) for folder in (adapter.parent, adapter) if (config := _config_of_run(folder)))
    folder, config = next(runs, (adapter, {}))
    if not config:
        return Run(adapter, adapter, as_held(_settings_of_adapter(adapter), adapter), None, {})
    pair = (config["model"].get("init_args") or {}).get("pair") or {}
    known = {field.name for field in fields(PairSettings)} - {"lora"}
    lora = LoraSettings(adapter=str(adapter))
    settings = PairSettings(**{name: value for name, value in pair.items() if name in known}, lora=lora)
    return Run(folder, adapter, as_held(settings, adapter), (pair.get("lora") or {}).get("adapter"), config)


def opened(run: Run, loading: Loading) -> Opened:
    """A run whose policy can be loaded.

    Raises:
        UserError: If the run trained a judge instead of a writer, or there is no such base, reference or device.
    """
    from transformers import AutoConfig

    if (run.adapter / "reward.json").is_file():
        raise UserError(f"{run.adapter} is a trained reward, which writes no text: give it as --reward {run.adapter}")
    if run.start is not None and not (Path(run.start) / WEIGHTS).is_file() and not _may_be_on_the_hub(run.start):
        raise UserError(_no_start(run.start))
    settings = with_base(run.settings, loading)
    device = device_of(loading.device)
    tokenizer = load_tokenizer(settings)
    config = AutoConfig.from_pretrained(settings.source, **settings.hub_options())
    own = getattr(config.get_text_config(), "max_position_embeddings", None) or MOST_CONTEXT
    return Opened(run, settings, tokenizer, device, int(min(own, tokenizer.model_max_length, MOST_CONTEXT)))


def load(found: Opened) -> Loaded:
    """The policy and its reference as they were at the start of training: the base, or the adapter started from.

    Raises:
        UserError: If base or adapters cannot be loaded.
    """
    pair = PolicyReferencePair(found.settings, found.device, found.tokenizer.eos_token_id)
    pair.requires_grad_(False).eval()
    pair.policy.delete_adapter(REFERENCE)  # it was a copy of the policy
    if found.run.start is not None:
        try:
            pair.policy.load_adapter(found.run.start, adapter_name=REFERENCE, is_trainable=False)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{_no_start(found.run.start)} ({error})") from error
    return Loaded(pair, found.tokenizer, found.device)


def _may_be_on_the_hub(adapter: str) -> bool:
    return adapter.count("/") == 1 and not Path(adapter).exists()


def _no_start(adapter: str) -> str:
    return (
        f"the reference of this run is the adapter {adapter}, as its config.yaml says, and it is not there; "
        "run the command where training ran, or set model.pair.lora.adapter in the config.yaml"
    )


def with_base(settings: PairSettings, loading: Loading) -> PairSettings:
    """The settings with what the command line says of the base."""
    given = {name: getattr(loading, name) for name in ("model", "dtype", "quantization")}
    return replace(settings, **{name: value for name, value in given.items() if value is not None})


def device_of(name: str) -> torch.device:
    """The device of that name.

    Raises:
        UserError: If it is no device, or not there.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise UserError(f"device is {name!r}; it must be auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device is {name!r}, but PyTorch {torch.__version__} sees no GPU; use --device cpu")
    return device


def _config_of_run(folder: Path) -> dict[str, Any]:
    """The configuration that ``fit`` wrote in a folder; empty if there is none, or it is something else's."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    model = config.get("model") if isinstance(config, dict) else None
    return config if isinstance(model, dict) and "class_path" in model else {}


def _settings_of_adapter(adapter: Path) -> PairSettings:
    """The base that an adapter's own config names."""
    about = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    model = str(about.get("base_model_name_or_path") or "")
    path = Path(model)
    if path.parts[-3:-1] == PACKAGED and resolve(path.name) != path.name:
        model = path.name
    return PairSettings(model, lora=LoraSettings(adapter=str(adapter)), revision=about.get("revision"))


def _nothing_there(path: str, place: Path, adapter: Path) -> str:
    if not place.is_dir():
        return f"{path}: there is no such folder; give a run folder, such as runs/eps_dpo/TIME, or that of an adapter"
    if (adapter / "adapter_config.json").is_file():
        return (
            f"{path}: the adapter has no {WEIGHTS} (pickled weights are refused: save it again with "
            "safe_serialization=True)"
        )
    runs = sorted(found.parent for found in place.glob("*/config.yaml"))
    if runs:
        return f"{path} holds no run itself; did you mean {runs[-1]}?"
    if (place / "config.yaml").is_file():
        return (
            f"{path}: the run has no adapter, so it did not come to its end; "
            f"go on with it by python -m lit_align fit --resume {shlex.quote(str(place))}"
        )
    return f"{path} holds neither a run nor an adapter (adapter_config.json and {WEIGHTS})"
