"""The quadratic objective of the paper's model, over batches of trunk activations.

Legend of symbols (name in code, shape), as in docs/method.md:

======  ==============  =========  ================================================================
symbol  code            shape      meaning
======  ==============  =========  ================================================================
n                                  training rows
C       ``n_outputs``              outputs of the network (classes)
P       ``n_parameters``           tangent parameters: tail, head weight, head bias
J(x)    ``jvp, vjp``    (C, P)     Jacobian of the outputs at the pre-trained weights w0
d       ``coef``        (P,)       w - w0
t       ``targets``     (n, C)     what J d is to equal
s       ``weights``     (n,)       weights of the rows
lambda  ``alpha``                  L2 penalty, absolute
H       ``matvec``      (P, P)     sum_i s_i J_i' J_i + lambda I, half the Hessian
b       ``rhs``         (P,)       sum_i s_i J_i' t_i
======  ==============  =========  ================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..images.cache import batch_sizes
from ..network.linearize import LinearizedNetwork, Point
from .kfac import KFAC, HeadBlock, KroneckerBlock, SmallBlock

__all__ = ["Budget", "Quadratic", "build_kfac"]

Batch = Sequence[Tensor]


@dataclass(frozen=True)
class Budget:
    """Limits of memory and time for the curvature. "Other" parameters are those outside Linear and Conv2d.

    Attributes
    ----------
    gradients : int
        Elements of the output gradients of all layers and probes that are held at once.
    other_rows : int
        Images from which the curvature of other parameters is estimated.
    other_elements : int
        Elements of the Jacobians of other parameters that are held at once.
    other_products : int
        Gradients of other parameters that are evaluated at once; each holds activations of its own.
    """

    gradients: int = 1 << 28
    other_rows: int = 64
    other_elements: int = 1 << 25
    other_products: int = 256


_BUDGET = Budget()


class Quadratic:
    """The objective ``sum_i s_i |J_i d - t_i|^2 + lambda |d|^2`` and its products.

    Parameters
    ----------
    network : LinearizedNetwork
    batches : sequence of batches
        Trunk activations; the order of their rows is the order of ``targets`` and ``weights``.
    targets : Tensor of shape (n, C)
    weights : Tensor of shape (n,)
    alpha : float
        lambda > 0.
    kept : int
        Bytes of activations kept between products, which are evaluated anew for the batches beyond.
    """

    def __init__(
        self,
        network: LinearizedNetwork,
        batches: Sequence[Batch],
        targets: Tensor,
        weights: Tensor,
        alpha: float,
        kept: int = 1 << 30,
    ):
        self.network, self.batches, self.alpha = network, batches, alpha
        self._points: dict[int, Point] = {}
        self._rhs: Tensor | None = None
        self._free = kept
        sizes = batch_sizes(batches)
        self.targets, self.weights = targets.split(sizes), weights.split(sizes)

    def rhs(self) -> Tensor:
        """b = sum_i s_i J_i' t_i, shape (P,); evaluated once."""
        if self._rhs is None:
            self._rhs = self._sum(lambda point, k: self.targets[k])
        return self._rhs

    def matvec(self, v: Tensor) -> Tensor:
        """H v (P,) for v (P,): J v, then S J v, then J' S J v, then the penalty."""
        return self._sum(lambda point, k: point.jvp(v)).add_(v, alpha=self.alpha)

    def batch_matvec(self, k: int, v: Tensor) -> Tensor:
        """H_k v (P,) for v (P,); H is the mean of H_k over the batches k."""
        point = self._point(k)
        product = point.vjp(self.weights[k].unsqueeze(1) * point.jvp(v))
        return (len(self.batches) * product).add_(v, alpha=self.alpha)

    def _sum(self, outputs: Callable[[Point, int], Tensor]) -> Tensor:
        """sum_i s_i J_i' u_i over all rows, for u (B, C) of each batch."""
        total = self.network.weight.new_zeros(self.network.n_parameters)
        for k in range(len(self.batches)):
            point = self._point(k)
            point.add_vjp(self.weights[k].unsqueeze(1) * outputs(point, k), total)
        return total

    def _point(self, k: int) -> Point:
        """The network linearized on a batch, kept if the budget of memory allows."""
        if k in self._points:
            return self._points[k]
        point = self.network.at(self.batches[k])
        if point.nbytes <= self._free:
            self._free -= point.nbytes
            self._points[k] = point
        return point

    def value(self, d: Tensor) -> float:
        """The objective at d."""
        total = self.alpha * float(d.double().square().sum())
        for k, (t, s) in enumerate(zip(self.targets, self.weights, strict=True)):
            residual = (self._point(k).jvp(d) - t).double()
            total += float(s.double() @ residual.square().sum(1))
        return total


def build_kfac(
    network: LinearizedNetwork, batches: Sequence[Batch], weights: Tensor, probes: Tensor, budget: Budget = _BUDGET
) -> KFAC:
    """Accumulate the curvature of the data term of the quadratic, in one pass over the batches.

    Parameters
    ----------
    network : LinearizedNetwork
    batches : sequence of batches
        As in `Quadratic`.
    weights : Tensor of shape (n,)
    probes : Tensor of shape (K, C) or (K, n, C)
        Output directions, the same for all rows or one set for each row. The sum of their outer products over K is
        the identity (exact curvature), or has the identity as its expectation.
    budget : Budget

    Returns
    -------
    KFAC
        Not yet factorized.
    """
    device = network.weight.device
    blocks, elements = _kronecker_blocks(network, batches[0])
    n_outputs, n_features = network.weight.shape
    head = HeadBlock(n_outputs, n_features, network.slices["head.weight"], network.slices["head.bias"])
    others, owners = _other_blocks(network, set(blocks), device)
    probes = (probes if probes.ndim == 3 else probes.unsqueeze(1)).expand(-1, len(weights), -1)
    # As many rows at once as the caller evaluates, if the gradients of all probes fit.
    largest = max(batch_sizes(batches))
    limit = max(1, largest // len(probes), budget.gradients // (len(probes) * max(elements, 1)))
    for piece, batch in _pieces(batches, limit):
        point = network.at(batch, gradients=bool(blocks))
        head.update(point.features, weights[piece])
        if blocks:
            with torch.no_grad():
                for name, inputs, gradients in _layer_gradients(point, blocks, probes[:, piece]):
                    blocks[name].update(inputs, gradients, weights[piece])
    if others:
        _update_others(network, batches, weights, others, owners, budget)
    return KFAC([*blocks.values(), *others, head])


def _kronecker_blocks(network: LinearizedNetwork, batch: Batch) -> tuple[dict[str, KroneckerBlock], int]:
    """Empty blocks of the layers in whose inputs each image has rows of its own, one image after the other.

    Also returns the number of elements of the outputs of these layers for one image. Other layers get small blocks,
    such as layers that are never called (a function reads their weight), or whose inputs have tokens before images. A
    batch with the same image twice shows which layers these are.
    """
    point = network.at([z[:1].repeat_interleave(2, 0) for z in batch], gradients=False)
    layers = network.kronecker_layers()
    calls = {name: point.layer_calls(name) for name in layers}
    names = [name for name, found in calls.items() if found and all(_halves_agree(x) for x, _ in found)]
    elements = sum(out.numel() // 2 for name in names for _, out in calls[name])
    slices = network.slices
    blocks = {n: KroneckerBlock(layers[n], slices[f"{n}.weight"], slices.get(f"{n}.bias")) for n in names}
    return blocks, elements


def _halves_agree(x: Tensor) -> bool:
    """Whether the first and the second half of the rows are equal, but for rounding."""
    if len(x) % 2:
        return False
    first, second = x.chunk(2)
    return bool((first - second).abs().max() <= 1e-3 * x.abs().max())


def _pieces(batches: Sequence[Batch], limit: int) -> Iterator[tuple[slice, Batch]]:
    """Batches of at most ``limit`` rows, and where their rows lie among all."""
    start = 0
    for batch in batches:
        size = batch[0].shape[0]
        for a in range(0, size, limit):
            b = min(a + limit, size)
            yield slice(start + a, start + b), [z[a:b] for z in batch]
        start += size


def _layer_gradients(
    point: Point, names: Iterable[str], probes: Tensor
) -> Iterator[tuple[str, list[Tensor], list[list[Tensor]]]]:
    """For each layer its name, inputs, and gradients along probes (K, B, C), as `KroneckerBlock.update` takes them."""
    calls = {name: point.layer_calls(name) for name in names}
    outputs = [out for pairs in calls.values() for _, out in pairs]
    gradients = [point.output_gradients(outputs, probe) for probe in probes]
    start = 0
    for name, pairs in calls.items():
        stop = start + len(pairs)
        yield name, [x.detach() for x, _ in pairs], [g[start:stop] for g in gradients]
        start = stop


def _other_blocks(
    network: LinearizedNetwork, covered: set[str], device: torch.device
) -> tuple[list[SmallBlock], list[list[str]]]:
    """One block for each module that owns parameters outside Linear and Conv2d."""
    owners: dict[str, list[str]] = {}
    for name in network.names:
        module = name.rpartition(".")[0]
        if module not in covered:
            owners.setdefault(module or name, []).append(name)
    groups = list(owners.values())
    return [SmallBlock([network.slices[n] for n in names], device) for names in groups], groups


def _update_others(
    network: LinearizedNetwork,
    batches: Sequence[Batch],
    weights: Tensor,
    blocks: list[SmallBlock],
    groups: list[list[str]],
    budget: Budget,
) -> None:
    """Add exact Jacobians of a few images, evenly spread over the n rows, scaled to the weight of all rows."""
    present = weights.nonzero().squeeze(1)
    count = min(len(present), budget.other_rows)
    chosen = present[torch.arange(count, device=weights.device) * len(present) // count]
    scale = weights.sum() / weights[chosen].sum()
    names = [n for group in groups for n in group]
    n_outputs = network.weight.shape[0]
    size = sum(network.slices[n].stop - network.slices[n].start for n in names)
    limit = max(1, min(budget.other_products // n_outputs, budget.other_elements // (size * n_outputs)))
    for piece, batch in _pieces(batches, len(weights)):
        mine = chosen[(chosen >= piece.start) & (chosen < piece.stop)] - piece.start
        for part in mine.split(limit) if len(mine) else ():
            jacobians = network.sample_jacobians([z[part] for z in batch], names)
            for block, group in zip(blocks, groups, strict=True):
                block.update([jacobians[n] for n in group], weights[piece][part] * scale)
