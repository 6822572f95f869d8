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
# # A study of your own
#
# The studies of `docs/evidence.md` are scripts with a YAML each. Here the bandit is asked another question than in
# its paper: what if the best token is 45, halfway between the reference's usual ones and the far end? Only the YAML
# changes. All of it takes some 25 minutes on two cores; `--quick` runs a few steps of two methods.

# %%
import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import yaml

import lit_align as package

QUICK = "--quick" in sys.argv
STUDIES = Path(package.__file__).parents[1] / "tools" / "reproduce"
HERE = Path("runs/study")
HERE.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## The YAML
#
# It is one of `python -m lit_align fit`: model, data and trainer of every run. What it leaves out, here the model
# and the prompts, is the paper's.

# %%
config = yaml.safe_load((STUDIES / "bandit.yaml").read_text())
config["data"]["init_args"]["reward"] = {"class_path": "bandit_world.Peak", "init_args": {"centre": 45}}
(HERE / "bandit.yaml").write_text(yaml.safe_dump(config))

# %% [markdown]
# ## Run
#
# Each method tries the same learning rates on a seed that is not reported, and then runs over the seeds with the
# best. Stop it whenever you like: the same command goes on where it was.

# %%
command = [sys.executable, str(STUDIES / "bandit.py"), "--config", str(HERE / "bandit.yaml"), "--out", str(HERE)]
subprocess.run([*command, *(["--quick"] if QUICK else ["--parts", "table3"])], check=True)

# %% [markdown]
# ## What was found
#
# Mean and standard error over seeds, from the JSON; and the settings that the search chose, with all that it tried.

# %%
found = json.loads((HERE / "bandit.json").read_text())
finals = {name: arm["final"] for name, arm in found["arms"].items()}
shown = {
    f"{what}, {part}": {name: final[what][part] for name, final in finals.items()}
    for what in ("reward", "kl")
    for part in ("mean", "standard_error", "n")
}
print(pd.DataFrame(shown).round(3))
print(pd.DataFrame({name: one["tried"] for name, one in found["search"].items()}).T)

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3))
for name, arm in found["arms"].items():
    curve = arm["curve"]
    axes[0].plot([step / curve["step"][-1] for step in curve["step"]], curve["reward"], label=name)
    axes[1].plot(curve["kl"], curve["reward"], ".-", label=name)
axes[0].set(xlabel="share of the run", ylabel="reward")
axes[1].set(xlabel="KL to the reference, nats")
axes[0].legend()
figure.savefig(HERE / "study.png", bbox_inches="tight")
