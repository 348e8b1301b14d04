"""The head and the stages of a network.

Hides how a network is read without tracing it: forward hooks see which layer makes the output, and at which
resolution each block works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from .rewrite import DROPOUTS, evaluate, replace_module

__all__ = ["Head", "channels_last", "find_head", "find_stages", "remove_head", "tangent_prefixes"]

# What may stand between the last layer and the output.
_PASS = (nn.Identity, nn.Flatten, nn.AdaptiveAvgPool2d, nn.AvgPool2d, *DROPOUTS)


@dataclass(frozen=True)
class Head:
    """The classifier of a network: its module, and a ReLU behind it that a linear model must not have.

    Attributes
    ----------
    name : str
    activation : str or None
        Name of the ReLU.
    """

    name: str
    activation: str | None = None


def _watch(module: nn.Module, example: Tensor, names: Iterable[str], see: Callable[[str, nn.Module, Any], None]) -> Any:
    """Evaluate the network; each call of a named module is reported as (name, module, output)."""
    modules = dict(module.named_modules(remove_duplicate=False))
    hooks = [modules[name].register_forward_hook(lambda m, _, out, name=name: see(name, m, out)) for name in names]
    try:
        return evaluate(module, example)
    finally:
        for hook in hooks:
            hook.remove()


# -------------------------------------------------------------------------------------------------- head


def _may_be_head(m: nn.Module) -> bool:
    return isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1))


def find_head(module: nn.Module, example: Tensor) -> Head:
    """Find the classifier: the last Linear, or 1x1 convolution, whose output is the network's output.

    Parameters
    ----------
    module : nn.Module
        In evaluation mode; it is only evaluated.
    example : Tensor of shape (B, C, H, W) or (B, n_features)

    Returns
    -------
    Head

    Raises
    ------
    ValueError
        When the output does not come from one such layer. The message names what was found.
    """
    calls: list[tuple[str, nn.Module, Any]] = []

    def see(name: str, m: nn.Module, out: Any) -> None:
        # A later operation in place must not change what a possible head returned.
        calls.append((name, m, out.clone() if _may_be_head(m) and isinstance(out, Tensor) else out))

    output = _watch(module, example, (n for n, m in module.named_modules() if n and not any(m.children())), see)
    if not isinstance(output, Tensor) or output.ndim != 2:
        found = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"The backbone must return one tensor of shape (batch, classes); it returns {found}.")
    if not bool(torch.isfinite(output).all()):
        raise ValueError(
            "The backbone's output is not finite on an input of random pixels: check its weights and preprocessing."
        )
    if not calls:
        raise ValueError("The backbone has no layer: its output must come from one nn.Linear.")
    activation = None
    for name, m, out in reversed(calls):
        if _may_be_head(m):
            once = sum(n == name for n, _, _ in calls) == 1
            if once and _reaches(m, out, output, rectified=activation is not None):
                return Head(name, activation)
            break
        if type(m) is nn.ReLU:
            activation = name
        elif not isinstance(m, _PASS):
            break
    name, m, _ = calls[-1]
    raise ValueError(
        "The backbone's output must come from one nn.Linear (or 1x1 nn.Conv2d) that can be replaced by a new "
        f"head; the last layer evaluated is {name!r} ({type(m).__name__}), and the output is not its plain "
        "result. Pass a module that ends in one Linear layer."
    )


def _reaches(layer: nn.Module, out: Any, output: Tensor, rectified: bool) -> bool:
    """Whether the network's output is the layer's output, possibly after ReLU, pooling and flattening."""
    if not isinstance(out, Tensor):
        return False
    if isinstance(layer, nn.Linear):
        return out.shape == output.shape and torch.equal(out.relu() if rectified else out, output)
    means = (out.flatten(2).mean(2), out.relu().flatten(2).mean(2))
    return any(m.shape == output.shape and torch.allclose(m, output, rtol=1e-4, atol=1e-5) for m in means)


def remove_head(module: nn.Module, example: Tensor) -> None:
    """Turn a private copy of a classifier into its feature extractor, in place: (B, ...) -> (B, D).

    Parameters
    ----------
    module : nn.Module
        In evaluation mode.
    example : Tensor of shape (B, ...)

    Raises
    ------
    ValueError
        When there is no head as `find_head` wants it, or when its input is not one vector for each image.
    """
    head = find_head(module, example)
    for name in (head.name, head.activation):
        if name is not None:
            replace_module(module, name, nn.Identity())
    features = evaluate(module, example)
    if not isinstance(features, Tensor) or features.ndim != 2:
        found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"The input of the backbone's head {head.name!r} must be one vector for each image; without the "
            f"head the network returns {found}."
        )


# ------------------------------------------------------------------------------------------------ stages


def _units(module: nn.Module, prefix: str = "", total: int | None = None) -> list[str]:
    """Names of the blocks that a network is a chain of: containers opened, blocks kept whole."""
    total = sum(p.numel() for p in module.parameters()) if total is None else total
    names = []
    for name, child in module.named_children():
        full = f"{prefix}{name}"
        share = sum(p.numel() for p in child.parameters())
        container = isinstance(child, nn.Sequential | nn.ModuleList)
        nested = any(isinstance(m, nn.Sequential | nn.ModuleList) for m in child.children())
        if container or (nested and 2 * share > total):
            names += _units(child, f"{full}.", total)
        elif share:
            names.append(full)
    return names


def find_stages(module: nn.Module, example: Tensor, by_width: bool = False) -> list[list[str]]:
    """Stages of a network in order of evaluation: runs of blocks whose outputs have one spatial resolution.

    Blocks of a transformer (token sequences) and of a network on vectors are a stage each. Blocks without a
    weight matrix join the stage before them, and what follows the last pooling joins the last stage.

    Parameters
    ----------
    module : nn.Module
        In evaluation mode; it is only evaluated.
    example : Tensor of shape (B, ...)
    by_width : bool
        Whether another number of channels begins a stage, too.

    Returns
    -------
    list of list of str
        Module names, first stage first.
    """
    shapes: dict[str, torch.Size] = {}

    def see(name: str, _: nn.Module, output: Any) -> None:
        if isinstance(output, tuple | list) and output:
            output = output[0]
        if isinstance(output, Tensor):
            shapes.pop(name, None)  # order of the last call
            shapes[name] = output.shape

    _watch(module, example, _units(module), see)
    spatial = any(len(s) > 2 for s in shapes.values())
    stages: list[list[str]] = []
    last: tuple[int, ...] | None = None
    for name, shape in shapes.items():
        weighted = any(p.ndim > 1 for p in module.get_submodule(name).parameters())
        size = _resolution(shape, example)
        pooled = spatial and (len(shape) == 2 or size == (1, 1))
        kind = shape[1:] if by_width and size is not None else size
        if stages and (not weighted or pooled or (size is not None and kind == last)):
            stages[-1].append(name)
        else:
            stages.append([name])
        last = kind if len(shape) == 4 else last
    return stages


def _resolution(shape: torch.Size, example: Tensor) -> tuple[int, ...] | None:
    """Height and width of an activation, channels first or last; None for tokens and vectors."""
    if len(shape) != 4:
        return None
    return tuple(shape[1:3]) if channels_last(shape, example) else tuple(shape[2:])


def channels_last(shape: torch.Size, example: Tensor) -> bool:
    """Whether the channels of an activation (B, ?, ?, ?) seem to come last.

    That is where its first two sizes, and not its last two, have the proportion of those of the images (B, C, H, W),
    but for a rounded pixel.
    """
    proportion = example.shape[2] / example.shape[3] if example.ndim == 4 else 1.0
    first, last = abs(shape[2] - shape[3] * proportion), abs(shape[1] - shape[2] * proportion)
    return last < min(first, 1)


def tangent_prefixes(module: nn.Module, example: Tensor, layers: Any) -> list[str] | None:
    """Module names whose parameters are linearized; None means all.

    Parameters
    ----------
    module : nn.Module
        Network without head, in evaluation mode; it is only evaluated.
    example : Tensor of shape (B, ...)
    layers : {"head", "all"}, int, str or list of str
        Value of ``tangent_layers``: nothing but the head, all, this many last stages, or modules by name.

    Raises
    ------
    ValueError
        Anything else, and names of no module; the message lists the blocks of the network.
    """
    if isinstance(layers, str) and layers in ("all", "head"):
        return None if layers == "all" else []
    if isinstance(layers, Integral) and not isinstance(layers, bool):
        count = int(layers)
        if count < 0:
            raise ValueError(f"tangent_layers must be at least 0, got {count}.")
        stages = find_stages(module, example)
        if count >= len(stages):
            return None
        chosen = [name for stage in stages[len(stages) - count :] for name in stage]
    elif isinstance(layers, str):
        chosen = [layers]
    elif isinstance(layers, Sequence) and all(isinstance(p, str) for p in layers):
        chosen = list(layers)
    else:
        raise ValueError(
            "tangent_layers must be 'head', 'all', an int (number of last stages) or a list of module names, "
            f"got {layers!r}."
        )
    return _first_names(module, chosen)


def _first_names(module: nn.Module, chosen: Sequence[str]) -> list[str]:
    """The chosen names; for modules that have several, the one that tracing and named_parameters use too."""
    first = {id(m): name for name, m in module.named_modules()}
    modules = dict(module.named_modules(remove_duplicate=False))
    names: dict[str, None] = {}  # a set in order
    for prefix in chosen:
        if not prefix or prefix not in modules:
            raise ValueError(
                f"tangent_layers names {prefix!r}, which is no module of the backbone. Blocks: {_units(module)}."
            )
        names[prefix] = None
        for m in modules[prefix].modules():
            name = first[id(m)]
            if not name.startswith(f"{prefix}."):
                names[name] = None
    return list(names)
