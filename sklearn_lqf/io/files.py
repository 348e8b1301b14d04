"""Fitted estimators as files of tensors and JSON, and as pickles that state their version.

Hides which parts of an estimator are written. Loading builds the network again from the parameters of the estimator,
and takes its weights from the file. It never runs code from a file.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import inspect
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..backbones.loading import Backbone, VectorNetwork, load_backbone
from ..backbones.preprocessing import Preprocessing
from ..engine.features import Standardization
from ..engine.fitted import FeatureReader, FittedModel
from ..engine.problem import Recipe, Solution, TrainingRows
from ..network.prepared import PreparedNetwork
from ..paper.model import PaperModel
from ..versions import __version__, installed_versions
from .archive import digest, read_archive, refusal, write_archive
from .manifest import decode, encode

__all__ = ["load_estimator", "pickled_state", "save_estimator", "unpickled_state"]

_WEIGHT = "weights."  # begins the names of the backbone's tensors
_VERSION = "_sklearn_lqf_version"  # in pickles
# Attributes that are neither parameters nor results: the model, which is written apart, and those of scikit-learn.
_APART = {"_model", "_metadata_request", "_skl_callbacks"}
_LOCAL = {"memory", "device"}  # items of `execution` that belong to a machine

Estimator = TypeVar("Estimator")


def save_estimator(estimator: Any, path: Any, include_backbone: bool) -> None:
    """Write a fitted estimator to a file.

    Parameters
    ----------
    estimator : estimator
        A fitted estimator of this package.
    path : str or path
    include_backbone : bool
        Whether the file holds the pre-trained weights. The built-in network for vectors is always in the file.

    Raises
    ------
    TypeError
        ``path`` is neither a str nor a path, or a value of the estimator cannot be written as JSON and tensors.
    ImportError, OSError
        As `archive.write_archive`.
    """
    path = _checked_path(path)
    tensors: dict[str, Tensor] = {}
    header = _header(estimator, include_backbone, tensors)
    write_archive(path, header, tensors)


def _checked_path(path: Any) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be a str or a path, got {type(path).__name__}: pass a path, no open file.")
    return Path(path)


def load_estimator(cls: type[Estimator], path: Any, place: torch.device, device: Any, backbone: Any) -> Estimator:
    """Read an estimator from a file.

    Parameters
    ----------
    cls : type
        Class of the estimator.
    path : str or path
    place : torch.device
        Device of the model.
    device : str or torch.device
        Becomes the item ``"device"`` of ``execution``, unless it is ``"auto"``.
    backbone : nn.Module, callable, str or None
        Replaces the parameter ``backbone``; needed if that was a module or a callable.

    Returns
    -------
    cls
        The estimator, fitted.

    Raises
    ------
    TypeError
        ``path`` is neither a str nor a path.
    ValueError
        The file is broken, was changed, has another format or another class, or the backbone is not that of the fit.
    FileNotFoundError
        There is no such file.
    ImportError
        The package safetensors is missing, or one that the backbone needs.
    RuntimeError
        The file has no backbone, and its weights cannot be downloaded.
    """
    path = _checked_path(path)
    header, tensors = read_archive(path)
    with refusal(path, "its content is not what save writes"):
        estimator: Any = _without_network(cls, header, tensors, device)
        saved = _saved_network(header, tensors)
    found = _backbone(estimator, saved, path, backbone)
    with refusal(path, "its model cannot be built"):
        estimator._model = _model(_built(found, saved, place), decode(header["model"], tensors))
    return estimator


def pickled_state(state: Any) -> dict[str, Any]:
    """The state of an estimator for a pickle, with the version of this package."""
    return {**state, _VERSION: __version__}


def unpickled_state(cls: type, state: dict[str, Any]) -> dict[str, Any]:
    """The state of an estimator from a pickle, with the defaults of parameters that it lacks.

    Warns
    -----
    UserWarning
        Another version of this package wrote the pickle.
    """
    state = dict(state)
    version = state.pop(_VERSION, "an earlier version")
    if version != __version__:
        warnings.warn(
            f"This {cls.__name__} was pickled by sklearn_lqf {version} and is read by {__version__}: it may "
            "not work, or give other results. Files written by save are meant to be read by later versions.",
            UserWarning,
            stacklevel=3,
        )
    defaults = {name: p.default for name, p in _signature(cls).items() if p.default is not p.empty}
    return {**defaults, **state}


def _signature(cls: type) -> dict[str, inspect.Parameter]:
    """Parameters of the constructor."""
    return {name: p for name, p in inspect.signature(cls).parameters.items() if p.kind is not p.VAR_KEYWORD}


# --------------------------------------------------------------------------------------------------- to a file


def _header(estimator: Any, include_backbone: bool, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Header of the file, as JSON; its tensors are put into ``tensors``."""
    parameters = estimator.get_params(deep=False)
    kept = {k: v for k, v in vars(estimator).items() if _is_fitted(k) and k not in parameters and k not in _APART}
    # Folds and scorers that cannot be written as text are left out; the loaded estimator takes its parameters instead.
    kept["_fitted_with"] = {k: v for k, v in kept["_fitted_with"].items() if _has_text(v)}
    backbone = parameters["backbone"]
    return {
        "class": type(estimator).__name__,
        "versions": installed_versions(),
        "backbone": None if isinstance(backbone, str) else f"{type(backbone).__module__}.{type(backbone).__qualname__}",
        "parameters": {k: _parameter(k, v, tensors) for k, v in parameters.items()},
        "attributes": {k: encode(v, k, tensors) for k, v in kept.items()},
        "requests": _requests(estimator),
        "network": _network_header(estimator._model.network, include_backbone, tensors),
        "model": encode(_model_fields(estimator._model), "model", tensors),
    }


def _is_fitted(name: str) -> bool:
    """Whether an attribute is a result of fit, by its name."""
    return (name.endswith("_") or name.startswith("_")) and not name.startswith("__")


def _model_fields(model: FittedModel | PaperModel) -> dict[str, Any]:
    """The fields of the fitted model except its network."""
    if isinstance(model, PaperModel):
        return {"kind": "paper", "head": model.head, "coef": model.coef, "unit": model.unit}
    return {
        "kind": "groups",
        "reader": _fields(model.reader, ["network", "_built"]),
        "standardization": _fields(model.solution.standardization),
        "solution": _fields(model.solution, ["standardization"]),
        "unit": model.unit,
        "recipe": _fields(model.recipe),
        "fingerprint": model.fingerprint,
        "rows": None if model.rows is None else _fields(model.rows),
    }


def _parameter(name: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    if name == "backbone":
        return value if isinstance(value, str) else None
    if name == "execution" and value is not None:
        value = {k: v for k, v in value.items() if k not in _LOCAL}
    if name == "weights" and isinstance(value, enum.Enum):
        return value.name  # of torchvision, which also takes the name
    try:
        return encode(value, f"parameters.{name}", tensors)
    except TypeError as error:
        raise TypeError(
            f"The parameter {name}={value!r} cannot be saved ({error}). Predictions do not depend on it when the "
            f"estimator is fitted: set_params({name}=...) to such a value before, or use joblib.dump."
        ) from error


def _has_text(value: Any) -> bool:
    try:
        encode(value, "", {})
    except TypeError:
        return False
    return True


def _requests(estimator: Any) -> dict[str, dict[str, Any]]:
    """Requests of metadata, as set by ``set_fit_request`` and similar methods."""
    known = getattr(estimator, "_metadata_request", None)
    return {} if known is None else known._serialize()


def _network_header(network: PreparedNetwork, include_backbone: bool, tensors: dict[str, Tensor]) -> dict[str, Any]:
    weights = _weights(network.source)
    included = bool(include_backbone) or isinstance(network.source, VectorNetwork)  # which has the scale of the data
    if included:
        tensors |= {_WEIGHT + name: value for name, value in weights.items()}
    fitted = {
        "shape": network.shape,
        "options": network.options,
        "output": network.output,
        "preprocessing": None if network.preprocessing is None else _fields(network.preprocessing),
        "dtype": str(network.dtype).removeprefix("torch."),
    }
    return {
        "weights": list(weights),
        "included": included,
        "digest": digest(weights),
        "fitted": encode(fitted, "network", tensors),
    }


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, also those that a state dict leaves out; a tied one under each of its names."""
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: value.detach() for name, value in named}


def _fields(instance: Any, without: list[str] | None = None) -> dict[str, Any]:
    """Values of the fields of a dataclass by name, not copied."""
    return {f.name: getattr(instance, f.name) for f in dataclasses.fields(instance) if f.name not in (without or [])}


# ------------------------------------------------------------------------------------------------- from a file


@dataclasses.dataclass(frozen=True)
class _SavedNetwork:
    """The network as a file describes it.

    Attributes
    ----------
    code : str or None
        Type of the backbone, unless it was given by name.
    names : list of str
        Names of its parameters and buffers.
    digest : str
        Digest of these.
    weights : dict of str to Tensor, or None
        None if they are not in the file.
    shape, options, preprocessing, dtype, output
        As in `PreparedNetwork`.
    """

    code: str | None
    names: list[str]
    digest: str
    weights: dict[str, Tensor] | None
    shape: Sequence[int]
    options: dict[str, Any]
    preprocessing: Preprocessing | None
    dtype: torch.dtype
    output: Any = None


def _saved_network(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> _SavedNetwork:
    network = header["network"]
    fitted = decode(network["fitted"], tensors)
    if fitted["preprocessing"] is not None:
        fitted["preprocessing"] = Preprocessing(**fitted["preprocessing"])
    fitted["dtype"] = {"float32": torch.float32, "float64": torch.float64}[fitted["dtype"]]
    names = [str(name) for name in network["weights"]]
    weights = {name: tensors[_WEIGHT + name] for name in names} if network["included"] else None
    return _SavedNetwork(header["backbone"], names, network["digest"], weights, **fitted)


def _without_network(cls: Any, header: Mapping[str, Any], tensors: Mapping[str, Tensor], device: Any) -> Any:
    """The estimator without its model."""
    if header["class"] != cls.__name__:
        raise ValueError(f"it holds an estimator of class {header['class']}: use {header['class']}.load")
    parameters = {k: decode(v, tensors) for k, v in header["parameters"].items()}
    execution = parameters.get("execution") or {}
    unknown = sorted(set(parameters) - set(_signature(cls)) | _LOCAL & set(execution))
    if unknown:
        raise ValueError(f"{cls.__name__} cannot take the parameters {unknown} from a file")
    attributes = {k: decode(v, tensors) for k, v in header["attributes"].items()}
    foreign = [k for k in attributes if not _is_fitted(k) or k in _APART]
    if foreign:
        raise ValueError(f"{foreign} are no fitted attributes")
    if device != "auto":
        parameters["execution"] = {**execution, "device": device}
    estimator = cls(**parameters)
    vars(estimator).update(attributes)
    estimator._fitted_with = {**{k: getattr(estimator, k) for k in cls._frozen}, **attributes["_fitted_with"]}
    if header["requests"]:
        known = estimator._get_metadata_request()
        for method, requests in header["requests"].items():
            for name, alias in requests.items():
                getattr(known, method).add_request(param=name, alias=alias)
        estimator._metadata_request = known
    return estimator


def _backbone(estimator: Any, saved: _SavedNetwork, path: Path, given: Any) -> Backbone:
    """The backbone with the weights of the fit; ``given`` replaces the parameter."""
    if given is None and estimator.backbone is None:
        raise ValueError(
            f"The model in {str(path)!r} was fitted with a backbone of type {saved.code}, which is code that the file "
            "does not hold: give load a module of the same architecture, or a callable that returns one, as backbone."
        )
    named = isinstance(estimator.backbone, str)
    other = given is not None and not (named and isinstance(given, str) and given == estimator.backbone)
    of_name = other and named and not isinstance(given, str)
    found = load_backbone(
        given if other else estimator.backbone,
        "auto" if of_name else estimator.weights,  # the weights of a name do not apply to a module
        vector_features=saved.shape[0] if len(saved.shape) == 1 else None,
        random_state=copy.deepcopy(estimator.random_state),  # drawing would change a RandomState
        download=estimator._execution.download,
        architecture_only=saved.weights is not None,
        image_size=saved.shape[1:] if len(saved.shape) == 3 else None,
    )
    own = _weights(found.module)
    wrong = [name for name in saved.names if name not in own or not _fits(own[name], name, saved)]
    if not wrong and saved.weights is not None:
        for name, value in saved.weights.items():
            own[name].copy_(value)
    if wrong or digest({name: own[name] for name in saved.names}) != saved.digest:
        what = "its weights are others"
        if wrong:
            what = f"{len(wrong)} of {len(saved.names)} weights are absent or of another shape or dtype: {wrong[:3]}"
        remedy = "" if saved.weights is not None else ", or save the model with include_backbone=True"
        raise ValueError(
            f"The backbone {found.name!r} is not the one that the model in {str(path)!r} was fitted with; {what}. Give "
            f"load the right one as backbone{remedy}."
        )
    if other:
        _become(estimator, found, saved, isinstance(given, str))
    return found


def _become(estimator: Any, found: Backbone, saved: _SavedNetwork, named: bool) -> None:
    """Set the parameters so that later fits of the estimator and its clones start from the weights of the file."""
    if isinstance(found.module, VectorNetwork):  # whose weights are drawn by random_state
        estimator.backbone = "vector"
        return
    estimator.backbone, estimator.weights = found.module, "auto"
    module = load_backbone(found.module) if named else found  # a module's preprocessing is not that of its name
    own, overrides = _fields(module.preprocessing), estimator.preprocessing or {}
    fitted = {} if saved.preprocessing is None else _fields(saved.preprocessing)
    further = {k: v for k, v in fitted.items() if k not in overrides and v != own[k]}  # such as those of a name
    if further:
        estimator.preprocessing = {**further, **overrides}


def _fits(own: Tensor, name: str, saved: _SavedNetwork) -> bool:
    """Whether a weight can be taken from the file; if the file has no weights, their digest decides later."""
    if saved.weights is None:
        return True
    return (own.shape, own.dtype) == (saved.weights[name].shape, saved.weights[name].dtype)


def _built(backbone: Backbone, saved: _SavedNetwork, device: torch.device) -> PreparedNetwork:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # shown at fit
        network = PreparedNetwork(
            backbone, saved.shape, **saved.options, preprocessing=saved.preprocessing, dtype=saved.dtype, device=device,
            output=saved.output,
        )  # fmt: skip
    further = sorted(set(_weights(network.source)) - set(saved.names))
    if further:
        raise ValueError(f"the backbone {backbone.name!r} has weights that the one of the fit had not: {further[:3]}")
    return network


def _model(network: PreparedNetwork, fields: dict[str, Any]) -> FittedModel | PaperModel:
    """The fitted model of a network."""
    if fields["kind"] == "paper":
        paper = PaperModel(network, fields["head"], fields["coef"], fields["unit"])
        _ = paper.linearized  # raises if the change and the network do not agree
        return paper
    reader = FeatureReader(network, **fields["reader"])
    solution = Solution(Standardization(**fields["standardization"]), **fields["solution"])
    rows = None if fields["rows"] is None else TrainingRows(**fields["rows"])
    return FittedModel(reader, solution, fields["unit"], Recipe(**fields["recipe"]), fields["fingerprint"], rows)
