"""The stages of ``tools/build_stories.py``, which makes the model and the data that ship with lit_align."""
