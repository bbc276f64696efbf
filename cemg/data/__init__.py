"""Datasets: readers of public formats, the k-core filter, the leave-one-out split, the synthetic set."""

from cemg.data.dataset import Dataset, Split
from cemg.data.readers import read_dataset
from cemg.data.synthetic import synthetic_dataset

__all__ = ["Dataset", "Split", "read_dataset", "synthetic_dataset"]
