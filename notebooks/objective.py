# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # An objective of your own
#
# One file with a pure loss and a class, one YAML, one test. Here all three are written into a folder, run and
# compared with DPO, without touching the package. The objective is a hinge on the implicit reward: it stops
# pushing a pair apart once the margin is wide enough.

# %%
import importlib
import sys
import time
from pathlib import Path

import torch

from lit_align.__main__ import main as lit_align

QUICK = "--quick" in sys.argv
HERE = Path("runs/objective") / time.strftime("%Y%m%d-%H%M%S")
HERE.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## The file
#
# The loss takes log-ratios, log π_θ/π_ref of the chosen and the rejected completion in nats, and gives one value
# for each pair; nothing in it knows of models or batches. The class scores the batch and says what each value
# counts.

# %%
(HERE / "hinge.py").write_text('''
import torch
from torch import Tensor

from lit_align.batch import CompletionBatch, Loss
from lit_align.module import AlignModule
from lit_align.settings import OptimSettings, PairSettings, check


def hinge_loss(logratio: Tensor, beta: float) -> Tensor:
    """L = max(0, 1 - beta m), with m = M_w - M_l."""
    return (1 - beta * (logratio[:, 0] - logratio[:, 1])).clamp(min=0)


class Hinge(AlignModule):
    """A hinge on the implicit reward.

    Args:
        beta: Inverse temperature, > 0.
        pair: The model and its adapter.
        optim: The optimizer and its schedule.
    """

    def __init__(self, beta: float = 0.1, pair: PairSettings = PairSettings(), optim: OptimSettings = OptimSettings()):
        super().__init__(pair, optim)
        check("model.beta", beta, beta > 0, "greater than 0", "0.1")
        self.beta = beta

    def loss(self, batch: CompletionBatch) -> Loss:
        logratio = self.score(batch).logratio
        value = hinge_loss(logratio, self.beta)
        return Loss(value, torch.ones_like(value), self.beta * logratio.detach(), {})
''')
sys.path.insert(0, str(HERE))
importlib.invalidate_caches()
from hinge import hinge_loss  # noqa: E402

# %% [markdown]
# ## Values worked by hand
#
# At the start policy and reference agree, so the loss is 1 for every pair. A margin of 5 nats at β 0.1 leaves
# half of it, 20 nats leave nothing, and from there no gradient comes. In the package, a test that inherits
# `ObjectiveContract` asks more: gradients in float64, invariance to padding, order and accumulation, two steps
# that raise the margin.

# %%
logratio = torch.tensor([[0.0, 0.0], [5.0, 0.0], [20.0, 0.0]], dtype=torch.float64, requires_grad=True)
value = hinge_loss(logratio, 0.1)
torch.testing.assert_close(value.detach(), torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64))
value.sum().backward()
assert logratio.grad is not None
torch.testing.assert_close(logratio.grad[:, 0], torch.tensor([-0.1, -0.1, 0.0], dtype=torch.float64))
assert torch.autograd.gradcheck(lambda x: hinge_loss(x, 0.1), (logratio.detach()[:2].requires_grad_(),))

# %% [markdown]
# ## The YAML
#
# The class path is all that is needed for the command line to know it: its options, their types and its help.

# %%
(HERE / "hinge.yaml").write_text("""
model:
  class_path: hinge.Hinge
  init_args:
    beta: 0.1
data:
  class_path: PreferenceData
  init_args:
    batch_size: 16
samples:
  prompts: 32
""")
quick = [
    "--trainer.max_steps=3",
    "--trainer.log_every_n_steps=1",
    "--data.max_rows=64",
    "--data.batch_size=8",
    "--samples.prompts=4",
]
short = quick if QUICK else []
for name, objective in (("hinge", []), ("dpo", ["--model", "DPO"])):
    arguments = ["fit", "--config", str(HERE / "hinge.yaml"), *objective, f"--run_dir={HERE / name}"]
    assert lit_align([*arguments, "--trainer.accelerator=cpu", *short]) == 0

# %% [markdown]
# ## Beside DPO
#
# Same rows, same order, same step size, samples of the same prompts.

# %%
assert lit_align(["compare", str(HERE / "hinge"), str(HERE / "dpo"), f"--out={HERE / 'compared'}"]) == 0
