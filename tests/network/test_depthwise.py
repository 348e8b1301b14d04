"""Weight gradients of depthwise convolutions against those of torch."""

import itertools

import pytest
import torch
from torch import nn

from sklearn_lqf.network import depthwise
from sklearn_lqf.network.depthwise import image_gradients, is_wide_depthwise, weight_gradient

GEOMETRIES = {
    "5": {"kernel_size": 5, "padding": 2},
    "7": {"kernel_size": 7, "padding": 3},
    "one row": {"kernel_size": (1, 4)},
    "no padding": {"kernel_size": (2, 5)},
    "much padding": {"kernel_size": (3, 5), "padding": (4, 6)},
    "stride": {"kernel_size": 5, "padding": 2, "stride": 2},
    "two strides": {"kernel_size": (4, 6), "padding": (1, 3), "stride": (3, 2)},
    "more rows than the image": {"kernel_size": (9, 5), "padding": (4, 2)},
}


@pytest.mark.parametrize("options", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_autograd(options, dtype, tolerance, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(6, 6, groups=6, dtype=dtype, **options)
    assert is_wide_depthwise(conv)
    for shape, pairs, layout in itertools.product(
        ((4, 6, 8, 7), (1, 6, 8, 7)), (0, 1 << 30), (torch.contiguous_format, torch.channels_last)
    ):
        monkeypatch.setattr(depthwise, "_PAIRS", pairs)
        x = torch.randn(shape, generator=generator, dtype=dtype).to(memory_format=layout)
        out = conv(x)
        u = torch.randn(out.shape, generator=generator, dtype=dtype).to(memory_format=layout)
        (expected,) = torch.autograd.grad(out, conv.weight, u)
        found = weight_gradient(conv, x, u)
        atol = tolerance * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)
        monkeypatch.setattr(depthwise, "_CHUNK", 1 if pairs else 1 << 30)
        rows = [weight_gradient(conv, x[i : i + 1], u[i : i + 1]).flatten(1) for i in range(len(x))]
        torch.testing.assert_close(image_gradients(conv, x, u), torch.stack(rows), rtol=0, atol=atol)


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
