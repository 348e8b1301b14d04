"""The parameters that all estimators share: their documentation, their defaults, their checks."""

from __future__ import annotations

import copy
import inspect
import itertools
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypeVar

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_memory
from torch import nn

from .backbones import Backbone
from .cache import CACHES
from .distributed import Group
from .problem import HEADS, Recipe

__all__ = ["Parameters", "check_number", "with_shared_parameters"]

_VIEWS = ("identity", "flip")
# Parameters in which processes that share a fit may differ; the backbone is compared by its weights.
_OF_A_PROCESS = {"backbone", "weights", "download", "batch_size", "cache", "memory", "device", "verbose"}

Class = TypeVar("Class", bound=type)
Estimator = TypeVar("Estimator", bound="Parameters")

_NETWORK_PARAMETERS = """
backbone : str, nn.Module or callable, default="auto"
    The pre-trained network: a classification model of torchvision by name (``"resnet18"``), one of timm
    (``"timm:convnext_tiny"``), ``"efficientnet_lite0"`` (its ImageNet weights come in a package, extra
    ``offline``), a module that ends in one Linear layer, or a callable that returns one. ``"auto"`` takes
    ``"resnet18"`` for images and a small built-in network for vectors. A module is never changed.
weights : str, path or None, default="auto"
    ``"auto"``: the pre-trained weights of the named backbone, or a module as it is. None: random
    initialization. Else the name of a set of weights of torchvision, or a local file (state dict, loaded
    with ``weights_only=True``, or safetensors).
download : bool, default=True
    Whether weights that are not on this machine are downloaded. False: `fit` fails instead, without asking a server;
    ``python -m sklearn_lqf`` lists what is there.
tangent_layers : {"head", "all"}, int or list of str, default=1
    What is linearized and trained: the head only, everything, this many last stages (runs of blocks at one
    spatial resolution; a stage is one block for transformers; more than there are: all), or modules by name.
    The rest is a frozen trunk, evaluated once for each image. The head is always trained.
readout : {"stages", "last"}, default="stages"
    What the head reads: ``"stages"`` appends to the network's own features the mean and standard deviation
    over all positions of the activations behind each stage; ``"last"`` is the network's own features alone.
    Each part is centered and scaled to variance 1 on the training images. A network that cannot be traced
    has the last features only.
head : {"orthogonal", "random", "ridge"}, default="orthogonal"
    The head at which the network is linearized; it decides what the layers before it can learn.
    ``"orthogonal"``: random orthogonal rows, and ``"random"``: rows drawn from N(0, 1/D); neither sees a
    target. ``"ridge"``: the ridge regression on the features whose penalty minimizes the leave-one-out error;
    the quadratic is then fitted to its leave-one-out residuals, and corrects its predictions.
"""
_FIT_PARAMETERS = """
tail_weight : float or None, default=0.03
    Prior variance of what the linearized layers before the head add to an output, relative to the head's: the
    penalty weighs their weights accordingly. None: all weights have one prior, as in the paper.
negative_slope : float, default=0.0
    Slope of the leak put into ReLU, ReLU6, Hardtanh, Hardswish and Hardsigmoid, in [0, 1). The paper uses
    weights pre-trained with Leaky-ReLU; to weights trained without, a leak of 0.1 does more harm than good,
    so the default leaves the activations as they are.
center : bool or "auto", default="auto"
    Whether the network's own output at the pre-trained weights is removed from the model, and the mean
    target takes its place. ``"auto"``: for heads that see no target, whose output is noise, but not for a ridge
    head.
damping : float, default=0.1
    Added to the penalty in the preconditioner, against the error of its approximation; in units of the trace of the
    curvature for one output. It changes the path of the solver, not the solution.
solver : {"pcg", "sgd"}, default="pcg"
    ``"pcg"``: K-FAC preconditioned conjugate gradients over all images. ``"sgd"``: the paper's K-FAC
    preconditioned stochastic gradient descent with momentum; both go to the same optimum.
max_iter : int, default=200
    Products with the curvature for ``"pcg"``, epochs for ``"sgd"``.
tol : float, default=1e-2
    The solver stops when the norm of the gradient relative to its value at zero is below.
views : str or sequence of str, default="identity"
    Fixed views of each training image: ``"identity"``, or ``("identity", "flip")`` to add the mirror image.
image_shape : tuple of int or None, default=None
    Shape (H, W) or (H, W, C) of the images of which the rows of a two-dimensional X are raveled. None: such
    rows are vectors.
image_size : int, tuple of int, "backbone" or None, default=None
    Size to which images are resized and cropped: an int or (H, W), or the size the backbone was trained at.
    None: images are used as they are, and must be of one size.
channel_axis : int, default=-1
    Axis of the channels within one image, -1 or 0.
preprocessing : dict or None, default=None
    Overrides of the backbone's ``mean``, ``std`` (for pixels in [0, 1]) and ``interpolation``.
batch_size : int, default=64
    Images evaluated at once, at most: on a CPU fewer where the activations of the linearized layers would take more
    than 256 MiB, on a GPU half as many as often as memory requires. The solution does not depend on it but for
    rounding.
cache : {"auto", "memory", "disk", "none"}, default="auto"
    Where the activations of the frozen trunk are kept during a fit: in memory, in a temporary file that is gone
    after it, or nowhere, which evaluates the trunk anew at each pass. ``"auto"``: in memory up to a quarter of
    the machine's (half of what is free of a device), else in a file up to half of the free space, else nowhere.
memory : str, path, joblib.Memory or None, default=None
    Folder in which the trunk activations of each image are shared between fits, and with predictions: a grid
    search evaluates the trunk once for each image. They are found by the content of image and trunk. As with
    any joblib.Memory nothing is ever removed from it, and it must be trusted, since it is unpickled.
store_data : bool, default=False
    Whether the estimator keeps the trunk activations of the training images (vectors: the rows themselves), their
    targets and weights, for `partial_fit`, `forget` and predictions with uncertainty. They are part of what is
    pickled, until it is fitted again.
device : str or torch.device, default="auto"
    ``"auto"``: CUDA where present, else the CPU.
distributed : bool, default=False
    Whether the processes of torch.distributed's default process group, started by torchrun and initialized
    by the caller, share the fit. Each calls `fit` with the same X and y, reads only the images of its share
    of the rows, and ends with the same model. What the head reads, (n, D), is gathered by every process.
    ``random_state`` must be an int; ``solver="sgd"`` and ``store_data`` are not supported.
dtype : {"auto", "float32", "float64"}, default="auto"
    Precision of the network. ``"auto"``: float64 for vectors, float32 for images.
random_state : int, RandomState instance or None, default=0
    Seeds the built-in network for vectors, random weights, the head and the order of batches of ``"sgd"``.
    Nothing else is random: by default the same data give the same model. None draws anew at each fit.
verbose : int, default=0
    Above 0: progress bars (needs tqdm, extra ``progress``).
"""
_ATTRIBUTES = """
n_features_in_ : int
    Columns of vectors or raveled rows; values of one image otherwise.
feature_names_in_ : ndarray of shape (n_features_in_,)
    Names of the columns of a DataFrame; defined only when they are all strings.
image_shape_ : tuple of int or None
    (H, W, C) of one image as given; None for vectors.
coef_ : ndarray of shape (n_parameters_,)
    Change d of the weights: linearized parameters of the network, then head weight (C, D), then head bias.
alpha_ : float
    Absolute L2 penalty lambda.
relative_alpha_ : float
    The same in the units of a numeric ``alpha``: what ``"auto"`` chose, around which to search.
tail_scale_ : float
    Prior scale of the weights before the head, relative to the head's: the square root of their variance.
n_iter_ : int
    Iterations of the solver.
residual_norms_ : ndarray of shape (n_iter_ + 1,)
    Relative norm of the gradient before the first and after each iteration.
distance_bound_ : float
    Certificate: upper bound on the distance of the solution from the optimum, in the norm of the penalty.
converged_ : bool
    Whether ``tol`` was reached.
n_parameters_ : int
    Number of linearized parameters P.
device_ : str
    Device of the fit.
"""


def with_shared_parameters(cls: Class) -> Class:
    """Fill in what the docstring of an estimator shares with the others."""
    text = inspect.cleandoc(cls.__doc__ or "")
    for name, shared in (
        ("network parameters", _NETWORK_PARAMETERS), ("fit parameters", _FIT_PARAMETERS), ("attributes", _ATTRIBUTES),
    ):  # fmt: skip
        text = text.replace(f"<{name}>", shared.strip())
    cls.__doc__ = f"{text}\n"
    return cls


class Parameters(BaseEstimator):
    """An estimator with the shared parameters, and no method that fits."""

    def __init__(
        self,
        backbone: Any = "auto",
        *,
        weights: Any = "auto",
        download: bool = True,
        tangent_layers: Any = 1,
        readout: str = "stages",
        head: str = "orthogonal",
        tail_weight: float | None = 0.03,
        negative_slope: float = 0.0,
        center: bool | str = "auto",
        damping: float = 0.1,
        solver: str = "pcg",
        max_iter: int = 200,
        tol: float = 1e-2,
        views: str | Sequence[str] = "identity",
        image_shape: Sequence[int] | None = None,
        image_size: Any = None,
        channel_axis: int = -1,
        preprocessing: Mapping[str, Any] | None = None,
        batch_size: int = 64,
        cache: str = "auto",
        memory: Any = None,
        store_data: bool = False,
        device: Any = "auto",
        distributed: bool = False,
        dtype: str = "auto",
        random_state: Any = 0,
        verbose: int = 0,
    ):
        self.backbone = backbone
        self.weights = weights
        self.download = download
        self.tangent_layers = tangent_layers
        self.readout = readout
        self.head = head
        self.tail_weight = tail_weight
        self.negative_slope = negative_slope
        self.center = center
        self.damping = damping
        self.solver = solver
        self.max_iter = max_iter
        self.tol = tol
        self.views = views
        self.image_shape = image_shape
        self.image_size = image_size
        self.channel_axis = channel_axis
        self.preprocessing = preprocessing
        self.batch_size = batch_size
        self.cache = cache
        self.memory = memory
        self.store_data = store_data
        self.device = device
        self.distributed = distributed
        self.dtype = dtype
        self.random_state = random_state
        self.verbose = verbose

    def _check_parameters(self, n_processes: int) -> None:
        check_number("negative_slope", self.negative_slope, 0, strict=False)
        for name, special in (("tail_weight", [None]), ("damping", []), ("tol", [])):
            check_number(name, getattr(self, name), 0, strict=name == "tail_weight", special=special)
        if self.negative_slope >= 1:
            raise ValueError(f"negative_slope must be below 1, got {self.negative_slope!r}.")
        for name in ("max_iter", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an int >= 1, got {value!r}.")
        for name, allowed in (
            ("solver", ("pcg", "sgd")), ("head", HEADS), ("readout", ("stages", "last")), ("cache", CACHES),
            ("dtype", ("auto", "float32", "float64")),
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, str) or value not in allowed:
                raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}.")
        self._memory()
        if not (isinstance(self.center, bool | np.bool_) or (isinstance(self.center, str) and self.center == "auto")):
            raise ValueError(f"center must be True, False or 'auto', got {self.center!r}.")
        for name in ("download", "distributed", "store_data"):
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        if n_processes > 1 and self.solver == "sgd":
            raise ValueError("solver='sgd' does not support distributed=True with several processes: use 'pcg'.")
        if n_processes > 1 and self.store_data:
            raise ValueError("store_data=True does not support distributed=True with several processes.")
        if n_processes > 1 and not isinstance(self.random_state, Integral):
            raise ValueError(
                "With distributed=True random_state must be an int, so that all processes draw the same; got "
                f"{self.random_state!r}."
            )
        if not isinstance(self.verbose, Integral) or self.verbose < 0:
            raise ValueError(f"verbose must be an int >= 0, got {self.verbose!r}.")
        try:
            check_random_state(self.random_state)
        except ValueError as error:
            raise ValueError(
                f"random_state must be an int from 0 to 2**32 - 1, a RandomState or None, got {self.random_state!r}."
            ) from error
        views = self._view_names() if isinstance(self.views, Iterable) else []
        known = all(isinstance(v, str) and v in _VIEWS for v in views)
        if not views or not known or len(set(views)) != len(views):
            raise ValueError(f"views must name each of {list(_VIEWS)} at most once, got {self.views!r}.")

    def _check_agreement(self, group: Group, rows: Any, y: np.ndarray, sample_weight: Any, backbone: Backbone) -> None:
        """Raise on all processes that share a fit unless they have the same data, parameters and weights."""
        parameters = {k: v for k, v in self.get_params(deep=False).items() if k not in _OF_A_PROCESS}
        module = backbone.module
        group.check_same(
            {
                "the constructor's parameters": repr(parameters),
                "the numbers of images": repr(len(rows)),
                "the targets y": repr(y.tolist()),
                "the sample weights": repr(None if sample_weight is None else np.asarray(sample_weight).tolist()),
                "the backbone's weights": itertools.chain(module.parameters(), module.buffers()),
            }
        )

    def _recipe(self) -> Recipe:
        return Recipe(self.head, self._centered(), self.tail_weight, float(self.damping), self._seed)

    def _centered(self) -> bool:
        return self.head != "ridge" if isinstance(self.center, str) else bool(self.center)

    def _view_names(self) -> list[str]:
        return [self.views] if isinstance(self.views, str) else list(self.views)

    def _draw_seed(self) -> int:
        """A seed for a generator of torch's own, by ``random_state``."""
        return int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))

    def _memory(self) -> Any:
        """The joblib.Memory, or None."""
        if self.memory is None:
            return None
        return check_memory(os.fspath(self.memory) if isinstance(self.memory, os.PathLike) else self.memory)

    def __sklearn_clone__(self: Estimator) -> Estimator:
        """A clone shares a module given as backbone, which is never changed, instead of copying it."""
        if not isinstance(self.backbone, nn.Module):
            return super().__sklearn_clone__()
        bare = copy.copy(self)  # other threads may be using this one
        bare.backbone = "auto"
        twin = super(Parameters, bare).__sklearn_clone__()
        twin.backbone = self.backbone
        return twin


def check_number(name: str, value: Any, low: float, strict: bool, special: Sequence[Any] = ()) -> None:
    """Raise ValueError unless a parameter is a finite number of the range, or one of some other values."""
    if any(value is s or (isinstance(value, str) and value == s) for s in special):
        return
    number = isinstance(value, Real) and not isinstance(value, bool)
    finite = number and abs(value if isinstance(value, int) else float(value)) <= sys.float_info.max
    if not finite or value < low or (strict and value == low):
        others = "".join(f"{s!r} or " for s in special)
        raise ValueError(f"{name} must be {others}a number {'>' if strict else '>='} {low}, got {value!r}.")
