"""What a fitted estimator answers: predictions, leave-one-out, influence, files. numpy in, numpy out."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from sklearn.utils.validation import check_is_fitted
from torch import nn

from ..answers.left_out import influence, leave_one_out
from ..answers.uncertainty import output_variance
from ..engine.fitted import FittedModel
from ..engine.problem import TrainingRows
from ..io.export import to_module
from ..io.files import load_estimator, pickled_state, save_estimator, unpickled_state
from ..paper.model import PaperModel
from ..runtime.arithmetic import choose_device, in_ordinary_arithmetic
from .data import Inputs
from .progress import Bars

__all__ = ["FittedMethods"]

Estimator = TypeVar("Estimator", bound="FittedMethods")


class FittedMethods(Inputs):
    """An estimator without `fit`; documented with those that are public."""

    _frozen: tuple[str, ...] = ("tol",)  # parameters that decide what a fitted model answers
    _model: FittedModel | PaperModel
    _fitted_with: dict[str, Any]  # values of the frozen parameters

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

    @in_ordinary_arithmetic
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
        return self._in_batches(self._model.evaluator(self._execution.folder), self._read_new_data(X))

    def _grouped(self, method: str) -> FittedModel:
        """The model, unless it is the paper's."""
        check_is_fitted(self)
        if not isinstance(self._model, FittedModel):
            raise ValueError(f"{method} is there for model='groups' only; this model was fitted with model='paper'.")
        return self._model

    @in_ordinary_arithmetic
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
        return to_module(self._model)

    # --------------------------------------------------------------------------------------------- answers

    @in_ordinary_arithmetic
    def leave_one_out(self, X: Any = None, y: Any = None, sample_weight: Any = None, groups: Any = None) -> np.ndarray:
        """Compute the outputs for each training image of the model that did not see it.

        Parameters
        ----------
        X : array-like or sequence of images, default=None
            The n images of `fit`, in any order. None: those that are stored (``store_data=True``), in their order.
        y : array-like of shape (n,) or (n, n_outputs), default=None
            Their labels or targets.
        sample_weight : array-like of shape (n,), default=None
            Their weights in `fit`.
        groups : array-like of shape (n,), default=None
            Their groups in `fit`.

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
        rows, weights, keep, n = self._rows_of_fit(X, y, sample_weight, groups)
        if model.recipe.grouped and rows.groups is None:
            raise ValueError("This model was fitted with groups: give those of the images, as in fit.")
        left_out = leave_one_out(model, rows, weights)
        outputs = np.empty((n, left_out.shape[1]))
        if len(keep) < n:
            outputs[:] = self._outputs(X)
        outputs[keep] = left_out
        return self._decision(outputs)

    @in_ordinary_arithmetic
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
        chooses these anew: the changes of the test loss by single refits correlated with these effects at 0.90 to 0.96
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

    def _rows_of_fit(
        self, X: Any, y: Any, sample_weight: Any, groups: Any = None
    ) -> tuple[TrainingRows, np.ndarray, np.ndarray, int]:
        """The training rows, given again or stored; their weights; their places in X; and how many rows X has.

        X None: those that are stored.
        """
        if X is None:
            rows = self._stored_rows()
            keep, n = np.arange(len(rows)), len(rows)
        else:
            inputs = self._read_new_data(X)
            n = len(inputs)
            rows, keep = self._new_rows(inputs, y, sample_weight, groups)
        return rows, self._weigh_classes(rows.targets, rows.given), keep, n

    def _new_rows(self, inputs: Any, y: Any, sample_weight: Any, groups: Any) -> tuple[TrainingRows, np.ndarray]:
        """Rows as the fitted model reads them, those with a positive weight; and their places."""
        model = self._grouped("rows")
        targets, given = self._known_targets(y, len(inputs), "y"), self._given_weights(sample_weight, len(inputs))
        keep = np.flatnonzero(self._weigh_classes(targets, given))
        with Bars(self.verbose) as bars:
            features, digests = self._evaluate(model.reader, inputs, keep, bars)
        vectors = inputs[keep] if isinstance(inputs, np.ndarray) else None
        labels = None if groups is None else self._given_groups(groups, len(inputs))[keep]
        return TrainingRows(features, targets[keep], given[keep], digests, vectors, labels), keep

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

    @in_ordinary_arithmetic
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
        versions. Not saved are two items of ``execution``, ``memory``, a folder that must be trusted, and ``device``,
        which `load` decides; callbacks; and the code of a module or callable given as ``backbone``, which `load` must
        be given again.
        """
        check_is_fitted(self)
        save_estimator(self, path, include_backbone)

    @classmethod
    @in_ordinary_arithmetic
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
            changed: a copy takes the weights of the file, or is compared with those of the fit, and becomes the
            parameter, so that clones and later fits start from these weights, too.

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
