"""Stages 3 and 4: the model and its training, first on stories and then on continuations."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

IGNORED = -100


class Shape(NamedTuple):
    """Sizes of the model, all > 0."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    context: int


def random_model(tokenizer: PreTrainedTokenizerFast, shape: Shape) -> LlamaForCausalLM:
    """A Llama of random weights for our tokenizer, input and output embeddings tied."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        intermediate_size=shape.intermediate,
        max_position_embeddings=shape.context,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def pack(documents: Sequence[Sequence[int]], tokens: int) -> Tensor:
    """Documents one after another in rows of equal length, (rows, tokens); the rest is left out."""
    stream = torch.tensor([token for document in documents for token in document])
    return stream[: len(stream) // tokens * tokens].view(-1, tokens)


def token_loss(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the labels in nats, (); ids and labels are (rows, tokens), labels not shifted."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        target = labels[:, 1:].reshape(-1)
        wanted = target != IGNORED  # only these positions go through the output layer
        logits = model.lm_head(hidden[:, :-1].flatten(0, 1)[wanted])
    return F.cross_entropy(logits.float(), target[wanted])


class Recipe(NamedTuple):
    """How to train.

    Attributes:
        steps: Optimizer steps, > 0.
        rows: Rows of a step, > 0.
        learning_rate: Rates at the beginning and the end, >= 0, linear between, after a short warm-up.
        seconds: Time limit, > 0: where it comes before the steps are done, the schedule follows the clock.
        seed: Of the order of rows.
        device: Where to compute.
    """

    steps: int
    rows: int
    learning_rate: tuple[float, float]
    seconds: float
    seed: int
    device: str

    def rate(self, done: float) -> float:
        """Learning rate when a share ``done``, in [0, 1], is behind."""
        first, last = self.learning_rate
        return (first + (last - first) * done) * min(1.0, 0.02 + done * 30)


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    chosen = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in chosen]
    muon = torch.optim.Muon(matrices, lr=0.0, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)]


def train(
    model: LlamaForCausalLM,
    rows: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    recipe: Recipe,
    watch: Callable[[], None],
) -> dict[str, float]:
    """Train in bfloat16 autocast.

    Args:
        model: Changed in place.
        rows: Ids and labels, (rows, tokens) each; positions labelled ``IGNORED`` carry no loss.
        held_out: The same of text that is not trained on.
        recipe: How.
        watch: Called after each tenth of the schedule, for a look at the model.

    Returns:
        Steps, labelled tokens seen, minutes, training loss at the end and held-out loss, in nats per token.
    """
    model.set_attn_implementation("eager" if recipe.device == "cpu" else "sdpa")  # the faster one for short rows
    model.to(recipe.device)
    updates, batches = optimizers(model), _batches(len(rows[0]), recipe)
    begun, losses, tokens, step, tenth = time.monotonic(), [], 0, 0, 1
    while (done := max(step / recipe.steps, (time.monotonic() - begun) / recipe.seconds)) < 1:
        if done * 10 >= tenth:
            unseen, tenth = evaluate(model, *held_out, recipe), int(done * 10) + 1
            speed = tokens / (time.monotonic() - begun)
            print(f"{done:.0%}: step {step}, loss {_recent(losses):.3f}, held-out {unseen:.3f}, {speed:.0f} tokens/s")
            watch()
        chosen = next(batches)
        ids, labels = (part[chosen].to(recipe.device) for part in rows)
        losses.append(_step(model, updates, ids, labels, recipe.rate(done)))
        tokens += int((labels != IGNORED).sum())
        step += 1
    figures = {"steps": step, "tokens": tokens, "minutes": round((time.monotonic() - begun) / 60, 1)}
    unseen = evaluate(model, *held_out, recipe)
    return {**figures, "loss": round(_recent(losses), 4), "held_out_loss": round(unseen, 4)}


def _step(
    model: LlamaForCausalLM, updates: Sequence[torch.optim.Optimizer], ids: Tensor, labels: Tensor, rate: float
) -> float:
    model.train()
    loss = token_loss(model, ids, labels)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for update in updates:
        for group in update.param_groups:
            group["lr"] = rate
        update.step()
        update.zero_grad(set_to_none=True)
    return loss.item()


def _batches(count: int, recipe: Recipe) -> Iterator[Tensor]:
    """Row numbers of each step, without end; every epoch in another order."""
    draw, queue = torch.Generator().manual_seed(recipe.seed), torch.empty(0, dtype=torch.long)
    while True:
        while len(queue) < recipe.rows:
            queue = torch.cat([queue, torch.randperm(count, generator=draw)])
        yield queue[: recipe.rows]
        queue = queue[recipe.rows :]


def _recent(losses: Sequence[float]) -> float:
    last = losses[-50:]
    return sum(last) / len(last) if last else math.nan


@torch.inference_mode()
def evaluate(model: LlamaForCausalLM, ids: Tensor, labels: Tensor, recipe: Recipe) -> float:
    """Mean cross-entropy over the labelled tokens of rows (rows, tokens), nats."""
    model.eval()
    total, count = 0.0, 0
    for first in range(0, len(ids), recipe.rows):
        part = labels[first : first + recipe.rows].to(recipe.device)
        wanted = int((part[:, 1:] != IGNORED).sum())
        total += token_loss(model, ids[first : first + recipe.rows].to(recipe.device), part).item() * wanted
        count += wanted
    return total / max(count, 1)
