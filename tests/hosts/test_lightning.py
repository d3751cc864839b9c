"""A Lightning module, trained by Lightning with and without `aefast.patch`."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import aefast

lightning = pytest.importorskip("lightning", reason="the host is Lightning, which is not installed")


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


@pytest.mark.filterwarnings("ignore:.*num_workers", "ignore:.*log_every_n_steps", "ignore:.*treespec")
def test_trained_by_lightning(tmp_path):
    _, _, expected = train(tmp_path / "plain", False)
    model, report, loss = train(tmp_path / "patched", True)
    assert [(entry.where, entry.what) for entry in report.swapped] == [
        ("forward", "F.silu(self.hidden(self.encoder(x))) → linear_act"),
        ("forward", "torch.sigmoid(self.output(h)) → linear_act"),
        ("training_step", "mse_loss → reconstruction_loss"),
        ("encoder:0-2", "Linear + GELU + Linear → mlp"),
    ]
    # Twelve steps of Adam, whose first are of one size however small a gradient is: roundings grow.
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    loaded = Autoencoder.load_from_checkpoint(tmp_path / "patched" / "last.ckpt", weights_only=True)
    assert type(loaded) is Autoencoder
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    report.undo()
    x = torch.rand(8, 12)
    assert torch.equal(model(x), loaded(x))
