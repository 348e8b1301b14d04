"""`fit` as a recipe that reads from top to bottom, and the updates of what it has fitted."""

from __future__ import annotations

import copy
import sys
import warnings
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.metaestimators import available_if
from torch import Tensor

from ..engine.fitted import FeatureReader, FittedModel
from ..engine.problem import Problem, Recipe, TrainingRows
from ..images.cache import TrunkCache
from ..images.digests import Fingerprint
from ..network.prepared import PreparedNetwork
from ..paper.model import PaperModel, fit_paper
from ..runtime.arithmetic import choose_device, in_ordinary_arithmetic
from ..runtime.memory import memory_budget
from ..runtime.processes import ALONE, ProcessGroup, default_group
from .base import FittedMethods
from .data import select_rows
from .progress import Bars, CallbackSupportMixin, Progress, with_callbacks

__all__ = ["LQFBase", "stores_data"]

# What a fit leaves beside attributes that end in "_". Parameters that decide what a fitted model answers are frozen in
# `_fitted_with`: to change one of them later changes nothing before the next fit.
_STATE = ("_model", "_fitted_with", "_image_options", "_size")

Estimator = TypeVar("Estimator", bound="LQFBase")


def stores_data(estimator: Any) -> bool:
    """Whether an estimator may be updated; else an AttributeError that says how it may."""
    if not estimator.store_data:
        raise AttributeError(
            f"This {type(estimator).__name__} keeps nothing of its training data: set store_data=True before fit."
        )
    return True


def _levels_to_the_caller() -> int:
    """Levels of the stack between a warning and the code that called the package."""
    levels, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals["__name__"].startswith(("sklearn_lqf.", "sklearn.callback.")):
        levels, frame = levels + 1, frame.f_back
    return levels


class LQFBase(CallbackSupportMixin, FittedMethods):
    """The estimator without what its targets are; documented with those that are public."""

    alpha: float | str

    # ------------------------------------------------------------------------------------------------- fit

    @with_callbacks
    @in_ordinary_arithmetic
    def fit(self: Estimator, X: Any, y: Any, sample_weight: Any = None, groups: Any = None) -> Estimator:
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
        groups : array-like of shape (n,), default=None
            Labels of groups of images that belong together, such as several of one object or patient. The prior, the
            temperature and `leave_one_out` are then those of leaving out one group, not one image.

        Returns
        -------
        self : estimator
            The fitted estimator.

        Raises
        ------
        ValueError
            Unusable parameters or data; the message says what was found and what to do.
        """
        return self._fit(X, y, sample_weight, groups)

    def _fit(self: Estimator, X: Any, y: Any, sample_weight: Any, groups: Any = None, classes: Any = None) -> Estimator:
        """`fit`, also with classes of which there is no image yet; a fit that raises leaves nothing fitted."""
        try:
            device = choose_device(self._execution.device)
            self._fit_all(X, y, sample_weight, groups, classes, device)
        except BaseException:
            for name in [n for n in vars(self) if n in _STATE or (n.endswith("_") and not n.startswith("_"))]:
                delattr(self, name)
            raise
        self._warn_unless_converged()
        return self

    def _fit_all(self, X: Any, y: Any, sample_weight: Any, groups: Any, classes: Any, device: torch.device) -> None:
        execution = self._execution
        group = default_group(device) if execution.distributed else ALONE
        # Read.
        group.together(self._check_parameters, group.size)
        inputs, backbone = group.together(self._read_training_rows, X, y)
        y = group.together(self._read_targets, y, len(inputs))
        if group.size > 1:
            self._check_agreement(group, inputs, y, sample_weight, groups, backbone)
        targets = self._learn_targets(y, classes)
        given = self._given_weights(sample_weight, len(inputs))
        self._fitted_with = {name: self._frozen_value(name) for name in self._frozen}
        weights = self._weigh_classes(targets, given)
        keep = np.flatnonzero(weights)  # a weight of zero is a row left out
        if len(keep) < group.size:
            raise ValueError(f"{group.size} processes cannot share {len(keep)} image(s): start fewer processes.")
        if np.maximum(given[keep], 1).sum() < 2:  # a weight of 2 is a row given twice
            raise ValueError(
                f"One row with a positive weight is not enough (n_samples={len(inputs)}): give at least 2."
            )
        labels = None if groups is None else self._given_groups(groups, len(inputs))[keep]
        recipe = self._new_recipe(targets.shape[1], labels is not None)
        with Progress(self, self.verbose if group.rank == 0 else 0, self.max_iter, X, y) as progress:
            # Prepare.
            with progress.step("preparing"):
                if self._paper:
                    network = self._prepare(backbone, inputs, keep, weights, device)
                else:
                    reader = self._reader(backbone, inputs, keep, weights, device)
                    if (precision := group.of_the_first(reader.precision)) != reader.precision:
                        reader = replace(reader, precision=precision)
                    network = reader.network
            self.device_ = str(network.device)
            self.precision_ = "full" if self._paper else reader.precision
            if self._paper:
                rows = (inputs, keep, targets[keep], weights[keep], given[keep], labels)
                self._fit_paper(network, recipe, *rows, self._draw_seed(), progress)
                return
            # Evaluate.
            own = keep[group.share(len(keep))]
            features, mine = group.together(self._evaluate, reader, inputs, own, progress)
            digests = group.all_gather_rows(torch.from_numpy(mine)).numpy()
            vectors = inputs[keep] if isinstance(inputs, np.ndarray) else None
            rows_of_fit = TrainingRows(features, targets[keep], given[keep], digests, vectors, labels)
            # Pose and solve.
            self._solve(reader, recipe, rows_of_fit, bool(self.store_data), progress, group, keep, len(inputs))

    def _frozen_value(self, name: str) -> Any:
        """The value of a parameter that a later change of it does not reach."""
        return copy.deepcopy(getattr(self, name))

    def _new_recipe(self, n_outputs: int, grouped: bool) -> Recipe:
        indicators = self._targets_are_indicators()
        return Recipe(
            prior=copy.deepcopy(self.prior),
            alpha=getattr(self, "alpha", "auto"),
            solver=self.solver,
            tol=float(self.tol),
            max_iter=int(self.max_iter),
            free=n_outputs - 1 if indicators else n_outputs,
            stratified=indicators,
            budget=memory_budget(),
            grouped=grouped,
        )

    def _solve(
        self,
        reader: FeatureReader,
        recipe: Recipe,
        rows: TrainingRows,
        keep_rows: bool,
        bars: Bars,
        group: ProcessGroup = ALONE,
        keep: np.ndarray | None = None,
        n: int = 0,
    ) -> None:
        """Everything that follows from the features; sets the fitted attributes.

        ``keep`` are the places of these rows among the n rows of X.
        """
        weights = self._weigh_classes(rows.targets, rows.given)
        unit = self._target_unit(rows.targets, weights)
        with bars.step("prior"):
            problem = Problem(rows, reader.groups, weights, unit, recipe, processes=group, device=reader.network.device)
        place = np.arange(len(rows)) if keep is None else keep
        with bars.step("solving"):
            alpha = self._choose_alpha(problem, recipe, rows, reader, place, n or len(rows))
            solution, held_out = group.of_the_first(problem.solve(alpha))
        if not np.isfinite(solution.weight).all():
            raise ValueError(
                f"The solution is not finite ({solution.advice}): use execution={{'dtype': 'float64'}}, check the "
                "backbone's weights and preprocessing, or increase alpha."
            )
        self._learn_from_held_out(held_out * unit, rows, weights)
        fingerprint = Fingerprint.of(torch.from_numpy(rows.digests), rows.targets, weights)
        self._model = FittedModel(reader, solution, unit, recipe, fingerprint, rows if keep_rows else None)
        self.prior_, self.groups_ = reader.shares(solution.variances), reader.columns
        self.alpha_ = solution.alpha
        self.coef_ = solution.weight.T * unit[:, None]
        self.intercept_ = solution.intercept * unit
        self.noise_variance_ = solution.noise
        self.solver_ = solution.method
        self.tangent_layers_ = reader.tangent_layers
        closed = solution.n_iter == 0 and not solution.residual_norms
        self._set_course(1 if closed else solution.n_iter, solution.residual_norms, solution.advice)

    def _set_course(self, n_iter: int, residual_norms: Any, advice: str | None) -> None:
        self.n_iter_ = n_iter
        self.residual_norms_ = np.array(residual_norms, dtype=np.float64)
        self.converged_ = advice is None
        self._advice = advice

    def _choose_alpha(
        self, problem: Problem, recipe: Recipe, rows: TrainingRows, reader: FeatureReader, keep: np.ndarray, n: int
    ) -> float | str:
        """The penalty."""
        return recipe.alpha

    def _fit_paper(
        self, network: PreparedNetwork, recipe: Recipe, inputs: Any, keep: np.ndarray, targets: np.ndarray,
        weights: np.ndarray, given: np.ndarray, groups: np.ndarray | None, seed: int, progress: Progress,
    ) -> None:  # fmt: skip
        """The paper's model: one change of all weights for all outputs."""
        activations = network.evaluator(self._execution.folder)

        def evaluate(start: int, stop: int) -> tuple[Tensor, ...]:
            return activations(select_rows(inputs, keep[start:stop]))

        def report(number: int, residual: float, x: Tensor) -> bool:
            def attributes() -> dict[str, Any]:
                model = PaperModel.at(network, seed, self._paper_unit(unit), x)
                return {"_model": model, "coef_": model.coef}

            return progress.iteration(number, residual, attributes)

        # Its outputs for the training images know their labels; those of the ridge regression without the image do not.
        reader = FeatureReader.draw(network, 0, None, seed, ("identity",))
        features, digests = self._evaluate(reader, inputs, keep, progress)
        rows = TrainingRows(features, targets, given, digests, groups=groups)
        unit = self._target_unit(targets, weights)
        probe = Problem(rows, reader.groups, weights, unit, replace(recipe, prior="last", solver="auto"))
        self._learn_from_held_out(probe.held_out("auto") * unit, rows, weights)

        cache = TrunkCache(
            evaluate,
            len(keep),
            network.rows_at_once(self._execution.batch_size),
            "auto",
            lambda n: progress.rows(n, len(keep)),
        )
        solver = "pcg" if self.solver == "auto" else self.solver
        fitted = fit_paper(
            network, cache, targets, weights, self._paper_unit(unit), multiplicity=rows.multiplicity,
            alpha=recipe.alpha, solver=solver, tol=recipe.tol, max_iter=recipe.max_iter, seed=seed, report=report,
        )  # fmt: skip
        self._model = fitted.model
        self.alpha_, self.coef_ = fitted.relative_alpha, fitted.model.coef
        self.intercept_, self.solver_ = np.zeros(targets.shape[1]), solver
        self.prior_, self.groups_, self.noise_variance_ = {}, {}, float("nan")
        self.tangent_layers_ = sorted({name.rpartition(".")[0] for name in network.split.tangent})
        result = fitted.result
        advice = None if result.converged else str(result.status.value)
        self._set_course(result.n_iter, result.residual_norms, advice)

    def _warn_unless_converged(self) -> None:
        if not self.converged_:
            warnings.warn(
                f"The solver stopped after {self.n_iter_} iterations at an error of "
                f"{self.residual_norms_[-1]:.1e}, above tol. {self._advice}",
                ConvergenceWarning,
                stacklevel=_levels_to_the_caller(),
            )

    # --------------------------------------------------------------------------------------------- updates

    @available_if(stores_data)
    @in_ordinary_arithmetic
    def forget(self: Estimator, indices: Any) -> Estimator:
        """Remove training images from the model, as if it had been fitted without them.

        Parameters
        ----------
        indices : int or array-like of int
            Which of the stored images, counted from 0: those of `fit` with a positive weight, in its order, then those
            of each `partial_fit`, without those forgotten before. Each at most once.

        Returns
        -------
        self : estimator
            The estimator, in which nothing of these images remains.

        Raises
        ------
        ValueError
            Indices out of range or twice; too few images, or none of some class, would remain.

        Notes
        -----
        Scale, prior and weights are fitted again to the stored features of the others, which depend on nothing but each
        image: the result is that of `fit` without the images, but for rounding. A folder ``memory`` is not touched.
        """
        self._grouped("forget")
        stored = self._stored_rows()
        rest = np.delete(np.arange(len(stored)), _check_indices(indices, len(stored)))
        empty = ~stored.targets.any(0)  # classes that had no image before do not lose one
        self._check_rest(stored.targets[rest] + empty)
        return self._update(stored.taking(rest))

    def _add(self: Estimator, X: Any, y: Any, sample_weight: Any, groups: Any) -> Estimator:
        """Fit again with more images; the estimator is fitted."""
        self._grouped("partial_fit")
        rows, _ = self._new_rows(self._read_new_data(X), y, sample_weight, groups)
        stored = self._stored_rows()
        if (stored.groups is None) != (rows.groups is None):
            given = "without" if stored.groups is None else "with"
            raise ValueError(f"This model was fitted {given} groups: add images {given} groups, too.")
        return self._update(stored.joined(rows))

    def _update(self: Estimator, rows: TrainingRows) -> Estimator:
        """Fit again to other rows, by the recipe of the fit; the estimator is as it was when this raises."""
        twin, model = copy.copy(self), self._grouped("an update")
        reader = model.reader
        with Bars(self.verbose) as bars:
            if rows.vectors is not None:  # whose standardization follows from all of them
                weights = self._weigh_classes(rows.targets, rows.given)
                network = reader.network.standardized(rows.vectors, weights)
                count = len(reader.directions)
                drawn = FeatureReader.draw(network, count, reader.sketch_size, reader.seed, reader.views)
                reader = replace(drawn, precision=reader.precision)
                features, _ = self._evaluate(reader, rows.vectors, np.arange(len(rows)), bars)
                rows = replace(rows, features=features)
            twin._solve(reader, model.recipe, rows, True, bars)
        self.__dict__.update(vars(twin))
        self._warn_unless_converged()
        return self


def _check_indices(indices: Any, n: int) -> np.ndarray:
    """Indices of some of n rows, each once."""
    chosen = np.atleast_1d(np.asarray(indices))
    if chosen.ndim != 1 or not (np.issubdtype(chosen.dtype, np.integer) or not chosen.size):
        raise ValueError(f"indices must be ints, got an array of {chosen.dtype} of shape {chosen.shape}.")
    chosen = chosen.astype(np.int64)
    wrong = chosen[(chosen < 0) | (chosen >= n)]
    if len(wrong):
        raise ValueError(f"indices must be from 0 to {n - 1}, got {wrong.tolist()[:5]}.")
    values, counts = np.unique(chosen, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"indices must name each image at most once, got twice: {values[counts > 1].tolist()[:5]}.")
    return chosen
