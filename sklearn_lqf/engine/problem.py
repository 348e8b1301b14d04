"""From the features of the training rows to the solution: scale, prior, coefficients, and what a held-out image gets.

Hides how the prior variances are chosen, on which of many rows, and which form of the solution is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from ..runtime.arithmetic import float64_device
from ..runtime.memory import PIECE_BYTES, device_budget
from ..runtime.processes import ALONE, ProcessGroup
from ..runtime.tables import copied_rows
from .centered import ScaledFeatures
from .estimate import EstimatedForm
from .features import Group, Standardization, fit_standardization
from .preconditioner import Block
from .prior import CRITERIA, Rows, learn_prior, scale_prior
from .ridge import (
    Factorization,
    Optimum,
    closed_form_fits,
    factorize,
    inner_products,
    leave_one_out,
    leave_sets_out,
    noise_variance,
    removals,
)

__all__ = ["PRIORS", "Problem", "Recipe", "Solution", "TrainingRows"]

PRIORS = (*CRITERIA, "equal", "last")
_PRIOR_ROWS = 500  # from which a prior is learned: more hardly change it, and cost the cube of their number
_PRIOR_ROWS_A_CLASS, _PRIOR_ROWS_MAX = 4, 2000  # of many classes
_ALONG = " directions"  # ends the names of groups of tangents that take backward passes
_CPU = torch.device("cpu")
_DEVIATION = 1.0  # of the log of a variance under the hyper-prior: see the study in docs/accuracy.md


@dataclass(frozen=True)
class TrainingRows:
    """What a model is fitted to: the rows with a positive weight.

    Attributes
    ----------
    features : ndarray of shape (n, D)
        Not standardized. Where processes share a fit, those of this process's share.
    targets : ndarray of shape (n, C)
        In float64, in the units of y.
    given : ndarray of shape (n,)
        Positive weights as given.
    digests : ndarray of shape (n, 16), uint8
        Of the images.
    vectors : ndarray of shape (n, n_features) or None
        The rows of X where they are vectors, whose standardization changes with them; None for images.
    groups : ndarray of shape (n,) or None
        Labels of the groups of rows that are left out together; None: each row alone.
    """

    features: np.ndarray
    targets: np.ndarray
    given: np.ndarray
    digests: np.ndarray
    vectors: np.ndarray | None = None
    groups: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def multiplicity(self) -> np.ndarray:
        """How many identical images a row stands for, at least 1, (n,)."""
        return np.maximum(self.given, 1.0)

    @property
    def sets(self) -> np.ndarray | None:
        """Numbers of the groups, (n,)."""
        if self.groups is None:
            return None
        labels, numbers = np.unique(self.groups, return_inverse=True)
        if len(labels) < 2:
            raise ValueError(
                "All images to fit to are of one group, which cannot be left out: use at least two groups."
            )
        return numbers.reshape(-1)

    def taking(self, chosen: np.ndarray) -> TrainingRows:
        """Copies of some rows."""
        few = {name: v[chosen] for name, v in self._few().items()}
        return replace(self, features=copied_rows((self.features, chosen)), **few)

    def joined(self, other: TrainingRows) -> TrainingRows:
        """These rows, then those of another."""
        theirs = other._few()
        few = {name: np.concatenate([v, theirs[name]]) for name, v in self._few().items()}
        both = ((rows.features, np.arange(len(rows.features))) for rows in (self, other))
        return replace(self, features=copied_rows(*both), **few)

    def _few(self) -> dict[str, np.ndarray]:
        """All that a row has but its features."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if name != "features" and value is not None}


@dataclass(frozen=True)
class Recipe:
    """How a solution is chosen: parameters of the estimators, by the same names.

    Attributes
    ----------
    prior : str, mapping of str to float, or sequence of float
    alpha : float or "auto"
    solver : {"auto", "closed", "pcg"}
    tol : float
    max_iter : int
    free : int
        Outputs that are free: C - 1 of indicators that add up to one, else C.
    stratified : bool
        Whether targets are indicators of classes.
    budget : int
        Bytes of the square matrices of a closed form.
    grouped : bool
        Whether rows are left out by groups.
    """

    prior: Any
    alpha: float | str
    solver: str
    tol: float
    max_iter: int
    free: int
    stratified: bool
    budget: int
    grouped: bool = False


@dataclass(frozen=True)
class Solution:
    """The fitted weights, in the units of y over ``unit``.

    Attributes
    ----------
    standardization : Standardization
    variances : ndarray of shape (G,)
        theta, prior variances over that of noise.
    weight : ndarray of shape (D, C)
        On standardized features.
    intercept : ndarray of shape (C,)
    noise : float
        Variance of the noise of a row of weight 1.
    method : str
        ``"rows"`` or ``"columns"``, the closed form, or ``"estimate"``: held-out outputs and noise are estimates.
    n_iter : int
        Of the solver; 0 of a closed form.
    residual_norms : tuple of float
    advice : str or None
        What a user may do about a solver that did not reach its tolerance; None where it did.
    """

    standardization: Standardization
    variances: np.ndarray
    weight: np.ndarray
    intercept: np.ndarray
    noise: float
    method: str
    n_iter: int = 0
    residual_norms: tuple[float, ...] = ()
    advice: str | None = None

    @property
    def alpha(self) -> float:
        """Variance of noise over the prior variance of an output."""
        return float(1 / self.variances.sum())


class Problem:
    """The quadratic of some training rows at any scale of the prior.

    Parameters
    ----------
    rows : TrainingRows
    groups : sequence of Group
        Of the columns of the features.
    weights : ndarray of shape (n,)
        Of the rows, those of their classes included; their scale does not matter.
    unit : ndarray of shape (C,)
        What the targets are divided by.
    recipe : Recipe
    fitted : Solution or None
        Whose standardization and prior are taken instead of those that follow from the rows.
    processes : ProcessGroup
        That share the rows: each has the features of its own, and all else of all.
    device : torch.device
        Of the network. The algebra is done there, or on the CPU where it has no float64.

    Attributes
    ----------
    standardization : Standardization
    variances : ndarray of shape (G,)
        theta, with the scale that the data choose.
    """

    def __init__(
        self,
        rows: TrainingRows,
        groups: Sequence[Group],
        weights: np.ndarray,
        unit: np.ndarray,
        recipe: Recipe,
        fitted: Solution | None = None,
        processes: ProcessGroup = ALONE,
        device: torch.device = _CPU,
    ):
        self._device = float64_device(device)
        self._rows, self.groups, self._recipe, self._processes = rows, list(groups), recipe, processes
        self.multiplicity = rows.multiplicity
        self.weights = weights * (self.multiplicity.sum() / weights.sum())
        self.targets = rows.targets / unit
        if fitted is None:
            self.standardization = fit_standardization(rows.features, self.weights, groups, processes)
        else:
            self.standardization = fitted.standardization
        self.variances = processes.of_the_first(self._choose_prior()) if fitted is None else fitted.variances

    # ---------------------------------------------------------------------------------------------- prior

    def _choose_prior(self) -> np.ndarray:
        prior = self._recipe.prior
        if isinstance(prior, str) and prior in CRITERIA:
            everything = np.ones(len(self.groups), dtype=bool)
            return learn_prior(self._seen_by_prior(everything), self._expected(), kind=prior, deviation=_DEVIATION)
        shares = self._shares(prior)
        used = shares > 0
        total = scale_prior(self._seen_by_prior(used), shares[used], kind=CRITERIA[0])
        return total * shares / shares.sum()

    def _seen_by_prior(self, used: np.ndarray) -> Rows:
        """Kernels of the groups in use (G,), targets and weights of the rows from which the prior is learned."""
        sample = self._prior_rows()
        targets, weights, multiplicity = (
            self._on_device(v[sample]) for v in (self.targets, self.weights, self.multiplicity)
        )
        together = None if self._rows.sets is None else self._on_device(self._rows.sets[sample])
        return Rows(self._kernels(sample, used), targets, weights, multiplicity, self._recipe.free, together)

    def _expected(self) -> np.ndarray:
        """A-priori variances: as much for the last features as for all statistics of layers together."""
        read = sum(not g.name.endswith(_ALONG) for g in self.groups) - 1
        return np.array([float(max(read, 1)) if g.name == "last" else 1.0 for g in self.groups])

    def _shares(self, prior: Any) -> np.ndarray:
        """Relative variances of the groups of a prior that is given."""
        names = [g.name for g in self.groups]
        if isinstance(prior, str):
            return np.array(
                [float(name == "last" or (prior == "equal" and not name.endswith(_ALONG))) for name in names]
            )
        if isinstance(prior, Mapping):
            unknown = sorted(set(prior) - set(names))
            if unknown:
                raise ValueError(f"prior names {unknown}, which are no groups of this network; its groups: {names}.")
            found = np.array([float(prior.get(name, 0.0)) for name in names])
        else:
            found = np.asarray(prior, dtype=np.float64)
            if found.shape != (len(names),):
                raise ValueError(
                    f"prior must have a number for each of the {len(names)} groups, {names}; got an array of shape "
                    f"{found.shape}."
                )
        if not np.isfinite(found).all() or (found < 0).any() or not found.any():
            raise ValueError(f"prior must hold finite and non-negative numbers, not all zero; got {prior!r}.")
        return found

    def _prior_rows(self) -> np.ndarray:
        """Rows from which the prior is learned: all, or some of each class and group, chosen by what the images are."""
        n, n_classes = len(self._rows), self.targets.shape[1]
        size = _PRIOR_ROWS
        if self._recipe.stratified:
            size = max(size, min(_PRIOR_ROWS_A_CLASS * n_classes, _PRIOR_ROWS_MAX))
        codes = self.targets.argmax(1) if self._recipe.stratified else np.zeros(n, int)
        keys = np.array([f"{d.tobytes().hex()} {c}" for d, c in zip(self._rows.digests, codes, strict=True)])
        # Equal images stand or fall together, so that a weight of 2 is a row given twice.
        _, first, unit = np.unique(keys, return_index=True, return_inverse=True)
        if len(first) <= size:
            return np.arange(n)
        sets = np.zeros(n, int) if self._rows.sets is None else self._rows.sets
        # The groups of a class take turns: there have to be several, of which one can be left out.
        place = _places(codes[first], _places(codes[first] * (sets.max() + 1) + sets[first], np.arange(len(first))))
        chosen = np.lexsort((np.arange(len(first)), place))[:size]
        return np.flatnonzero(np.isin(unit, chosen))

    def _kernels(self, sample: np.ndarray, used: np.ndarray) -> torch.Tensor:
        """Of each group in use between some rows in ascending order, (used, n, n)."""
        own = self._processes.share(len(self._rows))
        mine = sample[(sample >= own.start) & (sample < own.stop)] - own.start
        seen = self._processes.all_gather_rows(torch.from_numpy(self._rows.features[mine])).numpy()
        sizes = [group.size for group in self.groups]
        parts = self._on_device(self.standardization(seen)).split(sizes, dim=1)
        return torch.stack([x @ x.T for x, is_used in zip(parts, used, strict=True) if is_used])

    # ------------------------------------------------------------------------------------------- solution

    def variances_at(self, alpha: float | str) -> np.ndarray:
        """theta at a penalty: ``alpha`` is the variance of noise over the prior variance of an output."""
        if isinstance(alpha, str):
            return self.variances
        return self.variances / (self.variances.sum() * float(alpha))

    def factorization(self, variances: np.ndarray, products: torch.Tensor | None = None) -> Factorization:
        """What answers for these prior variances; in closed form where it fits.

        ``products`` are the `inner_products` of the features so scaled, where they are known.
        """
        features, recipe = self._scaled(self._rows.features, variances), self._recipe
        weights, budget = self._on_device(self.weights), self._budget
        if self._is_closed(features.shape[1], budget):
            return factorize(features, weights, budget, group=self._processes, products=products)
        whole = 8 * features.shape[0] * features.shape[1]  # bytes in float64, which are kept if there is room
        return EstimatedForm(
            features, weights, self._blocks(variances), tol=recipe.tol, max_iter=recipe.max_iter,
            multiplicity=self._on_device(self.multiplicity), piece=whole if whole <= budget else PIECE_BYTES,
            group=self._processes,
        )  # fmt: skip

    @property
    def _budget(self) -> int:
        """Bytes of the square matrices of a closed form."""
        own = self._recipe.budget
        return own if self._device.type == "cpu" else min(own, device_budget(self._device))

    def _is_closed(self, n_columns: int, budget: int) -> bool:
        solver = self._recipe.solver
        return solver == "closed" or (solver == "auto" and closed_form_fits(len(self._rows), n_columns, budget))

    def _on_device(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device)

    def optimum(self, form: Factorization) -> Optimum:
        """The solution for the targets."""
        return form.solve(self._on_device(self.targets))

    def removals(self, form: Factorization) -> torch.Tensor:
        """What has to be taken from the targets of a row for the effect of leaving it out, (n, C)."""
        return removals(form, self.optimum(form), self._on_device(self.multiplicity))

    def _root(self, variances: np.ndarray) -> np.ndarray:
        """Roots of the prior variances of the columns, (D,)."""
        return np.sqrt(np.repeat(variances, [g.size for g in self.groups]))

    def _blocks(self, variances: np.ndarray) -> list[Block]:
        """Of the preconditioner: a group, or a sketch of one layer, each."""
        found, start = [], 0
        for group, variance in zip(self.groups, variances, strict=True):
            if variance == 0:
                continue
            for size, sides in zip(group.parts, group.sides or [None] * len(group.parts), strict=True):
                found.append(Block(slice(start, start + size), sides))
                start += size
        return found

    def scaled(self, features: np.ndarray, variances: np.ndarray) -> torch.Tensor:
        """Raw features of new rows as a factorization takes them."""
        return self._scaled(features, variances)[:]

    def _scaled(self, features: np.ndarray, variances: np.ndarray) -> ScaledFeatures:
        shift, scale, root = self.standardization.shift, self.standardization.scale, self._root(variances)
        return ScaledFeatures(features, shift, root / scale, root > 0)

    def held_out(self, alpha: float | str) -> np.ndarray:
        """Outputs (n, C) by the solution without a row, or its group, at a penalty; scale and prior held fixed."""
        form = self.factorization(self.variances_at(alpha))
        return self._held_out(form, self.optimum(form))

    def _held_out(self, form: Factorization, optimum: Optimum) -> np.ndarray:
        if (sets := self._rows.sets) is not None:
            return leave_sets_out(form, optimum, torch.from_numpy(sets)).cpu().numpy()
        return leave_one_out(form, optimum, self._on_device(self.multiplicity)).cpu().numpy()

    def solve(self, alpha: float | str) -> tuple[Solution, np.ndarray]:
        """The solution at a penalty, and its leave-one-out outputs (n, C), scale and prior held fixed."""
        variances = self.variances_at(alpha)
        return self._solved(self.factorization(variances), variances)

    def path(self, alphas: Iterable[float]) -> Iterator[tuple[Solution, np.ndarray]]:
        """`solve` at several penalties, whose inner products are computed once where there is room to keep them."""
        features = self._scaled(self._rows.features, self.variances_at(1.0))
        products = None
        if self._recipe.solver != "pcg" and closed_form_fits(len(self._rows), features.shape[1], self._budget // 2):
            products = inner_products(features, self._on_device(self.weights), group=self._processes)
        for alpha in alphas:
            variances = self.variances_at(alpha)
            form = self.factorization(variances, None if products is None else products / alpha)
            yield self._processes.of_the_first(self._solved(form, variances))

    def _solved(self, form: Factorization, variances: np.ndarray) -> tuple[Solution, np.ndarray]:
        found = self.optimum(form)
        scale = self._root(variances)
        weight = np.zeros((len(scale), self.targets.shape[1]))
        weight[scale > 0] = found.coef.cpu().numpy() * scale[scale > 0][:, None]
        course: dict[str, Any] = {}
        if found.course is not None:
            advice = None if found.course.converged else str(found.course.status.value)
            course = {"n_iter": found.course.n_iter, "residual_norms": found.course.errors, "advice": advice}
        noise = noise_variance(found, torch.from_numpy(self.multiplicity), self._recipe.free)
        solution = Solution(
            self.standardization, variances, weight, found.intercept.cpu().numpy(), noise, form.method, **course
        )  # fmt: skip
        return solution, self._held_out(form, found)


def _places(kinds: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The place of each unit among those of its kind (n,), in an order (n,) of all."""
    place = np.zeros(len(kinds), int)
    for kind in np.unique(kinds):
        mine = np.flatnonzero(kinds == kind)
        place[mine[np.argsort(order[mine], kind="stable")]] = np.arange(len(mine))
    return place
