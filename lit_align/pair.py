"""PolicyReferencePair: a LoRA policy and its frozen reference on one base, one call to score a batch with both."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_align.adapters import POLICY, REFERENCE, START, active, adapted, bare, factors, free_reference
from lit_align.attention import BY_GROUP
from lit_align.batch import CompletionBatch, Perturbed, Rollout, Sampling, Scores
from lit_align.cache import ReferenceCache
from lit_align.decoding import decoding, has_cache
from lit_align.errors import UserError
from lit_align.generation import draw
from lit_align.kv_cache import rows_at_once
from lit_align.layout import Rows, one_row, separate_rows, to_columns, tree_inputs, tree_rows
from lit_align.logprobs import token_scores
from lit_align.models import check_head, head_of, load_base, shares_prompts, stop_ids
from lit_align.settings import PairSettings

log = logging.getLogger(__name__)


class PolicyReferencePair(nn.Module):
    """The policy π_θ (base and LoRA adapter) and the reference π_ref (the same base without it).

    If ``settings.lora.adapter`` names a saved adapter, the policy starts there and the reference is a frozen copy.

    Args:
        settings: Model, precision and adapter.
        device: Where the base lives; quantized weights are made there.
        eos_token_id: The tokenizer's end of sequence; generation stops there and where the model's own config says.

    Raises:
        UserError: If model or adapter cannot be used, with the reason.
    """

    def __init__(
        self, settings: PairSettings, device: torch.device | str = "cpu", eos_token_id: int | None = None
    ) -> None:
        super().__init__()
        self.settings = settings
        self.moving = False
        self._reference = REFERENCE
        self.policy = adapted(load_base(settings, torch.device(device)), settings)
        with self.as_reference():
            check_head(self.base)
        self.stop_ids = stop_ids(self.base, eos_token_id)
        self.cells = torch.zeros(2, dtype=torch.int64)  # of all passes so far: without a token, and all
        self.trees = shares_prompts(self.base.config)
        self.cached = has_cache(self.base)
        self.known = ReferenceCache(settings, self.policy) if settings.reference_cache else None
        if settings.gradient_checkpointing:
            self.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.policy.train()  # transformers checkpoints in train mode only; every dropout is 0

    @property
    def base(self) -> Any:
        """The causal language model under the adapter."""
        return self.policy.get_base_model()

    @property
    def quantization(self) -> str:
        """How the base is held: none, nf4 or int8."""
        config = getattr(self.base.config, "quantization_config", None)
        kinds = {"load_in_4bit": "nf4", "load_in_8bit": "int8"}
        return next((kind for name, kind in kinds.items() if getattr(config, name, False)), "none")

    def score(
        self,
        batch: CompletionBatch,
        *,
        reference: bool = True,
        epsilon: float | None = None,
        kl: bool = False,
        entropy: bool = False,
        value_head: Callable[[Tensor], Tensor] | None = None,
        recurring: bool = False,
    ) -> Scores:
        """Log-probs of every completion token under both models, in one pass over each.

        Args:
            batch: B prompts with K completions each.
            reference: Whether to run the reference.
            epsilon: Perturbation ε >= 0 of ε-DPO's two mixtures; None leaves them out.
            kl: Whether to compute the full-vocabulary token KL, KL(π_θ ‖ π_ref) and KL(π_ref ‖ π_θ).
            entropy: Whether to compute the policy's token entropy.
            value_head: From the policy's last hidden states (T, H) to a value each (T,), of what stands before each
                completion token; None leaves values out.
            recurring: Whether these completions will be scored again, in this run or another. What the reference says
                of them then goes to the cache, if there is one, and comes from there where its log-probs are enough.

        Returns:
            The scores. Gradient flows from ``token_logps``, ``token_kl``, ``entropy`` and ``values`` to the adapter.
        """
        rows, inputs = self._lay_out(batch)
        cache = self.known if reference and recurring and not self.moving else None
        known = None if cache is None or kl or epsilon is not None else cache.look_up(batch)
        reference_hidden = None
        if reference and known is None:
            with torch.no_grad(), self.as_reference():
                reference_hidden = self._hidden(inputs, rows.predictor)
        hidden = self._hidden(inputs, rows.predictor)
        found = token_scores(
            hidden,
            batch.completion_ids[batch.completion_mask],
            head_of(self.base, self.settings.temperature),
            reference_hidden=reference_hidden,
            epsilon=epsilon if reference else None,
            kl=kl and reference,
            entropy=entropy,
        )
        if known is not None:
            found = found._replace(reference_logps=known)
        elif cache is not None and found.reference_logps is not None:
            cache.add(batch, found.reference_logps)
        columns = [None if values is None else to_columns(values, batch) for values in found]
        logps, reference_logps, outward, inward, token_kl, token_entropy, forward_kl = columns
        assert logps is not None
        perturbed = None if outward is None or inward is None else Perturbed(outward, inward)
        values = None if value_head is None else to_columns(value_head(hidden), batch)
        return Scores(logps, reference_logps, perturbed, token_kl, token_entropy, batch.lengths, forward_kl, values)

    def final_hidden(self, batch: CompletionBatch) -> Tensor:
        """The policy's last hidden state at the last token of each completion, end of sequence included.

        Args:
            batch: B prompts with K completions each.

        Returns:
            The states after the final norm, (B, K, H), in the model's type; 0 for a column without tokens. Gradient
            flows to the adapter.
        """
        rows, inputs = self._lay_out(batch)
        there = batch.lengths > 0
        ends = batch.lengths[there].cumsum(0) - 1
        hidden = self._hidden(inputs, rows.place[ends])
        return hidden.new_zeros(*there.shape, hidden.shape[-1]).masked_scatter(there[..., None], hidden)

    @torch.no_grad()
    def generate(
        self, prompts: CompletionBatch, completions: int, sampling: Sampling, *, reference: bool = False
    ) -> Rollout:
        """Draw completions of each prompt.

        Args:
            prompts: A batch whose prompts are continued; its own completions are ignored.
            completions: How many completions of each prompt, >= 1.
            sampling: Length, temperature, truncation and seed of the draw.
            reference: Draw from the reference instead of the policy.

        Returns:
            The same prompts with K = ``completions`` columns of sampled ids, end of sequence included where it came
            within the budget, no reward; and ``old_logps``, the log-probs under the distribution they were drawn
            from, temperature and truncation included.
        """
        head = head_of(self.base, sampling.temperature or self.settings.temperature)
        together = rows_at_once(self.base, int(prompts.prompt_mask.sum(-1).max()) + sampling.max_new_tokens)
        begin = partial(decoding, self.base, self.cached)
        with self._in_eval_mode(), self.as_reference(reference):
            drawn = draw(begin, head, prompts, completions, sampling, self.stop_ids, together)
        if drawn.old_logps is not None and not drawn.old_logps.isfinite().all():
            raise UserError(
                f"the logits of {self.settings.model} are not finite, so nothing can be drawn from it: the weights are "
                "damaged or training diverged; lower model.optim.learning_rate or go back to an earlier checkpoint"
            )
        return drawn

    def ended(self, batch: CompletionBatch) -> Tensor:
        """Whether the last token of each completion ends it, and not the token budget, bool (B, K)."""
        last = batch.completion_ids.gather(-1, (batch.lengths - 1).clamp(min=0)[..., None])[..., 0]
        return torch.isin(last, torch.tensor(self.stop_ids, device=last.device)) & (batch.lengths > 0)

    def let_reference_move(self, averaged: bool) -> None:
        """Give the reference an adapter of its own, equal to the policy's start, for ``update_reference``.

        The mean of two adapters' weights is the mean of their products B·A, not the product of mean factors. With
        ``averaged`` the policy's A is frozen and shared with the reference, so that averaging B alone is exact.

        Args:
            averaged: Whether the reference will be an average, and not only a copy, of policies.
        """
        free_reference(self.policy, averaged)
        self.moving = True

    @torch.no_grad()
    def update_reference(self, alpha: float) -> None:
        """θ_ref ← α θ + (1 - α) θ_ref in the space of weights; exact, see ``let_reference_move``.

        Args:
            alpha: Share of the policy α, in [0, 1]; 1 copies it.
        """
        for _, policy, reference in factors(self.policy):
            if alpha == 1:
                reference.copy_(policy)
            else:
                reference.lerp_(policy, alpha)

    @contextmanager
    def as_reference(self, enabled: bool = True) -> Iterator[None]:
        """Within this context the adapted model is the reference. Take no backward pass through it."""
        if not enabled:
            yield
        elif self._reference not in self.policy.peft_config:
            with bare(self.policy):
                yield
        else:
            with active(self.policy, self._reference):
                yield

    @contextmanager
    def from_the_start(self) -> Iterator[None]:
        """Within this context the reference is the one that training began with, also where it has moved since."""
        self._reference = START if self.moving else REFERENCE
        try:
            yield
        finally:
            self._reference = REFERENCE

    def state_names(self) -> list[str]:
        """What a checkpoint must hold of this module: the policy's adapter, and the reference's if it moves."""
        kept = (f".{POLICY}.", f".{REFERENCE}.") if self.moving else (f".{POLICY}.",)
        return [name for name, _ in self.named_parameters() if any(part in name for part in kept)]

    def save_adapter(self, directory: str | Path) -> None:
        """Write the policy's adapter in peft's own format (safetensors) for ``PeftModel.from_pretrained``.

        ``base.json`` beside it says how the base was held, which "auto" in the settings does not.
        """
        self.policy.save_pretrained(str(directory), selected_adapters=[POLICY], safe_serialization=True)
        how = {"dtype": str(self.base.dtype).removeprefix("torch."), "quantization": self.quantization}
        held = {"model": self.settings.model, "revision": self.settings.revision, **how}
        (Path(directory) / "base.json").write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")

    @contextmanager
    def _in_eval_mode(self) -> Iterator[None]:
        """Gradient checkpointing, which works in train mode only, would turn the cache off."""
        trained = [part for part in self.policy.modules() if part.training]
        self.policy.eval()
        try:
            yield
        finally:
            for part in trained:
                part.training = True

    def _lay_out(self, batch: CompletionBatch) -> tuple[Rows, dict[str, Any]]:
        """The rows of a batch, with shared prompts where that is exact, and the model's inputs for them."""
        config = self.base.config
        apart = self.trees and config._attn_implementation == BY_GROUP
        width = config.get_text_config().hidden_size
        rows = one_row(batch) if apart else tree_rows(batch, width) if self.trees else separate_rows(batch)
        self.cells = self.cells.to(rows.cells.device) + rows.cells
        if self.trees:
            return rows, tree_inputs(rows, config, self.base.dtype, apart)
        return rows, {"input_ids": rows.input_ids, "attention_mask": rows.group.ge(0).long()}

    def _hidden(self, inputs: dict[str, Any], places: Tensor) -> Tensor:
        """Last hidden states at N flat places of the rows, (N, H)."""
        output = self.base.base_model(**inputs, use_cache=False)
        return output.last_hidden_state.flatten(0, 1)[places]
