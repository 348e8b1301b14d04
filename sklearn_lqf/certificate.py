"""How near the solution is to the optimum, and the linear model to the network."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted
from torch.func import functional_call

from .influence import one_by_one
from .linearize import _full_precision
from .surgery import plain_attention
from .threads import DUAL_NUMBERS

__all__ = ["CertificateMixin"]


class CertificateMixin:
    """Bounds and gaps on given images; for estimators with a linear model."""

    def output_bound(self: Any, X: Any) -> np.ndarray:
        """Bound how far outputs are from those of the exact optimum.

        Parameters
        ----------
        X : array-like or sequence of images
            As in `fit`.

        Returns
        -------
        bound : ndarray of shape (n, n_outputs)
            Upper bound on the distance of each output: ``distance_bound_`` times the norm of the output's Jacobian,
            in the norm dual to that of the penalty.
        """
        check_is_fitted(self)
        rows = self._in_batches(list, self._read_new_data(X))
        norms = [self._kernel([image]).flatten(0, 1).flatten(1).diagonal().sqrt() for image in one_by_one(rows)]
        return torch.stack(norms).numpy() * self.distance_bound_ * self._unit

    def network_outputs(self: Any, X: Any) -> np.ndarray:
        """Compute the outputs of the network itself at the weights w0 + d, which the linear model approximates.

        Parameters
        ----------
        X : array-like or sequence of images
            As in `fit`.

        Returns
        -------
        outputs : ndarray of shape (n, n_outputs)
            To be compared with the outputs of the linear model (`decision_function` for more than two classes,
            `predict` of a regressor): their difference says how far the linear regime holds.
        """
        check_is_fitted(self)
        model, network = self._model, self._model.network
        d = torch.tensor(self.coef_, device=model.device, dtype=model.dtype)
        change, weight, bias = network.views(d)
        moved = {n: p.detach() + change[n] for n, p in zip(network.names, network.parameters, strict=True)}
        found = []
        with DUAL_NUMBERS:
            module = copy.deepcopy(network.module)  # whose parameters no other thread uses
        with torch.no_grad(), _full_precision(), plain_attention():
            for z in self._in_batches(list, self._read_new_data(X)):
                features = network.standardized(functional_call(module, moved, tuple(z)))
                outputs = torch.nn.functional.linear(features, network.weight + weight, network.bias + bias)
                if self._centered():
                    outputs = outputs - network.at(z, gradients=False).outputs
                found.append(outputs.double().cpu().numpy() * self._unit)
        return np.concatenate(found) + (0 if self.intercept_ is None else self.intercept_)
