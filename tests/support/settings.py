"""Everything global that the package might leave changed."""

import pickle
import random
import warnings
from typing import Any

import numpy as np
import torch
from torch import nn


def settings(filters: bool = True) -> dict[str, Any]:
    """Settings of torch, of numpy and of warnings, and the states of generators, by name.

    ``filters``: those of warnings, too; not among threads, for which `warnings.catch_warnings`, also that of
    scikit-learn, is not safe.
    """
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    found = {
        "threads": torch.get_num_threads(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()),
        "autocast": [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")] + [torch.get_autocast_dtype("cpu")],
        "device": torch.get_default_device(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, cuda.matmul.allow_tf32),
        "attention": (cuda.flash_sdp_enabled(), cuda.math_sdp_enabled(), cuda.mem_efficient_sdp_enabled()),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "forward mode": torch.autograd.forward_ad._current_level,
        "modules": (nn.Module.__call__, nn.Module.__getattr__),
        "warnings": list(warnings.filters) if filters else None,
        "numpy": np.geterr(),
        "generators": (random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().numpy().tobytes()),  # noqa: NPY002
    }
    if hasattr(cuda.matmul, "fp32_precision"):
        found["precision"] = (cuda.matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision)
    return found
