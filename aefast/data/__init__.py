"""Where training data comes from: array files and the pictures that come inside Python packages.

::

    dataset = load("digits")  # or "patches", a .npy, .npz, .pt or .safetensors file, or a folder of arrays or images
    train, held_out = dataset.split()
    for batch in Batches(dataset.samples, train, batch_size=256, seed=0).epoch(0):
        ...  # (256, features), float32
"""

from aefast.data.batches import Batches
from aefast.data.blocks import Blocks
from aefast.data.dataset import DataError, Dataset, DataWarning
from aefast.data.files import FileRows
from aefast.data.iterable import IterableBatches
from aefast.data.load import SOURCES, load

__all__ = [
    "SOURCES",
    "Batches",
    "Blocks",
    "DataError",
    "DataWarning",
    "Dataset",
    "FileRows",
    "IterableBatches",
    "load",
]
