"""Going on with a run in its own folder: which run, from which checkpoint, and what may have changed since."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lit_align.callbacks.run_folder import CONFIG
from lit_align.checkpoint import Found, newest_good
from lit_align.errors import UserError

NEWEST = "newest"
"""What ``--resume`` without a folder stands for."""
RUNS = Path("runs")

MEANING = frozenset(
    {
        "accumulate_grad_batches",
        "gradient_clip_algorithm",
        "gradient_clip_val",
        "limit_train_batches",
        "overfit_batches",
        "precision",
        "reload_dataloaders_every_n_epochs",
    }
)
"""Keys of the trainer that say what an optimizer step is; the others say when to stop or look, and where to compute."""
FREE = frozenset(
    {
        "data.num_workers",
        "data.validation_batch_size",
        "data.max_dropped",
        "model.pair.gradient_checkpointing",
    }
)
"""Keys of model and data that change no step."""
LIMITS = ("max_steps", "max_epochs", "max_time", "min_steps", "min_epochs", "callbacks")
"""Keys of the trainer that can have ended a run."""


class NothingLeft(Exception):
    """The run that was to go on has come to its end; the message says so."""


@dataclass(frozen=True)
class Resumption:
    """What a run goes on from.

    Attributes:
        folder: The run folder.
        found: Its newest good checkpoint; None if it was stopped before the first, and begins anew.
        changes: Key -> the run's value and the one given now, for what may change and has.
        done: Why there is nothing to do, or an empty string.
    """

    folder: Path
    found: Found | None
    changes: dict[str, tuple[Any, Any]]
    done: str

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return 0 if self.found is None else self.found.step


def spelled_out(args: Sequence[str]) -> list[str]:
    """Arguments with a value for a bare ``--resume``, and with the run's own configuration where none is given.

    Args:
        args: The command line, the subcommand first.

    Raises:
        UserError: If it names no run and no configuration, and there is no run.
    """
    given = list(args)
    for i, arg in enumerate(given):
        if arg == "--resume" and (i + 1 == len(given) or given[i + 1].startswith("-")):
            given[i] = f"--resume={NEWEST}"
        elif arg == "--resume":
            given[i : i + 2] = [f"--resume={given[i + 1]}"]
    asked = [arg.split("=", 1)[1] for arg in given if arg.startswith("--resume=")]
    if not asked or any(arg in {"--config", "-c"} or arg.startswith("--config=") for arg in given):
        return given
    folder = newest_run(RUNS) if asked[-1] == NEWEST else Path(asked[-1])
    if folder is None:
        raise UserError(f"--resume: there is no run in {RUNS}/; name its folder, or give a --config to begin one")
    named = [arg for arg in given if not arg.startswith("--resume=")]
    return [named[0], "--config", str(config_of(folder)), f"--resume={folder}", *named[1:]]


def newest_run(place: Path) -> Path | None:
    """The run folder in or below ``place`` that was begun or gone on with last, or None."""
    return max(
        (path.parent for path in place.rglob(CONFIG)), key=lambda run: (run / CONFIG).stat().st_mtime_ns, default=None
    )


def config_of(folder: Path) -> Path:
    """The configuration of a run.

    Raises:
        UserError: If the folder holds none.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"--resume {folder}: no run, since there is no {CONFIG} in it")
    return folder / CONFIG


def resumption(asked: str, run_dir: str | None, place: Path, given: str) -> Resumption | None:
    """Find the run to go on with, and hold what is asked for now against what it was begun with.

    Args:
        asked: The value of ``--resume``: a run folder, or ``NEWEST``.
        run_dir: The user's own folder for the run, or None.
        place: Where runs of this objective are, unless a folder is named.
        given: The configuration now in effect, as YAML.

    Returns:
        None where no folder is named and there is no run yet: one begins.

    Raises:
        UserError: If the folder holds no run, or a setting differs that cannot change within a run.
    """
    folder = asked_for(asked, run_dir, place)
    if folder is None:
        return None
    was = yaml.safe_load(config_of(folder).read_text(encoding="utf-8"))
    now = yaml.safe_load(given)
    changes = dict(differences(was, now))
    refuse_changes({key: values for key, values in changes.items() if not may_change(key)}, folder)
    found = newest_good(folder / "checkpoints")
    done = "" if found is None else nothing_left(found, now["trainer"], changes)
    return Resumption(folder, found, changes, done)


def asked_for(asked: str, run_dir: str | None, place: Path) -> Path | None:
    """The run folder that ``--resume`` means, for the arguments of ``resumption``; None if it names none."""
    if asked != NEWEST:
        return Path(asked)
    newest = newest_run(place) if run_dir is None else Path(run_dir)
    return newest if newest is not None and (newest / CONFIG).is_file() else None


def newest_state(asked: str, run_dir: str | None, place: Path) -> Path:
    """The newest good checkpoint of the run that ``--resume`` means, for the arguments of ``resumption``.

    Raises:
        UserError: If there is no run or no checkpoint.
    """
    folder = asked_for(asked, run_dir, place)
    if folder is None:
        raise UserError(f"--resume: there is no run in {run_dir or place} yet; name its folder")
    found = newest_good(folder / "checkpoints")
    if found is None:
        raise UserError(f"--resume {folder}: there is no checkpoint in it yet, so nothing of it can be validated")
    return found.path


def differences(was: Any, now: Any, key: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Dotted keys whose values differ, as the command line spells them; keys that only one side knows do not count."""
    if isinstance(was, dict) and isinstance(now, dict) and not _other_class(was, now):
        for name in was.keys() & now.keys():
            inner = key if name == "init_args" else f"{key}.{name}".lstrip(".")
            yield from differences(was[name], now[name], inner)
    elif was != now:
        yield key, (was, now)


def _other_class(was: dict[str, Any], now: dict[str, Any]) -> bool:
    return was.get("class_path") != now.get("class_path")


def may_change(key: str) -> bool:
    """Whether a run can go on with another value of a setting and still be one run."""
    part, _, name = key.partition(".")
    if part == "trainer":
        return name.split(".")[0] not in MEANING
    return part not in {"model", "data", "seed_everything"} or key in FREE


def refuse_changes(changes: dict[str, tuple[Any, Any]], folder: Path) -> None:
    """Name the settings that cannot change within a run.

    Raises:
        UserError: If there are any, with both values of each.
    """
    if changes:
        lines = [f"  {key}: {was!r} in the run, {now!r} now" for key, (was, now) in sorted(changes.items())]
        raise UserError(
            f"--resume {folder}: a run cannot change what its steps mean:\n"
            + "\n".join(_short(line) for line in lines)
            + f"\nLeave out --config to keep all that it was begun with (fit --resume {folder}), or leave out --resume "
            "to begin another run"
        )


def _short(line: str, most: int = 300) -> str:
    return line if len(line) <= most else line[:most] + " …"


def nothing_left(found: Found, trainer: dict[str, Any], changes: dict[str, tuple[Any, Any]]) -> str:
    """Why no step is left to be taken after a checkpoint; empty if there are some."""
    steps, epochs = trainer.get("max_steps") or -1, trainer.get("max_epochs") or -1
    extend = "; to go on, raise --trainer.max_steps or --trainer.max_epochs"
    if 0 < steps <= found.step:
        return f"it has taken {found.step} steps, and trainer.max_steps is {steps}{extend}"
    if 0 < epochs <= found.epochs:
        return f"it has done {found.epochs} epochs, and trainer.max_epochs is {epochs}{extend}"
    lifted = any(key.split(".")[:2] == ["trainer", name] for key in changes for name in LIMITS)
    if found.ended and not lifted:
        return f"it ended after step {found.step}{extend}, or lift what stopped it"
    return ""
