"""The private parts of datasets. Checked on datasets 5.2.0."""

from datasets import Dataset


def content_key(dataset: Dataset) -> str:
    """A key of a dataset's content (`Dataset._fingerprint`): a hash of its files and of what was done to them.

    The alternative is to hash all rows each time a run begins.
    """
    return str(dataset._fingerprint)
