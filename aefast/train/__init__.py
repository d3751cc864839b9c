"""Training: the step, the loop around it, checkpoints, and what a run leaves behind.

::

    dataset = load("digits")
    model = Autoencoder(input_size=dataset.features, latent=16)
    result = Trainer(model, dataset, TrainConfig(epochs=10), "runs/digits").fit()
"""

from aefast.train.callbacks import Callback, TensorBoard
from aefast.train.checkpoint import Checkpoint, CheckpointError, CheckpointStore
from aefast.train.compare import Comparison, compare_with_eager
from aefast.train.config import TrainConfig
from aefast.train.schedule import Schedule
from aefast.train.step import CapturedStep, make_optimizer
from aefast.train.trainer import Trainer, TrainingError, TrainResult

__all__ = [
    "Callback",
    "CapturedStep",
    "Checkpoint",
    "CheckpointError",
    "CheckpointStore",
    "Comparison",
    "Schedule",
    "TensorBoard",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "TrainingError",
    "compare_with_eager",
    "make_optimizer",
]
