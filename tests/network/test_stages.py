"""The stages of networks, found by evaluating them."""

import pytest
import torch
from support.networks import Other, uninitialized
from torch import nn

from sklearn_lqf.network.stages import channels_last, find_stages


def example(*shape):
    return torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("shape", "image", "expected"),
    [
        ((2, 8, 8, 96), (64, 64), True), ((2, 8, 8, 8), (64, 64), False), ((2, 96, 8, 8), (64, 64), False),
        ((2, 8, 7, 9), (64, 64), False), ((2, 64, 64, 80), (256, 320), False), ((2, 64, 80, 64), (256, 320), True),
        ((2, 7, 9, 96), (256, 320), True), ((2, 512, 8, 10), (256, 320), False), ((2, 5, 5, 7), (), True),
    ],
)  # fmt: skip
def test_channels_are_told_from_rows_by_the_proportion_of_the_images(shape, image, expected):
    assert channels_last(torch.Size(shape), torch.zeros(2, 3, *image)) is expected


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()),
        nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8),
    )  # fmt: skip


class Block(nn.Module):
    """A residual block: a unit, whatever containers it holds."""

    def __init__(self, width, new=None, stride=1):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(width, new or width, 3, stride, 1), nn.ReLU())

    def forward(self, x):
        return self.body(x) if self.body[0].in_channels != self.body[0].out_channels else x + self.body(x)


def residual():
    """Blocks in a module of their own that holds most of the parameters."""

    def blocks(m, x):
        x = m.stem(x)
        for block in m.blocks:
            x = block(x)
        return x

    chain = nn.ModuleList([Block(4), Block(4, 8, 2), Block(8), Block(8, 9, 2), Block(9)])
    body = Other(blocks, stem=nn.Conv2d(3, 4, 3, padding=1), blocks=chain)
    return Other(lambda m, x: m.body(x).mean((2, 3)), body=body)


def with_channels_last():
    def forward(m, x):
        x = m.b(m.a(m.patches(x).permute(0, 2, 3, 1)))
        return m.c(m.down(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))

    first = {"patches": nn.Conv2d(3, 4, 4, 4), "a": nn.Linear(4, 5), "b": nn.Linear(5, 6)}
    return Other(forward, **first, down=nn.Conv2d(6, 8, 2, 2), c=nn.Linear(8, 8))


def transformer():
    def forward(m, x):
        x = m.patches(x).flatten(2).transpose(1, 2)
        return m.norm(m.blocks(torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1)))[:, 0]

    blocks = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True) for _ in range(3)))
    net = Other(forward, patches=nn.Conv2d(3, 8, 16, 16), blocks=blocks, norm=nn.LayerNorm(8))
    net.token = nn.Parameter(torch.zeros(1, 1, 8))
    return net


def of_vectors():
    return nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 4), nn.Tanh())


def in_another_order():
    return Other(lambda m, x: m.a(m.b(m.a(x))), a=nn.Linear(6, 6), b=nn.Linear(6, 6))


def of_several_values():
    """The first of a tuple counts, and nothing of a table."""

    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    class Table(nn.Linear):
        def forward(self, x):
            return {"out": super().forward(x)}

    return Other(lambda m, x: m.b(m.a(x)[0])["out"], a=Pair(6, 6), b=Table(6, 6))


STAGES = [
    (convolutional, (3, 32, 32), [["0", "1", "3.0"], ["4", "5"], ["8", "12"]]),
    (residual, (3, 32, 32), [
        ["body.stem", "body.blocks.0"], ["body.blocks.1", "body.blocks.2"], ["body.blocks.3", "body.blocks.4"],
    ]),
    (with_channels_last, (3, 32, 32), [["patches", "a", "b"], ["down", "c"]]),
    (transformer, (3, 32, 32), [["patches"], ["blocks.0"], ["blocks.1"], ["blocks.2", "norm"]]),
    (of_vectors, (6,), [["0"], ["1", "2"], ["4"]]),
    (in_another_order, (6,), [["b"], ["a"]]),
    (of_several_values, (6,), [["a"]]),
    (lambda: uninitialized("resnet18"), (3, 64, 64), [
        ["conv1", "bn1"], ["layer1.0", "layer1.1"], ["layer2.0", "layer2.1"], ["layer3.0", "layer3.1"],
        ["layer4.0", "layer4.1", "fc"],
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("make", "shape", "expected"), STAGES)
def test_stages(make, shape, expected):
    assert find_stages(make().eval(), example(*shape)) == expected
