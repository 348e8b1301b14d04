"""A backbone made ready for images of one size: preprocessing, trunk, tail and head.

Hides devices, dtypes, memory formats and the state that is pickled: plain CPU arrays and the network without its
head, from which the prepared graph is built again.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .backbones import Backbone
from .cache import SharedActivations, with_smaller_batches
from .cut import NoTrunk
from .graph import Split, remove_head, split_network
from .linearize import LinearizedNetwork, _full_precision
from .preprocessing import Preprocessing
from .readout import Standardization, fit_standardization
from .surgery import evaluate
from .threads import DUAL_NUMBERS

__all__ = ["PREPARED_OTHERWISE", "LinearModel", "choose_device", "ordinary_arithmetic"]

_BATCH_BYTES = 1 << 28  # of activations of the tail in one batch on a CPU, which larger ones slow down

PREPARED_OTHERWISE = (
    "The network was prepared otherwise where the model was fitted: use the versions of torch and of the backbone's "
    "code with which it was."
)


def choose_device(device: Any) -> torch.device:
    """The device named, or the fastest present for ``"auto"``; an absent one is an error that lists what is there."""
    present = ["cpu"]
    if torch.cuda.is_available():
        present += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if isinstance(device, str) and device == "auto":
        return torch.device("cuda" if "cuda" in present else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r} is not a device; present here: {present} (or 'auto').") from error
    if str(found) not in present:
        raise ValueError(f"device={str(found)!r} is not present; present here: {present} (or 'auto').")
    return found


@contextmanager
def ordinary_arithmetic(device: torch.device) -> Iterator[None]:
    """Tensors that may have gradients, in their own precision, whatever modes of torch the caller is in."""
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        yield


def _refuse_mixing(module: nn.Module, example: Tensor) -> None:
    """Raise when the features of an image depend on the others of its batch."""
    alone, beside = evaluate(module, example), evaluate(module, torch.cat([example, 1 - example]))[: len(example)]
    if not torch.allclose(alone, beside, rtol=1e-2, atol=1e-2 * float(alone.abs().max()), equal_nan=True):
        raise ValueError(
            "The backbone's features of an image change with the other images of a batch, as by a BatchNorm without "
            "running statistics (track_running_stats=False): each image must be evaluated by itself."
        )


class LinearModel:
    """f(x) = offset(x) + J(x) d for images of one size.

    Parameters
    ----------
    backbone : Backbone
    shape : tuple of int
        (C, H, W) of an image, or (n_features,) of a vector.
    tangent_layers, negative_slope, read_stages
        As in `graph.split_network`.
    preprocessing : Preprocessing or None
        None for vectors.
    dtype : torch.dtype
    device : torch.device
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
    ):
        source = copy.deepcopy(backbone.module).eval().requires_grad_(False)
        dtypes = [p.dtype for p in source.parameters()]  # none of a module without layers, which has no head
        example = self._example(shape, dtypes[0] if dtypes else torch.float32)
        remove_head(source, example)
        _refuse_mixing(source, example)
        self._source, self._shape = source, tuple(shape)
        self._options = {
            "tangent_layers": tangent_layers,
            "negative_slope": negative_slope,
            "read_stages": read_stages,
        }
        self.preprocessing, self.dtype, self.device = preprocessing, dtype, device
        self.network: LinearizedNetwork | None = None
        self.standardization: Standardization | None = None
        self._build()

    @staticmethod
    def _example(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Two inputs of the size in use, the same at each call and without the global generator."""
        generator = torch.Generator().manual_seed(0)
        return torch.rand(2, *shape, generator=generator, dtype=dtype)

    def _build(self) -> None:
        """Prepare trunk and tail from the network without head."""
        example = self._example(self._shape, self.dtype)
        self.split: Split = split_network(self._source, example, **self._options)
        for part in (self.split.trunk, self.split.tail):
            part.to(self.device)
            if len(self._shape) == 3:
                part.to(memory_format=torch.channels_last)
        self._row_bytes: int | None = None

    def standardize(self, features: Tensor, weights: Tensor) -> Tensor:
        """Fix the standardization of the features by those of the training images, which it returns standardized."""
        self.standardization = fit_standardization(features, weights, self.split.parts)
        return self.standardization(features)

    def set_head(self, weight: Tensor, bias: Tensor) -> LinearizedNetwork:
        """Linearize at a head of weight (C, D) and bias (C,) on the standardized features, as many as the network's."""
        if weight.shape[1] != self.split.n_features:
            read, given = weight.shape[1], self.split.n_features
            raise ValueError(f"The head reads {read} features, and the network gives {given}. {PREPARED_OTHERWISE}")
        weight, bias = (v.to(self.device, self.dtype).contiguous() for v in (weight, bias))
        self.network = LinearizedNetwork(self.split, weight, bias, self.standardization)
        return self.network

    def again(self) -> LinearModel:
        """The same network, not yet standardized and without a head: to be fitted while this model stays as it is."""
        twin = object.__new__(LinearModel)
        twin.__dict__.update(self.__dict__, network=None, standardization=None)
        return twin

    def in_units_of_the_solver(self, tail_scale: float) -> LinearizedNetwork:
        """The network linearized where it is, with the parameters of the tail in units of their prior scale."""
        assert self.network is not None, "no head"
        network = LinearizedNetwork(self.split, self.network.weight, self.network.bias, self.standardization)
        network.tail_scale = tail_scale
        return network

    def activations(self, images: Tensor) -> tuple[Tensor, ...]:
        """Trunk activations of images (B, C, H, W) in [0, 1], or vectors (B, n_features)."""
        x = images.to(self.device, self.dtype)
        if self.preprocessing is not None:
            x = self.preprocessing.normalize(x).contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), _full_precision():
            return tuple(self.split.trunk(x))

    def rows_at_once(self, most: int) -> int:
        """Rows of a batch: at most so many, and on a CPU, which swaps or ends before it says so, what is still fast."""
        if self.device.type != "cpu":
            return most
        if self._row_bytes is None:
            self._row_bytes = with_smaller_batches(lambda _: self._bytes_of_a_row(), 1)
        return max(1, min(most, _BATCH_BYTES // self._row_bytes))

    def _bytes_of_a_row(self) -> int:
        """Bytes of the activations that the linearized layers keep of one row."""
        head = torch.zeros(1, self.split.n_features, dtype=self.dtype)
        network = LinearizedNetwork(self.split, head, head[:, 0])
        with torch.no_grad():
            rows = self.split.trunk(self._example(self._shape, self.dtype))
        return network.at(rows, gradients=False).nbytes // len(rows[0])

    def evaluator(self, memory: Any) -> Callable[[Tensor], tuple[Tensor, ...]]:
        """`activations`, by way of a joblib.Memory that keeps them; None: of nothing."""
        trunk = self.split.trunk
        if memory is None or isinstance(trunk, NoTrunk):
            return self.activations
        shared = SharedActivations(memory, trunk, (self.preprocessing, self.dtype, self.device.type))
        return lambda images: tuple(z.to(self.device) for z in shared(images, self.activations))

    def features(self, activations: Sequence[Tensor]) -> Tensor:
        """Input of the head at the pre-trained weights, before it is standardized, (B, D)."""
        with DUAL_NUMBERS, torch.no_grad(), _full_precision():
            return self.split.tail(*activations)

    def outputs(
        self, batches: Iterable[Sequence[Tensor]], coef: np.ndarray, intercept: np.ndarray | None
    ) -> np.ndarray:
        """f_lin of batches of trunk activations, (n, C); with an intercept (C,) it stands for f_w0."""
        assert self.network is not None, "no head"
        d = torch.tensor(coef, device=self.device, dtype=self.dtype)
        found = []
        with _full_precision():
            for activations in batches:
                point = self.network.at(activations, gradients=False)
                offset = point.outputs if intercept is None else torch.tensor(intercept).to(d)
                found.append((offset + point.jvp(d)).cpu().numpy())
        return np.concatenate(found)

    def __getstate__(self) -> dict[str, Any]:
        built = ("split", "network", "standardization", "_row_bytes")
        state = {k: v for k, v in self.__dict__.items() if k not in built}
        state["device"] = str(self.device)
        if self.network is not None:
            state["head"] = (self.network.weight.cpu().numpy(), self.network.bias.cpu().numpy())
        if self.standardization is not None:
            state["standardization"] = (
                self.standardization.shift.cpu().numpy(),
                self.standardization.scale.cpu().numpy(),
            )
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        head, standardization = state.pop("head", None), state.pop("standardization", None)
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
        self.network = self.standardization = None
        if standardization is not None:
            self.standardization = Standardization(*(torch.tensor(v, device=self.device) for v in standardization))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # said at fit
            self._build()
        if head is not None:
            self.set_head(*(torch.tensor(h) for h in head))
