"""Networks that are split into trunk and tail, and what the parts must compute."""

import torch
from torch import fx, nn

from sklearn_lqf.network.tracing import split_network

SLOPE = 0.1


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def randomized(module, seed=0, by_fan=False):
    """Float64, evaluation mode, every parameter and statistic away from its initial value.

    ``by_fan``: weights of a size that keeps that of the activations.
    """
    module = module.double().eval()
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        fan = max(1, p[0].numel() if p.ndim > 1 else 4)
        size = (2 / fan) ** 0.5 if by_fan else 0.5
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * size
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.2, 2.0, generator=generator)
    return module


IMAGES = rand(5, 3, 8, 8, seed=5)  # other than the example, of which there are two
EXAMPLE = IMAGES[:2] * 0.5
VECTORS = rand(5, 6, seed=6)
TOKENS = rand(5, 4, 6, seed=7)


def split_checked(net, tangent_layers="all", x=IMAGES, example=None, tolerance=1e-12):
    """A split whose parts compute what the network computes, for several batch sizes."""
    example = x[:2] * 0.5 if example is None else example
    split = split_network(net, example, tangent_layers)
    for rows in (1, 2, len(x)):
        expected = net(x[:rows]).detach()
        cached = split.trunk(x[:rows])
        assert isinstance(cached, tuple)
        assert all(z.shape[0] == rows for z in cached)
        torch.testing.assert_close(split.tail(*cached).detach(), expected, rtol=tolerance, atol=tolerance)
    assert split.n_features == expected.shape[1]
    assert not set(split.tangent) - {n for n, _ in split.tail.named_parameters()}
    assert not any(p.requires_grad for p in split.trunk.parameters())
    return split


def operations(split, *kinds):
    """Targets of the nodes of these kinds, in both parts."""
    graphs = [part.graph for part in (split.trunk, split.tail) if isinstance(part, fx.GraphModule)]
    return [node.target for graph in graphs for node in graph.nodes if node.op in kinds]


def of_type(split, kind):
    return [m for part in (split.trunk, split.tail) for m in part.modules() if type(m) is kind]


def chain():
    """Three stages."""
    return randomized(
        nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
            nn.Sequential(nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
            nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
    )
