"""Weight gradients of depthwise convolutions against those of torch."""

import pytest
import torch
from support.splits import rand
from torch import nn

from sklearn_lqf.network.depthwise import image_gradients, is_wide_depthwise, weight_gradient

GEOMETRIES = {
    "7": {"kernel_size": 7, "padding": 3},
    "one row": {"kernel_size": (1, 4)},
    "much padding": {"kernel_size": (3, 5), "padding": (4, 6)},
    "two strides": {"kernel_size": (4, 6), "padding": (1, 3), "stride": (3, 2)},
    "more rows than the image": {"kernel_size": (9, 5), "padding": (4, 2)},
}
# Each way to compute them: of few and of many positions, of one image and of more than there is room for at once.
SHAPES = [(4, 6, 4, 5), (1, 6, 8, 12), (12, 6, 8, 12)]


@pytest.mark.parametrize("options", GEOMETRIES.values(), ids=GEOMETRIES)
def test_equals_autograd(options):
    conv = nn.Conv2d(6, 6, groups=6, dtype=torch.float64, **options)
    assert is_wide_depthwise(conv)
    for shape in SHAPES:
        for layout in (torch.contiguous_format, torch.channels_last):
            x = rand(*shape).contiguous(memory_format=layout)
            out = conv(x)
            u = rand(*out.shape, seed=1).contiguous(memory_format=layout)
            (expected,) = torch.autograd.grad(out, conv.weight, u)
            atol = 1e-12 * float(expected.abs().max())
            torch.testing.assert_close(weight_gradient(conv, x, u), expected, rtol=0, atol=atol)
            rows = [torch.autograd.grad(conv(a[None]), conv.weight, b[None])[0] for a, b in zip(x, u, strict=True)]
            found = image_gradients(conv, x, u).view(len(x), *conv.weight.shape)
            torch.testing.assert_close(found, torch.stack(rows), rtol=0, atol=atol)


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 1}, {"groups": 2}, {"out_channels": 12}, {"kernel_size": 3}, {"kernel_size": (5, 3)},
        {"dilation": 2}, {"padding_mode": "circular"}, {"padding": "same"}, {"device": "meta"},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_left_to_torch(options):
    wide = {"in_channels": 6, "out_channels": 6, "kernel_size": 5, "groups": 6, "padding": 2}
    assert is_wide_depthwise(nn.Conv2d(**wide))
    assert not is_wide_depthwise(nn.Conv2d(**{**wide, **options}))
