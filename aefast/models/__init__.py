"""Autoencoders built from `aefast.nn`.

A model is made from its config, called on a batch, and kept on disk as a folder of ``config.json`` and
``model.safetensors``::

    model = Autoencoder(AutoencoderConfig(input_size=784, hidden=(512,), latent=16))
    output = model(x)  # x: (B, 784) or any (B, ...) with 784 features a sample
    output.loss.backward()
    model.save_pretrained("runs/first")
    model = from_pretrained("runs/first")  # in eval mode
"""

from aefast.models._base import MODELS, Model, ModelConfig, ModelOutput, find_model, from_pretrained, register
from aefast.models.autoencoder import Autoencoder, AutoencoderConfig
from aefast.models.denoising import DenoisingAutoencoder, DenoisingConfig
from aefast.models.infovae import InfoVAE, InfoVAEConfig
from aefast.models.sparse import SparseAutoencoder, SparseCode, SparseConfig
from aefast.models.sparse_formats import load_saelens, load_sparsify, save_saelens, save_sparsify
from aefast.models.stochastic import StochasticAutoencoder, StochasticConfig
from aefast.models.vae import VAE, VAEConfig

__all__ = [
    "MODELS",
    "VAE",
    "Autoencoder",
    "AutoencoderConfig",
    "DenoisingAutoencoder",
    "DenoisingConfig",
    "InfoVAE",
    "InfoVAEConfig",
    "Model",
    "ModelConfig",
    "ModelOutput",
    "SparseAutoencoder",
    "SparseCode",
    "SparseConfig",
    "StochasticAutoencoder",
    "StochasticConfig",
    "VAEConfig",
    "find_model",
    "from_pretrained",
    "load_saelens",
    "load_sparsify",
    "register",
    "save_saelens",
    "save_sparsify",
]
