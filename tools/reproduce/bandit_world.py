"""The bandit of arXiv 2404.14367: its tokens, its two rewards, its reference policy, and the folders a run reads.

Everything is an ordinary folder or file: a GPT-2 of transformers, a tokenizer that reads numbers with spaces between
them, rows of prompts and rows of completions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lit_align.batch import CompletionBatch, Sampling
from lit_align.data.collate import Group, collate
from lit_align.data.judge import texts_of
from lit_align.pair import PolicyReferencePair
from lit_align.settings import PairSettings

TOKENS = 100
"""Every token is a context, and an action; none of them ends a response."""
RESPONSE = 10
WIDTH = 10.0
"""Of the rewards' peaks, in tokens."""
DRAWS = 10_000
HEAD = 0.5
"""Standard deviation of the head's weights before the fit."""
CLOSE = 0.01
"""Nats a token to which the reference is fitted, at least."""

Squash = Literal["tanh", "clip"]


class Peak:
    """Mean over a response's tokens a of exp(-((a - centre) / 10)²), in (0, 1]; arXiv 2404.14367, Section 4.

    Args:
        centre: The best token: 70 is R₁, far from what the reference writes, and 20 is R₂, where the Cauchy had its
            mode before its tails were squashed.
        with_prompt: Average over the prompt's token as well, as the authors' code does: the reward then is out of the
            policy's hands by a tenth.
    """

    def __init__(self, centre: int = 70, with_prompt: bool = False) -> None:
        self.centre, self.with_prompt = centre, with_prompt

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """The reward of each completion, both as numbers with spaces between them."""
        texts = [f"{p} {c}" if self.with_prompt else c for p, c in zip(prompts, completions, strict=True)]
        return [self.of([int(token) for token in text.split()]) for text in texts]

    def of(self, tokens: Sequence[int]) -> float:
        """The reward of some tokens."""
        return sum(math.exp(-(((token - self.centre) / WIDTH) ** 2)) for token in tokens) / len(tokens)

    def on_tokens(self, batch: CompletionBatch, tokenizer: Any) -> Tensor:
        """The same from the ids, which are the numbers: (B, K)."""
        peak = torch.exp(-(((torch.arange(TOKENS) - self.centre) / WIDTH) ** 2)).double()
        values = peak[batch.completion_ids.cpu()].masked_fill(~batch.completion_mask.cpu(), 0).sum(-1)
        count = batch.lengths.cpu()
        if self.with_prompt:
            values = values + peak[batch.prompt_ids[:, :1].cpu()]
            count = count + 1
        return values / count


def target(squash: Squash, seed: int = 0) -> Tensor:
    """The distribution of a token: a histogram of draws of Cauchy(-0.7, 0.4), brought into (-1, 1), in 100 bins.

    Args:
        squash: How: "tanh" as the authors' code does, or "clip" as their paper says, which puts what lies outside into
            the first and the last bin.
        seed: Of the draws.

    Returns:
        Probabilities, float64 (100,).
    """
    uniform = torch.rand(DRAWS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn = -0.7 + 0.4 * torch.tan(math.pi * (uniform - 0.5))
    drawn = drawn.tanh() if squash == "tanh" else drawn.clamp(-1, 1)
    return torch.histc(drawn, TOKENS, -1, 1) / DRAWS


def build(folder: Path, squash: Squash = "tanh", seed: int = 0) -> float:
    """Write the reference policy and its tokenizer, unless they are there.

    Args:
        folder: Where.
        squash: See ``target``.
        seed: Of the distribution and of the fit.

    Returns:
        KL(π_ref ‖ distribution) a token of what was fitted, the larger one of contexts drawn from π_ref and uniformly.

    Raises:
        RuntimeError: If that is too much; nothing is written then.
    """
    about = folder / "about.json"
    if not about.exists():
        wanted = target(squash, seed)
        model = fitted(wanted, seed)
        found = distance(model, wanted, seed)
        if found > CLOSE:
            raise RuntimeError(f"the reference is {found:.3f} nats a token from what it is to be")
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        about.write_text(json.dumps({"squash": squash, "seed": seed, "kl": found}) + "\n")
    return float(json.loads(about.read_text())["kl"])


def tokenizer() -> Any:
    """Words are the numbers from 0 to 99. The end of sequence is id 100, of which the model knows nothing.

    So it cannot be drawn, and a budget of 10 tokens cuts it off completions of a dataset.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {str(number): number for number in range(TOKENS)} | {"</s>": TOKENS}
    found = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=found, eos_token="</s>")


def fitted(wanted: Tensor, seed: int, steps: int = 100) -> Any:
    """A GPT-2 of 3 layers, 3 heads and width 48 whose every next token is drawn from one distribution.

    Adam with step size 0.01, KL(wanted ‖ model) on contexts of which half are drawn from the distribution and half
    uniformly, since a policy that learns comes to contexts the reference does not write.

    The head is one of its own, as in the authors' GPT, and begins ``HEAD`` wide: lit_align trains the blocks and leaves
    the head as it is, and after this short fit one of GPT-2's usual width, 0.02, would bound how sharp a distribution
    any hidden state can give, to a mean R₁ of 0.38. With this one the bound is above 0.999.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"n_layer": 3, "n_head": 3, "n_embd": 48, "n_positions": RESPONSE + 1, "vocab_size": TOKENS}
    sizes |= {"activation_function": "gelu_pytorch_tanh"}  # GPT-2's own in one operation instead of eight
    sizes |= {"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False}
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(GPT2Config(**sizes, **off))
        torch.nn.init.normal_(model.lm_head.weight, std=HEAD)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        loss = divergence(model, wanted, contexts(wanted, generator)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def contexts(wanted: Tensor, generator: torch.Generator) -> Tensor:
    """32 rows of tokens drawn uniformly, and 32 drawn from the distribution, int64 (64, 10)."""
    uniform = torch.randint(TOKENS, (32, RESPONSE), generator=generator)
    own = torch.multinomial(wanted, 32 * RESPONSE, True, generator=generator).view(32, RESPONSE)
    return torch.cat([uniform, own])


def divergence(model: Any, wanted: Tensor, ids: Tensor, forward: bool = True) -> Tensor:
    """KL(wanted ‖ model), or of the model from it, at each position, nats (N, 10)."""
    ours, theirs = model(ids).logits.log_softmax(-1), wanted.clamp(min=1e-9).log().float()
    one, two = (theirs, ours) if forward else (ours, theirs)
    return (one.exp() * (one - two)).sum(-1)


@torch.no_grad()
def distance(model: Any, wanted: Tensor, seed: int) -> float:
    """KL(model ‖ wanted) a token, the larger one of both kinds of contexts, on fresh ones."""
    ids = contexts(wanted, torch.Generator().manual_seed(seed + 1))
    return max(part.mean().item() for part in divergence(model, wanted, ids, forward=False).split(32))


def write_contexts(path: Path) -> Path:
    """Rows of all one-token prompts."""
    return _written(path, [{"prompt": str(token)} for token in range(TOKENS)])


def write_prompts(path: Path, contexts: Path, number: int, seed: int) -> Path:
    """So many of the contexts, drawn uniformly, one of them perhaps more than once, as the authors' code does."""
    rows = [json.loads(line) for line in contexts.read_text(encoding="utf-8").splitlines()]
    drawn = torch.randint(len(rows), (number,), generator=torch.Generator().manual_seed(seed)).tolist()
    return _written(path, [{"prompt": rows[place]["prompt"]} for place in drawn])


def write_groups(path: Path, model: str, prompts: Path, completions: int, tokens: int, seed: int) -> Path:
    """Rows of prompts, each with completions that the reference draws; their rewards are left for the run to give.

    Args:
        path: The file.
        model: The reference.
        prompts: Rows from ``write_prompts``.
        completions: Of each.
        tokens: Of a completion, at most.
        seed: Of the draws.
    """
    from lit_align.models import load_tokenizer

    tokenizer, pair = load_tokenizer(PairSettings(model)), PolicyReferencePair(PairSettings(model))
    texts = [json.loads(line)["prompt"] for line in prompts.read_text(encoding="utf-8").splitlines()]
    groups = [Group(row, torch.tensor(ids), [], None) for row, ids in enumerate(tokenizer(texts)["input_ids"])]
    drawn = pair.generate(collate(groups), completions, Sampling(tokens, seed=seed)).completions
    _, answers = texts_of(drawn, tokenizer)
    rows = [{"prompt": text, "completions": given} for text, given in zip(texts, answers, strict=True)]
    return _written(path, [row | {"rewards": [0.0] * completions} for row in rows])


def _written(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    part.replace(path)
    return path
