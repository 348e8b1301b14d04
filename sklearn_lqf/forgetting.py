"""Taking training images away from a fitted model, and adding some: the optimum of the changed set.

Nothing of the first fit goes into the second but the seed of its head, and where asked its solution, at which the
solver starts: features are standardized, the penalty chosen, and the quadratic posed from the stored activations of the
images that remain.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from .backbones import Backbone
from .cache import Fingerprint, TrunkCache
from .model import ordinary_arithmetic

__all__ = ["StoredData", "UpdateMixin", "stores_data"]


@dataclass(frozen=True)
class StoredData:
    """What an estimator keeps of n training images.

    Attributes
    ----------
    activations : sequence of ndarray of shape (V n, ...)
        Trunk activations, all images of the first view first; none for vectors.
    targets : ndarray of shape (n, C)
        In the units of y.
    weights : ndarray of shape (n,)
        As given to `fit`.
    images : Tensor of shape (n, 16)
        Digests.
    vectors : ndarray of shape (n, n_features) or None
        The rows themselves: their standardization changes with them.
    backbone : Backbone or None
        Of vectors.
    """

    activations: Sequence[np.ndarray]
    targets: np.ndarray
    weights: np.ndarray
    images: Tensor
    vectors: np.ndarray | None = None
    backbone: Backbone | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def taking(self, chosen: np.ndarray) -> StoredData:
        """Copies of some rows."""
        n = len(self)
        return replace(
            self,
            activations=[z.reshape(-1, n, *z.shape[1:])[:, chosen].reshape(-1, *z.shape[1:]) for z in self.activations],
            targets=self.targets[chosen],
            weights=self.weights[chosen],
            images=self.images[torch.from_numpy(chosen)],
            vectors=None if self.vectors is None else self.vectors[chosen],
        )

    def joined(self, other: StoredData) -> StoredData:
        """These rows, then those of another."""
        pairs = zip(self.activations, other.activations, strict=True)
        n, m = len(self), len(other)
        both = None
        if self.vectors is not None and other.vectors is not None:
            both = np.concatenate([self.vectors, other.vectors])
        return replace(
            self,
            activations=[
                np.concatenate([a.reshape(-1, n, *a.shape[1:]), b.reshape(-1, m, *b.shape[1:])], 1).reshape(
                    -1, *a.shape[1:]
                )
                for a, b in pairs
            ],
            targets=np.concatenate([self.targets, other.targets]),
            weights=np.concatenate([self.weights, other.weights]),
            images=torch.cat([self.images, other.images]),
            vectors=both,
        )

    def batches(self, batch_size: int, device: torch.device) -> TrunkCache:
        """The activations as a fit has them."""

        def read(start: int, stop: int) -> tuple[Tensor, ...]:
            found = (torch.from_numpy(z[start:stop]).to(device) for z in self.activations)
            return tuple(z.contiguous(memory_format=torch.channels_last) if z.ndim == 4 else z for z in found)

        return TrunkCache(read, len(self.activations[0]), batch_size, "memory", lambda count: None)


def stores_data(estimator: Any) -> bool:
    """Whether an estimator may be updated; else an AttributeError that says how it may."""
    if not estimator.store_data:
        raise AttributeError(
            f"This {type(estimator).__name__} keeps nothing of its training data: set store_data=True before fit."
        )
    return True


class UpdateMixin:
    """`forget` and what `partial_fit` is made of; for estimators that store their data."""

    @available_if(stores_data)
    def forget(self: Any, indices: Any, *, warm_start: bool = False) -> Any:
        """Remove training images from the model, as if it had been fitted without them.

        Parameters
        ----------
        indices : int or array-like of int
            Which of the stored images, counted from 0: those of `fit` with a positive weight, in its order, then those
            of each `partial_fit`, without those forgotten before. Each at most once.

        warm_start : bool, default=False
            False: the solver starts where that of `fit` does, and nothing of the present solution goes into the new
            one. True: it starts at the present solution and stops, perhaps at once, within ``tol`` of the optimum
            without the images; faster, and as near to it as ``distance_bound_`` states.

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
        Everything is fitted again on what is stored of the others: the result is that of `fit` without the images, but
        for rounding, or for what ``distance_bound_`` states with a warm start. A folder ``memory`` is not touched.
        """
        check_is_fitted(self)
        stored = self._stored_data()
        rest = np.delete(np.arange(len(stored)), _check_indices(indices, len(stored)))
        empty = ~stored.targets.any(0)  # classes that had no image before do not lose one
        self._check_rest(stored.targets[rest] + empty)
        return self._update(stored.taking(rest), warm_start)

    def _add(self: Any, X: Any, y: Any, sample_weight: Any) -> Any:
        """Fit again with more images; the estimator is fitted."""
        self._check_parameters(1)
        stored = self._stored_data()
        rows = self._read_new_data(X)
        values = self._known_targets(y, len(rows), "y")
        given = self._given_weights(sample_weight, len(rows))
        keep = np.flatnonzero(self._weigh_classes(values, given))
        seen = Fingerprint(len(keep))
        cache = self._trunk_activations(self._model, rows, keep, seen, "memory")
        more = self._store(rows, stored.backbone, seen.images, cache, values[keep], given[keep], keep)
        return self._update(stored.joined(more), warm_start=True)

    def _update(self: Any, stored: StoredData, warm_start: bool) -> Any:
        """Fit again on stored data; the estimator is as it was when this raises."""
        twin = copy.copy(self)
        weights = self._weigh_classes(stored.targets, stored.weights)
        with ordinary_arithmetic(self._model.device):
            if stored.vectors is None:
                model = self._model.again()
            else:
                stored = replace(stored, backbone=copy.deepcopy(stored.backbone))  # which is standardized in place
                model = self._prepare(
                    stored.backbone, stored.vectors, np.arange(len(stored)), weights, self._model.device
                )
            cache = self._stored_batches(stored, model)
            data = twin._training_rows(cache, stored.targets, weights, stored.weights)
            start = (lambda model: self._carried_over(model, twin)) if warm_start else None
            result = twin._solve_for(model, data, start=start)
        twin._fingerprint = Fingerprint.of(stored.images, stored.targets, weights)
        twin._stored = stored
        self.__dict__.update(vars(twin))
        self._warn_unless_converged(result)
        return self

    def _carried_over(self: Any, model: Any, twin: Any) -> np.ndarray:
        """The solution in terms of a model that is standardized, and centered, by other images."""
        old, new, w = self._model.standardization, model.standardization, self._model.network.weight
        coef = self.coef_.copy()
        c = len(w)
        weight, bias = coef[self._n_tail : -c].reshape(w.shape), coef[-c:]  # views
        bias += weight @ ((new.shift - old.shift) / old.scale).cpu().numpy()
        weight *= (new.scale / old.scale).cpu().numpy()
        if self.intercept_ is not None:
            bias += (self.intercept_ - twin.intercept_) / self._unit
        return coef

    def _stored_batches(self: Any, stored: StoredData, model: Any) -> TrunkCache:
        if stored.vectors is None:
            return stored.batches(model.rows_at_once(self.batch_size), model.device)
        n = len(stored)
        return self._trunk_activations(model, stored.vectors, np.arange(n), Fingerprint(n), "memory")

    def _stored_data(self: Any) -> StoredData:
        """What is stored, or an error."""
        if self._stored is None:
            raise ValueError(
                f"This {type(self).__name__} was fitted with store_data=False and keeps nothing of its training data: "
                "fit it with store_data=True."
            )
        return self._stored

    def _store(
        self: Any,
        rows: Any,
        backbone: Backbone | None,
        images: Tensor,
        cache: TrunkCache,
        targets: np.ndarray,
        given: np.ndarray,
        keep: np.ndarray,
    ) -> StoredData:
        """What is to be kept of some rows; ``given`` are weights without those of classes."""
        if isinstance(rows, np.ndarray):
            return StoredData([], targets, given, images, rows[keep], backbone)
        activations = [torch.cat(parts).cpu().numpy() for parts in zip(*cache, strict=True)]
        return StoredData(activations, targets, given, images)


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
