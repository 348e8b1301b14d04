"""Weight gradients of depthwise convolutions on a CPU.

oneDNN has fast code for kernels of up to three columns. For wider kernels, as in EfficientNet and ConvNeXt, it has
reference code, which takes longer than the rest of the layer.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

__all__ = ["are_few", "image_gradients", "is_wide_depthwise", "weight_gradient"]

_COLUMNS = 3  # largest number of columns of a kernel for which there is fast code
_PAIRS = 1024  # largest number of pairs of an input and an output position for which all products are the fastest way
_CHUNK = 1 << 19  # elements of such products that are held at once: they fit into the caches


def is_wide_depthwise(conv: nn.Conv2d) -> bool:
    """Whether `weight_gradient` supports a layer and is faster than torch."""
    return (
        conv.in_channels == conv.out_channels == conv.groups
        and conv.kernel_size[1] > _COLUMNS
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and conv.weight.device.type == "cpu"
    )


def weight_gradient(conv: nn.Conv2d, x: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of <u, conv(x)> with respect to the weight.

    Parameters
    ----------
    conv : Conv2d
        A layer for which `is_wide_depthwise` is true.
    x : Tensor of shape (B, C, H, W)
    gradient : Tensor of shape (B, C, h, w)
        u.

    Returns
    -------
    Tensor in the shape of the weight
    """
    return (_by_positions if are_few(x, gradient) else _by_columns)(conv, x, gradient)


def are_few(x: Tensor, gradient: Tensor) -> bool:
    """Whether the positions are so few that `image_gradients` is also faster than torch."""
    return x.shape[2:].numel() * gradient.shape[2:].numel() <= _PAIRS


def image_gradients(conv: nn.Conv2d, x: Tensor, gradient: Tensor) -> Tensor:
    """`weight_gradient` of each image separately, (B, C, k) with the k elements of a kernel."""
    n, c = x.shape[:2]
    inputs, outputs = (z.permute(0, 2, 3, 1).reshape(n, -1, c) for z in (x, gradient))
    met = _meetings(conv, x).transpose(0, 1).flatten(1)
    out = x.new_empty(n, len(met), c)
    rows = max(1, _CHUNK // (met.shape[1] * c))
    for i, o, part in zip(inputs.split(rows), outputs.split(rows), out.split(rows), strict=True):
        torch.matmul(met, (i.unsqueeze(2) * o.unsqueeze(1)).flatten(1, 2), out=part)
    return out.mT


def _meetings(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """1 if an element of the kernel connects a position of the input with one of the output, else 0: (H W, k, h w)."""
    height, width = x.shape[2:]
    places = torch.eye(height * width, dtype=x.dtype).view(-1, 1, height, width)
    return nn.functional.unfold(places, conv.kernel_size, conv.dilation, cast(tuple, conv.padding), conv.stride)


def _by_positions(conv: nn.Conv2d, x: Tensor, gradient: Tensor) -> Tensor:
    """Products of each input position with each output position, summed over images, then over connected positions."""
    n, c = x.shape[:2]
    inputs, outputs = (z.permute(0, 2, 3, 1).reshape(-1, c).T.contiguous().view(c, n, -1) for z in (x, gradient))
    return torch.einsum("cio,iko->ck", inputs.mT @ outputs, _meetings(conv, x)).view_as(conv.weight)


def _by_columns(conv: nn.Conv2d, x: Tensor, gradient: Tensor) -> Tensor:
    """Gradients of three columns of the kernel at a time, each from the columns of the padded input that they meet."""
    (rows, columns), (top, left), (down, across) = conv.kernel_size, cast(tuple, conv.padding), conv.stride
    if x.shape[2] < rows:  # there is no fast code for this either
        x, top = nn.functional.pad(x, (0, 0, top, top)), 0
    x = nn.functional.pad(x, (left, left))
    reach = (gradient.shape[3] - 1) * across
    parts = [
        torch.ops.aten.convolution_backward(
            gradient, x[..., a : a + reach + part.shape[3]], part, None, [down, across], [top, 0], [1, 1], False,
            [0, 0], conv.groups, [False, True, False],
        )[1]
        for a, part in zip(range(0, columns, _COLUMNS), conv.weight.detach().split(_COLUMNS, 3), strict=True)
    ]  # fmt: skip
    return torch.cat(parts, 3)
