"""A Lightning module, trained by Lightning with and without `aefast.patch`."""

import importlib

import pytest
import torch


@pytest.mark.filterwarnings("ignore:.*num_workers", "ignore:.*log_every_n_steps", "ignore:.*treespec")
def test_trained_by_lightning(tmp_path):
    pytest.importorskip("lightning", reason="the host is Lightning, which is not installed")
    host = importlib.import_module("support.lightning_host")
    _, _, expected = host.train(tmp_path / "plain", False)
    model, report, loss = host.train(tmp_path / "patched", True)
    assert [(entry.where, entry.what) for entry in report.swapped] == [
        ("forward", "F.silu(self.hidden(self.encoder(x))) → linear_act"),
        ("forward", "torch.sigmoid(self.output(h)) → linear_act"),
        ("training_step", "mse_loss → reconstruction_loss"),
        ("encoder:0-2", "Linear + GELU + Linear → mlp"),
    ]
    # Twelve steps of Adam, whose first are of one size however small a gradient is: roundings grow.
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    loaded = host.Autoencoder.load_from_checkpoint(tmp_path / "patched" / "last.ckpt", weights_only=True)
    assert type(loaded) is host.Autoencoder
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    report.undo()
    x = torch.rand(8, 12)
    assert torch.equal(model(x), loaded(x))
