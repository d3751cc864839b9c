"""Autoencoders as scikit-learn estimators, for pipelines, grid searches and cross-validation.

::

    model = make_pipeline(MinMaxScaler(), AutoencoderEstimator(latent=8, random_state=0))
    codes = model.fit_transform(X)  # (N, 8)
    model.inverse_transform(codes)  # (N, features)

Needs scikit-learn, which comes with ``aefast[train]``.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aefast._random import seeded
from aefast.data import Batches
from aefast.models import VAE, Autoencoder, Model
from aefast.nn.linear_act import check_positive_int
from aefast.train import CapturedStep, TrainConfig, TrainingError, make_optimizer

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.utils import check_array, check_random_state
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        f'aefast.estimators needs scikit-learn 1.6 or newer ({error}); install it with: pip install "aefast[train]"'
    ) from error

# How long training is by default: so many epochs, and at least so many steps. With fewer, reconstructions of tables of
# a few hundred rows are worse than those of as many principal components.
_EPOCHS, _STEPS = 50, 1000
# Rows that are encoded, decoded or scored at a time.
_ROWS = 4096
# Codes of a row that its evidence lower bound is the mean of.
_DRAWS = 8
# Training is far from its end if of all that the loss fell by, such a share fell from the last fifth of epochs but one
# to the last; 0.22 is that of a loss that falls as fast as ever. Well below it, what is to come may be overfitting.
_FALLING_SHARE = 0.15


class _DenseEstimator(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """What the estimators share. A subclass has ``_model_class``, ``_model_options``, ``_score`` and ``_scores``."""

    _model_class: type[Model]
    # Arguments of the initialiser that are options of the model.
    _model_options: tuple[str, ...]

    def fit(self, X: Any, y: Any = None) -> _DenseEstimator:
        """Train the model on X (N, features); y is ignored. Returns itself.

        Raises:
            ValueError: X is not as scikit-learn wants it, or an option is out of its range.
            TrainingError: the loss is no longer finite.
            KeyboardInterrupt: in the first epoch; later ones end the training and keep what it has come to.

        Warns:
            ConvergenceWarning: scikit-learn's: the loss was still falling nearly as fast as ever when training ended.
            UserWarning: it was interrupted.
        """
        X = validate_data(self, X, dtype=(np.float64, np.float32), order="C")
        options = {name: _plain(getattr(self, name)) for name in self._model_options}
        config = self._model_class.config_class.from_dict(
            {"input_size": X.shape[1], **options}, type(self).__name__
        )
        # 2**31 - 1 seeds, as many as RandomState draws on every platform.
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        settings = {name: _plain(getattr(self, name)) for name in ("batch_size", "lr", "device")}
        epochs = _plain(self.epochs)
        training = TrainConfig(seed=seed, epochs=_EPOCHS if epochs is None else epochs, **settings)
        if epochs is None:
            steps = -(-len(X) // training.batch_size)
            training = dataclasses.replace(training, epochs=max(_EPOCHS, -(-_STEPS // steps)))
        device = training.resolve_device()
        samples = _tensor(X)
        with seeded(seed, device):
            model = self._model_class(config, device=device, dtype=samples.dtype)
            self._prepare(model, samples)
            self.loss_curve_ = self._train(model, samples.to(device), training)
        self._warn_if_falling()
        self.model_ = model.eval()
        self._noise_seed = seed
        return self

    def _prepare(self, model: Model, samples: Tensor) -> None:
        """Set what of a new model depends on the samples (N, features)."""

    def _train(self, model: Model, samples: Tensor, training: TrainConfig) -> list[float]:
        """Train `model` in place; the mean loss of each epoch."""
        step = CapturedStep(model.train(), make_optimizer(model.parameters(), training.lr))
        rows = torch.arange(len(samples))
        batches = Batches(samples, rows, batch_size=training.batch_size, seed=training.seed)
        losses: list[float] = []
        for epoch in range(training.epochs):
            total = torch.zeros((), dtype=torch.float64, device=samples.device)
            try:
                for batch in batches.epoch(epoch):
                    total += len(batch) * sum(step(batch).values())
            except KeyboardInterrupt:
                if not losses:
                    raise
                warnings.warn(
                    f"{type(self).__name__}: interrupted in epoch {epoch + 1} of {training.epochs}; the model is as "
                    "trained so far",
                    stacklevel=3,
                )
                break
            losses.append(total.item() / len(samples))
            if not math.isfinite(losses[-1]):
                raise TrainingError(
                    f"the loss is no longer finite in epoch {epoch + 1}; lower lr={training.lr:g}, or scale X"
                )
            if self.verbose:
                print(f"{type(self).__name__}: epoch {epoch + 1}/{training.epochs} · loss {losses[-1]:.5g}")
        return losses

    def _warn_if_falling(self) -> None:
        """Say that there were far too few epochs, as far as the losses of at least two tell.

        Means over a fifth of the epochs average out what is by chance, and compare alike whatever the scale of the loss
        and its lowest value are.
        """
        losses = np.asarray(self.loss_curve_)
        if len(losses) < 2:
            return
        count = max(1, len(losses) // 5)
        last, before = losses[-count:].mean(), losses[-2 * count : -count].mean()
        if before - last > _FALLING_SHARE * (losses[0] - last):
            warnings.warn(
                f"{type(self).__name__}: the loss was still falling after {len(losses)} epochs, from {before:.4g} to "
                f"{last:.4g} in the last {count}; raise epochs or lr, or scale X",
                ConvergenceWarning,
                stacklevel=3,
            )

    def transform(self, X: Any) -> np.ndarray:
        """The codes of X (N, features): (N, latent), of the dtype that the model was fitted in."""
        rows = self._checked(X)
        return self._mapped(rows, self.model_.encode)

    def inverse_transform(self, X: Any) -> np.ndarray:
        """The samples that codes X (N, latent) stand for: (N, features)."""
        check_is_fitted(self, "model_")
        codes = check_array(X, dtype=self._dtype, order="C")
        if codes.shape[1] != self._n_features_out:
            raise ValueError(
                f"X has {codes.shape[1]} features, but {type(self).__name__}.inverse_transform is expecting "
                f"{self._n_features_out} features, the latents, as input"
            )
        return self._mapped(codes, self.model_.decode)

    def score(self, X: Any, y: Any = None) -> float:
        samples = _tensor(self._checked(X))
        place = next(self.model_.parameters()).device
        total = 0.0
        with torch.no_grad(), seeded(self._noise_seed, place):
            for batch in samples.split(_ROWS):
                total += len(batch) * self._score(batch.to(place)).item()
        return total / len(samples)

    def _score(self, batch: Tensor) -> Tensor:
        """The mean score of a batch (B, features); the larger the better."""
        raise NotImplementedError

    def score_samples(self, X: Any) -> np.ndarray:
        rows = self._checked(X)
        place = next(self.model_.parameters()).device
        with seeded(self._noise_seed, place):
            return self._mapped(rows, self._scores())

    def _scores(self) -> Callable[[Tensor], Tensor]:
        """What gives each row of a batch (B, features) its score, (B,), whatever rows are beside it."""
        raise NotImplementedError

    def _checked(self, X: Any) -> np.ndarray:
        check_is_fitted(self, "model_")
        return validate_data(self, X, dtype=self._dtype, order="C", reset=False)

    def _mapped(self, rows: np.ndarray, function: Callable[[Tensor], Tensor]) -> np.ndarray:
        place = next(self.model_.parameters()).device
        with torch.no_grad():
            parts = [function(part.to(place)).cpu() for part in _tensor(rows).split(_ROWS)]
        return torch.cat(parts).numpy()

    @property
    def _dtype(self) -> type[np.floating]:
        is_single = next(self.model_.parameters()).dtype == torch.float32
        return np.float32 if is_single else np.float64

    @property
    def _n_features_out(self) -> int:
        """What names of output features are made for; scikit-learn looks for it by this name."""
        return self.model_.config.latent

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        if "model_" in state:
            # Parameters on a GPU would be of no use where there is none.
            state["model_"] = copy.deepcopy(state["model_"]).cpu()
        return state


class AutoencoderEstimator(_DenseEstimator):
    """`aefast.models.Autoencoder` as a scikit-learn transformer.

    It minimises the mean squared error of the reconstruction. Features count as they are: scale them first, for
    example with ``StandardScaler`` or ``MinMaxScaler``. float32 X is trained in float32, which is faster; everything
    else in float64.

    Args:
        latent: size of the codes.
        hidden: widths of the encoder's hidden layers; may be empty. The decoder's are the same in reverse.
        activation: activation of the hidden layers, one of `aefast.kernels.activation.ACTIVATIONS`.
        output_activation: activation of the reconstruction, such as "sigmoid" for data in [0, 1].
        linear_decoder: makes the decoder a single linear layer.
        epochs: passes over X; by default 50, or of few rows as many as make 1,000 steps.
        batch_size: samples of a step.
        lr: learning rate of Adam.
        device: "cpu", "cuda", or "auto": CUDA where it is.
        random_state: of the initial weights and the order of samples. An int makes equal fits, and leaves numpy's and
            torch's global generators alone; None draws from numpy's.
        verbose: whether the loss of each epoch is printed.

    Attributes:
        model_: the fitted `aefast.models.Autoencoder`, in eval mode.
        loss_curve_: the mean loss of each epoch.
        n_features_in_, feature_names_in_: as scikit-learn has them.
    """

    _model_class = Autoencoder
    _model_options = ("latent", "hidden", "activation", "output_activation", "linear_decoder")

    def __init__(
        self,
        latent: int = 16,
        *,
        hidden: Sequence[int] = (128,),
        activation: str = "relu",
        output_activation: str = "identity",
        linear_decoder: bool = False,
        epochs: int | None = None,
        batch_size: int = 256,
        lr: float = 1e-3,
        device: str = "auto",
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        self.latent = latent
        self.hidden = hidden
        self.activation = activation
        self.output_activation = output_activation
        self.linear_decoder = linear_decoder
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def score(self, X: Any, y: Any = None) -> float:
        """The negative mean squared error of the reconstructions of X (N, features), over all elements."""
        return super().score(X)

    def score_samples(self, X: Any) -> np.ndarray:
        """The negative mean squared error of the reconstruction of each row of X (N, features): (N,).

        Rows unlike those of the training have the lowest.
        """
        return super().score_samples(X)

    def _score(self, batch: Tensor) -> Tensor:
        return self._scores()(batch).mean()

    def _scores(self) -> Callable[[Tensor], Tensor]:
        model = self.model_
        return lambda batch: -(model.decode(model.encode(batch)) - batch).square().mean(1)


class VAEEstimator(_DenseEstimator):
    """`aefast.models.VAE` as a scikit-learn transformer; the codes are the means of the posterior.

    Args:
        latent: size of the codes.
        hidden: widths of the encoder's hidden layers; may be empty. The decoder's are the same in reverse.
        activation: activation of the hidden layers, one of `aefast.kernels.activation.ACTIVATIONS`.
        likelihood: what a sample is given its code: "gaussian", a Gaussian whose variance is learnt, beginning at that
            of X; "mse", one of variance 1, beside which features that vary little do not count; "bernoulli", for
            features in [0, 1].
        beta: weight of the KL divergence.
        epochs, batch_size, lr, device, verbose: as in `AutoencoderEstimator`.
        random_state: as there, and of the noise that codes get in training and for scores.

    Attributes:
        model_: the fitted `aefast.models.VAE`, in eval mode.
        loss_curve_, n_features_in_, feature_names_in_: as in `AutoencoderEstimator`.
    """

    _model_class = VAE
    _model_options = ("latent", "hidden", "activation", "likelihood", "beta")

    def __init__(
        self,
        latent: int = 16,
        *,
        hidden: Sequence[int] = (128,),
        activation: str = "relu",
        likelihood: str = "gaussian",
        beta: float = 1.0,
        epochs: int | None = None,
        batch_size: int = 256,
        lr: float = 1e-3,
        device: str = "auto",
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        self.latent = latent
        self.hidden = hidden
        self.activation = activation
        self.likelihood = likelihood
        self.beta = beta
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def score(self, X: Any, y: Any = None) -> float:
        """The evidence lower bound on log p(x), the mean over the rows of X (N, features), in nats.

        It is estimated with one draw a row, the same ones at each call; beta has no part in it.
        """
        return super().score(X)

    def sample(self, n_samples: int = 1) -> tuple[np.ndarray, None]:
        """New samples (n_samples, features), decoded from draws of the prior N(0, I), and None for their labels.

        As with scikit-learn's own mixtures, a call makes what random_state says: an int the same at each call.
        """
        check_is_fitted(self, "model_")
        count = _plain(n_samples)
        check_positive_int(count, "n_samples")
        place = next(self.model_.parameters()).device
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        with torch.no_grad(), seeded(seed, place):
            return self.model_.sample(count).cpu().numpy(), None

    def score_samples(self, X: Any) -> np.ndarray:
        """The evidence lower bound on log p(x) of each row x of X (N, features), in nats: (N,).

        Rows unlike those of the training have the lowest. It is a mean over eight draws, the same for all rows and at
        each call; beta has no part in it.
        """
        return super().score_samples(X)

    def _prepare(self, model: VAE, samples: Tensor) -> None:
        """Let a learnt variance begin at that of the samples about their mean.

        Its log moves by at most about the learning rate a step. As long as it is far above, the divergence weighs more
        than the reconstruction and the codes tell nothing.
        """
        if model.log_variance is None:
            return
        samples = samples.double()
        variance = samples.var(0, correction=0).mean()
        # That of constants is 0, or comes from rounding alone.
        if variance > torch.finfo(model.log_variance.dtype).eps * samples.square().mean():
            with torch.no_grad():
                model.log_variance.fill_(variance.log())

    def _score(self, batch: Tensor) -> Tensor:
        return self.model_.elbo(batch)

    def _scores(self) -> Callable[[Tensor], Tensor]:
        like = self.model_.head.weight
        draws = torch.randn(_DRAWS, self.model_.config.latent, dtype=like.dtype, device=like.device)

        def scores(batch: Tensor) -> Tensor:
            return sum(self.model_.elbo(batch, reduction="none", noise=noise) for noise in draws) / _DRAWS

        return scores


def _plain(value: Any) -> Any:
    """Numbers of numpy, as grid searches make them, as Python's; the rest as it is."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple, np.ndarray)):
        return tuple(_plain(item) for item in value)
    return value


def _tensor(rows: np.ndarray) -> Tensor:
    # torch shares memory, which it cannot promise to leave unwritten.
    return torch.from_numpy(rows if rows.flags.writeable else rows.copy())
