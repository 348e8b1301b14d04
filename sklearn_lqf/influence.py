"""What each training image did: the fitted quadratic without it, in closed form.

The dual of the quadratic has a variable for each output of each training row, and a matrix A = K + lambda S^-1 with
the tangent kernel K = J J' and the weights S of the rows. Its inverse Z answers every question of the form "and
without this image?" by Schur complements of the block of that image (Woodbury). The mean target, which stands for
the network's own output, is that of the images that remain.

Axes: n images, V views, b = V C outputs of an image, m new images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .kernel import tangent_kernel
from .linearize import LinearizedNetwork, Point, _full_precision
from .objective import Quadratic, build_kfac
from .problem import probe_outputs
from .solvers import pcg

__all__ = ["DUAL_MAX", "Dual", "InfluenceMixin", "TrainingSet", "one_by_one"]

DUAL_MAX = 6000  # outputs of all training rows, of which there is a square matrix


@dataclass(frozen=True)
class TrainingSet:
    """What was fitted.

    Attributes
    ----------
    targets : Tensor of shape (n, C)
    weights : Tensor of shape (n,)
        Positive weight of an image, shared equally by its views.
    multiplicity : Tensor of shape (n,)
        How many identical images a row stands for, at least 1: one of them is left out.
    offsets : Tensor of shape (V, n, C) or None
        What J d is added to; None: the mean target.
    """

    targets: Tensor
    weights: Tensor
    multiplicity: Tensor
    offsets: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """Mean target, (C,)."""
        return self.weights @ self.targets / self.weights.sum()

    @property
    def means_without(self) -> Tensor:
        """Mean target without each image, (n, C)."""
        gone = self.weights / self.multiplicity
        rest = (self.weights.sum() - gone).unsqueeze(1)
        return (self.weights @ self.targets - gone.unsqueeze(1) * self.targets) / rest


class Dual:
    """The inverse of A and what follows from it.

    Parameters
    ----------
    kernel : Tensor of shape (V n, C, V n, C)
        In float64; all images of the first view, then the next.
    data : TrainingSet
        In float64.
    alpha : float
        lambda > 0.
    """

    def __init__(self, kernel: Tensor, data: TrainingSet, alpha: float):
        n, c = data.targets.shape
        views = len(kernel) // n
        self._data, self._views, self._n, self._c = data, views, n, c
        a = kernel.view(views, n, c, views, n, c).permute(1, 0, 2, 4, 3, 5).reshape(n * views * c, -1)
        self._noise = alpha * views / data.weights  # diagonal of lambda S^-1, (n,)
        a = a + torch.diag(self._noise.repeat_interleave(views * c))
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(a))
        offsets = data.mean.expand(views, n, c) if data.offsets is None else data.offsets
        self._residual = (data.targets - offsets).transpose(0, 1).reshape(n, views * c)
        solution = (self.inverse @ self._residual.reshape(-1)).view(n, -1)  # (n, b)
        ones = torch.eye(c, dtype=torch.float64).repeat(n * views, 1)  # (n b, C)
        self._constant = (self.inverse @ ones).view(n, -1, c)  # the solution for targets of one class everywhere
        self._shift = torch.zeros(n, c, dtype=torch.float64)
        if data.offsets is None:
            self._shift = data.mean - data.means_without  # of the targets of all others, when one is left out
        left = 1 - 1 / data.multiplicity
        part = left / (self._noise * (1 - left))  # zero when nothing of the image is left
        b = views * c
        blocks = self.inverse.view(n, b, n, b)[torch.arange(n), :, torch.arange(n)]  # (n, b, b)
        self._blocks = blocks
        # The solution for the targets that are left when an image is out, at that image: before, and what goes.
        self._moved = solution + (self._constant @ self._shift.unsqueeze(2)).squeeze(2)
        kept = part.view(-1, 1, 1) * torch.eye(b, dtype=torch.float64)
        self._removed = torch.linalg.solve(blocks + kept, self._moved)

    def leave_one_out(self) -> Tensor:
        """f_lin of each image by the model that did not see it, (V, n, C)."""
        noise = self._noise.unsqueeze(1)
        target = self._residual.view(self._n, self._views, self._c) + self._shift.unsqueeze(1)
        own = target.flatten(1) - noise * self._moved  # J d with the shifted targets
        own = own - self._removed + noise * (self._blocks @ self._removed.unsqueeze(2)).squeeze(2)
        outputs = own.view(self._n, self._views, self._c).transpose(0, 1)
        return outputs + (self._data.means_without if self._data.offsets is None else self._data.offsets)

    def changes(self, kernel: Tensor) -> Tensor:
        """Change of f_lin of new images when each training image is left out.

        Parameters
        ----------
        kernel : Tensor of shape (m, C, V n, C)
            Between new images and the training rows.

        Returns
        -------
        Tensor of shape (m, n, C)
        """
        m = len(kernel)
        k = self._by_image(kernel).flatten(0, 1)
        gone = (k @ self.inverse).view(m, self._c, self._n, -1)
        change = -torch.einsum("mcnb,nb->mnc", gone, self._removed)
        constant = (k @ self._constant.flatten(0, 1)).view(m, self._c, self._c)
        change += torch.einsum("mcd,nd->mnc", constant, self._shift)
        return change - self._shift

    def explained(self, kernel: Tensor) -> Tensor:
        """What the training rows take from the prior covariance K of new images: ``K' A^-1 K``.

        Parameters
        ----------
        kernel : Tensor of shape (m, C, V n, C)
            Between new images and the training rows.

        Returns
        -------
        Tensor of shape (m, C, C)
        """
        k = self._by_image(kernel)
        return torch.einsum("mcx,mdx->mcd", (k.flatten(0, 1) @ self.inverse).view_as(k), k)

    def _by_image(self, kernel: Tensor) -> Tensor:
        """A kernel (m, C, V n, C) with all outputs of one training image side by side, (m, C, n b)."""
        m = len(kernel)
        return kernel.view(m, self._c, self._views, self._n, self._c).transpose(2, 3).reshape(m, self._c, -1)


class InfluenceMixin:
    """What a fitted linear model says about its training images; for estimators with its attributes."""

    def leave_one_out(
        self: Any, X: Any = None, y: Any = None, sample_weight: Any = None, *, method: str = "exact"
    ) -> np.ndarray:
        """Compute the outputs for each training image of the model that did not see it.

        Parameters
        ----------
        X : array-like or sequence of images, default=None
            The n images of `fit`, in any order. None: those that are stored (``store_data=True``), in their order.
        y : array-like of shape (n,) or (n, n_outputs), default=None
            Their labels or targets.
        sample_weight : array-like of shape (n,), default=None
            Their weights in `fit`.
        method : {"exact", "head"}, default="exact"
            ``"exact"``: as if the quadratic had been minimized without the image, all its views left out.
            ``"head"``: an estimate that leaves the linearized layers before the head out of account, in the time of
            a linear probe.

        Returns
        -------
        decision : ndarray of shape (n, n_classes), or (n,) for two classes
            As from `decision_function`. Of rows with a weight of 2, one of two is left out; for rows without a weight
            it is the model as it is.

        Raises
        ------
        ValueError
            Other data than those of the fit; a head that saw the labels; or more than 6000 outputs in all.

        Notes
        -----
        Exact for the fitted quadratic: what `fit` settled before it is kept, that is the penalty, which
        ``alpha="auto"`` chose by the labels of all images (one number), and without labels the standardization of
        the features and the prior scale of the tail. The mean target is that of the other images. Time and memory
        grow with the square of the number of outputs of all rows.
        """
        if method not in ("exact", "head"):
            raise ValueError(f"method must be 'exact' or 'head', got {method!r}.")
        data, cache, keep, n = self._fitted_on(X, y, sample_weight)
        exact = method == "exact"
        found = self._dual(data, cache).leave_one_out() if exact else self._head_leave_one_out(data, cache)
        outputs = np.empty((n, found.shape[2]))
        if len(keep) < n:
            outputs[:] = self._outputs(X)
        outputs[keep] = found[0].numpy() * self._unit
        return self._decision(outputs)

    def influence(
        self: Any,
        X: Any,
        y: Any,
        X_test: Any,
        y_test: Any = None,
        sample_weight: Any = None,
        *,
        method: str = "exact",
    ) -> np.ndarray:
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
        method : {"exact", "cg", "kfac"}, default="exact"
            ``"cg"``: an estimate for up to 6000 training images whose outputs are too many for a square matrix: the
            inverse curvature is solved for, to ``tol``, for each of X_test; the leverage of a training image is that by
            the head, and the change of a loss is to first order. ``"kfac"``: the same, where the preconditioner stands
            for the inverse curvature: one pass over the training images for each of X_test, and a rough ranking.

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
        Exact in the sense of `leave_one_out`: no approximation to first order, but the optimum without the image.
        """
        if method not in ("exact", "cg", "kfac"):
            raise ValueError(f"method must be 'exact', 'cg' or 'kfac', got {method!r}.")
        data, cache, keep, n = self._fitted_on(X, y, sample_weight)
        test = self._in_batches(list, self._read_new_data(X_test))
        outputs = self._outputs_of(test)
        residual = None if y_test is None else outputs - self._known_targets(y_test, len(outputs), "y_test")
        if method != "exact":
            found = self._estimated_effect(data, cache, test, outputs, residual, method)
        else:
            changes = self._dual(data, cache).changes(self._kernel(test, cache)).numpy() * self._unit  # (m, n, C)
            if residual is None:
                found = self._explained(changes, outputs)
            else:
                found = (changes * (changes + 2 * residual[:, None])).sum(2)
        effect = np.zeros((len(outputs), n, *found.shape[2:]))
        effect[:, keep] = found
        return effect

    def _estimated_effect(
        self: Any,
        data: TrainingSet,
        cache: Sequence[Sequence[Tensor]],
        test: Sequence[Sequence[Tensor]],
        outputs: np.ndarray,
        residual: np.ndarray | None,
        method: str,
    ) -> np.ndarray:
        """Effects (m, n) or (m, n, C) as `influence`, by solves for the test images and the head's leverage."""
        network, inverse = self._inverse_curvature(data, cache, method == "cg")
        views, (n, c) = len(self._view_names()), data.targets.shape
        left_out = self._head_leave_one_out(data, cache)  # (V, n, C)
        part = (data.weights / data.multiplicity / views).view(n, 1)
        gone = (part * (data.targets - left_out)).flatten(0, 1).to(network.weight)  # (V n, C)

        def effect(point: Point, u: np.ndarray) -> Tensor:
            """``-u' J H^-1 J_i' gone_i`` for an image and u (C,): (n,)."""
            d = inverse(point.vjp(torch.from_numpy(u * self._unit).unsqueeze(0).to(network.weight)))
            slopes = torch.cat([network.at(z, gradients=False).jvp(d) for z in cache])
            return -(slopes * gone).sum(1).view(views, n).sum(0).double().cpu()

        rows = []
        with _full_precision():
            for i, image in enumerate(one_by_one(test)):
                point = network.at(image)
                if residual is not None:
                    rows.append(effect(point, 2 * residual[i]))
                    continue
                wanted = self._explained(np.eye(c)[None], outputs[i : i + 1])[0]  # (C,) or (C, C)
                found = [effect(point, u) for u in wanted.reshape(c, -1).T]
                rows.append(found[0] if wanted.ndim == 1 else torch.stack(found, 1))
        return torch.stack(rows).numpy()

    def _inverse_curvature(
        self: Any, data: TrainingSet, cache: Sequence[Sequence[Tensor]], solve: bool
    ) -> tuple[LinearizedNetwork, Callable[[Tensor], Tensor]]:
        """The network in the units of the solver, and H^-1 as a function of vectors (P,): solved for, or K-FAC."""
        network, views = self._model.in_units_of_the_solver(self.tail_scale_), len(self._view_names())
        weights = (data.weights / views).repeat(views).to(network.weight)
        targets = weights.new_zeros(len(weights), len(network.weight))
        kfac = build_kfac(network, cache, weights, probe_outputs(*targets.shape).to(weights))
        kfac.factorize(self.alpha_, weights.dtype, self.damping * kfac.output_trace if solve else 0.0)
        if not solve:
            return network, kfac
        quadratic = Quadratic(network, cache, targets, weights, self.alpha_)

        def solution(b: Tensor) -> Tensor:
            return pcg(quadratic.matvec, b, kfac, self.tol, self.max_iter, start=kfac.head_solution(b)).x

        return network, solution

    def _head_leave_one_out(self: Any, data: TrainingSet, cache: Sequence[Sequence[Tensor]]) -> Tensor:
        """Leave-one-out outputs (V, n, C) of the head alone, one output after the other."""
        points = (self._model.network.at(z, gradients=False) for z in cache)
        features = torch.cat([point.features for point in points]).double().cpu()
        _check_size(len(features), "images and views", "fewer images")
        kernel = (features @ features.T + 1).view(len(features), 1, len(features), 1)
        columns = [_column(data, c) for c in range(data.targets.shape[1])]
        return torch.cat([Dual(kernel, one, self.alpha_).leave_one_out() for one in columns], 2)

    def _dual(self: Any, data: TrainingSet, cache: Sequence[Sequence[Tensor]]) -> Dual:
        n, c = data.targets.shape
        _check_size(
            n * c * len(self._view_names()), "outputs (images, views and classes)", "fewer images, or method='head'"
        )
        return Dual(self._kernel(cache), data, self.alpha_)

    def _kernel(
        self: Any, rows: Sequence[Sequence[Tensor]], columns: Sequence[Sequence[Tensor]] | None = None
    ) -> Tensor:
        """The tangent kernel in the units of the solver."""
        return tangent_kernel(self._model.network, rows, columns, self.tail_scale_)


def one_by_one(batches: Iterable[Sequence[Tensor]]) -> Iterator[list[Tensor]]:
    """Batches of one image each."""
    for batch in batches:
        for i in range(len(batch[0])):
            yield [z[i : i + 1] for z in batch]


def _column(data: TrainingSet, c: int) -> TrainingSet:
    """The targets of one class."""
    offsets = None if data.offsets is None else data.offsets[:, :, c : c + 1]
    return TrainingSet(data.targets[:, c : c + 1], data.weights, data.multiplicity, offsets)


def _check_size(size: int, what: str, remedy: str) -> None:
    if size > DUAL_MAX:
        raise ValueError(
            f"This takes a square matrix with a row for each of {size} {what}; supported are up to {DUAL_MAX}: "
            f"use {remedy}."
        )
