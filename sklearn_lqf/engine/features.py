"""What the linear model reads of an image: groups of features of a prepared network.

The last features, and by stage: local tangents, the means of the inputs of its layers, which are the gradients of the
mean of each layer's own output by its weight; the deviations of these inputs; and tangents along directions in the
space of the last features, which take a backward pass for each. They depend on the image alone: directions and scales
come from the network's features of images that no data set holds. Hides the evaluation, the layout of the columns and
their scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..network.linearize import walker
from ..network.rewrite import is_plain
from ..network.statistics import Part
from ..network.tails import TracedTail
from ..network.tracing import Split
from ..runtime.memory import PIECE_BYTES, pieces
from ..runtime.processes import ALONE, ProcessGroup
from .sketch import LayerSketch, draw_sketch

__all__ = ["Group", "GroupFeatures", "Standardization", "draw_directions", "fit_standardization"]

# Columns of all statistics together, evenly by group: solutions for many images take a square matrix of them.
_COLUMNS = 1 << 14
_GROUP_COLUMNS = 1024  # of a group at most: more hardly change the inner products
# Elements of the weight of a convolution in groups, above which its gradients cost more than they give.
_DEPTHWISE_MAX = 4096


@dataclass(frozen=True)
class Group:
    """Features that share one prior variance.

    Attributes
    ----------
    name : str
        ``"last"``, or the last module of a stage and what is read of it: ``"tangents"`` (local), ``"deviation"`` or
        ``"directions"``.
    parts : tuple of int
        Columns of each part. Parts are scaled apart: the layers of a stage have equal shares.
    sides : tuple of (int, int)
        Of parts that are sketches: rows and columns of each as a matrix. Empty for other features.
    """

    name: str
    parts: tuple[int, ...]
    sides: tuple[tuple[int, int], ...] = ()

    @property
    def size(self) -> int:
        """Columns."""
        return sum(self.parts)


def draw_directions(features: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Directions in feature space with the covariance of given features.

    Parameters
    ----------
    features : Tensor of shape (N, D)
    count : int
        K.
    generator : torch.Generator
        Of the CPU.

    Returns
    -------
    Tensor of shape (K, D)
        Of mean squared norm 1, in float64; zero where the features do not vary.

    Notes
    -----
    ``u = Phi' e / sqrt(N)`` with e from N(0, I): the heads that regressions on random targets would have.
    """
    x = features.cpu().double()
    x = x - x.mean(0)
    u = torch.randn(count, len(x), generator=generator, dtype=torch.float64) @ x
    norm = u.square().sum(1).mean().sqrt()
    return u / norm if norm > 0 else u


class GroupFeatures:
    """psi(x), not yet standardized: a fixed function of the image.

    Parameters
    ----------
    split : Split
        A prepared network; its modules are only evaluated.
    directions : Tensor of shape (K, D)
        u_k in the space of the last features; K = 0: no tangents.
    sketch_size : int or None
        Columns of the random matrices of a sketch; None: exact gradients.
    seed : int
        Of the sketches.
    example : sequence of Tensor
        Trunk activations of one image, by which the layers are told that see each image in rows of its own.
    scales : Tensor of shape (parts,) or None
        Norm of each part of the network's features, by which those of the layers of a stage are divided before they
        are put together; see `part_norms`. None: ones.

    Attributes
    ----------
    groups : list of Group
        In the order of their columns.
    """

    def __init__(
        self,
        split: Split,
        directions: Tensor,
        sketch_size: int | None,
        seed: int,
        example: Sequence[Tensor],
        scales: Tensor | None = None,
    ):
        self._tail, self._default_layout = walker(split)
        self._parts = split.parts
        generator = torch.Generator().manual_seed(seed)
        self.groups, place, factor = _together(split.parts, scales, generator)
        self._place, self._factor = place.to(example[0].device), factor.to(example[0])
        self._n_read = sum(self.sizes)
        self._sketches: dict[str, LayerSketch] = {}
        self._directions = directions.to(example[0])
        if not len(directions):
            return
        for stage, names in self._layers_by_stage(split, example).items():
            sketches = [draw_sketch(self._layer(name), len(directions), sketch_size, generator) for name in names]
            like = (example[0].device, example[0].dtype)
            self._sketches |= {name: sketch.to(*like) for name, sketch in zip(names, sketches, strict=True)}
            sides = tuple((s.left.shape[2], s.right.shape[2]) for s in sketches) if sketch_size is not None else ()
            self.groups.append(Group(f"{stage} directions", tuple(s.size for s in sketches), sides))

    @property
    def layers(self) -> list[str]:
        """Names of the layers that have tangent features."""
        return list(self._sketches)

    @property
    def sizes(self) -> list[int]:
        """Columns of each group."""
        return [group.size for group in self.groups]

    def _layer(self, name: str) -> nn.Linear | nn.Conv2d:
        layer = self._tail.layers()[name]
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        return layer

    def _layers_by_stage(self, split: Split, example: Sequence[Tensor]) -> dict[str, list[str]]:
        """Layers to be sketched, by the last module of their stage; first stage first."""
        _, one = self._with_graph(self._laid_out([z[:1] for z in example]))
        _, two = self._with_graph(self._laid_out([z[:1].repeat_interleave(2, 0) for z in example]))
        tangent, found = set(split.tangent), dict[str, list[str]]()
        for name, m in self._tail.layers().items():
            if f"{name}.weight" not in tangent or not is_plain(m, (nn.Linear, nn.Conv2d)):
                continue
            calls = self._tail.calls(two, name)
            pairs = zip(self._tail.calls(one, name), calls, strict=True)
            # Of a layer of learned constants nothing in the image is behind the output.
            if not calls or not all(y.requires_grad and _is_twice(x, x1) for (x1, _), (x, y) in pairs):
                continue
            if isinstance(m, nn.Conv2d) and m.groups > 1 and m.weight.numel() > _DEPTHWISE_MAX:
                continue
            found.setdefault(split.stage_of(name), []).append(name)
        order = {stage: i for i, stage in enumerate(split.stages)}
        return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))

    def _laid_out(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return [z.contiguous() for z in inputs] if self._default_layout else inputs

    def __call__(self, activations: Sequence[Tensor]) -> Tensor:
        """Features (B, D) of trunk activations, each (B, ...)."""
        if not self._sketches:
            return self._read(self.network_features(activations))
        return self._with_directions(self._laid_out(activations))

    def network_features(self, activations: Sequence[Tensor]) -> Tensor:
        """What the prepared network returns, (B, columns of all parts)."""
        with torch.no_grad():
            return self._tail.primal(self._laid_out(activations))[0].detach()

    def part_norms(self, features: Tensor) -> Tensor:
        """Root of the variance of each part of the network's features (N, ...), (parts,) in float64; 1 for 0."""
        variance = features.cpu().double().var(0, correction=0)  # not every accelerator has float64
        norms = torch.stack([part.sum().sqrt() for part in variance.split([part.size for part in self._parts])])
        return torch.where(norms > 0, norms, torch.ones_like(norms)).cpu()

    def _read(self, features: Tensor) -> Tensor:
        """Columns of the groups, from those of the network."""
        read = self._factor.new_zeros(features.shape[0], self._n_read)
        return read.index_add_(1, self._place, features * self._factor)

    def _with_directions(self, activations: Sequence[Tensor]) -> Tensor:
        rows = activations[0].shape[0]  # len would be a constant of an exported program
        features, values = self._with_graph(activations)
        last = self._last(features, values)
        calls = [(name, x, out) for name in self._sketches for x, out in self._tail.calls(values, name)]
        with torch.no_grad():
            read = [self._sketches[name].inputs(x, rows) for name, x, _ in calls]
        found: dict[str, list[Tensor]] = {name: [] for name in self._sketches}
        for k, u in enumerate(self._directions):
            gradients = torch.autograd.grad(
                last, [out for _, _, out in calls], u.expand_as(last),
                retain_graph=k < len(self._directions) - 1, allow_unused=True,
            )  # fmt: skip
            here: dict[str, Tensor] = {}  # sums over the calls of a layer
            with torch.no_grad():
                for (name, _, out), x, g in zip(calls, read, gradients, strict=True):
                    part = self._sketches[name].features(x, torch.zeros_like(out) if g is None else g, k)
                    here[name] = here[name] + part if name in here else part
            for name, part in here.items():
                found[name].append(part)
        joined = [self._sketches[name].joined(parts) for name, parts in found.items()]
        return torch.cat([self._read(features.detach()), *joined], 1)

    def _last(self, features: Tensor, values: dict[Any, Any]) -> Tensor:
        """The last features (B, D), as they are before the statistics are appended.

        A gradient of the columns of all features would go back through the statistics, too, though it is zero there.
        """
        if isinstance(self._tail, TracedTail) and len(self._parts) > 1:
            appended = cast(Any, self._tail.output.args[0])  # of torch.cat, see `statistics.add_readout`
            return values[appended[0]]
        return features if isinstance(self._tail, TracedTail) else values["last"]

    def _with_graph(self, activations: Sequence[Tensor]) -> tuple[Tensor, dict[Any, Any]]:
        """What the network returns, and all values, with a graph that begins at the activations, not at parameters."""
        with torch.enable_grad():
            return self._tail.primal([z.detach().requires_grad_(z.is_floating_point()) for z in activations])


def _together(
    parts: Sequence[Part], scales: Tensor | None, generator: torch.Generator
) -> tuple[list[Group], Tensor, Tensor]:
    """Groups of the columns of parts; the new place of each column, and its factor.

    Parts of one name, of layers of one stage, are one group. Where they have too many columns, each column is added to
    a random one of fewer, with a random sign: inner products have the old ones as their expectation (CountSketch:
    Charikar, Chen, Farach-Colton 2002).
    """
    groups: list[Group] = []
    places, factors = [torch.empty(0)] * len(parts), [torch.empty(0)] * len(parts)
    names, start = list(dict.fromkeys(part.name for part in parts)), 0
    most = min(_GROUP_COLUMNS, _COLUMNS // max(len(names) - 1, 1))
    for name in names:
        mine = [i for i, part in enumerate(parts) if part.name == name]
        total = sum(parts[i].size for i in mine)
        place, factor = torch.arange(total), torch.ones(total, dtype=torch.float64)
        if name != "last":
            norms = torch.ones(len(parts), dtype=torch.float64) if scales is None else scales
            factor = torch.cat([(1 / norms[i]).expand(parts[i].size) for i in mine])
        if name != "last" and total > most:
            place = torch.randint(0, most, (total,), generator=generator)
            factor = factor * (torch.randint(0, 2, (total,), generator=generator) * 2 - 1)
            total = most
        sizes = [parts[i].size for i in mine]
        for i, p, f in zip(mine, (place + start).split(sizes), factor.split(sizes), strict=True):
            places[i], factors[i] = p, f
        groups.append(Group(name, (total,)))
        start += total
    return groups, torch.cat(places), torch.cat(factors)


def _is_twice(x: Tensor, once: Tensor) -> bool:
    """Whether x has the rows of another tensor, then the same again, but for rounding."""
    if x.shape != (2 * len(once), *once.shape[1:]):
        return False
    return bool((x - torch.cat([once, once])).abs().max() <= 1e-3 * x.abs().max())


# ------------------------------------------------------------------------------------------------------ scale


@dataclass(frozen=True)
class Standardization:
    """Features less their mean over the training images, each part over one scale: ``(x - shift) / scale``.

    One scale for all features of a part keeps their proportions, which carry meaning. No label is seen.

    Attributes
    ----------
    shift, scale : ndarray of shape (D,)
        In float64.
    """

    shift: np.ndarray
    scale: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Standardized features (n, D) in float64."""
        return (features - self.shift) / self.scale


def fit_standardization(
    features: np.ndarray, weights: np.ndarray, groups: Sequence[Group], processes: ProcessGroup = ALONE,
    piece: int = PIECE_BYTES,
) -> Standardization:  # fmt: skip
    """Mean 0, and mean squared norm 1 of each group.

    Parameters
    ----------
    features : ndarray of shape (n, D)
        Where processes share the rows, those of this process's share.
    weights : ndarray of shape (n,)
        Of the rows of all processes, not all zero.
    groups : sequence of Group
    processes : ProcessGroup
    piece : int
        Bytes of the rows that are held in float64 at once.

    Raises
    ------
    ValueError
        Some features are not finite.
    """
    s = (weights / weights.sum())[processes.share(len(weights))]
    parts = pieces(len(features), 8 * features.shape[1], piece)

    def mean_of(values: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        found = np.zeros(features.shape[1])
        for rows in parts:
            found += s[rows] @ values(features[rows].astype(np.float64))
        return processes.all_reduce(torch.from_numpy(found)).numpy()

    with np.errstate(invalid="ignore", over="ignore"):
        mean = mean_of(lambda x: x)
    if not np.isfinite(mean).all():
        raise ValueError(
            "The backbone's features of the training images are not all finite: check its weights and preprocessing, "
            "or use execution={'dtype': 'float64'}."
        )
    variance = mean_of(lambda x: np.square(x - mean))
    # The variance of constant features is rounding.
    noise = 10 * np.finfo(features.dtype).eps * np.abs(mean)
    scale, start = np.ones(len(mean)), 0
    for group in groups:
        norms = []
        for size in group.parts:
            part = slice(start, start + size)
            norm = float(variance[part].sum()) ** 0.5
            varies = norm > np.sqrt(np.square(noise[part]).sum())
            norms.append((part, norm if varies else 0.0))
            start += size
        count = sum(norm > 0 for _, norm in norms)
        for part, norm in norms:
            scale[part] = norm * count**0.5 if norm > 0 else np.inf  # what does not vary says nothing
    return Standardization(mean, scale)
