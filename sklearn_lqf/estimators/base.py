"""What all estimators share: `fit` as a recipe, and what a fitted model answers. numpy in, numpy out."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from ..answers.left_out import influence, leave_one_out
from ..answers.uncertainty import output_variance
from ..backbones.loading import Backbone
from ..engine.fitted import FeatureReader, FittedModel
from ..engine.problem import Problem, Recipe, TrainingRows
from ..images.cache import Fingerprint, TrunkCache, memory_budget
from ..io.export import to_module
from ..io.files import load_estimator, pickled_state, save_estimator, unpickled_state
from ..network.prepared import PreparedNetwork, choose_device, ordinary_arithmetic
from ..paper.model import PaperModel, fit_paper
from ..runtime.processes import ALONE, Group, default_group
from .data import Inputs, evaluate_rows, select_rows
from .progress import CallbackSupportMixin, Progress, with_callbacks

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


class LQFBase(CallbackSupportMixin, Inputs):
    """The estimator without what its targets are; documented with those that are public."""

    _frozen: tuple[str, ...] = ()  # parameters that decide what a fitted model answers
    _model: FittedModel | PaperModel
    _fitted_with: dict[str, Any]
    alpha: float | str

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
            device = choose_device(self._execution.device)
            with ordinary_arithmetic(device):
                self._fit_all(X, y, sample_weight, classes, device)
        except BaseException:
            for name in [n for n in vars(self) if n in _STATE or (n.endswith("_") and not n.startswith("_"))]:
                delattr(self, name)
            raise
        self._warn_unless_converged()
        return self

    def _fit_all(self, X: Any, y: Any, sample_weight: Any, classes: Any, device: torch.device) -> None:
        execution = self._execution
        group = default_group(device) if execution.distributed else ALONE
        # Read.
        group.together(self._check_parameters, group.size)
        inputs, backbone = group.together(self._read_training_rows, X, y)
        y = group.together(self._read_targets, y, len(inputs))
        if group.size > 1:
            self._check_agreement(group, inputs, y, sample_weight, backbone)
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
        # Prepare.
        seed = self._draw_seed()
        network = self._prepare(backbone, inputs, keep, weights, device)
        recipe = self._new_recipe(targets.shape[1])
        self.device_ = str(device)
        with Progress(self, self.verbose if group.rank == 0 else 0, self.max_iter, X, y) as progress:
            if self._paper:
                rows = (inputs, keep, targets[keep], weights[keep], given[keep])
                self._fit_paper(network, recipe, *rows, seed, progress)
                return
            # Evaluate.
            count = int(self.n_directions) if self._reads_directions() else 0
            reader = FeatureReader.draw(network, count, self.sketch_size, seed, self._view_names())
            own = keep[group.share(len(keep))]
            found = group.together(self._evaluate, reader, inputs, own, progress)
            features, digests = (group.all_gather_rows(v).numpy() for v in found)
            vectors = inputs[keep] if isinstance(inputs, np.ndarray) else None
            rows_of_fit = TrainingRows(features, targets[keep], given[keep], digests, vectors)
            # Pose and solve.
            self._solve(reader, recipe, rows_of_fit, bool(self.store_data), group, keep, len(inputs))

    def _frozen_value(self, name: str) -> Any:
        """The value of a parameter that a later change of it does not reach."""
        return copy.deepcopy(getattr(self, name))

    def _reads_directions(self) -> bool:
        """Whether tangents along directions may have a variance."""
        if self._paper or (isinstance(self.prior, str) and self.prior in ("equal", "last")):
            return False
        named = isinstance(self.prior, Mapping) and not any(str(name).endswith(" directions") for name in self.prior)
        return self.tangents in ("network", "both") and not named

    def _new_recipe(self, n_outputs: int) -> Recipe:
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
        )

    def _evaluate(
        self, reader: FeatureReader, inputs: Any, chosen: np.ndarray, progress: Progress | None = None
    ) -> tuple[Tensor, Tensor]:
        """Raw features (n, D) and digests (n, 16) of some rows."""
        seen = Fingerprint(len(chosen))

        def see(start: int, images: Tensor) -> None:
            seen.see(np.arange(start, start + len(images)), images)
            if progress is not None:
                progress.rows(len(images), len(chosen))

        size = reader.network.rows_at_once(self._execution.batch_size)
        features = evaluate_rows(reader.reading(self._execution.folder), inputs, chosen, size, see)
        return torch.from_numpy(features), seen.images

    def _solve(
        self,
        reader: FeatureReader,
        recipe: Recipe,
        rows: TrainingRows,
        keep_rows: bool,
        group: Group = ALONE,
        keep: np.ndarray | None = None,
        n: int = 0,
    ) -> None:
        """Everything that follows from the features; sets the fitted attributes.

        ``keep`` are the places of these rows among the n rows of X.
        """
        weights = self._weigh_classes(rows.targets, rows.given)
        unit = self._target_unit(rows.targets, weights)
        problem = Problem(rows, reader.groups, weights, unit, recipe)
        place = np.arange(len(rows)) if keep is None else keep
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
        self.prior_, self.groups_ = self._model.prior, self._model.columns
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

    def _prepare(
        self, backbone: Backbone, rows: Any, keep: np.ndarray, weights: np.ndarray, device: torch.device
    ) -> PreparedNetwork:
        """The backbone made ready for the size of the images, or for the scale of the vectors."""
        vectors, dtype = isinstance(rows, np.ndarray), self._execution.dtype
        if vectors:
            shape: tuple[int, ...] = (rows.shape[1],)
            preprocessing = None
        else:
            preprocessing = backbone.preprocessing.override(self.preprocessing)
            shape = (backbone.in_channels, *rows.size)
        precision = torch.float64 if dtype == "float64" or (vectors and dtype == "auto") else torch.float32
        layers = self.tangent_layers if self._paper or self._reads_directions() else "head"
        alone = isinstance(self.prior, str) and self.prior == "last"
        local = not self._paper and self.tangents in ("local", "both") and not alone
        slope = float(self.negative_slope)
        network = PreparedNetwork(backbone, shape, layers, slope, local, preprocessing, precision, device)
        if layers is not self.tangent_layers:  # not needed, but a wrong name is a mistake all the same
            network.check_layers(self.tangent_layers)
        return network.standardized(rows[keep], weights[keep]) if vectors else network

    def _fit_paper(
        self, network: PreparedNetwork, recipe: Recipe, inputs: Any, keep: np.ndarray, targets: np.ndarray,
        weights: np.ndarray, given: np.ndarray, seed: int, progress: Progress,
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
        features, digests = self._evaluate(reader, inputs, keep)
        rows = TrainingRows(features.numpy(), targets, given, digests.numpy())
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
            alpha=recipe.alpha, solver=solver, tol=float(self.tol), max_iter=int(self.max_iter), seed=seed, report=report,
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
                f"The solver stopped after {self.n_iter_} iterations at a relative gradient of "
                f"{self.residual_norms_[-1]:.1e}, above tol. {self._advice}",
                ConvergenceWarning,
                stacklevel=_levels_to_the_caller(),
            )

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

    def _targets_are_indicators(self) -> bool:
        """Whether the targets of a row are those of one class, which add up to one."""
        return False

    def _target_unit(self, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """What targets (n, C) are divided by, (C,)."""
        raise NotImplementedError

    def _paper_unit(self, unit: np.ndarray) -> np.ndarray:
        """The same for the paper's model."""
        return unit

    def _weigh_classes(self, values: np.ndarray, given: np.ndarray) -> np.ndarray:
        """Weights of rows with targets (n, C): those given, times those of their classes."""
        return given

    def _check_rest(self, values: np.ndarray) -> None:
        """Raise unless the targets (n, C) of the rows that would remain are enough for a fit."""
        raise NotImplementedError

    def _learn_from_held_out(self, held_out: np.ndarray, rows: TrainingRows, weights: np.ndarray) -> None:
        """Set what is fitted on the outputs (n, C), in the units of y, for rows by the model without them."""
        raise NotImplementedError

    def _decision(self, outputs: np.ndarray) -> np.ndarray:
        """Outputs (n, C) in the shape that users see."""
        raise NotImplementedError

    def _explained(self, changes: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        """Of changes (m, n, C) of outputs (m, C) those that explain a prediction: (m, n), or (m, n, C)."""
        raise NotImplementedError

    # --------------------------------------------------------------------------------------------- predict

    def features(self, X: Any) -> np.ndarray:
        """Compute the standardized features of images, in groups.

        Parameters
        ----------
        X : array-like or sequence of images
            As in `fit`.

        Returns
        -------
        features : ndarray of shape (n, n_features)
            What ``coef_`` multiplies: the groups side by side, each of mean squared norm 1 on the training images;
            ``groups_`` has the columns of each.
        """
        return self._grouped("features").solution.standardization(self._raw_features(self._read_new_data(X)))

    def _raw_features(self, rows: Any) -> np.ndarray:
        return self._in_batches(self._grouped("features").reader.reading(self._execution.folder), rows)

    def _outputs(self, X: Any) -> np.ndarray:
        """Outputs in units of y, (n, C)."""
        check_is_fitted(self)
        found = self._in_batches(self._model.evaluator(self._execution.folder), self._read_new_data(X))
        bad = np.flatnonzero(~np.isfinite(found).all(1))
        if len(bad):
            raise ValueError(
                f"The outputs for {len(bad)} of {len(found)} rows of X are not finite, the first X[{bad[0]}]: the "
                f"backbone's activations overflow {self._model.network.dtype} there. Leave these rows out, or fit with "
                "execution={'dtype': 'float64'}."
            )
        return found

    def _grouped(self, method: str) -> FittedModel:
        """The model, unless it is the paper's."""
        check_is_fitted(self)
        if not isinstance(self._model, FittedModel):
            raise ValueError(f"{method} is there for model='groups' only; this model was fitted with model='paper'.")
        return self._model

    def to_module(self) -> nn.Module:
        """Make a module of torch that computes the outputs of the fitted model.

        Returns
        -------
        module : nn.Module
            Maps images (B, C, H, W), channels first, of the size and dtype of the model and in [0, 1], or vectors
            (B, n_features), to outputs (B, n_outputs): estimates of the class indicators, or target values. It is a
            copy on the device of the model.

        Notes
        -----
        Resizing and the decision are the caller's: for more than two classes the outputs are those of
        ``decision_function``, the class is their argmax, and probabilities are their softmax over ``temperature_``.
        ``torch.export.export`` with ``strict=False`` makes a program of it, ``torch.onnx.export`` (extra ``onnx``) one
        for other runtimes.
        """
        check_is_fitted(self)
        with ordinary_arithmetic(self._model.network.device):
            return to_module(self._model)

    # --------------------------------------------------------------------------------------------- answers

    def leave_one_out(self, X: Any = None, y: Any = None, sample_weight: Any = None) -> np.ndarray:
        """Compute the outputs for each training image of the model that did not see it.

        Parameters
        ----------
        X : array-like or sequence of images, default=None
            The n images of `fit`, in any order. None: those that are stored (``store_data=True``), in their order.
        y : array-like of shape (n,) or (n, n_outputs), default=None
            Their labels or targets.
        sample_weight : array-like of shape (n,), default=None
            Their weights in `fit`.

        Returns
        -------
        outputs : ndarray of shape (n,) or (n, n_outputs)
            As ``decision_function`` or ``predict`` (of a regressor) would return them. Of an image that stands for
            several (a weight above 1) one is left out; rows without a weight get the outputs of the model.

        Raises
        ------
        ValueError
            The data are not those of `fit`, or none are stored.

        Notes
        -----
        Closed form, for all outputs at once, with the scale of the features and the prior held fixed; the prior was
        chosen with the labels of all images, this one's included. Where ``solver_`` is ``"estimate"``, so is this.
        """
        model = self._grouped("leave_one_out")
        rows, weights, keep, n = self._rows_of_fit(X, y, sample_weight)
        left_out = leave_one_out(model, rows, weights)
        outputs = np.empty((n, left_out.shape[1]))
        if len(keep) < n:
            outputs[:] = self._outputs(X)
        outputs[keep] = left_out
        return self._decision(outputs)

    def influence(self, X: Any, y: Any, X_test: Any, y_test: Any = None, sample_weight: Any = None) -> np.ndarray:
        """Compute the effect of leaving out each training image on predictions.

        Parameters
        ----------
        X : array-like or sequence of images, or None
            The n images of `fit`, in any order. None: those that are stored (``store_data=True``), in their order.
        y : array-like of shape (n,) or (n, n_outputs), or None
            Their labels or targets.
        X_test : array-like or sequence of images
            The m images to be explained.
        y_test : array-like of shape (m,) or (m, n_outputs), default=None
            Their labels or targets.
        sample_weight : array-like of shape (n,), default=None
            Weights of the training images in `fit`.

        Returns
        -------
        effect : ndarray of shape (m, n), or (m, n, n_outputs)
            With ``y_test``: the change of the squared loss ``|f - t|^2`` of each image when one training image is
            left out, t the indicators of its class or its targets; positive where that image helps. Without: the
            change of the output of the predicted class, of the target, or of all outputs (several labels or
            targets). Zero for training rows without a weight.

        Raises
        ------
        ValueError
            As `leave_one_out`.

        Notes
        -----
        No approximation to first order, but the solution without the image, with scale and prior held fixed. A refit
        chooses these anew: the changes of the test loss by single refits correlated with these effects at 0.90 to 0.95
        where it was measured (page on influence). Where ``solver_`` is ``"estimate"``, so is this.
        """
        model = self._grouped("influence")
        rows, weights, keep, n = self._rows_of_fit(X, y, sample_weight)
        features = self._raw_features(self._read_new_data(X_test))
        outputs = model.outputs(features)
        residual = None if y_test is None else outputs - self._known_targets(y_test, len(outputs), "y_test")

        def effect(changes: np.ndarray, piece: slice) -> np.ndarray:
            if residual is None:
                return self._explained(changes, outputs[piece])
            return (changes * (changes + 2 * residual[piece, None])).sum(2)

        found = influence(model, rows, weights, features, effect)
        whole = np.zeros((len(outputs), n, *found.shape[2:]))
        whole[:, keep] = found
        return whole

    def _output_variance(self, X: Any) -> np.ndarray:
        """Posterior variance of an output over the square of its unit, (n,)."""
        model = self._grouped("return_std")
        rows, weights, _, _ = self._rows_of_fit(None, None, None)
        return output_variance(model, rows, weights, self._raw_features(self._read_new_data(X)))

    def _rows_of_fit(self, X: Any, y: Any, sample_weight: Any) -> tuple[TrainingRows, np.ndarray, np.ndarray, int]:
        """The training rows, given again or stored; their weights; their places in X; and how many rows X has.

        X None: those that are stored.
        """
        if X is None:
            rows = self._stored_rows()
            keep, n = np.arange(len(rows)), len(rows)
        else:
            inputs = self._read_new_data(X)
            n = len(inputs)
            rows, keep = self._new_rows(inputs, y, sample_weight)
        return rows, self._weigh_classes(rows.targets, rows.given), keep, n

    def _new_rows(self, inputs: Any, y: Any, sample_weight: Any) -> tuple[TrainingRows, np.ndarray]:
        """Rows as the fitted model reads them, those with a positive weight; and their places."""
        model = self._grouped("rows")
        targets, given = self._known_targets(y, len(inputs), "y"), self._given_weights(sample_weight, len(inputs))
        keep = np.flatnonzero(self._weigh_classes(targets, given))
        with ordinary_arithmetic(model.network.device):
            features, digests = self._evaluate(model.reader, inputs, keep)
        vectors = inputs[keep] if isinstance(inputs, np.ndarray) else None
        return TrainingRows(features.numpy(), targets[keep], given[keep], digests.numpy(), vectors), keep

    # --------------------------------------------------------------------------------------------- updates

    @available_if(stores_data)
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

    def _add(self: Estimator, X: Any, y: Any, sample_weight: Any) -> Estimator:
        """Fit again with more images; the estimator is fitted."""
        self._grouped("partial_fit")
        rows, _ = self._new_rows(self._read_new_data(X), y, sample_weight)
        return self._update(self._stored_rows().joined(rows))

    def _update(self: Estimator, rows: TrainingRows) -> Estimator:
        """Fit again to other rows, by the recipe of the fit; the estimator is as it was when this raises."""
        twin, model = copy.copy(self), self._grouped("an update")
        reader = model.reader
        with ordinary_arithmetic(reader.network.device):
            if rows.vectors is not None:  # whose standardization follows from all of them
                weights = self._weigh_classes(rows.targets, rows.given)
                network = reader.network.standardized(rows.vectors, weights)
                reader = FeatureReader.draw(
                    network, len(reader.directions), reader.sketch_size, reader.seed, reader.views
                )
                features, _ = self._evaluate(reader, rows.vectors, np.arange(len(rows)))
                rows = replace(rows, features=features.numpy())
            twin._solve(reader, model.recipe, rows, True)
        self.__dict__.update(vars(twin))
        self._warn_unless_converged()
        return self

    def _stored_rows(self) -> TrainingRows:
        """What is stored, or an error."""
        rows = self._grouped("stored data").rows
        if rows is None:
            raise ValueError(
                f"This {type(self).__name__} was fitted with store_data=False and keeps nothing of its training data: "
                "fit it with store_data=True."
            )
        return rows

    # -------------------------------------------------------------------------------------------------- files

    def save(self, path: Any, *, include_backbone: bool = True) -> None:
        """Write the fitted estimator to a file that can be loaded without trusting it.

        Parameters
        ----------
        path : str or path
            Conventionally ends in ``.safetensors``. A file of this name is replaced once the new one is complete.
        include_backbone : bool, default=True
            Whether the file holds the pre-trained weights. False: `load` takes them from where `fit` had them, and
            compares them by a digest; the file is smaller by the size of the backbone. The built-in network for
            vectors is always in the file.

        Raises
        ------
        TypeError
            A parameter or a class label is of a kind that JSON and tensors cannot represent.
        ImportError
            The package safetensors is missing.
        OSError
            The file cannot be written; one that was there is as before.

        Notes
        -----
        The file holds tensors and JSON: parameters, fitted attributes, stored training data (``store_data=True``),
        versions. Not saved are two items of ``execution``, the folder ``memory``, which must be trusted, and ``device``,
        which `load` decides; callbacks; and the code of a module or callable given as ``backbone``, which `load` must be given again.
        """
        check_is_fitted(self)
        save_estimator(self, path, include_backbone)

    @classmethod
    def load(cls: type[Estimator], path: Any, *, device: Any = "auto", backbone: Any = None) -> Estimator:
        """Load an estimator that `save` has written; nothing that the file holds is run.

        Parameters
        ----------
        path : str or path
            The file.
        device : str or torch.device, default="auto"
            Where the model is put; becomes the item of ``execution``.
        backbone : nn.Module, callable, str or None, default=None
            Takes the place of the parameter ``backbone``; needed where that was a module or callable. It is never
            changed: a copy takes the weights of the file, or is compared with those of the fit.

        Returns
        -------
        estimator : estimator
            Its predictions are those of the estimator that was saved, on the same device to the last bit.

        Raises
        ------
        ValueError
            The file is broken, was changed, has a newer format or holds another class; or the backbone is not the
            one that was fitted.
        FileNotFoundError
            There is no such file.
        ImportError
            The package safetensors is missing, or one that the backbone needs.
        RuntimeError
            The file holds no backbone, and its weights cannot be downloaded.
        """
        return load_estimator(cls, path, choose_device(device), device, backbone)

    def __getstate__(self) -> dict[str, Any]:
        return pickled_state(super().__getstate__())

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(unpickled_state(type(self), state))


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
