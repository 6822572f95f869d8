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
# # A tour of the main job
#
# A small story model that comes along is aligned towards cheerful stories with ε-DPO, on a CPU, in under a
# minute. Open this file as a notebook (Jupyter with jupytext, or VS Code), or run it as a script; `--quick` takes
# a few steps only.

# %%
import json
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch

import lit_align as package
from lit_align.__main__ import main as lit_align

QUICK = "--quick" in sys.argv
RUN = Path("runs/tour") / time.strftime("%Y%m%d-%H%M%S")
CONFIG = Path(package.__file__).parents[1] / "configs" / "eps_dpo.yaml"
quick = ["--trainer.max_steps=4", "--trainer.log_every_n_steps=1", "--data.max_rows=64", "--samples.prompts=4"]
short = quick if QUICK else []

# %% [markdown]
# ## Train
#
# `lit_align([...])` is the command line `python -m lit_align ...`, whose words are the list. 0 says that all went
# well.

# %%
arguments = ["fit", "--config", str(CONFIG), f"--run_dir={RUN}", "--trainer.accelerator=cpu", *short]
assert lit_align(arguments) == 0

# %% [markdown]
# ## What is in the run folder
#
# The configuration with every default, the metrics of every logged step, samples from before and after, the
# report on the data, and the adapter.

# %%
print(sorted(path.name for path in RUN.iterdir()))
print(json.loads((RUN / "data_report.json").read_text())["train"])

# %% [markdown]
# ## What was learned
#
# The margin between the implicit rewards of the two stories of a pair grows. ε-DPO gives every pair a β of its
# own: where the pair's log-ratio grows or falls steadily as the policy is moved a little towards the reference and a
# little away from it, β changes.

# %%
metrics = pd.read_csv(RUN / "metrics.csv").groupby("step").first()
figure, axes = plt.subplots(1, 3, figsize=(12, 3))
for axis, name in zip(axes, ("train/rewards/margins", "train/beta", "train/kl"), strict=True):
    metrics[name].dropna().plot(ax=axis, title=name)
figure.savefig(RUN / "tour.png", bbox_inches="tight")

# %% [markdown]
# ## Samples of the policy, beside those of the reference
#
# Judged by the same sentiment score that made the preferences, on prompts that were held out. Read the reward
# with the KL: how far the policy has gone from the reference for it.

# %%
assert lit_align(["evaluate", str(RUN), *(["--prompts=8", "--completions=2"] if QUICK else [])]) == 0

# %% [markdown]
# ## Elsewhere
#
# The adapter is in peft's format, so plain transformers and peft are enough.

# %%
from peft import PeftModel  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from lit_align.assets import resolve  # noqa: E402

tokenizer = AutoTokenizer.from_pretrained(RUN / "adapter")
model = PeftModel.from_pretrained(
    AutoModelForCausalLM.from_pretrained(resolve("stories"), dtype="float32"), RUN / "adapter"
).eval()
prompt = tokenizer("Once upon a time, there was a little dog.", return_tensors="pt")
torch.manual_seed(0)
told = model.generate(**prompt, max_new_tokens=40, do_sample=True, pad_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(told[0], skip_special_tokens=True))
