"""A pretended GPU: tensors that may not meet those of the CPU, nor become arrays, until they are moved."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

__all__ = ["PretendedGPU"]

_GPU, _CPU = torch.device("cuda", 0), torch.device("cpu")
_MOVES = {torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda}
_HOST_ONLY = {torch.Tensor.numpy, torch.Tensor.__array__}
_INDEXING = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}


class _OnGPU(torch.Tensor):
    """A tensor of the CPU that claims to be on the GPU."""


class PretendedGPU(TorchFunctionMode):
    """Within it the machine has a GPU, ``device="cuda"``, for which the CPU computes."""

    def __enter__(self) -> PretendedGPU:
        with ExitStack() as undo:
            for owner, name, value in (
                (torch.accelerator, "is_available", True),
                (torch.accelerator, "current_accelerator", _GPU),
                (torch.accelerator, "device_count", 1),
                (torch.cuda, "mem_get_info", (1 << 30, 1 << 30)),
            ):
                undo.enter_context(mock.patch.object(owner, name, return_value=value))
            self._undo = undo.pop_all()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._undo.close()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function == torch.Tensor.device.__get__:  # made anew each time it is asked for
            return _GPU if isinstance(args[0], _OnGPU) else _CPU
        if function is torch.Tensor.pin_memory:
            return args[0]
        if function is torch._has_compatible_shallow_copy_type:
            return isinstance(args[0], _OnGPU) == isinstance(args[1], _OnGPU)
        with torch._C.DisableTorchFunctionSubclass():
            if function in _MOVES:
                return self._move(function, args, kwargs)
            tensors = [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, torch.Tensor)]
            here = [v for v in tensors if v.ndim or isinstance(v, _OnGPU)]  # a number of the CPU may meet any tensor
            if function in _INDEXING:  # so may indices
                here = here[:1]
            on_gpu = [isinstance(v, _OnGPU) for v in here]
            name = getattr(function, "__name__", function)
            if any(on_gpu) and not all(v or not t.ndim for v, t in zip(on_gpu, here, strict=True)):
                raise RuntimeError(f"Expected all tensors to be on the same device, in {name}.")
            if any(on_gpu) and function in _HOST_ONLY:
                raise TypeError("can't convert cuda:0 device type tensor to numpy.")
            asked = kwargs.get("device")
            created = asked is not None and torch.device(asked).type == "cuda"
            if created:
                kwargs["device"] = _CPU
            found = function(*args, **kwargs)
            return self._marked(found) if created or any(on_gpu) else found

    def _move(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensor, *others = args
        target = _GPU if isinstance(tensor, _OnGPU) else _CPU
        if function is torch.Tensor.cpu:
            target, others = _CPU, []
        elif function is torch.Tensor.cuda:
            target, others = _GPU, []
        for value in [*others, kwargs.pop("device", None)]:
            if isinstance(value, str | torch.device):
                target = torch.device(value)
            elif isinstance(value, torch.Tensor):
                target = _GPU if isinstance(value, _OnGPU) else _CPU
        plain = [v for v in others if isinstance(v, torch.dtype | torch.Tensor)]
        found = tensor.as_subclass(torch.Tensor).to(*plain, **kwargs) if plain or kwargs else tensor
        return found.as_subclass(_OnGPU if target.type == "cuda" else torch.Tensor)

    def _marked(self, found: Any) -> Any:
        if isinstance(found, torch.Size):
            return found
        return tree_map(lambda v: v.as_subclass(_OnGPU) if isinstance(v, torch.Tensor) else v, found)
