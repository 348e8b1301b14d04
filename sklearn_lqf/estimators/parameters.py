"""The parameters that all estimators share: their documentation, their defaults, their checks."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import HasMethods, Interval, StrOptions, validate_parameter_constraints
from sklearn.utils.validation import check_memory
from torch import nn

from ..backbones.loading import Backbone
from ..engine.problem import PRIORS
from ..runtime.processes import ProcessGroup

__all__ = ["Execution", "Parameters", "check_number", "with_shared_parameters"]

_VIEWS = ("identity", "flip")
# Parameters in which processes that share a fit may differ; the backbone is compared by its weights.
_OF_A_PROCESS = {"backbone", "weights", "execution", "verbose"}

Class = TypeVar("Class", bound=type)
Estimator = TypeVar("Estimator", bound="Parameters")

_NETWORK_PARAMETERS = """
backbone : str, nn.Module or callable, default="auto"
    The pre-trained network: a classification model of torchvision by name (``"resnet18"``), one of timm
    (``"timm:convnext_tiny"``) or of Hugging Face (``"hf:facebook/dinov2-small"``, extra ``hf``),
    ``"efficientnet_lite0"``, whose ImageNet weights are installed with this package, a module that gives one vector for
    each image, with or without a classifier, or a callable that returns one. ``"auto"`` takes ``"efficientnet_lite0"``
    for images and a small built-in network for vectors. A module is never changed.
weights : str, path or None, default="auto"
    ``"auto"``: the pre-trained weights of the named backbone, or a module as it is. None: random
    initialization. Else the name of a set of weights of torchvision, or a local file (state dict, loaded
    with ``weights_only=True``, or safetensors).
output : str, int, sequence of these or None, default=None
    Which part of what the backbone returns is the vector of an image, where it returns several tensors: a name or an
    index, or the names and indices that lead to it. It is taken as it is; tokens (n, tokens, features) are averaged.
    None: what is before the classifier, or a vector under a name in use, such as ``"pooler_output"``.
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
    An iterative solver stops when the root mean squared error of the outputs for the training images is guaranteed to
    be below this part of the deviation of their targets; with ``model="paper"``, which has no such guarantee, when the
    norm of the gradient is below this part of its value at zero.
views : str or sequence of str, default="identity"
    Views of an image over which its features are averaged, in `fit` and in predictions: ``"identity"``, or
    ``("identity", "flip")`` with the mirror image, which costs twice the time.
image_shape : tuple of int or None, default=None
    Shape (H, W) or (H, W, C) of the images of which the rows of a two-dimensional X are raveled. None: such
    rows are vectors.
image_size : int, tuple of int, "auto", "backbone" or None, default="auto"
    Size to which images are resized and cropped: an int or (H, W), or the size that the backbone was trained at
    (``"backbone"``). None: images are used as they are, and must be of one size. ``"auto"``: files and PIL images get
    the size of the backbone. Arrays are used as they are from 64 pixels up to this size; smaller ones are enlarged to
    64, larger ones get the size of the backbone. Where that is not known, as for most modules, ``"auto"`` is None.
channel_axis : int, default=-1
    Axis of the channels within one image, -1 or 0.
preprocessing : dict or None, default=None
    Overrides of the backbone's ``mean``, ``std`` (for pixels in [0, 1]) and ``interpolation``.
store_data : bool, default=False
    Whether the estimator keeps the features of the training images (vectors: the rows, too), their targets and weights,
    for `partial_fit`, `forget`, predictions with uncertainty, and `leave_one_out` and `influence` without the images.
    They are part of what is pickled, until it is fitted again.
random_state : int, RandomState instance or None, default=0
    Seeds the built-in network for vectors, random weights, directions and sketches, and for the paper's model the head
    and the order of batches of ``"sgd"``. Nothing else is random: by default the same data give the same model. None
    draws anew at each fit.
verbose : int, default=0
    Above 0: progress bars (needs tqdm, extra ``progress``).
execution : dict or None, default=None
    Where and how the model is computed, which changes its numbers by rounding at most. `set_params` and grid searches
    reach an item as ``execution__<name>``. Absent items have their defaults:

    - ``"device"``, str or torch.device, ``"auto"``: the accelerator of the machine where there is one, else
      the CPU. MPS and XPU are untested.
    - ``"dtype"``, ``"auto"``: precision of the network, ``"float32"`` or ``"float64"``; by default that for images,
      this for vectors.
    - ``"tolerance"``, float, 0: relative error of the features up to which the network is computed in bfloat16, which
      some processors and most GPUs do faster. The error is measured at `fit` on synthetic images, for each group of
      features; 0.1 is worth a try. ``precision_`` says what was taken.
    - ``"batch_size"``, int, 64: images evaluated at once, at most; fewer where that is faster, or memory requires it.
    - ``"n_jobs"``, int or None, None: threads that read and decode images while the network works, one for None, one
      for each processor for -1.
    - ``"memory"``, str, path or joblib.Memory, None: folder in which what the network computes of each image is shared
      between fits, and with predictions: a grid search evaluates the network once for each image. It holds trunk
      activations, and features along directions, found by the content of image and network. As with any joblib.Memory
      nothing is ever removed from it, and it must be trusted, since it is unpickled.
    - ``"distributed"``, bool, False: whether the processes of torch.distributed's default process group, started by
      torchrun and initialized by the caller, share the fit. Each calls `fit` with the same X and y, reads only the
      images of its share of the rows, keeps their features, and ends with the same model. ``random_state`` must be an
      int; ``model="paper"`` and ``store_data`` are not supported.
    - ``"download"``, bool, True: whether weights that are not on this machine are downloaded. False: `fit` fails
      instead, without asking a server; ``python -m sklearn_lqf`` lists what is there.
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
loo_score_ : float
    What `score` would be, as far as the training images can tell: accuracy, or R2 of a regressor, of the outputs for
    each of them by the model without it (or its group), the prior held fixed. With ``model="paper"``: of the ridge
    regression that the temperature is fitted on.
noise_variance_ : float
    Variance of the noise of the targets that has the largest restricted likelihood, in units of their scale.
solver_ : str
    How the solution was found, and all answers will be: ``"rows"`` or ``"columns"``, in closed form from a square
    matrix of the rows or the columns of the features; ``"estimate"``, by conjugate gradients, where held-out outputs,
    variances and influences are estimates; ``"pcg"`` or ``"sgd"`` with ``model="paper"``.
tangent_layers_ : list of str
    Names of the layers with tangents along directions; with ``model="paper"`` of the modules that are linearized.
n_iter_ : int
    Iterations of the solver; 1 of a closed form, which is one step of Newton's method.
residual_norms_ : ndarray of shape (n_iter_ + 1,)
    What ``tol`` bounds, before the first and after each iteration; empty for a closed form.
converged_ : bool
    Whether ``tol`` was reached; True for a closed form.
device_ : str
    Device of the fit.
precision_ : {"full", "bfloat16"}
    Of the products of the network, see ``execution``.
"""


@dataclass(frozen=True)
class Execution:
    """Where and how a model is computed; documented with the estimators.

    Attributes
    ----------
    device, dtype, tolerance, batch_size, n_jobs, memory, distributed, download
        Items of the parameter ``execution``.
    """

    device: Any = "auto"
    dtype: str = "auto"
    tolerance: float = 0.0
    batch_size: int = 64
    n_jobs: int | None = None
    memory: Any = None
    distributed: bool = False
    download: bool = True

    @property
    def folder(self) -> Any:
        """The joblib.Memory, or None."""
        if self.memory is None:
            return None
        return check_memory(os.fspath(self.memory) if isinstance(self.memory, os.PathLike) else self.memory)


_EXECUTION = {field.name: field.default for field in fields(Execution)}
_EXECUTION_CONSTRAINTS: dict[str, list[Any]] = {
    "device": [str, torch.device],
    "dtype": [StrOptions({"auto", "float32", "float64"})],
    "tolerance": [Interval(Real, 0, None, closed="left")],
    "batch_size": [Interval(Integral, 1, None, closed="left")],
    "n_jobs": [Integral, None],
    "memory": [str, os.PathLike, HasMethods("cache"), None],
    "distributed": ["boolean"],
    "download": ["boolean"],
}
# Parameters of version 0.1, and what to write instead.
_RENAMED = {
    **{name: f"execution={{{name!r}: ...}}, or set_params(execution__{name}=...)" for name in _EXECUTION},
    "readout": "prior='last' in place of readout='last'; readout='stages' is the default",
    "head": "nothing: there is no random head but with model='paper'",
    "tail_weight": "nothing: the prior is learned",
    "target_scale": "nothing: targets are centered",
    "center": "nothing: the intercept is free",
    "damping": "nothing: it is fixed",
    "cache": "nothing: features are read once",
}


def with_shared_parameters(cls: Class) -> Class:
    """Fill in what the docstring of an estimator shares with the others; refuse parameters of version 0.1 by name."""
    text = inspect.cleandoc(cls.__doc__ or "")
    for name, shared in (
        ("network parameters", _NETWORK_PARAMETERS), ("model parameter", _MODEL_PARAMETER),
        ("fit parameters", _FIT_PARAMETERS), ("attributes", _ATTRIBUTES),
    ):  # fmt: skip
        text = text.replace(f"<{name}>", shared.strip())
    cls.__doc__ = f"{text}\n"
    init: Any = vars(cls)["__init__"]

    @functools.wraps(init)
    def checked(estimator: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name in _RENAMED:
                raise TypeError(f"{cls.__name__} has no parameter {name!r} any more; write {_RENAMED[name]}.")
        init(estimator, *args, **kwargs)

    type.__setattr__(cls, "__init__", checked)
    return cls


class Parameters(BaseEstimator):
    """An estimator with the shared parameters, and no method that fits."""

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "backbone": [str, nn.Module, callable],
        "output": [str, Integral, Sequence, None],
        "tangents": [StrOptions({"local", "network", "both"}), None],
        "n_directions": [Interval(Integral, 0, None, closed="left")],
        "sketch_size": [Interval(Integral, 1, None, closed="left"), None],
        "model": [StrOptions({"groups", "paper"})],
        "prior": [StrOptions(set(PRIORS)), Mapping, Sequence, np.ndarray],
        "alpha": [StrOptions({"auto"}), Interval(Real, 0, None, closed="neither")],
        "class_weight": [StrOptions({"balanced"}), Mapping, None],
        "negative_slope": [Interval(Real, 0, 1, closed="left")],
        "solver": [StrOptions({"auto", "closed", "pcg", "sgd"})],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "views": [str, Sequence],
        "preprocessing": [Mapping, None],
        "store_data": ["boolean"],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
        "execution": [Mapping, None],
    }

    # Parameters; those with a value here are not of every estimator, and have this one where they are absent.
    backbone: Any
    weights: Any
    output: Any
    tangents: str | None
    tangent_layers: Any
    n_directions: int
    sketch_size: int | None
    prior: Any
    model: str = "groups"
    negative_slope: float = 0.0
    solver: str = "auto"
    max_iter: int
    tol: float
    views: str | Sequence[str]
    image_shape: Sequence[int] | None
    image_size: Any
    channel_axis: int
    preprocessing: Mapping[str, Any] | None
    store_data: bool = False
    random_state: Any
    verbose: int = 0
    execution: Mapping[str, Any] | None

    @property
    def _execution(self) -> Execution:
        """Checked items of ``execution``, and the defaults of the others."""
        name = f"{type(self).__name__}(execution=...)"
        own = {"execution": self._parameter_constraints["execution"]}
        validate_parameter_constraints(own, {"execution": self.execution}, type(self).__name__)
        given = {} if self.execution is None else dict(self.execution)
        unknown = sorted(map(str, set(given) - set(_EXECUTION)))
        if unknown:
            raise ValueError(f"execution has no item {unknown[0]!r}; its items: {sorted(_EXECUTION)}.")
        validate_parameter_constraints(_EXECUTION_CONSTRAINTS, given, name)
        return Execution(**given)

    @property
    def _paper(self) -> bool:
        """Whether the model is the paper's."""
        return self.model == "paper"

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Get the parameters of this estimator.

        Parameters
        ----------
        deep : bool, default=True
            Whether items of ``execution`` are listed, too, as ``execution__<name>``.

        Returns
        -------
        params : dict of str to any
            Values by name.
        """
        found = super().get_params(deep=deep)
        if deep and (self.execution is None or isinstance(self.execution, Mapping)):
            items = {**_EXECUTION, **(self.execution or {})}
            found |= {f"execution__{name}": value for name, value in items.items()}
        return found

    def set_params(self: Estimator, **params: Any) -> Estimator:
        """Set parameters of this estimator.

        Parameters
        ----------
        **params : dict
            Parameters by name; items of ``execution`` as ``execution__<name>``.

        Returns
        -------
        self : estimator
            The estimator.

        Raises
        ------
        ValueError
            There is no such parameter, or ``execution`` is no dict to which an item could be added.
        """
        items = {k: v for k, v in params.items() if k.startswith("execution__")}
        for name in params:
            if name in _RENAMED:
                raise ValueError(f"{type(self).__name__} has no parameter {name!r} any more; write {_RENAMED[name]}.")
        unknown = sorted(k for k in items if k.removeprefix("execution__") not in _EXECUTION)
        if unknown:
            raise ValueError(f"Invalid parameter {unknown[0]!r}: the items of execution are {sorted(_EXECUTION)}.")
        super().set_params(**{k: v for k, v in params.items() if k not in items})
        if items:
            given = {k.removeprefix("execution__"): v for k, v in items.items()}
            if not isinstance(self.execution, Mapping | None):
                raise ValueError(f"execution must be a dict or None, got {self.execution!r}: set it as a whole.")
            self.execution = {**(self.execution or {}), **given}
        return self

    def _check_parameters(self, n_processes: int) -> None:
        self._validate_params()
        execution = self._execution
        execution.folder  # noqa: B018 raises for what is no folder
        if isinstance(self.prior, str) and self.prior not in PRIORS:  # a str is a sequence, too
            raise ValueError(f"prior must be one of {list(PRIORS)}, a dict or numbers; got {self.prior!r}.")
        if not isinstance(self.prior, str | None):
            values = list(self.prior.values()) if isinstance(self.prior, Mapping) else list(self.prior)
            if not values:
                raise ValueError(f"prior must be one of {list(PRIORS)} or hold numbers; got {self.prior!r}.")
            for value in values:
                check_number("Each number of prior", value)
        views = self._view_names()
        known = all(isinstance(v, str) and v in _VIEWS for v in views)
        if not views or not known or len(set(views)) != len(views):
            raise ValueError(f"views must name each of {list(_VIEWS)} at most once, got {self.views!r}.")
        self._check_combinations(execution, n_processes)

    def _check_combinations(self, execution: Execution, n_processes: int) -> None:
        """Parameters that exclude each other."""
        if not self._paper and self.solver == "sgd":
            raise ValueError("solver='sgd' is the paper's: set model='paper', or use 'auto', 'closed' or 'pcg'.")
        if self._paper:
            if self.solver == "closed":
                raise ValueError("model='paper' has no closed form: use solver='auto', 'pcg' or 'sgd'.")
            for name, wrong, value in (
                ("distributed", n_processes > 1, execution.distributed),
                ("store_data", self.store_data, self.store_data), ("views", self.views != "identity", self.views),
            ):  # fmt: skip
                if wrong:
                    raise ValueError(f"model='paper' does not support {name}={value!r}.")
        if n_processes > 1 and self.store_data:
            raise ValueError("store_data=True does not support distributed=True with several processes.")
        if n_processes > 1 and not isinstance(self.random_state, Integral):
            raise ValueError(
                "With distributed=True random_state must be an int, so that all processes draw the same; got "
                f"{self.random_state!r}."
            )

    def _check_agreement(
        self, group: ProcessGroup, rows: Any, y: np.ndarray, sample_weight: Any, groups: Any, backbone: Backbone
    ) -> None:
        """Raise on all processes that share a fit unless they have the same data, parameters and weights."""
        parameters = {k: v for k, v in self.get_params(deep=False).items() if k not in _OF_A_PROCESS}
        parameters["dtype"] = self._execution.dtype
        module = backbone.module
        group.check_same(
            {
                "the constructor's parameters": repr(parameters),
                "the numbers of images": repr(len(rows)),
                "the targets y": repr(y.tolist()),
                "the sample weights": repr(None if sample_weight is None else np.asarray(sample_weight).tolist()),
                "the groups": repr(None if groups is None else np.asarray(groups).tolist()),
                "the backbone's weights": itertools.chain(module.parameters(), module.buffers()),
            }
        )

    def _view_names(self) -> list[str]:
        return [self.views] if isinstance(self.views, str) else list(self.views)

    def _draw_seed(self) -> int:
        """A seed for a generator of torch's own, by ``random_state``."""
        return int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))

    def __sklearn_clone__(self: Estimator) -> Estimator:
        """A clone shares a module given as backbone, which is never changed, instead of copying it."""
        if not isinstance(self.backbone, nn.Module):
            return super().__sklearn_clone__()
        bare = copy.copy(self)  # other threads may be using this one
        bare.backbone = "auto"
        twin = super(Parameters, bare).__sklearn_clone__()
        twin.backbone = self.backbone
        return twin


def check_number(name: str, value: Any, *, positive: bool = False) -> None:
    """Raise ValueError unless a member of a parameter is a finite number, and not negative, or positive."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not np.isfinite(float(value)) or value < 0 or (positive and value == 0):
        raise ValueError(f"{name} must be a number {'>' if positive else '>='} 0, got {value!r}.")
