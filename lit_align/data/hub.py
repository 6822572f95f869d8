"""Read one split of a dataset on the Hugging Face Hub, through ``datasets``."""

from __future__ import annotations

from pathlib import Path

from lit_align.data.files import number_rows
from lit_align.data.rows import DataError, Source, SplitMissing


def read_hub(dataset: str, split: str, max_rows: int | None = None) -> Source:
    """Download, or find in the local cache, one split of a dataset. Code in the repository is never run.

    Args:
        dataset: ``name``, ``owner/name``, or either followed by ``:config``.
        split: A split the dataset has.
        max_rows: Read at most this many rows, > 0; None reads all.

    Raises:
        SplitMissing: If the dataset has no such split.
        DataError: If the name is neither a local path nor loadable from the Hub.
    """
    import datasets

    path, _, config = dataset.partition(":")
    try:
        table = datasets.load_dataset(path, config or None, split=split)
    except Exception as error:  # whatever the client raises, the user needs the same facts
        reason = str(error).strip().splitlines() or [""]
        if "Config name is missing" in reason[0]:
            listed = " ".join(line.strip() for line in reason[:2])
            raise DataError(f'dataset "{dataset}": {listed} Give it as data.dataset {path}:CONFIG') from error
        if isinstance(error, ValueError) and "Unknown split" in reason[0]:
            raise SplitMissing(f'dataset "{dataset}": {reason[0]}') from error
        raise DataError(
            f'dataset "{dataset}": there is no such file or folder in {Path.cwd()}, and it could not be loaded from '
            f"the Hugging Face Hub ({type(error).__name__}: {reason[0]}); check the spelling and the network, or give "
            "a local .jsonl or .parquet file"
        ) from error
    return number_rows(f"{dataset}/{split}", table, max_rows)
