"""Log-probs of completions under a frozen reference, kept on disk for every run with the same reference.

A folder belongs to one reference: its name is a hash of all that its log-probs depend on, the content of the weights
included. In it a completion is found by the token ids of its prompt and its own. So nothing has to be told to forget,
and runs that differ in objective, step size or the policy's adapter share what they have in common.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_align.adapters import POLICY, REFERENCE
from lit_align.batch import CompletionBatch
from lit_align.caches import root
from lit_align.logp_files import LogProbFiles
from lit_align.settings import PairSettings, check_cacheable

log = logging.getLogger(__name__)


class ReferenceCache:
    """Log-probs of completions under the reference of a pair.

    The reference is read and its folder opened at the first question.

    Args:
        settings: Of the pair, with ``reference_cache`` set.
        policy: The pair's model, of peft; its reference does not change from here on.

    Raises:
        UserError: If the model computes in a type in which log-probs depend on what else is in the batch.
    """

    def __init__(self, settings: PairSettings, policy: Any) -> None:
        base = policy.get_base_model()
        eight_bit = getattr(base, "is_loaded_in_8bit", False)
        check_cacheable(str(base.dtype).removeprefix("torch."), "int8" if eight_bit else "")
        self.settings, self.policy = settings, policy
        self._files: LogProbFiles | None = None

    @property
    def files(self) -> LogProbFiles:
        """The folder of this reference."""
        if self._files is None:
            about = fingerprint(self.policy, self.settings.temperature)
            folder = root(self.settings.reference_cache) / "reference" / _digest(json.dumps(about).encode()).hex()[:32]
            self._files = LogProbFiles(folder)
            log.info("reference cache: %s, %d completions", folder, len(self._files))
            self._describe(folder, about)
        return self._files

    def look_up(self, batch: CompletionBatch) -> Tensor | None:
        """Token log-probs under the reference.

        Args:
            batch: The completions.

        Returns:
            One value for each true entry of ``completion_mask``, nats, in its order, (T,); None unless all completions
            are known.
        """
        found = self.files.get(list(_keys(batch)))
        return torch.cat(found).to(batch.completion_ids.device) if found else None

    def add(self, batch: CompletionBatch, token_logps: Tensor) -> None:
        """Remember token log-probs under the reference.

        Args:
            batch: The completions.
            token_logps: One value for each true entry of ``completion_mask``, nats, in its order, (T,).
        """
        lengths = batch.lengths[batch.lengths > 0].tolist()
        vectors = token_logps.detach().float().cpu().split(lengths)
        self.files.put(dict(zip(_keys(batch), vectors, strict=True)))

    def _describe(self, folder: Path, about: dict[str, Any]) -> None:
        """For people: which reference the folder belongs to."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "about.json").exists():
                text = json.dumps({"model": self.settings.model, **about}, indent=2)
                (folder / "about.json").write_text(text, encoding="utf-8")
        except OSError as error:
            log.warning("the reference cache %s cannot be written: %s", folder, error)


def fingerprint(policy: Any, temperature: float) -> dict[str, Any]:
    """All that a reference's log-probs depend on beside the tokens; the policy's adapter is no part of it.

    Args:
        policy: A model of peft.
        temperature: Divides the logits.
    """
    import transformers

    base = policy.get_base_model()
    state = {name.replace(".base_layer", ""): value for name, value in base.state_dict().items()}
    own = {name: value for name, value in state.items() if f".{REFERENCE}." in name}
    shared = {
        name: value for name, value in state.items() if f".{REFERENCE}." not in name and f".{POLICY}." not in name
    }
    adapter = policy.peft_config.get(REFERENCE)
    about = {
        "format": 1,
        "weights": _content(shared),
        "adapter": _content(own) if own else None,
        "adapter_config": _plain(adapter.to_dict(), {"base_model_name_or_path", "revision"}) if adapter else None,
        "config": _plain(base.config.to_dict(), {"_name_or_path", "transformers_version"}),
        "attention": base.config._attn_implementation,
        "dtype": str(base.dtype),
        "temperature": temperature,
        "device": base.device.type,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "transformers": transformers.__version__,
    }
    return json.loads(json.dumps(about, sort_keys=True, default=lambda v: sorted(v) if isinstance(v, set) else str(v)))


def _plain(config: Mapping[str, Any], without: set[str]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in without}


def _content(state: Mapping[str, Tensor]) -> str:
    """A hash of names, types, shapes and values."""

    def one(entry: tuple[str, Tensor]) -> bytes:
        name, tensor = entry
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return _digest(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode(), values.data)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return _digest(*pool.map(one, sorted(state.items()))).hex()


def _keys(batch: CompletionBatch) -> Iterator[bytes]:
    """A key for each completion that has tokens, in the order of the mask."""
    prompts, completions = batch.prompt_ids.cpu().numpy(), batch.completion_ids.cpu().numpy()
    prompt_mask, completion_mask = batch.prompt_mask.cpu().numpy(), batch.completion_mask.cpu().numpy()
    for prompt, kept, columns, masks in zip(prompts, prompt_mask, completions, completion_mask, strict=True):
        before = prompt[kept].astype("<i8")
        for completion, mask in zip(columns, masks, strict=True):
            if mask.any():
                yield _digest(
                    struct.pack("<Q", len(before)), before.tobytes(), completion[mask].astype("<i8").tobytes()
                )


def _digest(*parts: bytes | memoryview) -> bytes:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.digest()
