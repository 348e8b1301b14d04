"""The linear head at which a network is linearized.

A ridge regression on the features in closed form, with the outputs that each image would get from a head
that did not see it. Knows no network: features and targets in, weights out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RidgeHead", "fit_ridge_head", "random_head"]


@dataclass(frozen=True)
class RidgeHead:
    """A ridge regression.

    Attributes
    ----------
    weight : Tensor of shape (C, D)
    bias : Tensor of shape (C,)
    held_out : Tensor of shape (V, n, C)
        Outputs for each training row by the head fitted without its image (all views left out).
    alpha : float
        L2 penalty, the one of ``alphas`` with the smallest squared leave-one-out error.
    """

    weight: Tensor
    bias: Tensor
    held_out: Tensor
    alpha: float


def fit_ridge_head(
    features: Tensor,
    targets: Tensor,
    weights: Tensor,
    multiplicity: Tensor,
    relative_alphas: Tensor,
) -> RidgeHead:
    """Weighted ridge regression with intercept; its penalty by leave-one-out, in closed form.

    Parameters
    ----------
    features : Tensor of shape (V, n, D)
        V views of each of n images.
    targets : Tensor of shape (n, C)
    weights : Tensor of shape (n,)
        Positive weight of an image, shared equally by its views.
    multiplicity : Tensor of shape (n,)
        How many identical images a row stands for, at least 1: leaving one out removes the fraction
        1/multiplicity of its weight, so that a weight of 2 equals a row given twice.
    relative_alphas : Tensor of shape (A,)
        Candidates in units of the mean squared norm of the centered features.

    Returns
    -------
    RidgeHead
        In float64.

    Notes
    -----
    With weighted and centered features X, hat matrix H and residual r, leaving out the fraction q of the
    rows g of one image changes their residual to (I - q H_gg)^-1 r_g (Woodbury).
    """
    views, n, d = features.shape
    x, s = features.double().reshape(views * n, d), (weights.double() / views).repeat(views)
    y = targets.double().repeat(views, 1)
    total = s.sum()
    x_mean, y_mean = (s @ x) / total, (s @ y) / total
    root = s.sqrt().unsqueeze(1)
    xs, ys = (x - x_mean) * root, (y - y_mean) * root
    u, sigma, vt = _thin_svd(xs)
    energy = sigma.square()
    fraction = (1 / multiplicity.double()).view(n, 1, 1)
    eye = torch.eye(views, dtype=x.dtype, device=x.device)
    grouped_u = u.view(views, n, -1).transpose(0, 1)  # (n, V, r)
    intercept = (s / total).sqrt().view(views, n).T  # (n, V)
    uy = u.T @ ys
    best: tuple[float, Tensor, Tensor] | None = None
    for alpha in relative_alphas.double().to(x.device) * energy.sum() / total:
        shrink = energy / (energy + alpha)
        residual = (ys - u @ (shrink.unsqueeze(1) * uy)).view(views, n, -1).transpose(0, 1)  # (n, V, C)
        hat = (grouped_u * shrink) @ grouped_u.mT + intercept.unsqueeze(2) * intercept.unsqueeze(1)
        left_out = torch.linalg.solve(eye - fraction * hat, residual)
        error = float(left_out.square().sum())
        if best is None or error < best[0]:
            best = (error, alpha, left_out)
    if best is None:
        raise ValueError("relative_alphas must not be empty")
    _, alpha, left_out = best
    weight = (vt.T @ ((sigma / (energy + alpha)).unsqueeze(1) * uy)).T
    held_out = y.view(views, n, -1) - (left_out.transpose(0, 1).reshape(views * n, -1) / root).view(
        views, n, -1
    )
    return RidgeHead(weight, y_mean - weight @ x_mean, held_out, float(alpha))


def _thin_svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u (N, r), s (r,), vt (r, D) of x, from the smaller Gram matrix when the two sizes are far apart."""
    rows, columns = x.shape
    if rows <= 4 * columns:
        return torch.linalg.svd(x, full_matrices=False)
    values, v = torch.linalg.eigh(x.T @ x)
    keep = values > values.max().clamp_min(torch.finfo(x.dtype).tiny) * columns * torch.finfo(x.dtype).eps
    sigma, v = values[keep].sqrt(), v[:, keep]
    return (x @ v) / sigma, sigma, v.T


def random_head(n_classes: int, n_features: int, generator: torch.Generator) -> Tensor:
    """Rows drawn from N(0, 1/D), shape (C, D) in float64: label-free."""
    return torch.randn(n_classes, n_features, generator=generator, dtype=torch.float64) / n_features**0.5
