"""From cached activations to the quadratic: the head, the targets of J d, the preconditioner and the penalty.

Hides what `fit` settles before it solves, so that another penalty, other rows or other processes are one call away.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from .cache import TrunkCache
from .distributed import ALONE, Group
from .head import fit_ridge_head, orthogonal_head, random_head
from .kfac import KFAC
from .linearize import _full_precision
from .model import LinearModel
from .objective import Quadratic, build_kfac, weigh_tail
from .solvers import Directions, SolverResult, pcg

__all__ = ["HEADS", "Problem", "Recipe", "TrainingRows", "weighted_mean"]

HEADS = ("orthogonal", "random", "ridge")
_EXACT_MAX = 256  # outputs of all rows up to which the preconditioner takes them all; above, one probe for each row
_RIDGE_ALPHAS = torch.logspace(-6, 4, 41, dtype=torch.float64)  # wide enough that no end is ever the minimum
_PATH_BYTES = 1 << 30  # of directions kept along a path of penalties
_ALPHA_MIN = 1e-3  # of the unit of alpha: below, an automatic penalty only costs iterations


@dataclass(frozen=True)
class TrainingRows:
    """The images of one fit, all rows of the first view first, then those of the next.

    Attributes
    ----------
    cache : TrunkCache
        Trunk activations of V views of the images of this process.
    targets : Tensor of shape (n, C)
        In float64, as the model is to output them.
    weights : Tensor of shape (n,)
        Positive weight of an image, shared equally by its views.
    given : Tensor of shape (n,)
        The same without the weights of classes.
    views : int
        V.
    kept : ndarray of bool of shape (n_all,) or None
        Which rows of X these are, in their order; None: all.
    """

    cache: TrunkCache
    targets: Tensor
    weights: Tensor
    given: Tensor
    views: int = 1
    kept: np.ndarray | None = None

    @property
    def multiplicity(self) -> Tensor:
        """How many identical images a row stands for, at least 1, (n,)."""
        return self.given.clamp_min(1)

    def taking(self, chosen: Sequence[int] | np.ndarray) -> TrainingRows:
        """Some of the images, whose activations stay where they are."""
        index = torch.as_tensor(chosen)
        n = len(self.targets)
        rows = torch.cat([index + v * n for v in range(self.views)])
        picked = index.to(self.targets.device)
        return replace(
            self,
            cache=self.cache.taking(rows),
            targets=self.targets[picked],
            weights=self.weights[picked],
            given=self.given[picked],
            kept=None,
        )

    def weighted(self, weights: Tensor) -> TrainingRows:
        """The same with other weights."""
        return replace(self, weights=weights)

    def rebatched(self, batch_size: int) -> TrainingRows:
        """The same in batches of another size."""
        return replace(self, cache=self.cache.rebatched(batch_size))


@dataclass(frozen=True)
class Recipe:
    """How the quadratic is made: parameters of the estimators, by the same names.

    Attributes
    ----------
    head : {"orthogonal", "random", "ridge"}
    centered : bool
        Whether the mean target stands for the network's own output.
    tail_weight : float or None
    damping : float
    seed : int
        Of the head.
    """

    head: str
    centered: bool
    tail_weight: float | None
    damping: float
    seed: int


class Problem:
    """The quadratic of some training rows at any penalty; the model is linearized at the head that belongs to it.

    Parameters
    ----------
    model : LinearModel
        Its standardization and head are set.
    rows : TrainingRows
    recipe : Recipe
    group : Group
        Processes that share the rows.

    Attributes
    ----------
    held_out : Tensor of shape (V, n, C)
        Leave-one-out outputs of the ridge regression on the features.
    ridge_alpha : float
        Its penalty, the one with the smallest squared leave-one-out error.
    mean : Tensor of shape (C,)
        Mean target.
    offset : Tensor of shape (V, n, C)
        What J d is added to.
    unit : float
        Mean squared norm of the Jacobian of one output of one image: the unit of numeric penalties.
    """

    def __init__(self, model: LinearModel, rows: TrainingRows, recipe: Recipe, group: Group = ALONE):
        self.rows, self._group, self._centered = rows, group, recipe.centered
        t, s, views = rows.targets, rows.weights, rows.views
        features = self._gather(torch.cat([model.features(z) for z in rows.cache]))
        if not bool(torch.isfinite(features).all()):
            raise ValueError(
                "The backbone's features of the training images are not all finite: check its weights and "
                "preprocessing, or use dtype='float64'."
            )
        features = model.standardize(features, s.repeat(views)).view(views, len(t), -1)
        ridge = fit_ridge_head(features, t, s, rows.multiplicity, _RIDGE_ALPHAS)
        self.held_out, self.ridge_alpha = ridge.held_out, ridge.alpha
        if recipe.head == "ridge":
            network = model.set_head(ridge.weight, ridge.bias)
        else:
            draw = orthogonal_head if recipe.head == "orthogonal" else random_head
            generator = torch.Generator().manual_seed(recipe.seed)
            network = model.set_head(draw(t.shape[1], features.shape[2], generator), torch.zeros(t.shape[1]))
        self.network, self.mean = network, weighted_mean(t, s)
        if recipe.centered:
            offset = self.mean.expand(views, *t.shape)
        elif recipe.head == "ridge":
            offset = ridge.held_out
        else:
            with _full_precision():
                own = torch.cat([network.at(z, gradients=False).outputs for z in rows.cache])
            offset = self._gather(own).view(views, *t.shape)
        self.offset = offset
        self._residual = (t - offset).flatten(0, 1).to(model.dtype)
        self._weights = (s / views).repeat(views).to(model.dtype)
        self._own = torch.arange(len(self._residual), device=t.device).view(views, -1)[:, group.share(len(t))].flatten()
        probes = probe_outputs(*self._residual.shape).to(self._residual)
        self.kfac = build_kfac(network, rows.cache, self._weights, probes, group, self._own)
        weigh_tail(network, self.kfac, recipe.tail_weight)
        self.unit = self.kfac.output_trace / float(s.sum())
        self._damping = recipe.damping * self.kfac.output_trace

    def alpha(self, relative: float | str) -> float:
        """The absolute penalty lambda of a relative one, or of ``"auto"``."""
        if relative == "auto":
            mean_weight = float(self.rows.weights.sum() / self.rows.multiplicity.sum())
            return max(self.ridge_alpha, _ALPHA_MIN * self.unit * mean_weight)
        return self.unit * float(relative)

    def at(self, alpha: float) -> tuple[Quadratic, KFAC]:
        """The quadratic with an absolute penalty, and its preconditioner; once."""
        self.kfac.factorize(alpha, self._residual.dtype, self._damping)
        rows = self.rows.cache
        return Quadratic(self.network, rows, self._residual, self._weights, alpha, self._group, self._own), self.kfac

    def path(self, alphas: Sequence[float], tol: float, max_iter: int) -> Iterator[SolverResult]:
        """The solutions for absolute penalties in falling order.

        Each starts at the minimum over all directions of those before, whose products with the curvature are known.
        The preconditioner of the tail is that of the first penalty, which its damping outweighs.
        """
        dtype = self._residual.dtype
        quadratic, kfac = self.at(alphas[0])
        b, seen = quadratic.rhs(), Directions(_PATH_BYTES)
        for alpha in alphas:
            quadratic.alpha = alpha
            kfac.refactorize_head(alpha, dtype)
            start, residual = seen.minimum(b, alpha) if len(seen) else (kfac.head_solution(b), None)
            record = partial(seen.add, alpha)
            yield pcg(quadratic.matvec, b, kfac, tol, max_iter, start=start, residual=residual, record=record)

    def outputs(self, d: Tensor, batches: Iterable[Sequence[Tensor]]) -> Tensor:
        """f_lin at a solution, for trunk activations of new images, (m, C)."""
        found = []
        with _full_precision():
            for z in batches:
                point = self.network.at(z, gradients=False)
                offset = self.mean.to(d) if self._centered else point.outputs
                found.append(offset + point.jvp(d))
        return torch.cat(found)

    def _gather(self, own: Tensor) -> Tensor:
        """Rows of all processes from those of each, in the order of one process: view by view."""
        by_image = own.unflatten(0, (self.rows.views, -1)).transpose(0, 1)  # (n, V, ...)
        return self._group.all_gather_rows(by_image).transpose(0, 1).flatten(0, 1)


def probe_outputs(n_rows: int, n_outputs: int) -> Tensor:
    """Output directions for the curvature: all outputs, or one of random signs for each row when there are many.

    Seeded by a constant: they shape the preconditioner and the unit of alpha, and must not differ between fits.
    """
    if n_rows * n_outputs <= _EXACT_MAX:
        return torch.eye(n_outputs, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 2, (1, n_rows, n_outputs), generator=generator, dtype=torch.float64) * 2 - 1


def weighted_mean(t: Tensor, s: Tensor) -> Tensor:
    """Mean (C,) of targets (n, C) with weights (n,)."""
    return (s.unsqueeze(1) * t).sum(0) / s.sum()
