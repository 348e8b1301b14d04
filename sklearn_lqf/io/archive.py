"""Files with a header and tensors: written as a whole or not at all, and refused if they were changed since.

Hides safetensors, which has no checksum, and the ways in which a file can be broken. Loading never runs code from a
file.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..versions import __version__

__all__ = ["FORMAT", "digest", "read_archive", "refusal", "write_archive"]

FORMAT = 2  # of the header; version 0.1, which had another model, wrote format 1
_HEADER, _DIGEST = "sklearn_lqf", "digest"  # keys of the metadata of safetensors


def digest(tensors: Mapping[str, Tensor], *texts: str) -> str:
    """BLAKE2b digest of texts, and of the names, dtypes, shapes and bytes of tensors.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        On any device; their order does not matter.
    *texts : str

    Returns
    -------
    str
        64 hexadecimal digits.
    """
    found = hashlib.blake2b(digest_size=32)
    for text in texts:
        found.update(f"{len(text)}:{text}".encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        found.update(f"{len(name)}:{name}{value.dtype}{tuple(value.shape)}".encode())
        if value.numel():
            found.update(cast(Any, value.reshape(-1).view(torch.uint8).numpy()))
    return found.hexdigest()


def write_archive(path: Path, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a file with a header and tensors.

    A file of this name is replaced at the end. If anything fails before, it stays as it was.

    Parameters
    ----------
    path : Path
        Its folder must exist. If it is a link, the file that it leads to is replaced.
    content : mapping of str to value
        The header, of values that JSON can hold. ``"format"`` and ``"version"`` are added.
    tensors : mapping of str to Tensor
        On any device.

    Raises
    ------
    FileNotFoundError
        There is no such folder.
    ImportError
        The package safetensors is missing.
    OSError
        The file cannot be written.
    ValueError
        The header has a number that is not finite.
    """
    header = json.dumps({"format": FORMAT, "version": __version__, **content}, allow_nan=False)
    save_file = _safetensors().save_file
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in tensors.items():
        found = value.cpu().contiguous()
        if found.untyped_storage().data_ptr() in storages:  # safetensors refuses tensors that share their memory
            found = found.clone()
        storages.add(found.untyped_storage().data_ptr())
        plain[name] = found
    path = Path(os.path.realpath(path.expanduser()))  # a link stays one
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{str(path)!r} cannot be written: there is no folder {str(path.parent)!r}.")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            mode = os.stat(file.fileno()).st_mode  # of a new file here; safetensors makes one for its owner alone
        save_file(plain, temporary, {_HEADER: header, _DIGEST: digest(plain, header)})
        os.chmod(temporary, mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the new name survive a power failure, on systems that can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError('save and load need safetensors: pip install "sklearn-lqf[save]".') from error
    return safetensors.torch


@contextmanager
def refusal(path: Path, why: str) -> Iterator[None]:
    """Turn whatever is raised into a ValueError that names the file and the cause."""
    try:
        yield
    except Exception as error:  # a file may be wrong in every way
        cause = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ValueError(f"The file {str(path)!r} cannot be loaded: {why} ({cause}).") from error


def read_archive(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file that `write_archive` has written.

    Parameters
    ----------
    path : Path

    Returns
    -------
    header : dict
        The header, with ``"format"`` and ``"version"``.
    tensors : dict of str to Tensor
        On the CPU.

    Raises
    ------
    ValueError
        The file is not one of `write_archive`, is damaged or was changed, or has another format.
    FileNotFoundError
        There is no such file.
    ImportError
        The package safetensors is missing.
    """
    load = _safetensors().load
    content = path.expanduser().read_bytes()
    with refusal(path, "it is no safetensors file, or it is broken"):
        tensors = load(content)
        size = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + size]).get("__metadata__") or {}
    refused = f"The file {str(path)!r} cannot be loaded: "
    text = metadata.get(_HEADER)
    if not isinstance(text, str) or _DIGEST not in metadata:
        raise ValueError(f"{refused}it was not written by save of an estimator of sklearn_lqf.")
    with refusal(path, "its header is broken"):
        header = json.loads(text)
        number, version = int(header["format"]), header["version"]
    if number != FORMAT:
        remedy = "install a newer version of sklearn_lqf"
        if number < FORMAT:
            remedy = "the model has changed since; fit it again, or load it with the version that wrote it"
        raise ValueError(
            f"{refused}sklearn_lqf {version} wrote it in format {number}; this is {__version__}, which reads format "
            f"{FORMAT}: {remedy}."
        )
    if digest(tensors, text) != metadata[_DIGEST]:
        raise ValueError(f"{refused}its content does not have the digest that it states; it was changed or damaged.")
    return header, tensors
