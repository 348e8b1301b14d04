"""A small network for vectors, which needs no pre-trained weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .backbone import Backbone, Wanted, finished, seed_of
from .preprocessing import Preprocessing

__all__ = ["VectorNetwork", "vector_network"]

_WIDTH = 128  # hidden units
_SLOPE = 0.1  # of its Leaky-ReLU


class VectorNetwork(nn.Module):
    """A small network for vectors, which needs no download: d -> 128 -> 128 -> 1, with Leaky-ReLU between.

    Parameters and buffers are float64. The buffers ``mean`` and ``scale`` of shape (d,), at first 0 and 1,
    standardize the input; they are to be set from the training data.

    Parameters
    ----------
    n_features : int
        d, the number of features.
    generator : torch.Generator
        On the CPU; draws the weights.

    Notes
    -----
    Weights are drawn from N(0, 2 / ((1 + 0.1^2) fan_in)), which keeps the variance of the activations from
    layer to layer [1]_. Biases are drawn from U(-1, 1) / sqrt(fan_in), as torch.nn.Linear does: with zero
    biases all kinks lie at the mean of the data, and on one feature only two straight pieces can be fitted.

    References
    ----------
    .. [1] He, Zhang, Ren, Sun, "Delving Deep into Rectifiers: Surpassing Human-Level Performance on ImageNet
       Classification", ICCV 2015, arXiv 1502.01852, eq. 15.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, n_features: int, generator: torch.Generator):
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_features, dtype=torch.float64, device="cpu"))
        self.register_buffer("scale", torch.ones(n_features, dtype=torch.float64, device="cpu"))
        self.hidden1 = _linear(n_features, _WIDTH, generator)
        self.hidden2 = _linear(_WIDTH, _WIDTH, generator)
        self.head = _linear(_WIDTH, 1, generator)
        self.activation = nn.LeakyReLU(_SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        """Map vectors (B, d) to outputs (B, 1)."""
        x = self.activation(self.hidden1((x - self.mean) / self.scale))
        return self.head(self.activation(self.hidden2(x)))


def vector_network(n_features: int, wanted: Wanted) -> Backbone:
    choice = wanted.choose("vector")
    generator = torch.Generator().manual_seed(seed_of(wanted.random_state))
    module = VectorNetwork(n_features, generator)
    wanted.load(module, choice, "vector")
    return finished("vector", module, Preprocessing.unknown(3), 3)


def _linear(n_in: int, n_out: int, generator: torch.Generator) -> nn.Linear:
    """A float64 layer, drawn as VectorNetwork says, without torch's global generator."""
    layer = nn.utils.skip_init(nn.Linear, n_in, n_out, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.normal_(0, (2 / ((1 + _SLOPE**2) * n_in)) ** 0.5, generator=generator)
        layer.bias.uniform_(-(n_in**-0.5), n_in**-0.5, generator=generator)
    return layer
