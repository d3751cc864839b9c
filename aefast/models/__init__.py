"""Autoencoders built from `aefast.nn`.

A model is made from its config, called on a batch, and kept on disk as a folder of ``config.json`` and
``model.safetensors``::

    model = Autoencoder(AutoencoderConfig(input_size=784, hidden=(512,), latent=16))
    output = model(x)  # x: (B, 784) or any (B, ...) with 784 features a sample
    output.loss.backward()
    model.save_pretrained("runs/first")
    model = from_pretrained("runs/first")
"""

from aefast.models._base import MODELS, Model, ModelConfig, ModelOutput, find_model, from_pretrained, register
from aefast.models.autoencoder import Autoencoder, AutoencoderConfig

__all__ = [
    "MODELS",
    "Autoencoder",
    "AutoencoderConfig",
    "Model",
    "ModelConfig",
    "ModelOutput",
    "find_model",
    "from_pretrained",
    "register",
]
