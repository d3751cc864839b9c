"""A Lightning module, and its training by Lightning.

In a file of its own, since importing Lightning takes seconds, which only the process that trains has to spend.
"""

import lightning
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import aefast


class Autoencoder(lightning.LightningModule):
    def __init__(self, latent=3):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, latent))
        self.hidden = nn.Linear(latent, 16)
        self.output = nn.Linear(16, 12)

    def forward(self, x):
        h = F.silu(self.hidden(self.encoder(x)))
        return torch.sigmoid(self.output(h))

    def training_step(self, batch, index):
        (x,) = batch
        loss = F.mse_loss(self(x), x)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def train(folder, is_patched):
    lightning.seed_everything(0, verbose=False)
    model = Autoencoder()
    report = aefast.patch(model) if is_patched else None
    loader = DataLoader(TensorDataset(torch.rand(64, 12)), batch_size=16)
    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=True,
    )
    trainer.fit(model, loader)
    trainer.save_checkpoint(folder / "last.ckpt")
    return model, report, trainer.callback_metrics["loss"]
