"""A backbone prepared for images of one size: preprocessing, trunk and tail.

Hides devices, dtypes, memory formats, and the state that is pickled, which is the network without its head. Unpickling
builds the trunk and the tail from it again.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..backbones.loading import Backbone, VectorNetwork
from ..backbones.preprocessing import Preprocessing
from ..images.cache import SharedActivations
from ..images.digests import module_digest
from ..images.synthetic import reference_images
from ..runtime.arithmetic import choose_device, full_precision, in_ordinary_arithmetic
from ..runtime.memory import BATCH_BYTES, LAYER_BYTES, with_smaller_batches
from .cut import NoTrunk
from .head import as_vectors
from .linearize import walker
from .rewrite import evaluate
from .stages import tangent_prefixes
from .tracing import Split, split_network

__all__ = ["PREPARED_OTHERWISE", "PreparedNetwork"]

_PARAMETERS_READ = 8  # how often, at most, parameters are read for the bytes of activations that a batch makes
_BUILT = {"split", "layout", "_row_bytes", "_digests"}  # what `_build` makes
PREPARED_OTHERWISE = (
    "The network was prepared otherwise where the model was fitted: use the versions of torch and of the backbone's "
    "code with which it was."
)


def _refuse_mixing(module: nn.Module, example: Tensor) -> None:
    """Raise if the features of an image depend on the other images of its batch, or on random numbers."""
    alone, beside = evaluate(module, example), evaluate(module, torch.cat([example, 1 - example[:1]]))[: len(example)]

    def differs(found: Tensor) -> bool:
        return not torch.allclose(alone, found, rtol=1e-2, atol=1e-2 * float(alone.abs().max()), equal_nan=True)

    if differs(beside):
        if differs(evaluate(module, example)):
            raise ValueError(
                "The backbone's features of an image are others each time it is evaluated, also in evaluation mode: it "
                "draws random numbers, as masked autoencoders do to hide patches. Pass a module that draws none (of "
                "masked autoencoders timm has models that see all patches, such as 'timm:vit_base_patch16_224.mae')."
            )
        raise ValueError(
            "The backbone's features of an image change with the other images of a batch, as by a BatchNorm without "
            "running statistics (track_running_stats=False): each image must be evaluated by itself."
        )


def _put_channels_last(module: nn.Module) -> None:
    """Store tensors with four axes with the channels last, in place; torch has no such format for more axes."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


class _RowBytes(NamedTuple):
    """Bytes of the activations of one row: those that the tail keeps, the largest of the trunk, all of the trunk."""

    kept: int
    largest: int
    trunk: int


class _TensorSizes(TorchDispatchMode):
    """The sizes in bytes of the tensors that operations return, and their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [v.numel() * v.element_size() for v in pytree.tree_leaves(out) if isinstance(v, Tensor)]
        self.sizes |= set(sizes)
        self.total += sum(sizes)
        return out


class PreparedNetwork:
    """Trunk and tail of a backbone without its head, for images of one size.

    Parameters
    ----------
    backbone : Backbone
    shape : tuple of int
        (C, H, W) of an image, or (n_features,) of a vector.
    tangent_layers, negative_slope, read_stages
        As in `tracing.split_network`.
    preprocessing : Preprocessing or None
        None for vectors.
    dtype : torch.dtype
    device : torch.device
    output
        As in `head.as_vectors`.
    """

    def __init__(
        self,
        backbone: Backbone,
        shape: Sequence[int],
        tangent_layers: Any,
        negative_slope: float,
        read_stages: bool,
        preprocessing: Preprocessing | None,
        dtype: torch.dtype,
        device: torch.device,
        output: Any = None,
    ):
        source = copy.deepcopy(backbone.module).eval().requires_grad_(False)
        dtypes = [p.dtype for p in source.parameters()]  # empty if the module has no layers, and so no head
        example = self._example(shape, dtypes[0] if dtypes else torch.float32)
        source = as_vectors(source, example, output)
        _refuse_mixing(source, example)
        self.source, self.shape, self.output = source, tuple(shape), output
        self.options = {
            "tangent_layers": tangent_layers,
            "negative_slope": negative_slope,
            "read_stages": read_stages,
        }
        self.preprocessing, self.dtype, self.device = preprocessing, dtype, device
        self._build()

    @staticmethod
    def _example(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Two random inputs of the size in use, the same at each call; the global generator is not used."""
        generator = torch.Generator().manual_seed(0)
        return torch.rand(2, *shape, generator=generator, dtype=dtype)

    def check_layers(self, layers: Any) -> None:
        """Raise ValueError unless layers are a value of ``tangent_layers`` for this network."""
        dtype = next((p.dtype for p in self.source.parameters()), torch.float32)
        tangent_prefixes(self.source, self._example(self.shape, dtype), layers)

    def standardized(self, vectors: np.ndarray, weights: np.ndarray) -> PreparedNetwork:
        """The built-in network with the weighted mean and scale of vectors (n, n_features); another network itself."""
        if not isinstance(self.source, VectorNetwork):
            return self
        x = vectors.astype(np.float64)
        mean = np.average(x, axis=0, weights=weights)
        scale = np.sqrt(np.average((x - mean) ** 2, axis=0, weights=weights))
        scale[scale <= 10 * np.finfo(np.float64).eps * np.maximum(np.abs(mean), 1)] = 1.0  # a constant feature
        twin = copy.copy(self)
        twin.source = copy.deepcopy(self.source)
        twin.source.mean.copy_(torch.from_numpy(mean))
        twin.source.scale.copy_(torch.from_numpy(scale))
        twin._build()
        return twin

    def _build(self) -> None:
        """Prepare trunk and tail from the network without head."""
        example = self._example(self.shape, self.dtype)
        self.split: Split = split_network(self.source, example, **self.options)
        for part in (self.split.trunk, self.split.tail):
            part.to(self.device)
        self.layout = self._choose_layout(example)
        if self.layout is torch.channels_last:
            for part in (self.split.trunk, self.split.tail):
                _put_channels_last(part)
        self._row_bytes: _RowBytes | None = None
        self._digests: dict[str, str] = {}

    def _choose_layout(self, example: Tensor) -> torch.memory_format:
        """Channels last for images, which convolutions prefer, unless the code of an untraced network cannot."""
        if len(self.shape) != 3:
            return torch.contiguous_format
        if not self.split.traced:
            try:
                with torch.no_grad():
                    x = example[:1].to(self.device).contiguous(memory_format=torch.channels_last)
                    self.split.tail(*self.split.trunk(x))
            except RuntimeError:  # of a view that torch does not have in this layout
                return torch.contiguous_format
        return torch.channels_last

    def activations(self, images: Tensor) -> tuple[Tensor, ...]:
        """Trunk activations of images (B, C, H, W) in [0, 1], or vectors (B, n_features)."""
        if self.device.type == "cpu" and not isinstance(self.split.trunk, NoTrunk):
            parts = [self._activations(part) for part in images.split(self.rows_of_trunk())]
            return parts[0] if len(parts) == 1 else tuple(torch.cat(z) for z in zip(*parts, strict=True))
        if self.device.type == "cuda":  # copied while the device works on what it was given before
            images = images.pin_memory()
        return self._activations(images)

    def _activations(self, images: Tensor) -> tuple[Tensor, ...]:
        x = images.to(self.device, non_blocking=True).to(self.dtype)
        if self.preprocessing is not None:
            x = self.preprocessing.normalize(x).contiguous(memory_format=self.layout)
        with torch.no_grad(), full_precision():
            return tuple(self.split.trunk(x))

    def example_activations(self) -> tuple[Tensor, ...]:
        """Trunk activations of one random input, which is not an image of any data set."""
        with torch.no_grad(), full_precision():
            return tuple(self.split.trunk(self._on_device(1)))

    def _on_device(self, count: int) -> Tensor:
        """One or two random inputs as the trunk takes them."""
        example = self._example(self.shape, self.dtype)[:count].to(self.device)
        return example.contiguous(memory_format=self.layout) if len(self.shape) == 3 else example

    def reference_inputs(self, count: int) -> Tensor:
        """Inputs (count, ...) that are in no data set: those of `synthetic.reference_images`, or random vectors."""
        if len(self.shape) == 3:
            return reference_images(count, *self.shape)
        x = torch.randn(count, *self.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        if isinstance(self.source, VectorNetwork):
            x = self.source.mean.cpu() + self.source.scale.cpu() * x
        return x

    def rows_at_once(self, most: int, budget: int = BATCH_BYTES) -> int:
        """Rows of a batch: at most ``most``, and on a CPU so few that the activations of the tail fit into a budget.

        A batch has at least one row. On a CPU the limit is set in advance, because a machine swaps or ends the process
        before it reports a lack of memory.
        """
        if self.device.type != "cpu":
            return most
        return max(1, min(most, budget // self._bytes_of_a_row.kept))

    def rows_of_trunk(self, layer_budget: int = LAYER_BYTES) -> int:
        """Rows of a batch that a CPU evaluates at once in the trunk, which it does faster for fewer.

        Parameters
        ----------
        layer_budget : int
            Bytes of the largest activation for one thread. For two threads it is doubled, and it grows again beyond
            eight. More rows are taken of networks with many parameters, which are read each time.
        """
        row, threads = self._bytes_of_a_row, torch.get_num_threads()
        layer_budget *= max(min(threads, 2), threads // 4)
        tensors = (*self.split.trunk.parameters(), *self.split.trunk.buffers())
        parameters = sum(v.numel() * v.element_size() for v in tensors)
        return max(1, layer_budget // row.largest, _PARAMETERS_READ * parameters // row.trunk)

    @property
    def _bytes_of_a_row(self) -> _RowBytes:
        if self._row_bytes is None:
            self._row_bytes = with_smaller_batches(lambda _: self._measured_row(), 1)
        return self._row_bytes

    def _measured_row(self) -> _RowBytes:
        tail, _ = walker(self.split)
        seen = []
        with torch.no_grad():
            for count in (1, 2):
                with _TensorSizes() as found:
                    rows = self.split.trunk(self._on_device(count))
                seen.append(found)
                if count == 1:
                    _, values = tail.primal(rows)
        tensors = (v for v in pytree.tree_leaves(list(values.values())) if isinstance(v, Tensor))
        kept = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
        one, two = seen
        grown = two.sizes - one.sizes  # not made of parameters alone
        largest = max((size for size in one.sizes if 2 * size in grown), default=1)
        return _RowBytes(max(1, kept), max(1, largest), max(1, two.total - one.total))

    def evaluator(self, memory: Any, precision: str = "full") -> Callable[[Tensor], tuple[Tensor, ...]]:
        """The function `activations`, with its results kept in a joblib.Memory; None: they are not kept."""
        if memory is None or isinstance(self.split.trunk, NoTrunk):
            return self.activations
        shared = SharedActivations(memory, (self._digest("trunk"), *self._numerics, precision))
        return lambda images: tuple(z.to(self.device) for z in shared(images, self.activations))

    def features_evaluator(
        self, memory: Any, features: Callable[[Tensor], Tensor], options: object
    ) -> Callable[[Tensor], Tensor]:
        """A function of images (B, ...) and of this network, with its results (B, D) kept in a joblib.Memory.

        ``options`` are what else it depends on; their ``repr`` counts. The code of a network that does not trace is not
        known well enough to find its features again, and None keeps nothing.
        """
        if memory is None or not self.split.traced:
            return features
        shared = SharedActivations(memory, (self._digest("trunk"), self._digest("tail"), *self._numerics, options))
        return lambda images: shared(images, lambda x: (features(x),))[0].to(self.device)

    @property
    def _numerics(self) -> tuple[object, ...]:
        return self.preprocessing, self.dtype, self.device.type

    def _digest(self, part: str) -> str:
        """Of the trunk or the tail, by which what it computes is found again."""
        if part not in self._digests:
            self._digests[part] = module_digest(getattr(self.split, part))
        return self._digests[part]

    def __getstate__(self) -> dict[str, Any]:
        state = {k: v for k, v in self.__dict__.items() if k not in _BUILT}
        state["device"] = str(self.device)
        return state

    @in_ordinary_arithmetic
    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        try:
            self.device = choose_device(state["device"])
        except ValueError:
            warnings.warn(
                f"The model was fitted on {state['device']!r}, which is not present: it is loaded on the CPU.",
                UserWarning,
                stacklevel=2,
            )
            self.device = torch.device("cpu")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # shown at fit
            self._build()
