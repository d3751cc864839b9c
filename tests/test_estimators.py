"""The scikit-learn estimators: scikit-learn's own checks, what they learn, randomness, errors."""

import copy
import json
import pickle
import random
import sys
import warnings

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler

from aefast import estimators
from aefast.data import Batches
from aefast.errors import InputError
from aefast.estimators import AutoencoderEstimator, VAEEstimator
from aefast.train import TrainingError
from support.processes import environment, run

ESTIMATORS = (AutoencoderEstimator, VAEEstimator)
QUICK = {"latent": 3, "hidden": (16,), "epochs": 2, "random_state": 0, "device": "cpu"}
# Most fits here are too short on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
every_estimator = pytest.mark.parametrize("estimator_class", ESTIMATORS)


@pytest.fixture(scope="module")
def digits():
    """(1797, 64) in [0, 1], float32."""
    return (load_digits().data / 16).astype(np.float32)


CHECKS = """
import json, sys, warnings
from sklearn.utils.estimator_checks import check_estimator
from aefast import estimators

estimator = getattr(estimators, sys.argv[1])(epochs=20)
results = check_estimator(estimator, on_skip=None, on_fail=None)
print(json.dumps([[found["check_name"], found["status"], repr(found["exception"])] for found in results]))
"""


@pytest.mark.slow
@every_estimator
def test_scikit_learn_finds_nothing_wrong(estimator_class, tmp_path):
    """All checks, none of them skipped or expected to fail; with the default options but for the time they take."""
    # scikit-learn checks array inputs only where SciPy was told of them before it is imported.
    settings = {"cwd": tmp_path, "env": environment(SCIPY_ARRAY_API="1", OMP_NUM_THREADS="1")}
    done = run([sys.executable, "-c", CHECKS, estimator_class.__name__], **settings)
    assert done.returncode == 0, done.stdout
    results = json.loads(done.stdout.splitlines()[-1])
    # scikit-learn 1.6 has about as many for a transformer.
    assert len(results) > 35
    assert [result for result in results if result[1] != "passed"] == []


@pytest.mark.parametrize("load", [load_wine, load_breast_cancer], ids=["wine", "cancer"])
def test_small_tables_are_trained_until_codes_beat_principal_components(load):
    X = StandardScaler().fit_transform(load().data)
    model, pca = AutoencoderEstimator(latent=8, random_state=0).fit(X), PCA(8).fit(X)
    assert model.score(X) > -np.square(pca.inverse_transform(pca.transform(X)) - X).mean()
    assert len(model.loss_curve_) == -(-1000 // -(-len(X) // 256))


def test_long_data_are_passed_over_fifty_times(digits):
    model = AutoencoderEstimator(latent=3, hidden=(4,), batch_size=16, random_state=0).fit(digits)
    assert len(model.loss_curve_) == 50


def test_an_autoencoder_explains_more_than_principal_components(digits):
    training, held_out = digits[::2], digits[1::2]
    model = AutoencoderEstimator(latent=8, epochs=60, random_state=0).fit(training)
    pca = PCA(8).fit(training)
    linear = -np.square(pca.inverse_transform(pca.transform(held_out)) - held_out).mean()
    assert model.score(held_out) > linear
    codes = model.transform(held_out)
    assert codes.shape == (len(held_out), 8)
    error = np.square(model.inverse_transform(codes) - held_out).mean()
    assert model.score(held_out) == pytest.approx(-error, rel=1e-5)
    assert len(model.loss_curve_) == 60 and model.loss_curve_[-1] < 0.3 * model.loss_curve_[0]
    errors = np.square(model.inverse_transform(codes) - held_out).mean(1)
    assert model.score_samples(held_out) == pytest.approx(-errors, rel=1e-5)


@every_estimator
def test_too_few_epochs_are_told(digits, estimator_class):
    with pytest.warns(
        ConvergenceWarning, match=r"still falling after 5 epochs, from .* in the last 1; raise"
    ):
        estimator_class(latent=4, epochs=5, lr=1e-4, random_state=0).fit(digits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # One epoch has no other beside it.
        estimator_class(**{**QUICK, "epochs": 1}).fit(digits)
        enough = estimator_class(latent=1, hidden=(), epochs=200, lr=1e-2, random_state=0)
        enough.fit(np.random.default_rng(0).normal(size=(2000, 3)))


@pytest.mark.parametrize("estimator", [AutoencoderEstimator, VAEEstimator])
def test_rows_unlike_the_others_score_lowest(digits, estimator):
    model = estimator(latent=8, epochs=20, random_state=0).fit(digits[100:])
    shuffled = np.random.default_rng(0).permuted(digits[:100], axis=1)
    usual, unusual = model.score_samples(digits[:100]), model.score_samples(shuffled)
    # The chance that one of the latter is below one of the former.
    assert (unusual[:, None] < usual[None, :]).mean() > 0.97


def test_the_noise_of_scores_and_samples_is_of_the_random_state(digits):
    first, other = (VAEEstimator(**{**QUICK, "random_state": seed}).fit(digits) for seed in (0, 1))
    other.model_ = first.model_
    assert first.score(digits) == first.score(digits) != other.score(digits)
    assert not np.array_equal(first.sample(5)[0], other.sample(5)[0])
    other.set_params(random_state=0)
    assert np.array_equal(first.sample(5)[0], other.sample(5)[0])
    other.set_params(random_state=np.random.RandomState(0))
    assert not np.array_equal(other.sample(5)[0], other.sample(5)[0])


def test_codes_of_a_vae_tell_rows_apart_that_vary_by_less_than_1(digits):
    model = VAEEstimator(latent=4, epochs=20, random_state=0).fit(digits)
    codes = model.transform(digits)
    assert codes.std(0).max() > 0.5
    error = np.square(model.inverse_transform(codes) - digits).mean()
    assert error < 0.7 * digits.var(0).mean()


def test_the_variance_of_a_vae_begins_at_that_of_the_data(digits):
    still = {**QUICK, "epochs": 1, "lr": 1e-30}
    for scale in (1, 1e6):
        model = VAEEstimator(**still).fit(scale * digits)
        variance = scale**2 * digits.var(0).mean()
        assert model.model_.log_variance.exp().item() == pytest.approx(variance, rel=1e-4)
    for constant in (0, 1, 0.1):
        model = VAEEstimator(**still).fit(np.full((30, 3), constant))
        assert model.model_.log_variance.item() == pytest.approx(0)
    assert VAEEstimator(**still, likelihood="mse").fit(digits).model_.log_variance is None


@pytest.mark.parametrize("count", [0, -1, 2.5])
def test_a_number_of_samples_is_named(digits, count):
    with pytest.raises(InputError, match=f"^n_samples={count}: expected a positive integer$"):
        VAEEstimator(**QUICK).fit(digits).sample(count)


def test_the_score_of_a_vae_is_its_bound(digits):
    options = {"latent": 6, "likelihood": "bernoulli", "random_state": 0}
    short, long = (VAEEstimator(epochs=epochs, **options).fit(digits) for epochs in (1, 30))
    assert long.score(digits) > short.score(digits) + 5
    assert long.score(digits) == long.score(digits)
    x = torch.from_numpy(digits)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        bounds = torch.stack([long.model_.elbo(x) for _ in range(20)])
    # The mean over 1797 draws varies by the deviation that twenty such means have.
    assert long.score(digits) == pytest.approx(bounds.mean().item(), abs=5 * bounds.std().item())
    with torch.no_grad():
        assert np.array_equal(long.transform(digits), long.model_.encode(x).numpy())
    each = long.score_samples(digits)
    assert each.shape == (1797,) and np.array_equal(each, long.score_samples(digits))
    assert each[100:110] == pytest.approx(long.score_samples(digits[100:110]), rel=1e-5)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(long._noise_seed)
        draws = torch.randn(8, 6)
        expected = torch.stack([long.model_.elbo(x, reduction="none", noise=noise) for noise in draws]).mean(
            0
        )
    assert each == pytest.approx(expected.numpy(), rel=1e-5)
    samples, labels = long.sample(50)
    assert samples.shape == (50, 64) and labels is None
    assert samples.min() >= 0 and samples.max() <= 1
    assert np.array_equal(long.sample(50)[0], samples)


@every_estimator
def test_an_int_makes_equal_fits_and_disturbs_no_generator(digits, estimator_class):
    def states():
        return torch.get_rng_state().numpy().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    before = states()
    first = estimator_class(**QUICK).fit(digits)
    codes, score = first.transform(digits), first.score(digits)
    assert states() == before
    torch.manual_seed(99)
    second = estimator_class(**QUICK).fit(digits)
    assert np.array_equal(second.transform(digits), codes) and second.score(digits) == score
    other = clone(first).set_params(random_state=1).fit(digits)
    assert not np.array_equal(other.transform(digits), codes)


@every_estimator
def test_the_order_of_samples_is_of_the_random_state_and_the_epoch(digits, estimator_class, monkeypatch):
    seen = []

    class Watched(estimators.CapturedStep):
        def __call__(self, batch):
            seen.append(batch.clone())
            return super().__call__(batch)

    monkeypatch.setattr(estimators, "CapturedStep", Watched)
    orders = []
    for random_state in (0, 0, 1):
        options = {**QUICK, "random_state": random_state}
        estimator_class(**options, batch_size=32).fit(digits[:100])
        assert len(seen) == 2 * 4
        orders += [torch.cat(seen[:4]), torch.cat(seen[4:])]
        seen.clear()
    first, second, again, _, other, _ = orders
    assert torch.equal(again, first)
    for order in (second, other):
        assert not torch.equal(order, first)
        # The same samples.
        assert torch.equal(order.unique(dim=0), first.unique(dim=0))


def test_the_loss_of_an_epoch_is_the_mean_over_its_samples(digits):
    """With steps too small to change a weight it is the score; the last of four batches has 4 samples."""
    options = {**QUICK, "epochs": 1, "batch_size": 32, "lr": 1e-30}
    model = AutoencoderEstimator(**options).fit(digits[:100])
    assert model.loss_curve_ == pytest.approx([-model.score(digits[:100])], rel=1e-5)


@every_estimator
def test_none_draws_from_numpy_and_an_instance_from_itself(digits, estimator_class):
    def codes(random_state):
        options = {**QUICK, "random_state": random_state}
        return estimator_class(**options).fit(digits[:50]).transform(digits[:50])

    np.random.seed(3)
    first = codes(None)
    assert not np.array_equal(codes(None), first)
    np.random.seed(3)
    assert np.array_equal(codes(None), first)
    assert np.array_equal(codes(np.random.RandomState(3)), first)


@every_estimator
def test_a_pickle_and_a_copy_are_the_same(digits, estimator_class):
    model = estimator_class(**QUICK).fit(digits)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert np.array_equal(other.transform(digits), model.transform(digits))
        assert other.score(digits) == model.score(digits)
        assert other.get_params() == model.get_params()
        assert not other.model_.training and not model.model_.training
    # The model itself stays where it was.
    assert model.model_ is not pickle.loads(pickle.dumps(model)).model_


@every_estimator
def test_precision_is_that_of_the_data(digits, estimator_class):
    for dtype in (np.float32, np.float64):
        model = estimator_class(**QUICK).fit(digits.astype(dtype))
        codes = model.transform(digits)
        assert codes.dtype == model.inverse_transform(codes).dtype == dtype
        assert {parameter.dtype for parameter in model.model_.parameters()} == {
            torch.from_numpy(np.zeros(1, dtype)).dtype
        }
    integers = estimator_class(**QUICK).fit((16 * digits).astype(np.int64))
    assert integers.transform(digits).dtype == np.float64


def test_pipelines_and_grid_searches(digits):
    pipeline = make_pipeline(MinMaxScaler(), AutoencoderEstimator(**QUICK))
    grid = {"autoencoderestimator__latent": np.arange(1, 3), "autoencoderestimator__lr": np.array([1e-3])}
    search = GridSearchCV(pipeline, grid, cv=2, error_score="raise").fit(digits[:200])
    best = search.best_estimator_
    latent = search.best_params_["autoencoderestimator__latent"]
    codes = best.transform(digits[:5])
    assert codes.shape == (5, latent)
    assert best.inverse_transform(codes).shape == (5, 64)
    names = [f"autoencoderestimator{index}" for index in range(latent)]
    assert best.get_feature_names_out().tolist() == names


def test_verbose_tells_each_epoch(digits, capsys):
    AutoencoderEstimator(**QUICK).fit(digits)
    assert capsys.readouterr().out == ""
    model = AutoencoderEstimator(**QUICK, verbose=True).fit(digits)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"AutoencoderEstimator: epoch {index + 1}/2 · loss {loss:.5g}"
        for index, loss in enumerate(model.loss_curve_)
    ]


def test_an_interrupt_keeps_what_was_trained(digits, monkeypatch):
    whole = AutoencoderEstimator(**QUICK).fit(digits)
    epoch = Batches.epoch

    def interrupted_in(number):
        def batches(self, index, *arguments, **options):
            yield from epoch(self, index, *arguments, **options)
            if index == number:
                raise KeyboardInterrupt

        monkeypatch.setattr(Batches, "epoch", batches)

    interrupted_in(2)
    model = AutoencoderEstimator(**{**QUICK, "epochs": 9})
    with pytest.warns(UserWarning, match="AutoencoderEstimator: interrupted in epoch 3 of 9"):
        model.fit(digits)
    assert model.loss_curve_ == whole.loss_curve_
    assert model.score(digits) > whole.score(digits)
    interrupted_in(0)
    with pytest.raises(KeyboardInterrupt):
        model.fit(digits)


@pytest.mark.parametrize(
    ("estimator_class", "options", "message"),
    [
        (AutoencoderEstimator, {"latent": 0}, "latent=0: expected a positive integer"),
        (AutoencoderEstimator, {"hidden": 5}, "hidden=5: expected a sequence"),
        (AutoencoderEstimator, {"activation": "rleu"}, "activation='rleu'.*did you mean 'relu'"),
        (AutoencoderEstimator, {"epochs": 0}, "epochs=0: expected a positive integer"),
        (AutoencoderEstimator, {"batch_size": 1.5}, "batch_size=1.5: expected a positive integer"),
        (AutoencoderEstimator, {"lr": -1}, "lr=-1: expected a finite number above 0"),
        (AutoencoderEstimator, {"device": "gpu"}, "device='gpu': expected one of auto, cpu, cuda"),
        (VAEEstimator, {"beta": -1.0}, "beta=-1.0: expected a finite number"),
        (VAEEstimator, {"likelihood": "normal"}, "likelihood='normal': expected one of"),
    ],
)
def test_bad_options_are_named_by_the_fit(digits, estimator_class, options, message):
    model = estimator_class(**{**QUICK, **options})
    with pytest.raises(InputError, match=message):
        model.fit(digits)
    with pytest.raises(NotFittedError):
        model.transform(digits)


def test_bad_data_are_named(digits):
    model = AutoencoderEstimator(**QUICK).fit(digits)
    with pytest.raises(ValueError, match="X has 63 features, but AutoencoderEstimator is expecting 64"):
        model.transform(digits[:, 1:])
    with pytest.raises(ValueError, match=r"X has 4 features.*is expecting 3 features, the latents"):
        model.inverse_transform(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="Input X contains NaN"):
        model.score(np.full((2, 64), np.nan))
    with pytest.raises(InputError, match=r"expected values in \[0, 1\] for the bernoulli likelihood"):
        VAEEstimator(**QUICK, likelihood="bernoulli").fit(16 * digits)
    with pytest.raises(
        TrainingError, match=r"the loss is no longer finite in epoch 1; lower lr=0\.001, or scale X"
    ):
        AutoencoderEstimator(**QUICK).fit(1e30 * digits)


WITHOUT = """
import sys
sys.modules["sklearn"] = None
import aefast, aefast.models, aefast.sampling, aefast.train, aefast.cli
try:
    import aefast.estimators
except ImportError as error:
    print("refused:", error)
"""


def test_without_scikit_learn_only_the_estimators_are_missing(tmp_path):
    done = run([sys.executable, "-c", WITHOUT], cwd=tmp_path, env=environment())
    assert done.returncode == 0, done.stdout
    assert "refused: aefast.estimators needs scikit-learn 1.6 or newer" in done.stdout
    assert 'pip install "aefast[train]"' in done.stdout
