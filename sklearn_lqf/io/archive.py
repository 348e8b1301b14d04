"""One file of a header and tensors: written as a whole or not at all, and read only as it was written.

Hides safetensors, which knows no checksum, and the ways in which a file can be broken. Nothing in a file is ever run.
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

FORMAT = 2  # of the header; 1 was that of version 0.1, whose model was another
_HEADER, _DIGEST = "sklearn_lqf", "digest"  # keys of the metadata of safetensors


def digest(tensors: Mapping[str, Tensor], *texts: str) -> str:
    """BLAKE2b of texts, and of names, dtypes, shapes and bytes of tensors, in hexadecimal digits."""
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
    """Write a header, of what JSON can hold, and tensors.

    A file that is there is replaced at the end, and is as it was when anything fails before.
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
    """Make a new name outlast a loss of power, where the system can."""
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
    """Header and tensors of a file that is what `save` has written."""
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
