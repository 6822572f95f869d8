"""Rows of text become completion batches, in an order that resumes exactly."""

from __future__ import annotations

from lit_align.data.preference import PreferenceData

__all__ = ["PreferenceData"]
