"""The sparse autoencoder: its kinds of sparsity, unit directions, dead latents, and other libraries' files."""

import copy
import json

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from aefast import cli
from aefast.data import Dataset
from aefast.errors import InputError
from aefast.models import (
    VAE,
    SparseAutoencoder,
    SparseCode,
    SparseConfig,
    from_pretrained,
    load_saelens,
    load_sparsify,
    save_saelens,
    save_sparsify,
    sparse,
)
from aefast.models.sparse import SPARSITIES
from aefast.nn import JumpReLU, PenalizedLinearAct, SparseDecoder, TopKEncoder
from aefast.train import TrainConfig, Trainer
from support.training import SPARSE

FEATURES, LATENT, BATCH = 12, 40, 30


def make(sparsity="topk", dtype=torch.float64, **options):
    torch.manual_seed(0)
    given = SPARSE[sparsity] | options
    model = SparseAutoencoder(input_size=FEATURES, latent=LATENT, sparsity=sparsity, dtype=dtype, **given)
    with torch.no_grad():
        # What training would make of the start, in which encoder and decoder are one and biases 0.
        model.encoder.weight.add_(0.1 * torch.randn_like(model.encoder.weight))
        model.encoder.bias.add_(0.1 * torch.randn_like(model.encoder.bias))
        model.decoder.bias.add_(0.1 * torch.randn_like(model.decoder.bias))
    if options.get("unit_norm", True):
        model.normalize()
    return model


def data(batch=BATCH, dtype=torch.float64):
    return torch.randn(batch, FEATURES, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        dtype
    )


def directions(model):
    return model.encoder.weight if model.config.tied else model.decoder.weight


def plain_code(model, x):
    """The codes by the formulas of the class, dense."""
    config = model.config
    made = (x - model.decoder.bias if config.pre_bias else x) @ model.encoder.weight.T + model.encoder.bias
    if config.sparsity == "l1":
        return made.relu()
    if config.sparsity == "kl":
        return made.sigmoid()
    if config.sparsity == "jumprelu":
        return made * (made > model.log_threshold.exp())
    if config.sparsity == "topk":
        kept = torch.zeros_like(made, dtype=torch.bool).scatter(1, made.topk(config.k).indices, True)
    else:
        flat = torch.zeros(made.numel(), dtype=torch.bool)
        flat[made.flatten().topk(config.k * len(x)).indices] = True
        kept = flat.view_as(made)
    return torch.where(kept, made, 0.0).relu()


@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pre_bias", [True, False])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_the_loss_is_that_of_the_formulas(sparsity, pre_bias, tied, unit_norm):
    model = make(sparsity, pre_bias=pre_bias, tied=tied, unit_norm=unit_norm)
    x = data()
    out = model(x)
    code = plain_code(model, x)
    made = code @ directions(model) + model.decoder.bias
    expected = (made - x).square().mean()
    weight = model.config.sparsity_weight
    if sparsity == "l1":
        expected = expected + weight * code.abs().sum(1).mean()
    elif sparsity == "kl":
        rate, mean = model.config.rate, code.mean(0)
        divergence = rate * (rate / mean).log() + (1 - rate) * ((1 - rate) / (1 - mean)).log()
        expected = expected + weight * divergence.sum()
    elif sparsity == "jumprelu":
        expected = expected + weight * (code > 0).sum(1).double().mean()
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(sum(out.terms.values()), out.loss)
    torch.testing.assert_close(model.dense(out.latent), code)
    torch.testing.assert_close(out.reconstruction, made)


@pytest.mark.parametrize("sparsity", ["l1", "kl", "jumprelu"])
def test_the_weight_of_the_penalty_grows_over_the_warm_up(tmp_path, sparsity):
    plain, model, x = make(sparsity), make(sparsity, sparsity_warmup_steps=4), data()
    whole = plain(x).terms["sparsity"]
    twin = model.eager_twin()
    shares = [(model(x).terms["sparsity"] / whole).item() for _ in range(3)]
    assert shares == pytest.approx([0.0, 0.25, 0.5])
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded(x).terms["sparsity"].item() == pytest.approx(whole.item())
    shares = [(loaded.train()(x).terms["sparsity"] / whole).item() for _ in range(3)]
    assert shares == pytest.approx([0.75, 1.0, 1.0])
    assert loaded.training_steps == 6 and model.training_steps == 3
    losses = [model.eager_loss(twin, x).item() for _ in range(2)]
    reconstruction = model(x).terms["mse"].item()
    assert losses == pytest.approx([reconstruction, reconstruction + 0.25 * whole.item()])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_repeats_the_weight_of_its_pass(use_reentrant):
    model = make("l1", sparsity_warmup_steps=3)
    for _ in range(3):
        twin, x = copy.deepcopy(model), data().requires_grad_()
        for one, run in (
            (model, lambda loss, x: checkpoint(loss, x, use_reentrant=use_reentrant)),
            (twin, lambda loss, x: loss(x)),
        ):
            one.zero_grad()
            run(lambda x, one=one: one(x).loss, x).backward()
        for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
        assert model.training_steps == twin.training_steps


def test_thresholds_learn_within_the_bandwidth():
    """Their gradients are those of arXiv:2407.14435 with a rectangle of that width as the kernel."""
    model, x = make("jumprelu"), data()
    model(x).loss.backward()
    config, threshold = model.config, model.log_threshold.detach().exp()
    with torch.no_grad():
        made = (x - model.decoder.bias) @ model.encoder.weight.T + model.encoder.bias
        left = plain_code(model, x) @ model.decoder.weight + model.decoder.bias - x
        by_code = 2 / x.numel() * left @ model.decoder.weight.T
        kernel = ((made - threshold).abs() < config.bandwidth / 2) / config.bandwidth
        by_threshold = -(kernel * (threshold * by_code + config.sparsity_weight / BATCH)).sum(0)
    assert 0 < kernel.count_nonzero() < kernel.numel()
    torch.testing.assert_close(model.log_threshold.grad, threshold * by_threshold)


@pytest.mark.parametrize("sparsity", ["l1", "jumprelu"])
def test_lengths_of_directions_go_into_the_codes(sparsity):
    model, x = of_other_lengths(make(sparsity)), data()
    with torch.no_grad():
        model.decoder.weight[3] = 0.0
    norms = model.decoder.weight.detach().norm(dim=1)
    code = plain_code(model, x)
    made = code @ model.decoder.weight + model.decoder.bias
    model.fold_decoder_norms()
    model.eval()
    norms[3] = 1.0
    torch.testing.assert_close(model.encode(x), code * norms)
    torch.testing.assert_close(model(x).reconstruction, made)
    norms = torch.ones_like(norms)
    norms[3] = 0.0
    torch.testing.assert_close(model.decoder.weight.norm(dim=1), norms)


@pytest.mark.parametrize(
    ("sparsity", "tied", "message"),
    [
        ("topk", False, "sparsity='topk': expected l1 or jumprelu, .* unit_norm=False"),
        ("batchtopk", False, "sparsity='batchtopk': expected l1 or jumprelu"),
        ("kl", False, "sparsity='kl': expected l1 or jumprelu"),
        ("l1", True, "tied=True: expected an encoder of its own"),
    ],
)
def test_lengths_that_codes_cannot_take_up_are_refused(sparsity, tied, message):
    model = of_other_lengths(make(sparsity, tied=tied))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=message):
        model.fold_decoder_norms()
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_weights_from_elsewhere_need_no_counts(tmp_path, sparsity):
    model, x = make(sparsity, dtype=torch.float32), data(dtype=torch.float32)
    model(x)
    state = model.state_dict()
    state.pop("unused", None)
    model.load_state_dict(state)
    around = torch.nn.Sequential(make(sparsity, dtype=torch.float32))
    around.load_state_dict({f"0.{name}": one for name, one in state.items()})
    model.eval().save_pretrained(tmp_path)
    safetensors.torch.save_file(dict(state), tmp_path / "model.safetensors")
    loaded = from_pretrained(tmp_path)
    for one in (model, around[0], loaded):
        assert "unused" not in one._buffers or not (one.unused.any() or one.unused.is_meta)
        torch.testing.assert_close(one.eval()(x).reconstruction, model(x).reconstruction)
    state.pop("encoder.bias")
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"encoder.bias\"\."):
        model.load_state_dict(state)


@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_the_eager_twin_trains_alike(sparsity, tied, unit_norm):
    model = make(
        sparsity, tied=tied, unit_norm=unit_norm, **({"dead_after": 1} if "topk" in sparsity else {})
    )
    twin, x = model.eager_twin(), data()
    for one in (model, twin):
        # With the dead latents that the first batch leaves, the second has an auxiliary loss.
        one.optimizer = torch.optim.SGD(one.parameters(), 0.1)
    for _ in range(3):
        losses = [model(x).loss, model.eager_loss(twin, x)]
        for one, loss in zip((model, twin), losses, strict=True):
            one.optimizer.zero_grad()
            loss.backward()
        torch.testing.assert_close(*losses)
        for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")
        for one in (model, twin):
            one.optimizer.step()
    for ours, theirs in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs)
    if unit_norm:
        SparseAutoencoder.normalize(twin)
    torch.testing.assert_close(model.eval()(x).reconstruction, twin.eval()(x))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_directions_stay_of_length_one(sparsity, tied):
    model, x = make(sparsity, dtype=torch.float32, tied=tied), data(dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        model(x).loss.backward()
        along = (directions(model) * directions(model).grad).sum(1)
        # Of a sum of FEATURES products that cancel.
        assert along.abs().max() <= 1e-6 * directions(model).grad.abs().max().clamp_min(1)
        optimizer.step()
    assert (directions(model).norm(dim=1) - 1).abs().max() > 1e-4
    model.eval()
    kept = directions(model).clone()
    torch.testing.assert_close(kept.norm(dim=1), torch.ones(LATENT))
    model.normalize()
    assert torch.equal(directions(model), kept)


def of_other_lengths(model):
    """The model with directions of lengths from 1/2 to 2, in training mode."""
    with torch.no_grad():
        directions(model).mul_(torch.linspace(0.5, 2, LATENT, dtype=torch.float64)[:, None])
    return model.train()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_gradients_through_encode_and_decode_whatever_the_lengths(sparsity, tied):
    """They are those of the decoder that is used, of length 1, without what is along its directions."""
    model, x = of_other_lengths(make(sparsity, tied=tied)), data()
    reference = copy.deepcopy(model)
    with torch.no_grad():
        unit = F.normalize(directions(reference), dim=1)
        directions(reference).copy_(unit)
    made = plain_code(reference, x) @ directions(reference) + reference.decoder.bias
    # Two decodes of one encode, as in nested losses.
    (made - x).square().mean().mul(2).backward()
    code = model.encode(x)
    loss = F.mse_loss(model.decode(code), x) + F.mse_loss(model.decode(model.dense(code)), x)
    loss.backward()
    torch.testing.assert_close(directions(model).detach(), unit)
    gradient = directions(reference).grad
    gradient -= unit * (gradient * unit).sum(1, keepdim=True)
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        if name != "log_threshold":
            torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sparsity", ["topk", "batchtopk", "l1", "jumprelu"])
def test_losses_of_one_s_own_train_the_model_of_forward(sparsity, tied):
    """With what is counted beside the weights; bit for bit but for the order of a sum where both layers are one."""
    without = {"aux_weight": 0.0} if "topk" in sparsity else {"sparsity_weight": 0.0}
    model = make(sparsity, tied=tied, **without).train()
    twin = copy.deepcopy(model)
    for one, loss in (
        (model, lambda x: F.mse_loss(model.decode(model.encode(x)), x)),
        (twin, lambda x: twin(x).loss),
    ):
        optimizer = torch.optim.Adam(one.parameters(), lr=0.05)
        for x in data().split(5):
            optimizer.zero_grad()
            loss(x).backward()
            optimizer.step()
    assert model.unused.any()
    for (name, ours), theirs in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        if tied and ours.is_floating_point():
            torch.testing.assert_close(ours, theirs)
        else:
            assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("sparsity", ["topk", "batchtopk", "l1"])
def test_losses_of_one_s_own_are_compiled(sparsity):
    """Also where the compiler takes `encode` and `decode` apart, of which the latter makes directions of length 1."""
    model = of_other_lengths(make(sparsity, dtype=torch.float32))
    twin, x = copy.deepcopy(model), data(dtype=torch.float32)

    def loss(one, x):
        return F.mse_loss(one.decode(one.encode(x)), x)

    for one, call in ((model, torch.compile(loss, backend="aot_eager")), (twin, loss)):
        call(one, x).backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")
    assert torch.equal(model.unused, twin.unused)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("sparsity", ["batchtopk", "jumprelu"])
def test_a_checkpoint_counts_once(sparsity, use_reentrant):
    model = make(sparsity)
    twin, x = copy.deepcopy(model), data(4).requires_grad_()

    def losses(one):
        return (lambda x: one(x).loss), (lambda x: one.dense(one.encode(x)).sum())

    for ours, theirs in zip(losses(model), losses(twin), strict=True):
        checkpoint(ours, x, use_reentrant=use_reentrant).backward()
        theirs(x).backward()
    assert twin.unused.any()
    for (name, ours), theirs in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


def test_nothing_is_counted_in_the_transforms_of_torch_func():
    model, x = make(), data()
    jacobian = torch.func.jacrev(lambda x: model.encode(x).values)(x)
    assert jacobian.shape == (BATCH, model.config.k, *x.shape)
    assert not model.unused.any()


class Halved(torch.nn.Module):
    def forward(self, weight):
        return 0.5 * weight


@pytest.mark.parametrize("tied", [True, False])
def test_parametrized_directions_have_length_one_where_they_are_used(tied):
    model, x = make(tied=tied), data()
    expected = model.eval()(x)
    layer = model.encoder if tied else model.decoder
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Halved())
    torch.testing.assert_close(model(x).reconstruction, expected.reconstruction)
    optimizer = torch.optim.SGD(model.train().parameters(), 0.1)
    for loss in (lambda: model(x).loss, lambda: F.mse_loss(model.decode(model.encode(x)), x)):
        optimizer.zero_grad()
        loss().backward()
        own = layer.parametrizations.weight.original
        # The gradient of w/|w| has nothing along w.
        torch.testing.assert_close((own * own.grad).sum(1), torch.zeros(LATENT, dtype=torch.float64))
        assert own.grad.abs().max() > 1e-3
        optimizer.step()
    made = model(x).reconstruction
    torch.testing.assert_close(model.eval()(x).reconstruction, made)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_several_forwards_before_a_backward(sparsity, tied):
    """And the model in eval mode between them: directions that have length 1 are not touched."""
    torch.manual_seed(0)
    model = SparseAutoencoder(
        input_size=8, latent=24, sparsity=sparsity, tied=tied, **SPARSE[sparsity]
    ).train()
    x, y = torch.rand(16, 8), torch.rand(16, 8)
    loss = model(x).loss + model(y).loss
    model.eval()
    model(x)
    model.train()
    loss.backward()
    found = [one.grad.clone() for one in model.parameters()]
    model.zero_grad()
    model(x).loss.backward()
    model(y).loss.backward()
    for one, gradient in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(one.grad, gradient)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("sparsity", ["topk", "batchtopk"])
def test_a_checkpoint_repeats_the_dead_latents_of_its_pass(sparsity, use_reentrant):
    """What it computes again in the backward is the pass as it was, and counts once."""
    model = make(sparsity, dead_after=4, aux_k=8)
    for part in data().split(4)[:3]:
        twin, x = copy.deepcopy(model), part.requires_grad_()
        for one, run in (
            (model, lambda loss, x: checkpoint(loss, x, use_reentrant=use_reentrant)),
            (twin, lambda loss, x: loss(x)),
        ):
            one.zero_grad()
            run(lambda x, one=one: one(x).loss, x).backward()
            assert 0 < one.dead.sum() < LATENT
        for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad), name
        for (name, ours), theirs in zip(model.named_buffers(), twin.buffers(), strict=True):
            assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("sparsity", ["topk", "batchtopk"])
def test_checkpoints_repeat_the_dead_latents_each_of_its_own_passes(sparsity):
    """Two that wait for the backward at once, of which one has two passes."""
    model = make(sparsity, dead_after=4, aux_k=8)
    twin, parts = copy.deepcopy(model), data().split(4)
    for one, run in (
        (model, lambda loss, *parts: checkpoint(loss, *parts, use_reentrant=False)),
        (twin, lambda loss, *parts: loss(*parts)),
    ):

        def loss(*parts, one=one):
            return sum(one(part).loss for part in parts)

        run(loss, parts[0]).backward()
        one.zero_grad()
        dead = one.dead.clone()
        (run(loss, *parts[:2]) + run(loss, parts[2])).backward()
        assert not torch.equal(one.dead, dead)
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    for (name, ours), theirs in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


def test_hooks_of_saved_tensors_make_no_pass_a_repeated_one():
    """A reentrant checkpoint's pass in the backward is the first that counts, whatever hooks are around it."""
    model = make("topk", dead_after=4, aux_k=8)
    twin, x = copy.deepcopy(model), data().requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        checkpoint(lambda x: model(x).loss, x, use_reentrant=True).backward()
    twin(x).loss.backward()
    for (name, ours), theirs in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sparsity", ["l1", "kl", "jumprelu"])
def test_gradients_by_torch_func_are_those_of_autograd(sparsity, tied):
    model, x = make(sparsity, tied=tied), data()
    parameters = dict(model.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).loss

    expected = torch.autograd.grad(model(x).loss, parameters.values())
    detached = {name: one.detach() for name, one in parameters.items()}
    found = torch.func.grad(loss)(detached, x)
    by_parts = torch.func.vmap(torch.func.grad(loss), (None, 0))(detached, x.view(3, -1, FEATURES))
    of_part = torch.autograd.grad(model(x[: BATCH // 3]).loss, parameters.values())
    for name, one, part in zip(parameters, expected, of_part, strict=True):
        torch.testing.assert_close(found[name], one)
        torch.testing.assert_close(by_parts[name][0], part)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_batchtopk_trains_in_another_dtype_and_takes_an_empty_batch(dtype):
    model = SparseAutoencoder(input_size=8, latent=24, sparsity="batchtopk", k=3).to(dtype).train()
    model(torch.rand(16, 8, dtype=dtype)).loss.backward()
    kept = model.kept_above.clone()
    assert kept > 0 and kept.dtype == torch.float32
    model(torch.rand(0, 8, dtype=dtype))
    assert model.kept_above == kept


def test_without_unit_norm_directions_are_free():
    model, x = make(unit_norm=False), data()
    with torch.no_grad():
        model.decoder.weight.mul_(3)
    model(x).loss.backward()
    assert (model.decoder.weight * model.decoder.weight.grad).sum(1).abs().max() > 1e-3
    torch.testing.assert_close(
        model.eval().decoder.weight.norm(dim=1), torch.full((LATENT,), 3.0, dtype=torch.float64)
    )


def test_hooks_that_nobody_calls_are_told_of(caplog, monkeypatch):
    monkeypatch.setattr(sparse, "_warn_of_hooks", sparse._warn_of_hooks.__wrapped__)
    model = make()
    model(data())
    assert not caplog.records
    model.encoder.register_forward_hook(lambda *arguments: None)
    for call in (model, model.encode):
        caplog.clear()
        call(data())
        (record,) = caplog.records
        assert "hooks of the modules encoder and decoder are not called" in record.message


@pytest.mark.parametrize("layer", ["encoder", "decoder"])
def test_lengths_of_parametrized_weights_are_refused(layer):
    model = of_other_lengths(make("l1", unit_norm=False))
    torch.nn.utils.parametrizations.weight_norm(getattr(model, layer), "weight")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="got parametrized ones; remove the parametrizations first"):
        model.fold_decoder_norms()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_shards_are_not_normalized_within_a_forward():
    """The forward has gathered copies, of which nothing would be kept."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, free = make(dtype=torch.float32), make(dtype=torch.float32, unit_norm=False)
        for one in (model, free):
            fully_shard(one)
        with pytest.raises(
            InputError, match=r"unit_norm=True: within fully_shard .* unit_norm=False, and call"
        ):
            model(data(dtype=torch.float32))
        with pytest.raises(InputError, match=r"unit_norm=True: within fully_shard"):
            model.decode(torch.ones(2, LATENT))
        model.eval()(data(dtype=torch.float32))
        optimizer = torch.optim.Adam(free.parameters(), lr=0.1)
        for _ in range(3):
            free.normalize()
            norms = free.decoder.weight.full_tensor().norm(dim=1)
            torch.testing.assert_close(norms, torch.ones(LATENT))
            free(data(dtype=torch.float32)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        dist.destroy_process_group()


def test_dead_latents_make_what_is_left():
    model, x = make(dead_after=BATCH, aux_k=3, aux_weight=0.5), data()
    with torch.no_grad():
        # These are never among the largest.
        model.encoder.bias[:7] = -20.0
    assert "aux" in model(x).terms
    dead = model.unused >= BATCH
    assert dead[:7].all()
    assert model.dead.equal(dead)
    with torch.no_grad():
        model.encoder.bias[:7] = 0.0
    before = copy.deepcopy(model)
    out = model(x)
    with torch.no_grad():
        left = x - (plain_code(before, x) @ before.decoder.weight + before.decoder.bias)
        made = (x - before.decoder.bias) @ before.encoder.weight.T + before.encoder.bias
        kept = torch.where(dead, made, -torch.inf).topk(3)
        code = torch.zeros_like(made).scatter(1, kept.indices, kept.values.relu())
        expected = 0.5 * (code @ before.decoder.weight - left).square().mean()
    torch.testing.assert_close(out.terms["aux"], expected)
    # Latents of which it makes something are those that it has a gradient for.
    used = code.any(0)
    assert used.any()
    (gradient,) = torch.autograd.grad(out.terms["aux"], model.decoder.weight)
    assert gradient.any(1).equal(used)


def test_few_dead_latents_have_a_share_of_their_loss():
    """As many as there are of those that it asks for."""
    losses = []
    for aux_k in (2, 8):
        model = make(dead_after=1, aux_k=aux_k)
        model.unused[3:5] = 1
        losses.append(model(data()).terms["aux"])
    torch.testing.assert_close(losses[1], 2 / 8 * losses[0])


def _nothing(model, number):
    return model


def _by_hand(model, number):
    if number in (2, 7):
        model.unused[number] = model.config.dead_after
    return model


def _by_load(model, number):
    if number in (2, 7):
        model.load_state_dict({**model.state_dict(), "unused": torch.arange(LATENT) * 60 // number})
    return model


def _by_swap(model, number):
    """As `torch.utils.swap_tensors` lets tensors be loaded: the same tensor by its name, with another version."""
    if number in (2, 7):
        other = torch.full_like(model.unused, model.config.dead_after)
        for _ in range(model.unused._version):
            other.add_(0)
        torch.utils.swap_tensors(model.unused, other)
    return model


def _by_another(model, number):
    if number in (2, 7):
        model.unused = model.unused + 3 * BATCH
    return model


def _by_copy(model, number):
    if number in (2, 7):
        model.unused += 2 * BATCH
    return copy.deepcopy(model)


def _by_encode(model, number):
    model.encode(data(7))
    return model


def _by_compiler(model, number):
    if number in (2, 7):
        torch._dynamo.reset()
        torch.compile(model, backend="aot_eager")(data(3 * BATCH))
    return model


def _by_eval(model, number):
    if number in (2, 7):
        model.eval()(data())
        model.train()
    return model


@pytest.mark.parametrize(
    "change",
    [_nothing, _by_hand, _by_load, _by_swap, _by_another, _by_copy, _by_encode, _by_compiler, _by_eval],
)
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_dead_latents_are_known_without_a_look_where_there_can_be_none(change, is_checkpointed, monkeypatch):
    """As on a GPU, where a look waits: the same steps, whatever else happens to the counts."""

    def steps(is_waited_for):
        monkeypatch.setattr(sparse, "_is_waited_for", lambda unused: is_waited_for)
        model, found = make("topk", dead_after=5 * BATCH, aux_k=8), []
        with torch.no_grad():
            model.encoder.bias[:7] = -20.0
        for number in range(10):
            model = change(model, number)
            model.zero_grad()
            x = data() + number
            loss = (
                checkpoint(lambda x, model=model: model(x).loss, x, use_reentrant=False)
                if is_checkpointed
                else (model(x).loss)
            )
            loss.backward()
            found += [loss.detach(), *(one.grad for one in model.parameters()), model.unused.clone()]
        assert model.dead.any()
        return found

    for ours, theirs in zip(steps(True), steps(False), strict=True):
        assert torch.equal(ours, theirs)


@pytest.fixture
def looks_of(monkeypatch):
    """`looks_of(model, x)`: how often a pass asks for counts of latents, as on a GPU."""
    asked = []
    monkeypatch.setattr(sparse, "_is_waited_for", lambda unused: True)
    for name in ("_listed", "_largest"):
        look = getattr(sparse, name)
        monkeypatch.setattr(
            sparse, name, lambda *arguments, look=look: asked.append(look) or look(*arguments)
        )

    def looks_of(model, x):
        asked.clear()
        model(x)
        return len(asked)

    return looks_of


@pytest.mark.parametrize(
    ("is_unused", "expected"), [(True, [1, 0, 0, 0, 0, 1, 1, 1]), (False, [1, 0, 0, 0, 0, 1, 1, 0])]
)
def test_passes_look_for_dead_latents_when_there_can_be_some(is_unused, expected, looks_of):
    """The first asks for the largest count. After as many samples as make one dead, the dead are listed; if there are
    none, the next asks for the largest count again."""
    model = make("topk", dead_after=5 * BATCH, k=LATENT // 2)
    if is_unused:
        with torch.no_grad():
            model.encoder.bias[:7] = -20.0
    assert [looks_of(model, data()) for _ in range(8)] == expected
    assert model.dead.any() == is_unused


def test_what_graphs_count_is_asked_for(looks_of, monkeypatch):
    """A replay counts on, and the tensor's version does not tell of it."""
    model, x = make("topk", dead_after=5 * BATCH, k=LATENT // 2), data()
    assert [looks_of(model, x) for _ in range(2)] == [1, 0]
    with monkeypatch.context() as within:
        within.setattr(sparse, "_is_capturing", lambda one: True)
        model.encode(x)
    model.unused.data[3] = 5 * BATCH
    assert model(x).terms["aux"] > 0
    model.unused.zero_()
    assert [looks_of(model, x) for _ in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("sparsity", sorted({*SPARSITIES} - {"kl"}))
def test_use_is_counted_in_training_alone(sparsity):
    model, x = make(sparsity), data()
    with torch.no_grad():
        model.encoder.bias[:7] = -20.0
    assert not model.unused.any()
    used = (plain_code(model, x) > 0).any(0)
    model(x)
    assert torch.equal(model.unused, torch.where(used, 0, BATCH))
    with torch.no_grad():
        model(x)
    model.eval()(x)
    assert torch.equal(model.unused, torch.where(used, 0, BATCH))
    model.train()(x[:0])
    model.encode(x)
    assert torch.equal(model.unused, torch.where(used, 0, 2 * BATCH))
    assert model.unused[:7].all() and not model.dead.any()
    model.unused[2] = 1_000_000
    assert model.dead.nonzero().tolist() == [[2]]


def test_codes_of_batchtopk_in_eval_mode_are_the_samples_own():
    model, x = make("batchtopk"), data()
    least = model(x).latent.values
    least = least[least > 0].min()
    torch.testing.assert_close(model.kept_above, least.float())
    model.eval()
    whole = model.dense(model.encode(x))
    parts = torch.cat([model.dense(model.encode(part)) for part in x.split(7)])
    torch.testing.assert_close(whole, parts)
    made = (x - model.decoder.bias) @ model.encoder.weight.T + model.encoder.bias
    torch.testing.assert_close(whole, torch.where(made > model.kept_above, made, 0.0))


def test_what_batches_kept_is_a_running_mean():
    model = make("batchtopk")
    least = []
    for x in data().split(10):
        values = model(x).latent.values
        least.append(values[values > 0].min().float())
    expected = least[0]
    for one in least[1:]:
        expected = 0.99 * expected + 0.01 * one
    torch.testing.assert_close(model.kept_above, expected)


def test_a_sparse_code_and_its_dense_view_decode_alike():
    model, x = make("batchtopk"), data()
    code = model.encode(x)
    assert isinstance(code, SparseCode)
    assert code.values.shape == code.indices.shape
    dense = model.dense(code)
    assert dense.shape == (BATCH, LATENT)
    torch.testing.assert_close(model.decode(code), model.decode(dense))


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_evaluate(sparsity):
    model, x = make(sparsity).eval(), data()
    measures = model.evaluate(x)
    code = model.dense(model.encode(x))
    error = (model.decode(model.encode(x)) - x).square().mean()
    torch.testing.assert_close(measures["mse"], error)
    torch.testing.assert_close(measures["l0"], (code > 0).sum(1).double().mean())
    torch.testing.assert_close(measures["explained_variance"], 1 - error / x.var(0, unbiased=False).mean())
    assert ("dead" in measures) == (sparsity != "kl")
    assert ("sparsity" in measures) == ("topk" not in sparsity)
    torch.testing.assert_close(measures["loss"], measures["mse"] + measures.get("sparsity", 0.0))


@pytest.mark.parametrize("size", [1, 29, 30])
def test_training_tells_what_is_explained_of_all_held_out_samples(tmp_path, size):
    """Single samples among their batches, which have no variance."""
    x = data(dtype=torch.float32)
    for held_out in (x, torch.ones_like(x)):
        trainer = Trainer(
            make(dtype=torch.float32),
            [x],
            TrainConfig(epochs=1, device="cpu"),
            tmp_path,
            validation=list(held_out.split(size)),
            console=Console(quiet=True),
        )
        trainer._plot = lambda: None
        found = trainer.fit(overwrite=True, compare=False).held_out
        if held_out is x:
            expected = from_pretrained(tmp_path).evaluate(x)["explained_variance"].item()
            assert found["explained_variance"] == pytest.approx(expected, rel=1e-5)
        else:
            assert "explained_variance" not in found


def offset_samples(count=2000):
    """Codes of few of 24 directions, with two features far from 0."""
    generator = torch.Generator().manual_seed(4)
    atoms = F.normalize(torch.randn(24, FEATURES, generator=generator), dim=1)
    codes = torch.rand(count, 24, generator=generator)
    samples = (codes * (torch.rand(count, 24, generator=generator) < 0.1)) @ atoms
    samples[:, 3] += 200
    samples[:, 7] -= 60
    return samples


def trainer_of(directory, model, samples, **options):
    config = TrainConfig(**{"epochs": 2, "batch_size": 50, "device": "cpu", "lr": 3e-3, **options})
    made = Trainer(
        model, Dataset("offset", samples, (FEATURES,)), config, directory, console=Console(quiet=True)
    )
    made._plot = lambda: None
    return made


def new(**options):
    torch.manual_seed(0)
    return SparseAutoencoder(input_size=FEATURES, latent=LATENT, **options)


@pytest.mark.parametrize("sparsity", ["topk", "l1"])
def test_a_run_finds_directions_of_samples_far_from_0(tmp_path, sparsity):
    options = {"k": 4} if sparsity == "topk" else {}
    found = trainer_of(tmp_path, new(sparsity=sparsity, **options), offset_samples(), epochs=8).fit(
        compare=False
    )
    assert found.held_out["explained_variance"] > 0.8


def test_a_run_begins_with_the_mean_of_its_first_batch(tmp_path):
    samples = offset_samples(200)
    made = trainer_of(tmp_path, new(k=4), samples, steps=1, lr=1e-12, ema_decay=0.5)
    expected = next(iter(made.batches.epoch(0))).double().mean(0).float()
    assert made.model.awaits_samples
    made.fit(compare=False)
    # The average of the weights, which is what is kept, begins there too.
    for one in (made.model, from_pretrained(tmp_path)):
        torch.testing.assert_close(one.decoder.bias.detach(), expected)
        assert not one.awaits_samples


@pytest.mark.parametrize(
    "options",
    [{"pre_bias": False}, {"output_activation": "sigmoid"}, {"loss": "bce_with_logits"}],
    ids=str,
)
def test_biases_that_are_no_means_of_samples_begin_as_they_are(options):
    assert not new(**options).awaits_samples


def test_what_was_trained_before_keeps_its_bias(tmp_path):
    samples = offset_samples(200)
    for name in ("encoder", "decoder"):
        model = new(k=4)
        with torch.no_grad():
            getattr(model, name).bias[1] = 0.25
        before = model.decoder.bias.clone()
        trainer_of(tmp_path / name, model, samples, steps=1, lr=1e-12).fit(compare=False)
        torch.testing.assert_close(model.decoder.bias, before)
    frozen = new(k=4)
    frozen.decoder.bias.requires_grad_(False)
    assert not frozen.awaits_samples


def test_a_resumed_run_does_not_begin_again(tmp_path):
    """Also where training has left the bias 0."""
    samples = offset_samples(200)
    for directory, steps in (("whole", (6,)), ("parts", (2, 6))):
        for count in steps:
            made = trainer_of(
                tmp_path / directory, new(sparsity="l1", sparsity_warmup_steps=5), samples, steps=count
            )
            made.fit(compare=False, resume=count > steps[0])
    whole, parts = (from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    for ours, theirs in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    made = trainer_of(
        tmp_path / "parts", new(sparsity="l1", sparsity_warmup_steps=5), samples, steps=7, lr=3e-3
    )
    made._initialize = None
    restore = made._restore

    def emptied(checkpoint):
        restore(checkpoint)
        with torch.no_grad():
            made.model.decoder.bias.zero_()
            made.model.encoder.bias.zero_()

    made._restore = emptied
    made.fit(compare=False, resume=True)


def test_samples_that_a_model_begins_with_are_checked():
    with pytest.raises(InputError, match="samples: expected at least one"):
        new().initialize(torch.empty(0, FEATURES))
    with pytest.raises(InputError, match=r"x: expected shape \(B, 12\)"):
        new().initialize(torch.empty(3, 5))


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_round_trip(tmp_path, sparsity):
    model, x = make(sparsity, dtype=torch.float32), data(dtype=torch.float32)
    model(x)
    model.eval().save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert type(loaded) is SparseAutoencoder
    assert loaded.config == model.config
    assert torch.equal(loaded(x).reconstruction, model(x).reconstruction)
    for ours, theirs in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_training_streams_from_a_memory_map(tmp_path):
    """Mixtures of few directions are found again."""
    generator = np.random.default_rng(0)
    atoms = generator.standard_normal((24, 16))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    codes = generator.random((4000, 24)) * (generator.random((4000, 24)) < 0.1)
    np.save(tmp_path / "activations.npy", (codes @ atoms).astype(np.float32))
    arguments = (
        *(
            "train",
            "--model",
            "sparse",
            "--data",
            str(tmp_path / "activations.npy"),
            "--latent",
            "48",
            "--k",
            "4",
        ),
        *("--epochs", "20", "--batch-size", "128", "--lr", "3e-3", "--no-compare", "--device", "cpu"),
        *("--dead-after", "4000", "--out", str(tmp_path / "run")),
    )
    assert cli.main(list(arguments)) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = [line["val_explained_variance"] for line in lines if "val_explained_variance" in line]
    assert measured[-1] > 0.9
    model = from_pretrained(tmp_path / "run")
    assert model.config.k == 4


def test_the_warm_up_of_the_penalty_is_an_option_of_the_command_line(tmp_path):
    np.save(tmp_path / "samples.npy", offset_samples(100).numpy())
    command = (
        f"train --model sparse --data {tmp_path}/samples.npy --out {tmp_path}/run --latent 20 --device cpu"
    )
    command += " --sparsity jumprelu --sparsity-warmup-steps 7 --steps 3 --no-compare"
    assert cli.main(command.split()) == 0
    model = from_pretrained(tmp_path / "run")
    assert (model.config.sparsity_warmup_steps, model.training_steps) == (7, 3)


def sparsify_files(folder, **changes):
    """A folder as sparsify's `save_to_disk` writes it."""
    generator = torch.Generator().manual_seed(2)
    shapes = {
        "encoder.weight": (LATENT, FEATURES),
        "encoder.bias": (LATENT,),
        "W_dec": (LATENT, FEATURES),
        "b_dec": (FEATURES,),
    }
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    weights["W_dec"] /= weights["W_dec"].norm(dim=1, keepdim=True)
    options = {
        "activation": "topk",
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": LATENT,
        "k": 5,
    }
    options |= {"multi_topk": False, "skip_connection": False, "transcode": False, "d_in": FEATURES}
    (folder / "cfg.json").write_text(json.dumps(options | changes))
    safetensors.torch.save_file(weights, folder / "sae.safetensors")
    return weights


def saelens_files(folder, architecture, **changes):
    """A folder as SAELens's `save_inference_model` writes it."""
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "W_enc": (FEATURES, LATENT),
        "b_enc": (LATENT,),
        "W_dec": (LATENT, FEATURES),
        "b_dec": (FEATURES,),
    }
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    options = {
        "d_in": FEATURES,
        "d_sae": LATENT,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
    }
    options |= {"normalize_activations": "none", "reshape_activations": "none", "architecture": architecture}
    if architecture == "topk":
        options["k"] = 5
    if architecture == "jumprelu":
        weights["threshold"] = torch.rand(LATENT, generator=generator)
    (folder / "cfg.json").write_text(json.dumps(options | changes))
    safetensors.torch.save_file(weights, folder / "sae_weights.safetensors")
    return weights


def test_loads_what_sparsify_saves(tmp_path):
    weights, x = sparsify_files(tmp_path), data(dtype=torch.float32)
    model = load_sparsify(tmp_path)
    made = F.relu((x - weights["b_dec"]) @ weights["encoder.weight"].T + weights["encoder.bias"])
    values, indices = made.topk(5)
    found = model.encode(x)
    torch.testing.assert_close(found.values, values)
    assert torch.equal(model.dense(found) > 0, torch.zeros_like(made).scatter(1, indices, values) > 0)
    expected = torch.zeros_like(made).scatter(1, indices, values) @ weights["W_dec"] + weights["b_dec"]
    torch.testing.assert_close(model(x).reconstruction, expected)


@pytest.mark.parametrize("rescaled", [True, False])
@pytest.mark.parametrize("pre_bias", [True, False])
@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "standard"])
def test_loads_what_saelens_saves(tmp_path, architecture, pre_bias, rescaled):
    changes = {"apply_b_dec_to_input": pre_bias}
    if architecture == "topk":
        changes["rescale_acts_by_decoder_norm"] = rescaled
    weights, x = saelens_files(tmp_path, architecture, **changes), data(dtype=torch.float32)
    model = load_saelens(tmp_path)
    made = (x - weights["b_dec"] if pre_bias else x) @ weights["W_enc"] + weights["b_enc"]
    decoder = weights["W_dec"]
    if architecture == "topk" and rescaled:
        norms = decoder.norm(dim=1)
        made, decoder = made * norms, decoder / norms[:, None]
    if architecture == "topk":
        values, indices = made.topk(5)
        code = torch.zeros_like(made).scatter(1, indices, values.relu())
    else:
        code = made.relu()
        if architecture == "jumprelu":
            code = code * (made > weights["threshold"])
    torch.testing.assert_close(model.dense(model.encode(x)), code)
    torch.testing.assert_close(model(x).reconstruction, code @ decoder + weights["b_dec"])


def with_tensors(folder, file, **tensors):
    """The file with more tensors in it."""
    weights = safetensors.torch.load_file(folder / file) | tensors
    safetensors.torch.save_file(weights, folder / file)


@pytest.mark.parametrize("name", ["scaling_factor", "finetuning_scaling_factor"])
@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "standard"])
def test_loads_the_scaling_factor_of_saelens(tmp_path, architecture, name):
    x = data(dtype=torch.float32)
    weights = saelens_files(tmp_path, architecture)
    plain = load_saelens(tmp_path)
    code = plain.dense(plain.encode(x))
    # Some versions write one that nothing was finetuned by.
    with_tensors(tmp_path, "sae_weights.safetensors", **{name: torch.ones(LATENT)})
    torch.testing.assert_close(load_saelens(tmp_path)(x).reconstruction, plain(x).reconstruction)
    saelens_files(tmp_path, architecture, finetuning_scaling_factor=True)
    factor = torch.linspace(0.5, 3, LATENT)
    with_tensors(tmp_path, "sae_weights.safetensors", **{name: factor})
    model = load_saelens(tmp_path)
    torch.testing.assert_close(model.dense(model.encode(x)), code)
    expected = (code * factor) @ weights["W_dec"] + weights["b_dec"]
    torch.testing.assert_close(model(x).reconstruction, expected)


@pytest.mark.parametrize(
    ("changes", "tensors", "message"),
    [
        ({"activation_fn_str": "tanh-relu"}, {}, "activation_fn_str='tanh-relu': expected 'relu' of archi"),
        ({"activation_fn": "gelu"}, {}, "activation_fn='gelu': expected 'relu' of architecture 'standard'"),
        ({}, {"W_skip": (12, 12)}, "W_skip: expected W_enc, b_enc, W_dec, b_dec alone"),
        ({}, {"threshold": (40,)}, "threshold: expected W_enc"),
        ({}, {"scaling_factor": (40,)}, "scaling_factor: expected one, and .* got numbers other than 1"),
        ({"finetuning_scaling_factor": True}, {}, "True: expected scaling_factor in sae_weights"),
        (
            {"finetuning_scaling_factor": True},
            {"scaling_factor": (3,)},
            r"expected shape \(40,\), got \(3,\)",
        ),
        (
            {"finetuning_scaling_factor": True},
            {"scaling_factor": (40,), "finetuning_scaling_factor": (40,)},
            "got two of them",
        ),
    ],
)
def test_what_changes_the_function_of_saelens_files_is_not_left_out(tmp_path, changes, tensors, message):
    saelens_files(tmp_path, "standard", **changes)
    more = {name: torch.full(shape, 2.0) for name, shape in tensors.items()}
    with_tensors(tmp_path, "sae_weights.safetensors", **more)
    with pytest.raises(InputError, match=message):
        load_saelens(tmp_path)


@pytest.mark.parametrize("name", ["activation_fn", "activation_fn_str"])
@pytest.mark.parametrize(
    ("architecture", "activation"), [("standard", "relu"), ("jumprelu", "relu"), ("topk", "topk")]
)
def test_saelens_files_may_name_their_activation(tmp_path, architecture, activation, name):
    saelens_files(tmp_path, architecture, **{name: activation})
    load_saelens(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_thresholds_are_those_of_the_file_in_every_dtype(tmp_path, dtype):
    weights = {name: one.to(dtype) for name, one in saelens_files(tmp_path, "jumprelu").items()}
    safetensors.torch.save_file(weights, tmp_path / "sae_weights.safetensors")
    model, threshold = load_saelens(tmp_path), weights["threshold"].float()
    torch.testing.assert_close(model.log_threshold.exp(), threshold)
    model(data(dtype=dtype)).loss.backward()
    for one in (torch.float16, torch.bfloat16):
        model.to(one)
        assert model(data(dtype=one)).latent.dtype == one
        torch.testing.assert_close(model.log_threshold.exp(), threshold)
        assert model.log_threshold.grad.dtype == torch.float32
        model.save_pretrained(tmp_path)
        assert torch.equal(from_pretrained(tmp_path).log_threshold, model.log_threshold)
    twin = model.float().eager_twin()
    assert torch.equal(twin.log_threshold, model.log_threshold)
    torch.testing.assert_close(model.log_threshold.exp(), threshold)


def trained(sparsity, **options):
    """A model whose every number matters, in training mode, as an optimiser's step leaves it."""
    torch.manual_seed(0)
    options |= {"k": 5} if "topk" in sparsity else {}
    model = SparseAutoencoder(input_size=FEATURES, latent=LATENT, sparsity=sparsity, **options)
    model(data(dtype=torch.float32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("options", [{}, {"pre_bias": False}, {"tied": True}, {"unit_norm": False}], ids=str)
def test_saves_as_sparsify_does(tmp_path, options):
    model, x = trained("topk", **options), data(dtype=torch.float32)
    save_sparsify(model, tmp_path / "new")
    expected = model.eval()(x).reconstruction
    weights = safetensors.torch.load_file(tmp_path / "new" / "sae.safetensors")
    written = json.loads((tmp_path / "new" / "cfg.json").read_text())
    made = F.relu((x - weights["b_dec"]) @ weights["encoder.weight"].T + weights["encoder.bias"])
    values, indices = made.topk(written["k"])
    code = torch.zeros_like(made).scatter(1, indices, values)
    torch.testing.assert_close(code @ weights["W_dec"] + weights["b_dec"], expected)
    assert written["normalize_decoder"] == model.config.unit_norm
    back = load_sparsify(tmp_path / "new")
    torch.testing.assert_close(back(x).reconstruction, expected)


@pytest.mark.parametrize("options", [{}, {"pre_bias": False}, {"tied": True}], ids=str)
@pytest.mark.parametrize("sparsity", ["topk", "batchtopk", "jumprelu", "l1"])
def test_saves_as_saelens_does(tmp_path, sparsity, options):
    model, x = trained(sparsity, **options), data(dtype=torch.float32)
    save_saelens(model, tmp_path, metadata={"hook_name": "blocks.0.hook_resid_pre"})
    expected = model.eval()(x)
    weights = safetensors.torch.load_file(tmp_path / "sae_weights.safetensors")
    written = json.loads((tmp_path / "cfg.json").read_text())
    assert (written["d_in"], written["d_sae"], written["dtype"]) == (FEATURES, LATENT, "float32")
    assert written["metadata"] == {"sae_lens_version": "6.0.0", "hook_name": "blocks.0.hook_resid_pre"}
    seen = x - weights["b_dec"] if written["apply_b_dec_to_input"] else x
    made = seen @ weights["W_enc"] + weights["b_enc"]
    if written["architecture"] == "topk":
        values, indices = made.topk(written["k"])
        code = torch.zeros_like(made).scatter(1, indices, values.relu())
    else:
        code = made.relu()
        if written["architecture"] == "jumprelu":
            assert (weights["threshold"] > 0).all()
            code = code * (made > weights["threshold"])
    torch.testing.assert_close(code, model.dense(expected.latent))
    torch.testing.assert_close(code @ weights["W_dec"] + weights["b_dec"], expected.reconstruction)
    torch.testing.assert_close(load_saelens(tmp_path)(x).reconstruction, expected.reconstruction)


def test_thresholds_are_saved_in_float32(tmp_path):
    model = trained("jumprelu", threshold=0.3).bfloat16()
    save_saelens(model, tmp_path)
    back = load_saelens(tmp_path)
    assert back.encoder.weight.dtype == torch.bfloat16
    torch.testing.assert_close(back.log_threshold, model.log_threshold, rtol=0, atol=1e-6)


def test_what_a_format_does_not_have_is_refused(tmp_path):
    for save, model, message in (
        (save_sparsify, trained("jumprelu"), "save_sparsify: sparsity='jumprelu': expected one of topk"),
        (save_saelens, trained("kl"), "save_saelens: sparsity='kl': expected one of topk, batchtopk"),
        (
            save_saelens,
            trained("l1", output_activation="sigmoid"),
            "output_activation='sigmoid': expected 'ide",
        ),
        (save_saelens, torch.nn.Linear(2, 2), "model must be a SparseAutoencoder, got Linear"),
    ):
        with pytest.raises(InputError, match=message):
            save(model, tmp_path)
    with pytest.raises(InputError, match="metadata: expected JSON values"):
        save_saelens(trained("topk"), tmp_path, metadata={"hook": object()})
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="expected a directory, found a file"):
        save_saelens(trained("topk"), tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def without(folder, name, file):
    weights = safetensors.torch.load_file(folder / file)
    del weights[name]
    safetensors.torch.save_file(weights, folder / file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: without(folder, "W_dec", "sae.safetensors"),
            "missing W_dec; the file has b_dec, encoder.bias",
        ),
        (lambda folder: (folder / "sae.safetensors").unlink(), "expected a readable sae.safetensors"),
        (
            lambda folder: (folder / "sae.safetensors").write_bytes(b"no"),
            "expected a readable sae.safetensors",
        ),
        (lambda folder: (folder / "cfg.json").write_text("{"), "expected a readable cfg.json"),
        (lambda folder: (folder / "cfg.json").write_text("[]"), "expected options by name"),
        (
            lambda folder: sparsify_files(folder, activation="groupmax"),
            "activation='groupmax': expected 'topk'",
        ),
        (lambda folder: sparsify_files(folder, skip_connection=True), "skip_connection=True"),
        (lambda folder: sparsify_files(folder, signed=True), "signed=True: expected False"),
        (
            lambda folder: with_tensors(folder, "sae.safetensors", W_skip=torch.eye(12)),
            "W_skip: expected encoder.weight, encoder.bias, W_dec, b_dec alone",
        ),
        (
            lambda folder: sparsify_files(folder, d_in=13),
            r"encoder.weight: expected shape \(40, 13\), got \(40, 12\)",
        ),
        (lambda folder: sparsify_files(folder, d_in=None), "d_in=None: expected a positive integer"),
        (lambda folder: sparsify_files(folder, k=41), "k=41: expected at most latent, 40"),
    ],
)
def test_foreign_files_of_sparsify_are_refused(tmp_path, change, message):
    sparsify_files(tmp_path)
    change(tmp_path)
    with pytest.raises(InputError, match=message):
        load_sparsify(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("gated", {}, "architecture='gated': expected one of standard, topk, jumprelu"),
        (
            "topk",
            {"normalize_activations": "layer_norm"},
            "normalize_activations='layer_norm': expected 'none'",
        ),
        ("topk", {"k": None}, "missing option 'k'"),
        ("standard", {"d_sae": 41}, r"W_enc: expected shape \(12, 41\), got \(12, 40\)"),
    ],
)
def test_foreign_files_of_saelens_are_refused(tmp_path, architecture, changes, message):
    saelens_files(tmp_path, architecture, **changes)
    with pytest.raises(InputError, match=message):
        load_saelens(tmp_path)


def test_saelens_files_need_their_threshold(tmp_path):
    saelens_files(tmp_path, "jumprelu")
    without(tmp_path, "threshold", "sae_weights.safetensors")
    with pytest.raises(InputError, match="missing threshold"):
        load_saelens(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": "top"}, "sparsity='top': expected one of l1, kl, topk, batchtopk, jumprelu"),
        ({"k": 0}, "k=0: expected a positive integer"),
        ({"k": 41}, "k=41: expected at most latent, 40"),
        ({"sparsity": "l1", "k": 3}, "k=3: sparsity 'l1' has no such option; it takes sparsity_weight"),
        ({"sparsity_weight": 1.0}, "sparsity_weight=1.0: sparsity 'topk' has no such option"),
        (
            {"sparsity": "l1", "sparsity_weight": -1.0},
            "sparsity_weight=-1.0: expected a finite number of at least 0",
        ),
        ({"sparsity_warmup_steps": 5}, "sparsity_warmup_steps=5: sparsity 'topk' has no such option"),
        (
            {"sparsity": "l1", "sparsity_warmup_steps": -1},
            "sparsity_warmup_steps=-1: expected an integer of at least 0",
        ),
        ({"sparsity": "l1", "sparsity_warmup_steps": False}, "sparsity_warmup_steps=False"),
        ({"sparsity": "l1", "sparsity_warmup_steps": 2.5}, "sparsity_warmup_steps=2.5"),
        ({"sparsity": "kl", "dead_after": 9}, "dead_after=9: sparsity 'kl' has no such option"),
        ({"sparsity": "kl", "rate": 1.0}, "rate=1.0: expected a number between 0 and 1"),
        ({"sparsity": "jumprelu", "bandwidth": 0.0}, "bandwidth=0.0: expected a number above 0"),
        ({"hidden": (8,)}, "hidden=.*: a sparse autoencoder has no hidden layers"),
        ({"activation": "gelu"}, "activation='gelu': the activation is that of the sparsity"),
        ({"tied": 1}, "tied=1: expected true or false"),
        ({"loss": None}, "loss=None"),
        ({"output_activation": "relu"}, "output_activation='relu': expected identity or sigmoid"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        SparseAutoencoder(input_size=FEATURES, latent=LATENT, **options)


@pytest.mark.parametrize(
    ("sparsity", "expected"),
    [
        ("topk", {"k": 32, "aux_weight": 1 / 32, "aux_k": FEATURES // 2, "dead_after": 1_000_000}),
        ("batchtopk", {"k": 32, "aux_weight": 1 / 32, "aux_k": FEATURES // 2, "dead_after": 1_000_000}),
        ("l1", {"sparsity_weight": 0.0003, "sparsity_warmup_steps": 0, "dead_after": 1_000_000}),
        ("kl", {"sparsity_weight": 0.0001, "rate": 0.05}),
        ("jumprelu", {"sparsity_weight": 0.00001, "bandwidth": 0.001, "threshold": 0.001}),
    ],
)
def test_default_options(sparsity, expected):
    config = SparseConfig(input_size=FEATURES, latent=LATENT, sparsity=sparsity)
    assert {name: config.option(name) for name in expected} == expected


def test_modules():
    torch.manual_seed(0)
    encoder, decoder, x = (
        TopKEncoder(FEATURES, LATENT, 5),
        SparseDecoder(LATENT, FEATURES),
        data(dtype=torch.float32),
    )
    values, indices = encoder(x)
    expected = F.linear(x, encoder.weight, encoder.bias).topk(5)
    torch.testing.assert_close(values, expected.values)
    assert torch.equal(indices, expected.indices)
    dense = SparseCode(values, indices).dense(LATENT)
    torch.testing.assert_close(decoder(values, indices), decoder(dense))
    torch.testing.assert_close(decoder.weight.norm(dim=1), torch.ones(LATENT))
    of_batch = TopKEncoder(FEATURES, LATENT, 5, of_batch=True)
    assert int((of_batch(x)[1] >= 0).sum()) == 5 * BATCH
    assert "k=5" in repr(encoder)
    assert "latents=40" in repr(decoder)
    with pytest.raises(InputError, match="k=41: expected at most latents, 40"):
        TopKEncoder(FEATURES, LATENT, 41)
    with pytest.raises(InputError, match="latents=0"):
        SparseDecoder(0, FEATURES)


@pytest.mark.parametrize("options", [{}, {"activation": "sigmoid", "penalty": "kl", "rate": 0.2}])
def test_a_penalized_layer_and_its_twin_agree(options):
    torch.manual_seed(0)
    layer, x = PenalizedLinearAct(FEATURES, LATENT, **options), data(dtype=torch.float32)
    twin = layer.eager()
    assert layer.state_dict().keys() == twin.state_dict().keys()
    torch.testing.assert_close(layer(x), twin(x))
    assert f"penalty={options.get('penalty', 'l1')}" in repr(layer)


@pytest.mark.parametrize(
    "made",
    [
        lambda: JumpReLU(5, threshold=0.25),
        lambda: make("jumprelu", threshold=0.25),
        lambda: make("batchtopk"),
        lambda: make("l1", sparsity_warmup_steps=3),
        lambda: VAE(input_size=4, likelihood="gaussian", kl_warmup_steps=3),
    ],
    ids=["module", "jumprelu", "batchtopk", "warm-up", "vae"],
)
def test_what_is_no_layer_s_can_be_set_anew(made):
    """As it is after a model was made on the meta device."""
    torch.manual_seed(0)
    module = made()
    own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    before = {name: one.clone() for name, one in own.items()}
    with torch.no_grad():
        for one in own.values():
            one.fill_(7)
    module.reset_parameters()
    assert before and all(torch.equal(own[name], one) for name, one in before.items())


def test_jumprelu_and_its_twin_agree():
    activation, x = JumpReLU(FEATURES, threshold=0.3, bandwidth=0.5), data(dtype=torch.float32)
    twin = activation.eager()
    results = []
    for one in (activation, twin):
        h, count = one(x)
        (h.square().sum() + count.sum()).backward()
        results.append((h, count, one.log_threshold.grad))
    torch.testing.assert_close(*results)
    torch.testing.assert_close(results[0][0], x * (x > 0.3))
    assert "bandwidth=0.5" in repr(activation)


@pytest.mark.parametrize(
    ("make_module", "message"),
    [
        (lambda: PenalizedLinearAct(3, 4, penalty="l2"), "penalty='l2': expected one of"),
        (
            lambda: PenalizedLinearAct(3, 4, penalty="kl", rate=1.0),
            "rate=1.0: expected a number between 0 and 1",
        ),
        (lambda: JumpReLU(0), "features=0"),
        (lambda: JumpReLU(3, threshold=0.0), "threshold=0.0: expected a number above 0"),
        (lambda: JumpReLU(3, bandwidth=-1.0), "bandwidth must be a finite number of at least 0"),
    ],
)
def test_bad_options_of_modules_are_named(make_module, message):
    with pytest.raises(InputError, match=message):
        make_module()
