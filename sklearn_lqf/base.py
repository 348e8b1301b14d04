"""What all estimators share: `fit` as a recipe, and the linear model that it leaves. numpy in, numpy out."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from .backbones import Backbone
from .cache import Fingerprint, TrunkCache, with_smaller_batches
from .certificate import CertificateMixin
from .distributed import ALONE, Group, default_group
from .forgetting import StoredData, UpdateMixin
from .influence import InfluenceMixin, TrainingSet
from .inputs import Inputs, flipped, select_rows, standardize_vectors
from .kfac import KFAC
from .linearize import _full_precision
from .model import LinearModel, choose_device, ordinary_arithmetic
from .objective import Quadratic
from .persistence import PersistenceMixin
from .problem import Problem, TrainingRows
from .progress import CallbackSupportMixin, Progress, with_callbacks
from .serving import ServingMixin
from .solvers import SolverResult, Status, pcg, sgd
from .uncertainty import UncertaintyMixin

__all__ = ["LQFBase"]

_STATE = ("_model", "_stored", "_fingerprint")  # beside the attributes that end in an underscore

Estimator = TypeVar("Estimator", bound="LQFBase")


def _levels_to_the_caller() -> int:
    """Levels of the stack between a warning and the code that called the package."""
    levels, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals["__name__"].startswith(("sklearn_lqf.", "sklearn.callback.")):
        levels, frame = levels + 1, frame.f_back
    return levels


class LQFBase(
    CallbackSupportMixin,
    CertificateMixin,
    InfluenceMixin,
    PersistenceMixin,
    ServingMixin,
    UncertaintyMixin,
    UpdateMixin,
    Inputs,
):
    """The estimator without what its targets are; documented with those that are public."""

    alpha: float | str
    _unit: np.ndarray  # (C,), of the targets that the model is fitted to, in those of y

    # ------------------------------------------------------------------------------------------------- fit

    @with_callbacks
    def fit(self: Estimator, X: Any, y: Any, sample_weight: Any = None) -> Estimator:
        """Fit the linearized network.

        Parameters
        ----------
        X : array-like or sequence of images
            Images: an array (n, H, W) or (n, H, W, C) of uint8 (0..255) or floats (0..1), raveled rows
            (n, n_features) with ``image_shape``, or a sequence of paths, PIL images or arrays. Vectors:
            (n, n_features) of floats.
        y : array-like of shape (n,) or (n, n_outputs)
            Class labels, or target values; several columns are labels each of which is there (1) or not (0), or
            several target values.
        sample_weight : array-like of shape (n,), default=None
            Non-negative weights. A weight of 2 equals a row given twice, a weight of 0 a row left out.

        Returns
        -------
        self : estimator
            The fitted estimator.

        Raises
        ------
        ValueError
            Unusable parameters or data; the message says what was found and what to do.
        """
        return self._fit(X, y, sample_weight)

    def _fit(self: Estimator, X: Any, y: Any, sample_weight: Any, classes: Any = None) -> Estimator:
        """`fit`, also with classes of which there is no image yet; a fit that raises leaves nothing fitted."""
        try:
            device = choose_device(self.device)
            with ordinary_arithmetic(device):
                result = self._fit_all(X, y, sample_weight, classes, device)
        except BaseException:
            for name in [n for n in vars(self) if n in _STATE or (n.endswith("_") and not n.startswith("_"))]:
                delattr(self, name)
            raise
        self._warn_unless_converged(result)
        return self

    def _fit_all(self, X: Any, y: Any, sample_weight: Any, classes: Any, device: torch.device) -> SolverResult:
        shared = isinstance(self.distributed, bool | np.bool_) and self.distributed
        group = default_group(device) if shared else ALONE
        group.together(self._check_parameters, group.size)
        rows, backbone = group.together(self._read_training_rows, X, y)
        y = group.together(self._read_targets, y, len(rows))
        if group.size > 1:
            self._check_agreement(group, rows, y, sample_weight, backbone)
        values = self._learn_targets(y, classes)
        given = self._given_weights(sample_weight, len(rows))
        weights = self._weigh_classes(values, given)
        keep = np.flatnonzero(weights)  # a weight of zero is a row left out
        if len(keep) < group.size:
            raise ValueError(f"{group.size} processes cannot share {len(keep)} image(s): start fewer processes.")
        if np.maximum(given[keep], 1).sum() < 2:  # a weight of 2 is a row given twice
            raise ValueError(f"One row with a positive weight is not enough (n_samples={len(rows)}): give at least 2.")
        self._seed = self._draw_seed()
        model = self._prepare(backbone, rows, keep, weights, device)
        with Progress(self, self.verbose if group.rank == 0 else 0, self.max_iter, X, y) as progress:
            own = keep[group.share(len(keep))]
            seen = Fingerprint(len(own))
            cache = group.together(self._trunk_activations, model, rows, own, seen, self.cache, progress)
            data = self._training_rows(cache, values[keep], weights[keep], given[keep], weights > 0)
            result = self._solve_for(model, data, group, progress)
            images = group.all_gather_rows(seen.images)
            self._fingerprint = Fingerprint.of(images, values[keep], weights[keep])
            self._stored: StoredData | None = None
            if self.store_data:
                self._stored = self._store(rows, backbone, images, cache, values[keep], given[keep], keep)
        return result

    def _training_rows(
        self,
        cache: TrunkCache,
        values: np.ndarray,
        weights: np.ndarray,
        given: np.ndarray,
        kept: np.ndarray | None = None,
    ) -> TrainingRows:
        """What is fitted, from the targets (n, C) in the units of y; fixes the units of the model's."""
        self._unit = self._target_unit(values, weights)
        t, s, g = (torch.tensor(v, device=cache.device) for v in (values / self._unit, weights, given))
        return TrainingRows(cache, t, s, g, len(self._view_names()), kept)

    def _solve_for(
        self,
        model: LinearModel,
        data: TrainingRows,
        group: Group = ALONE,
        progress: Progress | None = None,
        start: Callable[[LinearModel], np.ndarray] | None = None,
    ) -> SolverResult:
        """Everything that follows from the trunk activations; sets the fitted attributes.

        ``start`` gives a solution that is near, for the model when it is standardized.
        """

        def minimize(size: int) -> SolverResult:
            problem = Problem(model, data.rebatched(size), self._recipe(), group)
            alpha = self._penalty(problem, model)
            quadratic, preconditioner = problem.at(alpha)
            self._set_problem(model, problem, quadratic)
            near = None if start is None else start(model)
            return self._solve(quadratic, preconditioner, progress, near)

        size = data.cache.batch_size
        # Processes that wait for each other cannot begin again one by one.
        result = with_smaller_batches(minimize, size) if group.size == 1 else minimize(size)
        if result.status is Status.NOT_FINITE:
            raise ValueError(
                f"The solver met values that are not finite after {result.n_iter} iterations: the derivatives of the "
                f"backbone overflow {self._model.dtype}. Use dtype='float64', check its weights and preprocessing, or "
                "increase alpha."
            )
        self._set_solution(result)
        return result

    def _penalty(self, problem: Problem, model: LinearModel) -> float:
        """The absolute penalty."""
        return problem.alpha(self.alpha)

    def _prepare(
        self, backbone: Backbone, rows: Any, keep: np.ndarray, weights: np.ndarray, device: torch.device
    ) -> LinearModel:
        """The backbone made ready for the size of the images, or for the scale of the vectors."""
        vectors = isinstance(rows, np.ndarray)
        dtype = torch.float64 if self.dtype == "float64" or (vectors and self.dtype == "auto") else torch.float32
        if vectors:
            standardize_vectors(backbone, rows[keep], weights[keep])
            shape: tuple[int, ...] = (rows.shape[1],)
            preprocessing = None
        else:
            preprocessing = backbone.preprocessing.override(self.preprocessing)
            shape = (backbone.in_channels, *rows.size)
        return LinearModel(
            backbone,
            shape,
            self.tangent_layers,
            float(self.negative_slope),
            self.readout == "stages",
            preprocessing,
            dtype,
            device,
        )

    def _trunk_activations(
        self,
        model: LinearModel,
        rows: Any,
        keep: np.ndarray,
        seen: Fingerprint,
        kind: str,
        progress: Progress | None = None,
    ) -> TrunkCache:
        """Activations of every view of every kept row: all rows of the first view, then the next."""
        views, activations = self._view_names(), model.evaluator(self._memory())
        n_rows = len(views) * len(keep)

        def evaluate(start: int, stop: int) -> tuple[Tensor, ...]:
            wanted = np.arange(start, stop)
            images = select_rows(rows, keep[wanted % len(keep)])
            count = max(0, len(keep) - start)  # rows of the first view
            seen.see(wanted[:count], images[:count])
            flip = torch.tensor([views[v] == "flip" for v in wanted // len(keep)])
            return activations(flipped(images, flip) if flip.any() else images)

        def report(count: int) -> None:
            if progress is not None:
                progress.rows(count, n_rows)

        return TrunkCache(evaluate, n_rows, model.rows_at_once(self.batch_size), kind, report)

    def _solve(
        self, quadratic: Quadratic, preconditioner: KFAC, progress: Progress | None, near: np.ndarray | None = None
    ) -> SolverResult:
        """The minimum; from a solution that is near, if one is known, without an iteration where it suffices."""

        def report(number: int, residual: float, x: Tensor) -> bool:
            stop = progress is not None and progress.iteration(
                number, residual, lambda: {"coef_": self._change_of_weights(x)}
            )
            return quadratic.group.any(stop)

        b = quadratic.rhs()
        first = preconditioner.head_solution(b) if near is None else self._in_units_of_the_solver(near).to(b)
        if self.solver == "pcg":
            residual = None if near is None else b - quadratic.matvec(first)
            result = pcg(quadratic.matvec, b, preconditioner, self.tol, self.max_iter, report, first, residual)
        else:
            n_batches, generator = len(quadratic.batches), torch.Generator().manual_seed(self._draw_seed())
            result = sgd(
                quadratic.matvec, quadratic.batch_matvec, n_batches, b, preconditioner, self.tol, self.max_iter,
                generator, report, first,
            )  # fmt: skip
        self._noise = quadratic.noise_variance(result.x)
        return result

    def _set_problem(self, model: LinearModel, problem: Problem, quadratic: Quadratic) -> None:
        """Fitted attributes that do not wait for the solution."""
        self._model = model
        self.alpha_ = quadratic.alpha
        self.device_ = str(model.device)
        self.n_parameters_ = quadratic.network.n_parameters
        self.tail_scale_ = quadratic.network.tail_scale
        self._n_tail = quadratic.network.slices["head.weight"].start
        self.intercept_ = problem.mean.cpu().numpy() * self._unit if self._centered() else None
        self.relative_alpha_ = quadratic.alpha / problem.unit
        self._learn_from_held_out(problem, self._unit)

    def _set_solution(self, result: SolverResult) -> None:
        assert self._model.network is not None
        self._model.network.tail_scale = 1.0  # from here on directions are in the units of the weights
        self.coef_ = self._change_of_weights(result.x)
        self.n_iter_ = result.n_iter
        self.residual_norms_ = np.array(result.residual_norms)
        self.distance_bound_ = result.residual_norms[-1] * result.scale / self.alpha_
        self.converged_ = result.converged

    def _warn_unless_converged(self, result: SolverResult) -> None:
        if not result.converged:
            warnings.warn(
                f"The solver stopped after {result.n_iter} iterations at a relative gradient of "
                f"{result.residual_norms[-1]:.1e}, above tol={self.tol:g}. {result.status.value}",
                ConvergenceWarning,
                stacklevel=_levels_to_the_caller(),
            )

    def _change_of_weights(self, x: Tensor) -> np.ndarray:
        """d in the units of the weights, from the solver's."""
        d = x.detach().cpu().numpy().copy()
        d[: self._n_tail] *= self.tail_scale_
        return d

    def _in_units_of_the_solver(self, coef: np.ndarray) -> Tensor:
        """The reverse."""
        x = torch.tensor(coef)
        x[: self._n_tail] /= self.tail_scale_
        return x

    # ------------------------------------------------------------------------------- what the targets are

    def _read_targets(self, y: Any, n: int) -> np.ndarray:
        """Check y for n rows."""
        raise NotImplementedError

    def _learn_targets(self, y: np.ndarray, classes: Any) -> np.ndarray:
        """Targets (n, C) in float64, from what `_read_targets` returned; sets what says what they are."""
        raise NotImplementedError

    def _known_targets(self, y: Any, n: int, name: str) -> np.ndarray:
        """Targets (n, C) of n rows of the kind that was fitted; ``name`` is that of y in messages."""
        raise NotImplementedError

    def _target_unit(self, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """What targets (n, C) are divided by, (C,)."""
        raise NotImplementedError

    def _weigh_classes(self, values: np.ndarray, given: np.ndarray) -> np.ndarray:
        """Weights of rows with targets (n, C): those given, times those of their classes."""
        return given

    def _check_rest(self, values: np.ndarray) -> None:
        """Raise unless the targets (n, C) of the rows that would remain are enough for a fit."""
        raise NotImplementedError

    def _learn_from_held_out(self, problem: Problem, unit: np.ndarray) -> None:
        """Set what is fitted on the leave-one-out outputs of the ridge regression, in the units (C,) of its targets."""
        raise NotImplementedError

    def _decision(self, outputs: np.ndarray) -> np.ndarray:
        """Outputs (n, C) in the shape that users see."""
        raise NotImplementedError

    def _explained(self, changes: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        """Of changes (m, n, C) of outputs (m, C) those that explain a prediction: (m, n), or (m, n, C)."""
        raise NotImplementedError

    # --------------------------------------------------------------------------------------------- predict

    def features(self, X: Any) -> np.ndarray:
        """Compute what the head reads at the pre-trained weights: the standardized features of the backbone.

        Parameters
        ----------
        X : array-like or sequence of images
            As in `fit`.

        Returns
        -------
        features : ndarray of shape (n, D)
            Input of the head.
        """
        check_is_fitted(self)
        rows = self._read_new_data(X)
        model = self._model
        assert model.standardization is not None
        found = self._in_batches(lambda batches: [model.features(z) for z in batches], rows)
        return model.standardization(torch.cat(found)).cpu().numpy()

    def _outputs(self, X: Any) -> np.ndarray:
        """Outputs in units of y, (n, C)."""
        check_is_fitted(self)
        return self._in_batches(self._outputs_of, self._read_new_data(X))

    def _outputs_of(self, batches: Iterable[Sequence[Tensor]]) -> np.ndarray:
        """The same of trunk activations."""
        intercept = None if self.intercept_ is None else self.intercept_ / self._unit
        found = self._model.outputs(batches, self.coef_, intercept)
        bad = np.flatnonzero(~np.isfinite(found).all(1))
        if len(bad):
            raise ValueError(
                f"The outputs for {len(bad)} of {len(found)} rows of X are not finite, the first X[{bad[0]}]: the "
                f"backbone's activations overflow {self._model.dtype} there. Leave these rows out, or fit with "
                "dtype='float64'."
            )
        return found * self._unit.astype(found.dtype)

    def _fitted_on(self, X: Any, y: Any, sample_weight: Any) -> tuple[TrainingSet, TrunkCache, np.ndarray, int]:
        """The training data, given again or stored; their trunk activations; which rows have a weight; and of how many.

        X None: those that are stored.
        """
        check_is_fitted(self)
        if self.head == "ridge":
            raise ValueError(
                "head='ridge' has seen the targets, so that the quadratic does not say what fit would have done "
                "without an image: use head='orthogonal'."
            )
        if X is None:
            stored = self._stored_data()
            keep, n = np.arange(len(stored)), len(stored)
            values, given = stored.targets, stored.weights
            weights = self._weigh_classes(values, given)
            cache = self._stored_batches(stored, self._model)
        else:
            rows = self._read_new_data(X)
            n = len(rows)
            values = self._known_targets(y, n, "y")
            given = self._given_weights(sample_weight, n)
            weights = self._weigh_classes(values, given)
            keep = np.flatnonzero(weights)
            seen, kind = Fingerprint(len(keep)), "auto" if self.cache == "none" else self.cache
            cache = self._trunk_activations(self._model, rows, keep, seen, kind)
            if Fingerprint.of(seen.images, values[keep], weights[keep]) != self._fingerprint:
                raise ValueError(
                    "X, y and sample_weight are not the data that this model was fitted on: give all rows of fit, in "
                    "any order."
                )
        t, s, m = (torch.tensor(v[keep]) for v in (values / self._unit, weights, np.maximum(given, 1.0)))
        offsets = None
        if not self._centered():
            network = self._model.network
            assert network is not None
            with _full_precision():
                found = torch.cat([network.at(z, gradients=False).outputs for z in cache])
            offsets = found.double().cpu().view(-1, *t.shape)
        return TrainingSet(t, s, m, offsets), cache, keep, n
