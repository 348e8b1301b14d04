"""The stages of a network, which are runs of blocks at one resolution, and the parameters that are linearized.

Hides how stages are found without tracing: forward hooks record the shape of the output of each block.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from .rewrite import watch

__all__ = ["channels_last", "find_stages", "is_chosen", "refuse_tied", "tangent_names", "tangent_prefixes"]


def _units(module: nn.Module, prefix: str = "", total: int | None = None) -> list[str]:
    """Names of the blocks whose chain is the network: containers and wrappers are opened, blocks are not."""
    total = _size(module) if total is None else total
    names = []
    for name, child in module.named_children():
        full = f"{prefix}{name}"
        share = _size(child)
        if isinstance(child, nn.Sequential | nn.ModuleList) or (2 * share > total and _is_chain(child)):
            names += _units(child, f"{full}.", total)
        elif share:
            names.append(full)
    return names


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _is_chain(module: nn.Module) -> bool:
    """Whether a module has containers, or has a child with a large part of its parameters that has containers."""
    children = list(module.children())
    if any(isinstance(m, nn.Sequential | nn.ModuleList) for m in children):
        return True
    return any(5 * _size(m) > _size(module) and _is_chain(m) for m in children)


def find_stages(module: nn.Module, example: Tensor, by_width: bool = False) -> list[list[str]]:
    """Stages of a network in order of evaluation: runs of blocks whose outputs have one spatial resolution.

    In a transformer (token sequences), a network on vectors and a network with a single resolution each block is a
    stage. Blocks without a weight matrix belong to the stage before them, and blocks after the last pooling to the last
    stage.

    Parameters
    ----------
    module : nn.Module
        In evaluation mode; it is not changed.
    example : Tensor of shape (B, ...)
    by_width : bool
        Whether a stage also ends where the number of channels changes.

    Returns
    -------
    list of list of str
        Module names, first stage first.
    """
    shapes: dict[str, torch.Size] = {}

    def see(name: str, _: nn.Module, args: tuple, output: Any) -> None:
        while isinstance(output, tuple | list) and output:
            output = output[0]
        if isinstance(output, Tensor):
            shapes.pop(name, None)  # order of the last call
            shapes[name] = output.shape

    watch(module, example, _units(module), see)
    spatial = any(len(s) > 2 for s in shapes.values())
    sizes = {size for shape in shapes.values() if (size := _resolution(shape, example)) not in (None, (1, 1))}
    alike = len(sizes) == 1 and len(shapes) > 2  # for example a transformer whose tokens are in a map
    stages: list[list[str]] = []
    last: tuple[int, ...] | None = None
    for name, shape in shapes.items():
        weighted = any(p.ndim > 1 for p in module.get_submodule(name).parameters())
        size = _resolution(shape, example)
        pooled = spatial and (len(shape) == 2 or size == (1, 1))
        kind = shape[1:] if by_width and size is not None else size
        if stages and (not weighted or pooled or (size is not None and kind == last and not alike)):
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
    """Whether the last axis of an activation (B, ?, ?, ?) is probably that of the channels.

    This is so if the two sizes after B, and not the last two, have the proportion of height and width of the images
    (B, C, H, W), except for a rounded pixel.
    """
    proportion = example.shape[2] / example.shape[3] if example.ndim == 4 else 1.0
    first, last = abs(shape[2] - shape[3] * proportion), abs(shape[1] - shape[2] * proportion)
    return last < min(first, 1)


def tangent_prefixes(module: nn.Module, example: Tensor, layers: Any) -> list[str] | None:
    """Module names whose parameters are linearized; None means all.

    Parameters
    ----------
    module : nn.Module
        Network without head, in evaluation mode; it is not changed.
    example : Tensor of shape (B, ...)
    layers : {"head", "all"}, int, str or list of str
        Value of ``tangent_layers``: only the head, everything, this many last stages, or modules by name.

    Returns
    -------
    list of str or None

    Raises
    ------
    ValueError
        ``layers`` is something else, or names no module; the message lists the blocks of the network.
    """
    if isinstance(layers, str) and layers in ("all", "head"):
        return None if layers == "all" else []
    if isinstance(layers, Integral) and not isinstance(layers, bool):
        count = int(layers)
        if count < 0:
            raise ValueError(f"tangent_layers must be at least 0, got {count}.")
        stages = find_stages(module, example)
        if count > max(len(stages), 1) or not stages:
            warnings.warn(
                f"tangent_layers={count} takes all parameters of the backbone: it has {len(stages)} stages.",
                UserWarning,
                stacklevel=2,
            )
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
    """The chosen names; if a module has several names, the one that tracing and named_parameters use is added."""
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


def is_chosen(name: str, prefixes: Sequence[str] | None) -> bool:
    """Whether the name of a parameter, or of a module with a dot added, belongs to these modules; None means all."""
    return prefixes is None or any(name.startswith(f"{prefix}.") for prefix in prefixes)


def _owned_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters with their names, which begin with the first name of their module; tied parameters come repeatedly."""
    for prefix, m in module.named_modules():
        for name, p in m.named_parameters(recurse=False, remove_duplicate=False):
            yield (f"{prefix}.{name}" if prefix else name), p


def tangent_names(module: nn.Module, prefixes: list[str] | None) -> list[str]:
    """Names of the parameters that are linearized."""
    return [name for name, _ in _owned_parameters(module) if is_chosen(name, prefixes)]


def refuse_tied(module: nn.Module, prefixes: list[str] | None) -> None:
    """Raise if a parameter that is linearized is used under two names, chosen or not."""
    owners: dict[int, str] = {}
    for name, p in _owned_parameters(module):
        other = owners.setdefault(id(p), name)
        if other != name and (is_chosen(name, prefixes) or is_chosen(other, prefixes)):
            raise ValueError(
                f"Parameters {other!r} and {name!r} are tied (one tensor). Tied weights cannot be linearized "
                "apart: untie them, or choose tangent_layers that leave them in the frozen trunk."
            )
