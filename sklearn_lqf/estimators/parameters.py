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

from ..backbones.loading import Backbone
from ..engine.problem import PRIORS
from ..runtime.processes import Group

__all__ = ["Parameters", "check_number", "with_shared_parameters"]

_VIEWS = ("identity", "flip")
_TANGENTS = ("local", "network", "both")
# Parameters in which processes that share a fit may differ; the backbone is compared by its weights.
_OF_A_PROCESS = {"backbone", "weights", "download", "batch_size", "memory", "device", "verbose"}

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
tangents : {"local", "network", "both", None}, default="local"
    What is read of the network beside its last features. ``"local"``: of the layers of all stages the gradient of the
    mean of their own output by their weight, which is made of the mean of their input and costs no backward pass, and
    the deviation of their input over the positions. ``"network"``: gradients of the last features along
    ``n_directions`` directions by the weights of ``tangent_layers``. None: nothing.
tangent_layers : {"head", "all"}, int or list of str, default=1
    For ``tangents="network"`` and ``model="paper"``, what is linearized: nothing before the head, everything, this many
    last stages (runs of blocks at one spatial resolution; a stage is one block for transformers; more than there are:
    all), or modules by name.
n_directions : int, default=8
    For ``tangents="network"``, directions in the space of the last features. Each costs one backward pass through the
    linearized layers for each image, in `fit` and in predictions.
sketch_size : int or None, default=16
    For ``tangents="network"``: the gradient of a layer's weight is projected to a matrix of this many rows and columns.
    None: exact gradients, for small networks.
"""
_MODEL_PARAMETER = """
model : {"groups", "paper"}, default="groups"
    ``"groups"``: features in groups with a learned prior, see Notes. ``"paper"``: one change of all linearized weights,
    shared by all classes, at a random head, as Achille et al. have it; see the page on the method.
"""
_FIT_PARAMETERS = """
negative_slope : float, default=0.0
    Slope of the leak put into ReLU, ReLU6, Hardtanh, Hardswish and Hardsigmoid, in [0, 1). The paper uses
    weights pre-trained with Leaky-ReLU; to weights trained without, a leak of 0.1 does more harm than good,
    so the default leaves the activations as they are.
solver : {"auto", "closed", "pcg", "sgd"}, default="auto"
    ``"closed"``: one Cholesky factorization, of rows or of columns, whichever are fewer. ``"pcg"``: conjugate gradients
    with a K-FAC preconditioner, for the same solution. ``"auto"``: closed where the matrix takes no more than a quarter
    of the machine's memory. ``"sgd"``: the paper's optimizer, with ``model="paper"`` only, for which ``"auto"`` is
    ``"pcg"``.
max_iter : int, default=200
    Iterations of ``"pcg"``, epochs of ``"sgd"``.
tol : float, default=1e-3
    An iterative solver stops when the norm of the gradient relative to its value at zero is below.
views : str or sequence of str, default="identity"
    Views of an image over which its features are averaged, in `fit` and in predictions: ``"identity"``, or
    ``("identity", "flip")`` with the mirror image, which costs twice the time.
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
    than 256 MiB, and half as many as often as memory requires. The solution does not depend on it but for rounding.
memory : str, path, joblib.Memory or None, default=None
    Folder in which the trunk activations of each image are shared between fits, and with predictions: a grid
    search evaluates the trunk once for each image. They are found by the content of image and trunk. As with
    any joblib.Memory nothing is ever removed from it, and it must be trusted, since it is unpickled.
store_data : bool, default=False
    Whether the estimator keeps the features of the training images (vectors: the rows, too), their targets and weights,
    for `partial_fit`, `forget`, predictions with uncertainty, and `leave_one_out` and `influence` without the images.
    They are part of what is pickled, until it is fitted again.
device : str or torch.device, default="auto"
    ``"auto"``: CUDA where present, else the CPU.
distributed : bool, default=False
    Whether the processes of torch.distributed's default process group, started by torchrun and initialized
    by the caller, share the fit. Each calls `fit` with the same X and y, reads only the images of its share
    of the rows, and ends with the same model. The features, (n, D), are gathered by every process.
    ``random_state`` must be an int; ``model="paper"`` and ``store_data`` are not supported.
dtype : {"auto", "float32", "float64"}, default="auto"
    Precision of the network. ``"auto"``: float64 for vectors, float32 for images.
random_state : int, RandomState instance or None, default=0
    Seeds the built-in network for vectors, random weights, directions and sketches, and for the paper's model the head
    and the order of batches of ``"sgd"``. Nothing else is random: by default the same data give the same model. None
    draws anew at each fit.
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
prior_ : dict of str to float
    Share of each group of features in the prior variance of an output, in the order of their depth.
groups_ : dict of str to (int, int)
    First column of each group of features, and the one behind its last, as `features` and ``coef_`` have them.
alpha_ : float
    Variance of noise over the prior variance of an output: ``alpha``, or what ``"auto"`` chose.
coef_ : ndarray of shape (n_outputs, n_features)
    Weights on the standardized features, see `features`. With ``model="paper"``: change of the weights,
    (n_parameters,): linearized parameters of the network, then head weight, then head bias.
intercept_ : ndarray of shape (n_outputs,)
    Outputs where all standardized features are zero; with ``model="paper"`` zeros.
noise_variance_ : float
    Variance of the noise of the targets that has the largest likelihood, in units of their scale.
solver_ : str
    How the solution was found, and all answers will be: ``"rows"`` or ``"columns"``, in closed form from a square
    matrix of the rows or the columns of the features; ``"estimate"``, by conjugate gradients, where held-out outputs,
    variances and influences are estimates; ``"pcg"`` or ``"sgd"`` with ``model="paper"``.
tangent_layers_ : list of str
    Names of the layers with tangents along directions; with ``model="paper"`` of the modules that are linearized.
n_iter_ : int
    Iterations of the solver; 1 of a closed form, which is one step of Newton's method.
residual_norms_ : ndarray of shape (n_iter_ + 1,)
    Relative norm of the gradient before the first and after each iteration; empty for a closed form.
converged_ : bool
    Whether ``tol`` was reached; True for a closed form.
device_ : str
    Device of the fit.
"""


def with_shared_parameters(cls: Class) -> Class:
    """Fill in what the docstring of an estimator shares with the others."""
    text = inspect.cleandoc(cls.__doc__ or "")
    for name, shared in (
        ("network parameters", _NETWORK_PARAMETERS), ("model parameter", _MODEL_PARAMETER),
        ("fit parameters", _FIT_PARAMETERS), ("attributes", _ATTRIBUTES),
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
        tangents: str | None = "local",
        tangent_layers: Any = 1,
        n_directions: int = 8,
        sketch_size: int | None = 16,
        model: str = "groups",
        prior: Any = "leave-one-out",
        alpha: float | str = "auto",
        negative_slope: float = 0.0,
        solver: str = "auto",
        max_iter: int = 200,
        tol: float = 1e-3,
        views: str | Sequence[str] = "identity",
        image_shape: Sequence[int] | None = None,
        image_size: Any = None,
        channel_axis: int = -1,
        preprocessing: Mapping[str, Any] | None = None,
        batch_size: int = 64,
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
        self.tangents = tangents
        self.tangent_layers = tangent_layers
        self.n_directions = n_directions
        self.sketch_size = sketch_size
        self.model = model
        self.prior = prior
        self.alpha = alpha
        self.negative_slope = negative_slope
        self.solver = solver
        self.max_iter = max_iter
        self.tol = tol
        self.views = views
        self.image_shape = image_shape
        self.image_size = image_size
        self.channel_axis = channel_axis
        self.preprocessing = preprocessing
        self.batch_size = batch_size
        self.memory = memory
        self.store_data = store_data
        self.device = device
        self.distributed = distributed
        self.dtype = dtype
        self.random_state = random_state
        self.verbose = verbose

    def _check_parameters(self, n_processes: int) -> None:
        check_number("negative_slope", self.negative_slope, 0, strict=False)
        if self.negative_slope >= 1:
            raise ValueError(f"negative_slope must be below 1, got {self.negative_slope!r}.")
        check_number("tol", self.tol, 0, strict=False)
        self._check_alpha()
        for name, least in (
            ("max_iter", 1),
            ("batch_size", 1),
            ("n_directions", 0),
            ("sketch_size", 1),
            ("verbose", 0),
        ):
            value = getattr(self, name)
            if name == "sketch_size" and value is None:
                continue
            if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an int >= {least}, got {value!r}.")
        if not (self.tangents is None or (isinstance(self.tangents, str) and self.tangents in _TANGENTS)):
            raise ValueError(f"tangents must be one of {list(_TANGENTS)} or None, got {self.tangents!r}.")
        for name, allowed in (
            ("model", ("groups", "paper")), ("solver", ("auto", "closed", "pcg", "sgd")),
            ("dtype", ("auto", "float32", "float64")),
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, str) or value not in allowed:
                raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}.")
        self._check_prior()
        self._memory()
        for name in ("download", "distributed", "store_data"):
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        self._check_combinations(n_processes)
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

    def _check_alpha(self) -> None:
        check_number("alpha", self.alpha, 0, strict=True, special=["auto"])

    def _check_prior(self) -> None:
        """Names are checked here, numbers when the groups are known."""
        if isinstance(self.prior, str):
            if self.prior not in PRIORS:
                raise ValueError(
                    f"prior must be one of {list(PRIORS)}, a dict of numbers by group, or a number for each group; got "
                    f"{self.prior!r}."
                )
            return
        values = list(self.prior.values()) if isinstance(self.prior, Mapping) else self.prior
        if not isinstance(values, Sequence | np.ndarray) or not len(values):
            raise ValueError(f"prior must be one of {list(PRIORS)} or hold numbers; got {self.prior!r}.")
        for value in values:
            check_number("Each number of prior", value, 0, strict=False)

    def _check_combinations(self, n_processes: int) -> None:
        """Parameters that exclude each other."""
        if self.model == "groups" and self.solver == "sgd":
            raise ValueError("solver='sgd' is the paper's: set model='paper', or use 'auto', 'closed' or 'pcg'.")
        if self.model == "paper":
            if self.solver == "closed":
                raise ValueError("model='paper' has no closed form: use solver='auto', 'pcg' or 'sgd'.")
            for name, wrong in (
                ("distributed", n_processes > 1), ("store_data", self.store_data), ("views", self.views != "identity"),
            ):  # fmt: skip
                if wrong:
                    raise ValueError(f"model='paper' does not support {name}={getattr(self, name)!r}.")
        if n_processes > 1 and self.store_data:
            raise ValueError("store_data=True does not support distributed=True with several processes.")
        if n_processes > 1 and not isinstance(self.random_state, Integral):
            raise ValueError(
                "With distributed=True random_state must be an int, so that all processes draw the same; got "
                f"{self.random_state!r}."
            )

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
