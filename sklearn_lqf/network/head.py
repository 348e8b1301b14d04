"""From a network to its last features, one vector for each image.

Hides how networks end: in one classifier, which is removed, in several, or in none; in a tensor, or in a tuple or a
dict with a pooled vector under a known name. For timm's models timm's own interface is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .rewrite import DROPOUTS, Output, evaluate, replace_module, watch

__all__ = ["as_vectors"]

# Modules that may come between the last layer and the output.
_PASS = (nn.Identity, nn.Flatten, nn.AdaptiveAvgPool2d, nn.AvgPool2d, *DROPOUTS)
_PROBABILITIES = (nn.Softmax, nn.LogSoftmax, nn.Sigmoid, nn.LogSigmoid, nn.Softmax2d)
# Names of class scores in outputs, and names of one vector for each image; the first that exists is taken.
_SCORES = ("logits",)
_VECTORS = (
    "pooler_output",
    "image_embeds",
    "image_embeddings",
    "image_features",
    "embeddings",
    "embedding",
    "features",
)
_TOKENS = "last_hidden_state"
_REMEDY = (
    "Name the part that is the vector by the parameter output, or pass a module that returns one vector for each image "
    "or ends in one Linear layer."
)


@dataclass(frozen=True)
class _Head:
    """The classifier of a network: its module, and a ReLU after it, which a linear model must not have.

    Attributes
    ----------
    name : str
    activation : str or None
        Name of the ReLU.
    """

    name: str
    activation: str | None = None


# ---------------------------------------------------------------------------------------------- one vector


def as_vectors(module: nn.Module, example: Tensor, chosen: Any = None) -> nn.Module:
    """The network up to its last features, (B, ...) -> (B, D), without its classifier if it has one.

    Parameters
    ----------
    module : nn.Module
        In evaluation mode; a private copy, which is changed.
    example : Tensor of shape (B, ...)
    chosen : str, int, sequence of these or None
        Keys that lead to the vector in what the network returns, or the last of them; it is then taken as it is.

    Returns
    -------
    nn.Module
        The same, or an `Output` of it.

    Raises
    ------
    ValueError
        The network returns no vector, or several. The message lists what was found.
    """
    if chosen is not None:
        return _chosen_part(module, example, chosen)
    if all(callable(getattr(module, name, None)) for name in ("forward_features", "forward_head", "reset_classifier")):
        return _of_timm(module, example)
    module = _interpolating(module, example)
    calls, output = _calls(module, example)
    if isinstance(output, Tensor) and output.ndim == 2:
        head = _one_head(calls, output)
        if head is not None:
            _remove(module, example, head)
            return module
        found = _of_several_heads(module, example, calls) or _without_head(module, calls, output)
        if found is None:
            raise _no_head(calls)
        return found
    if isinstance(output, Tensor):
        raise ValueError(
            f"The backbone must return one vector for each image, (batch, features); it returns {_described(output)}. "
            "Append the pooling that belongs to it, such as nn.AdaptiveAvgPool2d(1) and nn.Flatten() for a map."
        )
    return _of_parts(module, example, calls, output)


def _chosen_part(module: nn.Module, example: Tensor, chosen: Any) -> nn.Module:
    """The part of the output that the user names."""
    module = _interpolating(module, example)
    leaves = dict(_leaves(evaluate(module, example)))
    keys = (chosen,) if isinstance(chosen, str | int) else tuple(chosen)
    found = [place for place in leaves if place and keys in (place, place[-1:])]
    if len(found) != 1 or not (_is_vector(leaves[found[0]]) or leaves[found[0]].ndim == 3):
        raise ValueError(
            f"output={chosen!r} must name one vector of each image, or tokens, in what the backbone returns: "
            f"{_listed(leaves)}."
        )
    return Output(module, found[0], tokens="mean" if leaves[found[0]].ndim == 3 else None)


def _of_timm(module: nn.Module, example: Tensor) -> nn.Module:
    """A model of timm up to the features before its classifier, as timm defines them."""
    timm = cast(Any, module)
    try:
        with torch.no_grad():
            expected = timm.forward_head(timm.forward_features(example.clone()), pre_logits=True)
    except Exception:  # the size is not supported, which evaluate reports; or the model has no such methods
        evaluate(module, example)
        expected = None
    timm.reset_classifier(0)
    plain = evaluate(module, example)
    if isinstance(plain, Tensor) and plain.ndim == 2 and (expected is None or _equal(plain, expected)):
        return module
    output = Output(module, timm=True)
    if isinstance(expected, Tensor) and expected.ndim == 2 and _equal(evaluate(output, example), expected):
        return output
    raise ValueError(
        f"The features of the backbone {type(module).__name__} in front of its classifier must be one vector for each "
        f"image; they are {_described(plain if expected is None else expected)}. {_REMEDY}"
    )


def _interpolating(module: nn.Module, example: Tensor) -> nn.Module:
    """The same; a model of transformers interpolates its position embeddings if the images are of another size."""
    size = getattr(getattr(module, "config", None), "image_size", None)
    height_and_width = (size, size) if isinstance(size, int) else tuple(size or ())
    if example.ndim != 4 or height_and_width in ((), tuple(example.shape[2:])):
        return module
    name = "interpolate_pos_encoding"
    takes = name in inspect.signature(module.forward).parameters
    return Output(module, options={name: True}) if takes else module


def _of_parts(module: nn.Module, example: Tensor, calls: list[_Call], output: Any) -> nn.Module:
    """The vector in an output of several tensors."""
    leaves = dict(_leaves(output))
    names = {place: str(place[-1]) for place in leaves}
    scores = [place for place in leaves if names[place] in _SCORES and leaves[place].ndim == 2]
    vectors = [
        place
        for wanted in _VECTORS
        for place in leaves
        if names[place] == wanted and _is_vector(leaves[place])
    ]  # fmt: skip
    rows = [place for place, leaf in leaves.items() if leaf.ndim == 2 and len(leaf) == len(example)]
    if not scores and vectors:  # a vector with a known name is taken as it is
        return Output(module, vectors[0])
    chosen = scores[0] if scores else rows[0] if len(rows) == 1 else None
    if chosen is not None:
        one = Output(module, chosen)
        head = _one_head(calls, leaves[chosen])
        if head is None:
            found = _of_several_heads(module, example, calls)
            if found is None and not scores:
                found = _without_head(one, calls, leaves[chosen])
            if found is None:
                raise _no_head(calls)
            return found
        _remove(one, example, head)
        return one
    several = _of_several_heads(module, example, calls)
    if several is not None:
        return several
    tokens = [place for place in leaves if names[place] == _TOKENS and leaves[place].ndim == 3]
    if not rows and tokens:
        first = any(
            name.rpartition(".")[2] in ("cls_token", "class_embedding") for name, _ in module.named_parameters()
        )
        return Output(module, tokens[0], tokens="first" if first else "mean")
    raise ValueError(
        "The backbone must return one vector for each image, or name it "
        f"({', '.join(map(repr, (*_SCORES, *_VECTORS)))}); it returns {type(output).__name__}"
        f"{f' with {_listed(leaves)}' if leaves else ''}. {_REMEDY}"
    )


def _is_vector(leaf: Tensor) -> bool:
    """Whether a tensor is one vector for each image, (B, D) or (B, D, 1, 1)."""
    return leaf.ndim == 2 or (leaf.ndim == 4 and leaf.shape[2:] == (1, 1))


def _leaves(output: Any, place: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Tensor]]:
    """The tensors of an output, with the keys that lead to them."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield place, output
    elif isinstance(output, Mapping):
        items = output.items()
    elif is_dataclass(output):
        items = ((f.name, getattr(output, f.name)) for f in fields(output))
    elif isinstance(output, tuple | list):
        items = enumerate(output)
    for key, value in items:
        yield from _leaves(value, (*place, key))


def _listed(leaves: Mapping[tuple[str | int, ...], Tensor]) -> str:
    return ", ".join(f"{_place(place)} of shape {tuple(leaf.shape)}" for place, leaf in leaves.items())


def _place(place: tuple[str | int, ...]) -> str:
    return "".join(f"[{key!r}]" for key in place) or "a tensor"


def _described(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _equal(one: Tensor, other: Any) -> bool:
    same = isinstance(other, Tensor) and one.shape == other.shape
    return same and torch.allclose(
        one, other, rtol=1e-4, atol=1e-5 * float(one.abs().nan_to_num().max()), equal_nan=True
    )


# -------------------------------------------------------------------------------------------------- heads


@dataclass(frozen=True)
class _Call:
    """One evaluation of a module without children."""

    name: str
    module: nn.Module
    inputs: tuple
    output: Any


def _may_be_head(m: nn.Module) -> bool:
    return isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1))


def _calls(module: nn.Module, example: Tensor) -> tuple[list[_Call], Any]:
    """The evaluations of all layers, in order, and the output."""
    calls: list[_Call] = []

    def see(name: str, m: nn.Module, args: tuple, out: Any) -> None:
        # A later operation in place must not change the input and output of a possible head.
        if _may_be_head(m) and isinstance(out, Tensor):
            args, out = tuple(a.clone() if isinstance(a, Tensor) else a for a in args), out.clone()
        calls.append(_Call(name, m, args, out))

    layers = (n for n, m in module.named_modules() if n and not any(m.children()))
    output = watch(module, example, layers, see)
    finite = [bool(torch.isfinite(leaf).all()) for _, leaf in _leaves(output)]
    if finite and not all(finite):
        raise ValueError(
            "The backbone's output is not finite on an input of random pixels: check its weights and preprocessing."
        )
    return calls, output


def _one_head(calls: list[_Call], output: Tensor) -> _Head | None:
    """The layer whose result is the output; None if there is none."""
    activation = None
    for call in reversed(calls):
        if _may_be_head(call.module):
            once = sum(c.name == call.name for c in calls) == 1
            if once and _reaches(call.module, call.output, output, rectified=activation is not None):
                return _Head(call.name, activation)
            return None
        if type(call.module) is nn.ReLU:
            activation = call.name
        elif not isinstance(call.module, _PASS):
            return None
    return None


def _no_head(calls: list[_Call]) -> ValueError:
    """The error if no classifier was found."""
    if not calls:
        return ValueError("The backbone has no layer: its output must come from one nn.Linear.")
    last = calls[-1]
    return ValueError(
        "The backbone's output must be one vector for each image, or come from one nn.Linear (or 1x1 nn.Conv2d) that "
        f"can be replaced by a new head; the last layer evaluated is {last.name!r} ({type(last.module).__name__}), and "
        f"the output is not its plain result. {_REMEDY}"
    )


def _reaches(layer: nn.Module, out: Any, output: Tensor, rectified: bool) -> bool:
    """Whether the network's output is the layer's output, possibly after ReLU, pooling and flattening."""
    if not isinstance(out, Tensor):
        return False
    if isinstance(layer, nn.Linear):
        return out.shape == output.shape and torch.equal(out.relu() if rectified else out, output)
    means = (out.flatten(2).mean(2), out.relu().flatten(2).mean(2))
    return any(m.shape == output.shape and torch.allclose(m, output, rtol=1e-4, atol=1e-5) for m in means)


def _remove(module: nn.Module, example: Tensor, head: _Head) -> None:
    """Put identities in the place of a classifier, in a private copy; what was its input must be a vector."""
    for name in (head.name, head.activation):
        if name is not None:
            replace_module(module, name, nn.Identity())
    features = evaluate(module, example)
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise ValueError(
            f"The input of the backbone's head {head.name!r} must be one vector for each image; without the "
            f"head the network returns {_described(features)}."
        )


def _of_several_heads(module: nn.Module, example: Tensor, calls: list[_Call]) -> nn.Module | None:
    """The network up to the vector that several last Linear layers share as their input; None if there is none."""
    heads: dict[str, Tensor] = {}
    for call in reversed(calls):
        if isinstance(call.module, nn.Linear) and call.inputs and call.inputs[0].ndim == 2:
            if heads and not _equal(call.inputs[0], next(iter(heads.values()))):
                break
            heads[call.name] = call.inputs[0]
        elif not isinstance(call.module, _PASS):
            break
    if len(heads) < 2 or sum(c.name in heads for c in calls) > len(heads):
        return None
    vector = next(iter(heads.values()))
    replaced = {name: module.get_submodule(name) for name in heads}
    for name in heads:
        replace_module(module, name, nn.Identity())
    try:
        output = evaluate(module, example)
    except ValueError:  # the modules after the heads accept only class scores
        output = None
    for place, leaf in _leaves(output):
        if _equal(leaf, vector):
            return Output(module, place) if place else module
    for name, layer in replaced.items():
        replace_module(module, name, layer)
    return None


def _without_head(module: nn.Module, calls: list[_Call], output: Tensor) -> nn.Module | None:
    """The network itself if its output is a vector that is neither scores nor probabilities of classes; else None."""
    weighted = [c for c in calls if not isinstance(c.module, _PASS) and type(c.module) is not nn.ReLU]
    if not weighted or not any(True for _ in module.parameters()) or isinstance(weighted[-1].module, _PROBABILITIES):
        return None
    if not _may_be_head(weighted[-1].module):
        return module
    norms = output.norm(dim=1)  # an embedding on the sphere: the projection belongs to it
    return module if torch.allclose(norms, torch.ones_like(norms), rtol=1e-3) else None
