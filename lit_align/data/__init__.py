"""Rows of text become completion batches, in an order that resumes exactly."""

from __future__ import annotations

from lit_align.data.demonstrations import Demonstrations
from lit_align.data.mixed import MixedData
from lit_align.data.on_policy import OnPolicyData
from lit_align.data.preference import PreferenceData
from lit_align.data.scored import ScoredGroups
from lit_align.data.unpaired import UnpairedData

__all__ = ["Demonstrations", "MixedData", "OnPolicyData", "PreferenceData", "ScoredGroups", "UnpairedData"]
