"""The old place of read_rows, until tests/bench/inputs.py and peers.py use data/classification_sets.py."""
from data.classification_sets import read_rows  # noqa: F401
