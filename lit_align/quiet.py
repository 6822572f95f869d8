"""What the libraries say that the user could or should not change stays unsaid; their real warnings stay."""

from __future__ import annotations

import logging
import os
import sys
import warnings

NOISE = (
    ".*does not have many workers.*",
    ".*Total length of `list` across ranks is zero.*",  # no validation
    ".*smaller than the logging interval.*",
    ".*tensorboardX.*",
    ".*module\\(s\\) in eval mode at the start of training.*",  # the frozen base is meant to be
    ".*`is_gradient_checkpointing` is deprecated.*",  # raised and meant for transformers itself
    ".*sync_dist=True.*when logging on epoch level.*",  # torchmetrics has already added up the ranks
    ".*callbacks used to create the checkpoint need to be provided.*",
    ".*The dirpath has changed from.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*method of metric .* was called before the ``update`` method.*",  # nothing was drawn in this interval
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
)
"""Warnings about nothing the user could or should change."""


def quiet_libraries() -> None:
    """Settings that the libraries read when they are imported; what the user has set stays."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def quiet_warnings() -> None:
    """Silence tips and hints of the libraries, and bars where nobody watches them."""
    if not sys.stderr.isatty() and "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of optional CPU kernels
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
