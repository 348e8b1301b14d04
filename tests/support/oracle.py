"""Dense references that share no code with the package: explicit Jacobians, factors and quadratics."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev


def jacobian(features: nn.Module, names: Sequence[str], weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """Jacobians (n, C, P) of a linear head on features; parameters in the order of names, then the head."""
    parameters = {n: p.detach() for n, p in features.named_parameters()}

    def outputs(chosen: dict[str, Tensor], w: Tensor, b: Tensor, row: Tensor) -> Tensor:
        return (functional_call(features, {**parameters, **chosen}, (row.unsqueeze(0),)) @ w.T + b)[0]

    rows = []
    for row in x:
        body, w, b = jacrev(outputs, argnums=(0, 1, 2))({n: parameters[n] for n in names}, weight, bias, row)
        rows.append(torch.cat([j.reshape(len(bias), -1) for j in (*(body[n] for n in names), w, b)], 1))
    return torch.stack(rows)


def least_squares(j: Tensor, targets: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """argmin_d sum_i s_i |J_i d - t_i|^2 + alpha |d|^2, by numpy on the stacked rows."""
    root = weights.sqrt().repeat_interleave(j.shape[1]).numpy()
    rows, t = j.flatten(0, 1).numpy() * root[:, None], targets.flatten().numpy() * root
    penalty = np.eye(j.shape[2]) * alpha**0.5
    found = np.linalg.lstsq(np.vstack([rows, penalty]), np.append(t, np.zeros(len(penalty))), rcond=None)
    return torch.from_numpy(found[0])


def gauss_newton(j: Tensor, weights: Tensor) -> Tensor:
    """sum_i s_i J_i' J_i for Jacobians (n, C, P)."""
    return torch.einsum("n,ncp,ncq->pq", weights, j, j)


def layer_jacobians(
    layer: nn.Module, inputs: Sequence[Tensor], gradients: Sequence[Sequence[Tensor]], images: int
) -> Tensor:
    """Gradients (B, K, G, o, m) of sum <gradient, layer(input)>, image by image, the bias as last column.

    ``gradients`` are over probes, then over evaluations of the layer; an image has consecutive rows.
    """
    parameters = {n: p.detach() for n, p in layer.named_parameters()}
    groups = getattr(layer, "groups", 1)

    def product(p: dict[str, Tensor], i: int, k: int) -> Tensor:
        pairs = ((x.chunk(images)[i], g.chunk(images)[i]) for x, g in zip(inputs, gradients[k], strict=True))
        return sum(((functional_call(layer, p, (x,)) * g).sum() for x, g in pairs), torch.zeros(()).double())

    found = []
    for i in range(images):
        for k in range(len(gradients)):
            j = torch.func.grad(lambda p, i=i, k=k: product(p, i, k))(parameters)
            columns = [j["weight"].flatten(1)] + ([j["bias"].unsqueeze(1)] if "bias" in j else [])
            found.append(torch.cat(columns, 1).unflatten(0, (groups, -1)))
    return torch.stack(found).unflatten(0, (images, -1))


def as_matrix(operator: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """The matrix of a linear operator on vectors of float64."""
    return torch.stack([operator(e) for e in torch.eye(size, dtype=torch.float64)], 1)
