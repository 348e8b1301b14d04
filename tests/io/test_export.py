"""The model as one module, and as exported programs."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from support.data import TinyNet, make_images, tiny_net
from support.needs import needs_export_of_forward_mode
from support.networks import Other, built
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from sklearn_lqf.backbones.loading import load_backbone
from sklearn_lqf.engine.features import Standardization
from sklearn_lqf.engine.fitted import FeatureReader, FittedModel
from sklearn_lqf.engine.problem import Recipe, Solution
from sklearn_lqf.io.export import _backward_operations, to_module
from sklearn_lqf.network.prepared import PreparedNetwork
from sklearn_lqf.paper.model import PaperModel

F32, F64, CPU = torch.float32, torch.float64, torch.device("cpu")
IMAGES = (torch.from_numpy(make_images()[0]).permute(0, 3, 1, 2) / 255).double()
C = 3
ANY = torch.export.Dim("batch", min=1, max=1024)  # torch 2.6 asks for the largest
# Sums of some hundred products, made twice in another order; relative to the largest output.
TOLERANCE = {F64: 1e-12, F32: 2e-5}


def zoo() -> nn.Module:
    """Operations whose backward passes have operations of their own, one after the other; images of 24 x 24."""

    def forward(m, x):
        t = m.norm(m.maps(x).flatten(2).transpose(1, 2))
        t = t + m.attention(t, t, t, need_weights=False)[0]
        return m.fc(torch.sigmoid(m.up(t.transpose(1, 2).reshape(-1, 12, 2, 3))).mean((2, 3)))

    maps = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Hardswish(), nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.GroupNorm(2, 8), nn.SiLU(), nn.AvgPool2d(2, 1, 1, ceil_mode=True),
        nn.Conv2d(8, 12, 3, 1, 2, dilation=2), nn.GELU(), nn.AdaptiveAvgPool2d((2, 3)),
    )  # fmt: skip
    attention = nn.MultiheadAttention(12, 2, batch_first=True)
    rest = {"norm": nn.LayerNorm(12), "up": nn.ConvTranspose2d(12, 8, 3, 2, 1), "fc": nn.Linear(8, 4)}
    return Other(forward, maps=maps, attention=attention, **rest).eval()


class Branching(TinyNet):
    """Control flow that depends on the data: not traced."""

    def forward(self, x):
        return super().forward(x if x.mean() < 100 else -x)


def prepared(net, shape=(3, 12, 12), layers="all", dtype=F64, slope=0.0, read=True) -> PreparedNetwork:
    backbone = load_backbone(net, vector_features=shape[0] if len(shape) == 1 else None, random_state=0)
    preprocessing = backbone.preprocessing if len(shape) == 3 else None
    return PreparedNetwork(backbone, shape, layers, slope, read, preprocessing, dtype, CPU)


def grouped(network: PreparedNetwork, n_directions=2, size: int | None = 4, views=("identity",)) -> FittedModel:
    """A model of random weights."""
    reader = FeatureReader.draw(network, n_directions, size, 0, views)
    rng, d = np.random.default_rng(0), sum(group.size for group in reader.groups)
    scale = Standardization(rng.normal(size=d), rng.uniform(1, 2, d))
    variances, weight, intercept = np.ones(len(reader.groups)), rng.normal(size=(d, C)), rng.normal(size=C)
    solution = Solution(scale, variances, weight, intercept, 1.0, "rows")
    recipe = Recipe("equal", "auto", "auto", 1e-3, 1, C, False, 1 << 30)
    return FittedModel(reader, solution, np.array([1.0, 2.0, 3.0]), recipe, "")


def paper(network: PreparedNetwork, moved=True) -> PaperModel:
    rng = np.random.default_rng(0)
    head, unit = rng.normal(size=(C, network.split.n_features)), np.array([1.0, 2.0, 3.0])
    tangent = set(network.split.tangent)
    body = sum(p.numel() for name, p in network.split.tail.named_parameters() if name in tangent)
    size = body + head.size + C
    coef = 0.1 * rng.normal(size=size)
    if not moved:
        coef[: -head.size - C] = 0
    return PaperModel(network, head, coef, unit)


def assert_outputs(found: Tensor | np.ndarray, wanted: np.ndarray, dtype: torch.dtype = F64) -> None:
    found = found.detach().numpy() if isinstance(found, Tensor) else found
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE[dtype] * np.abs(wanted).max())


def exported(module: nn.Module, images: Tensor):
    """The program for any number of images, stored and read again, as a module."""
    program = torch.export.export(module, (images[:2],), dynamic_shapes=({0: ANY},), strict=False)
    store = io.BytesIO()
    torch.export.save(program, store)
    store.seek(0)
    return torch.export.load(store).module()


def assert_module(model: FittedModel | PaperModel, images: Tensor) -> None:
    """The module of a model has its outputs, exported or not, for any number of images."""
    module = to_module(model)
    wanted = model.evaluator(None)(images).numpy()
    assert_outputs(module(images), wanted)
    program = exported(module, images)
    if isinstance(model, FittedModel):
        assert not [n.name for n in program.graph.nodes if "backward" in str(n.target)]
    for n in (1, len(images)):
        assert_outputs(program(images[:n]), wanted[:n])


@pytest.mark.parametrize(
    ("layers", "options"),
    [(1, {"n_directions": 0}), ("all", {"size": None}), (1, {"size": 100}), ("all", {"views": ("identity", "flip")})],
    ids=str,
)
def test_outputs_are_those_of_the_model(layers, options):
    """Also under modes of torch."""
    model = grouped(prepared(tiny_net(), layers=layers, slope=0.01), **options)
    module, images = to_module(model), IMAGES.clone()
    found = module(images)
    assert not found.requires_grad
    assert_outputs(found, model.evaluator(None)(IMAGES).numpy())
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu")):
        with mode:
            assert torch.equal(module(images + 0), found)
    assert torch.equal(images, IMAGES)


@pytest.mark.filterwarnings("ignore:.*get_attr:UserWarning")  # torch 2.6, of its own graph
@pytest.mark.parametrize("kind", ["groups", "paper", "paper, head alone"])
def test_any_number_of_images_is_exported(kind):
    if kind.startswith("paper"):
        assert_module(paper(prepared(tiny_net(), slope=0.1, read=False), moved=kind == "paper"), IMAGES[:5])
    else:
        network = prepared(tiny_net(), layers=1, slope=0.01)
        assert_module(grouped(network, n_directions=1, views=("identity", "flip")), IMAGES[:5])


def test_vectors():
    vectors = torch.from_numpy(np.random.default_rng(0).normal(size=(30, 4)))
    assert_module(grouped(prepared("auto", (4,)), n_directions=1), vectors)


@pytest.mark.filterwarnings("ignore:.*cannot be traced")
def test_untraced_network():
    network, plain = (prepared(built(Branching).eval(), read=read) for read in (True, False))
    assert not network.split.traced
    for model in (grouped(network), grouped(network, 0), paper(plain)):
        assert_outputs(to_module(model)(IMAGES), model.evaluator(None)(IMAGES).numpy())


@pytest.mark.parametrize("make", [grouped, paper])
def test_module_is_independent_and_moves(make):
    model = make(prepared(tiny_net(), dtype=F32, read=make is grouped))
    images = IMAGES.float()
    wanted, module = model.evaluator(None)(images).numpy(), to_module(model)
    other = copy.deepcopy(module)
    assert_outputs(other(images), wanted, F32)
    assert_outputs(other.double()(IMAGES), wanted, F32)
    other = to_module(model)
    with torch.no_grad():
        for value in [*other.parameters(), *other.buffers()]:
            value.zero_()
    assert not other(images).any()
    other.load_state_dict(module.state_dict())  # all that it knows is there
    assert_outputs(other(images), wanted, F32)
    np.testing.assert_array_equal(model.evaluator(None)(images).numpy(), wanted)


@pytest.mark.filterwarnings("ignore:.*get_attr:UserWarning", "ignore:Nothing is read of")
def test_gradients_of_many_operations_are_exported():
    images = torch.rand(3, 3, 24, 24, dtype=F64, generator=torch.Generator().manual_seed(0))
    model = grouped(prepared(built(zoo), (3, 24, 24)), n_directions=1)
    assert {"maps.0", "maps.4", "maps.8"} <= set(model.reader.tangent_layers)
    assert_module(model, images)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 6, 5, 3, 2, dilation=2, groups=2),
        nn.Conv2d(8, 8, (3, 2), (2, 1), (1, 0), groups=8, padding_mode="reflect"),
        nn.ConvTranspose2d(8, 6, 3, 2, 1, output_padding=1),
        nn.MaxPool2d(3, 2, 1),
        nn.AvgPool2d((3, 2), (2, 1), (1, 0)),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True),
        nn.AvgPool2d(3, 2, ceil_mode=True, count_include_pad=False),
        nn.AvgPool2d(2, 1, 1, count_include_pad=False),
        nn.AvgPool2d(3, divisor_override=5),
        nn.AdaptiveAvgPool2d((2, 5)),
        nn.Hardsigmoid(),  # torch's kernel has 1 / 6 in float32
        nn.Softmax(-1),
        nn.ReLU(),
        nn.ReLU6(),
    ],
    ids=str,
)
def test_backward_operations(layer):
    layer = layer.double().requires_grad_(False)
    x = torch.randn(2, 8, 12, 12, dtype=F64, generator=torch.Generator().manual_seed(0))

    def gradient(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = layer(x)
            return torch.autograd.grad(y, x, torch.arange(y.numel(), dtype=F64).sin().view(y.shape))[0]

    program = make_fx(gradient, _backward_operations())(x)
    assert not [n.name for n in program.graph.nodes if "backward" in str(n.target)]
    tolerance = 1e-7 if isinstance(layer, nn.Hardsigmoid) else 1e-12
    torch.testing.assert_close(program(x), gradient(x), rtol=0, atol=tolerance)


@pytest.mark.filterwarnings("ignore:.*get_attr:UserWarning")  # torch 2.6, of its own graph
def test_model_of_the_paper_with_layer_norm_is_exported_for_one_number_of_images():
    needs_export_of_forward_mode()

    def forward(m, x):
        return m.fc(m.norm(m.conv(x).flatten(2).transpose(1, 2)).mean(1))

    net = built(lambda: Other(forward, conv=nn.Conv2d(3, 8, 4, 4), norm=nn.LayerNorm(8), fc=nn.Linear(8, 4)))
    model = paper(prepared(net, read=False))
    program = torch.export.export(to_module(model), (IMAGES,), strict=False)
    assert_outputs(program.module()(IMAGES), model.evaluator(None)(IMAGES).numpy())


def test_other_objects_are_refused():
    with pytest.raises(TypeError, match="no module for a dict"):
        to_module({})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of packages that nothing else here imports
@pytest.mark.parametrize("which", ["zoo", "paper"])
def test_onnx(which, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    net, side = (built(zoo), 24) if which == "zoo" else (tiny_net(), 12)
    network = prepared(net, (3, side, side), dtype=F32, read=which != "paper")
    model = paper(network) if which == "paper" else grouped(network, n_directions=1)
    images = torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(0))
    batch, file = torch.export.Dim("batch", min=1), tmp_path / "model.onnx"
    shapes = ({0: batch},)
    torch.onnx.export(to_module(model), (images[:2],), file, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = runtime.InferenceSession(file)
    for n in (1, 4):
        (found,) = session.run(None, {session.get_inputs()[0].name: images[:n].numpy()})
        assert_outputs(found, model.evaluator(None)(images[:n]).numpy(), F32)
