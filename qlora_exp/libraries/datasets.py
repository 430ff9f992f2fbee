"""Wrap the private parts of datasets. Checked on datasets 5.2.0."""

from datasets import Dataset


def content_key(dataset: Dataset) -> str:
    """Return a key of a dataset's content (`Dataset._fingerprint`): a hash of its files and of all operations on them.

    The alternative would be to hash all rows each time a run starts.
    """
    return str(dataset._fingerprint)
