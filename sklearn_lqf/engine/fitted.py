"""The fitted model, a value: what it reads of an image, and its weights on it.

Hides in which units the solver worked, the views of an image, and what of the model is pickled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..images.digests import Fingerprint
from ..network.prepared import PREPARED_OTHERWISE, PreparedNetwork
from ..runtime.arithmetic import float64_device, in_ordinary_arithmetic, in_precision
from ..runtime.memory import pieces
from .features import Group, GroupFeatures, draw_directions
from .problem import Problem, Recipe, Solution, TrainingRows

__all__ = ["FeatureReader", "FittedModel"]

_REFERENCES = 32  # images from whose features the directions are drawn


@dataclass(frozen=True)
class FeatureReader:
    """Images to raw features: a fixed function of each image.

    Attributes
    ----------
    network : PreparedNetwork
    directions : ndarray of shape (K, D)
        Of the tangents, in the space of the last features; see `draw`.
    sketch_size : int or None
    seed : int
        Of the sketches.
    scales : ndarray of shape (parts,)
        Norms of the parts of the network's features; see `draw`.
    views : tuple of str
        Views of an image over which features are averaged.
    precision : {"full", "bfloat16"}
        In which products of the network are computed; see `within`.
    """

    network: PreparedNetwork
    directions: np.ndarray
    sketch_size: int | None
    seed: int
    scales: np.ndarray
    views: tuple[str, ...] = ("identity",)
    precision: str = "full"
    _built: GroupFeatures = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_built", self._build())

    @classmethod
    def draw(
        cls, network: PreparedNetwork, n_directions: int, sketch_size: int | None, seed: int, views: Sequence[str]
    ) -> FeatureReader:
        """A reader whose directions and scales are those of the network's features of reference images.

        Parameters
        ----------
        network : PreparedNetwork
        n_directions : int
            K; 0: no tangents.
        sketch_size : int or None
            As in `features.GroupFeatures`.
        seed : int
        views : sequence of str
        """
        parts = network.split.parts
        directions, scales = np.empty((0, parts[0].size)), np.ones(len(parts))
        if n_directions or len(parts) > 1:
            plain = cls(network, directions, sketch_size, seed, scales)._built
            found = _of_references(network, lambda x: plain.network_features(network.activations(x)))
            scales = plain.part_norms(found).numpy()
            generator = torch.Generator().manual_seed(seed)
            directions = draw_directions(found[:, : parts[0].size], n_directions, generator).numpy()
        return cls(network, directions, sketch_size, seed, scales, tuple(views))

    def within(self, tolerance: float) -> FeatureReader:
        """This reader in bfloat16, if that is precise enough, else itself.

        Parameters
        ----------
        tolerance : float
            Largest norm that the error of the features of a group may have on reference images, relative to the norm
            of these features less their mean.
        """
        if tolerance == 0:
            return self
        faster = replace(self, precision="bfloat16")
        exact, found = (_of_references(self.network, r.reading(None)).cpu().double() for r in (self, faster))
        for start, stop in self.columns.values():
            wanted = exact[:, start:stop]
            error = float((found[:, start:stop] - wanted).norm())
            if not error <= tolerance * float((wanted - wanted.mean(0)).norm()):
                return self
        return faster

    @property
    def groups(self) -> list[Group]:
        """Of the columns of the features."""
        return self._built.groups

    @property
    def sizes(self) -> list[int]:
        """Columns of each group."""
        return self._built.sizes

    @property
    def columns(self) -> dict[str, tuple[int, int]]:
        """First column of each group, and the one behind its last."""
        ends = np.cumsum(self.sizes)
        return {g.name: (int(end) - g.size, int(end)) for g, end in zip(self.groups, ends, strict=True)}

    def shares(self, variances: np.ndarray) -> dict[str, float]:
        """Share of each group in the sum of their variances (G,), first stage first, the last features last."""
        order = {stage: i for i, stage in enumerate(self.network.split.stages)}
        parts = variances / variances.sum()
        shares = {group.name: float(part) for group, part in zip(self.groups, parts, strict=True)}
        names = sorted(shares, key=lambda name: order.get(name.rpartition(" ")[0], len(order)))
        return {name: shares[name] for name in names}

    @property
    def tangent_layers(self) -> list[str]:
        """Names of the layers that have tangent features."""
        return self._built.layers

    def reading(self, memory: Any) -> Callable[[Tensor], Tensor]:
        """Images (B, ...) to features (B, D) on the device.

        Trunk activations are kept in a joblib.Memory, and features that take gradients; None: they are not kept.
        """
        activations = self.network.evaluator(memory, self.precision)

        def read(images: Tensor) -> Tensor:
            views = [images.flip(-1) if view == "flip" else images for view in self.views]
            with in_precision(self.precision, self.network.device):
                parts = [self._evaluate(activations(view)) for view in views]
            return parts[0] if len(parts) == 1 else torch.stack(parts).mean(0)

        if not len(self.directions):  # the activations are all that takes time
            return read
        drawn = (self.sketch_size, self.seed, self.directions.tobytes(), self.scales.tobytes())
        return self.network.features_evaluator(memory, read, (*drawn, self.views, self.precision))

    def _evaluate(self, activations: Sequence[Tensor]) -> Tensor:
        return self._built(activations)

    def _build(self) -> GroupFeatures:
        network = self.network
        if len(self.scales) != len(network.split.parts):
            raise ValueError(
                f"The model reads {len(self.scales)} parts of features, and the network has "
                f"{len(network.split.parts)}. {PREPARED_OTHERWISE}"
            )
        # Copies: arrays of joblib may be read-only.
        directions, scales = torch.tensor(self.directions), torch.tensor(self.scales)
        example = network.example_activations()
        return GroupFeatures(network.split, directions, self.sketch_size, self.seed, example, scales)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_built"}

    @in_ordinary_arithmetic
    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)
        self.__post_init__()


def _of_references(network: PreparedNetwork, function: Callable[[Tensor], Tensor]) -> Tensor:
    """What a function of images returns for the reference images, in batches."""
    batches = network.reference_inputs(_REFERENCES).split(network.rows_at_once(_REFERENCES))
    return torch.cat([function(x) for x in batches])


@dataclass(frozen=True)
class FittedModel:
    """f_c(x) = b_c + sum_g sqrt(theta_g) <psi_g(x), beta_gc>, for all classes from one fit: a value.

    What it says of its training rows are functions of it, see `answers`.

    Attributes
    ----------
    reader : FeatureReader
    solution : Solution
    unit : ndarray of shape (C,)
        Of the solution's targets, in those of y.
    recipe : Recipe
        By which the solution was chosen.
    fingerprint : str
        Of the training rows.
    rows : TrainingRows or None
        The training rows, where they are kept.
    """

    reader: FeatureReader
    solution: Solution
    unit: np.ndarray
    recipe: Recipe
    fingerprint: str
    rows: TrainingRows | None = None

    def __post_init__(self) -> None:
        columns = sum(group.size for group in self.reader.groups)
        if len(self.solution.weight) != columns:
            raise ValueError(
                f"The model has weights on {len(self.solution.weight)} features, and the network gives {columns}. "
                f"{PREPARED_OTHERWISE}"
            )

    @property
    def network(self) -> PreparedNetwork:
        """What evaluates images."""
        return self.reader.network

    @cached_property
    def weight(self) -> np.ndarray:
        """On raw features, in the units of y, (D, C)."""
        return self.solution.weight / self.solution.standardization.scale[:, None] * self.unit

    @cached_property
    def bias(self) -> np.ndarray:
        """(C,), in the units of y."""
        return self.solution.intercept * self.unit - self.solution.standardization.shift @ self.weight

    def outputs(self, features: np.ndarray) -> np.ndarray:
        """f(x) in the units of y, (n, C), for raw features (n, D)."""
        with np.errstate(invalid="ignore", over="ignore"):  # callers say which rows are not finite
            parts = pieces(len(features), 8 * features.shape[1])  # in float64
            return np.concatenate([features[part] @ self.weight + self.bias for part in parts])

    def evaluator(self, memory: Any) -> Callable[[Tensor], Tensor]:
        """Images (B, ...) to outputs (B, C) in float64; trunk activations are kept in a joblib.Memory, or None."""
        read, device = self.reader.reading(memory), float64_device(self.network.device)
        weight, bias = (torch.tensor(v, device=device) for v in (self.weight, self.bias))
        return lambda images: read(images).to(device).double() @ weight + bias

    def problem(self, rows: TrainingRows, weights: np.ndarray) -> Problem:
        """The quadratic of the training rows, with the scale and the prior of the fit.

        Parameters
        ----------
        rows : TrainingRows
            Those of the fit, in any order.
        weights : ndarray of shape (n,)
            Those of their classes included.

        Raises
        ------
        ValueError
            The rows are others.
        """
        digests = torch.tensor(rows.digests)  # a copy: arrays of joblib may be read-only
        if Fingerprint.of(digests, rows.targets, weights) != self.fingerprint:
            raise ValueError(
                "X, y and sample_weight are not the data that this model was fitted on: give all rows of fit, in "
                "any order."
            )
        return Problem(
            rows, self.reader.groups, weights, self.unit, self.recipe, fitted=self.solution, device=self.network.device
        )

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("weight", "bias")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()
