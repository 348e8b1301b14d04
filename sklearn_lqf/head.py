"""The linear head at which a network is linearized.

A ridge regression on the features in closed form, with the outputs that each image would get from a head
that did not see it. Knows no network: features and targets in, weights out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RidgeHead", "fit_ridge_head", "orthogonal_head", "random_head"]

_GRAM_RATIO = 4  # rows for each column from which the Gram matrix serves: much faster, and accurate enough


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
        V views of each of n >= 2 images.
    targets : Tensor of shape (n, C)
    weights : Tensor of shape (n,)
        Positive weight of an image, shared equally by its views.
    multiplicity : Tensor of shape (n,)
        How many identical images a row stands for, at least 1: leaving one out removes the fraction
        1/multiplicity of its weight, so that a weight of 2 equals a row given twice.
    relative_alphas : Tensor of shape (A,)
        Candidates, positive, in units of the mean squared norm of the centered features (1 when all are
        constant), times the mean weight where weights are below 1: their scale does not matter then.

    Returns
    -------
    RidgeHead
        In float64.

    Raises
    ------
    ValueError
        No candidate, or none for which leaving out is defined.

    Notes
    -----
    With weighted and centered features X, hat matrix H and residual r, leaving out the fraction q of the
    rows g of one image changes their residual to (I - q H_gg)^-1 r_g (Woodbury).
    """
    views, n, d = features.shape
    x, y = features.double().reshape(views * n, d), targets.double().repeat(views, 1)
    s = (weights.double() / views).repeat(views)
    total = s.sum()
    x_mean, y_mean = (s @ x) / total, (s @ y) / total
    root = s.sqrt().unsqueeze(1)
    ys = (y - y_mean) * root
    # Centering leaves rounding errors of constant features, which are not to be fitted.
    largest = x.abs().amax(0).square().sum()
    noise = 10 * torch.finfo(features.dtype).eps * float((largest * total).sqrt())
    u, sigma, vt = _thin_svd((x - x_mean) * root, noise)
    energy, uy = sigma.square(), u.T @ ys
    alphas = relative_alphas.double().to(x.device) * (energy.sum() / multiplicity.sum() if len(energy) else 1.0)
    grouped_u = u.view(views, n, -1).transpose(0, 1)  # (n, V, r)
    intercept = (s / total).sqrt().view(views, n).T  # (n, V)
    fraction = (1 / multiplicity.double()).view(n, 1, 1)
    best: tuple[float, Tensor, Tensor] | None = None
    for alpha in alphas:
        shrink = energy / (energy + alpha)
        residual = (ys - u @ (shrink.unsqueeze(1) * uy)).view(views, n, -1).transpose(0, 1)  # (n, V, C)
        left_out = _leave_out(residual, grouped_u, shrink, intercept, fraction)
        error = float(left_out.square().sum())
        if error < (best[0] if best else math.inf):
            best = (error, alpha, left_out)
    if best is None:
        raise ValueError(
            f"None of {len(alphas)} penalties allows leaving out each of {n} images: there must be a positive "
            "penalty and at least two images, and features, targets and weights must be finite."
        )
    _, alpha, left_out = best
    weight = (vt.T @ ((sigma / (energy + alpha)).unsqueeze(1) * uy)).T
    held_out = y.view(views, n, -1) - left_out.transpose(0, 1) / root.view(views, n, 1)
    return RidgeHead(weight, y_mean - weight @ x_mean, held_out, float(alpha))


def _leave_out(residual: Tensor, u: Tensor, shrink: Tensor, intercept: Tensor, fraction: Tensor) -> Tensor:
    """Residuals (n, V, C) when each image is left out, from those of the fit; u (n, V, r), intercept (n, V)."""
    hat = (u * shrink) @ u.mT + intercept.unsqueeze(2) * intercept.unsqueeze(1)
    eye = torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
    return torch.linalg.solve_ex(eye - fraction * hat, residual).result  # not finite where undefined


def _thin_svd(x: Tensor, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """u (N, r), s (r,), vt (r, D) of x without singular values up to ``noise``; from x'x for many rows."""
    rows, columns = x.shape
    if rows <= _GRAM_RATIO * columns:
        u, sigma, vt = torch.linalg.svd(x, full_matrices=False)
        keep = sigma > noise
        return u[:, keep], sigma[keep], vt[keep]
    values, v = torch.linalg.eigh(x.T @ x)
    floor = max(noise**2, columns * torch.finfo(x.dtype).eps * float(values.max()))
    keep = values > floor
    sigma, v = values[keep].sqrt(), v[:, keep]
    return (x @ v) / sigma, sigma, v.T


def random_head(n_classes: int, n_features: int, generator: torch.Generator) -> Tensor:
    """Rows drawn from N(0, 1/D), shape (C, D) in float64: label-free."""
    return torch.randn(n_classes, n_features, generator=generator, dtype=torch.float64) / n_features**0.5


def orthogonal_head(n_classes: int, n_features: int, generator: torch.Generator) -> Tensor:
    """Random rows of norm 1, orthogonal as far as D allows, shape (C, D) in float64: label-free."""
    rows = random_head(n_classes, n_features, generator)
    blocks = [torch.linalg.qr(block.T)[0].T for block in rows.split(n_features)]
    return torch.cat(blocks)
