"""Where training data comes from: array files and the pictures that come inside Python packages.

::

    dataset = load("digits")  # or "patches", or a .npy, .npz or .pt file
    train, held_out = dataset.split()
    for batch in Batches(dataset.samples, train, batch_size=256, seed=0).epoch(0):
        ...  # (256, features), float32
"""

from aefast.data.batches import Batches
from aefast.data.dataset import DataError, Dataset
from aefast.data.load import SOURCES, load

__all__ = ["SOURCES", "Batches", "DataError", "Dataset", "load"]
