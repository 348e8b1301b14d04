"""Folders of images, one for each class.

Hides which files count as images, and how those that cannot be decoded are found.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.utils import Bunch

from .decoding import UnreadableError, decode
from .reading import checked_n_jobs

__all__ = ["load_image_folder"]

_EXTENSIONS = (
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
_NAMED = 10  # files that one message names
_BROKEN = ("raise", "skip", "ignore")


def load_image_folder(
    path: str | os.PathLike[str],
    *,
    categories: Sequence[str] | None = None,
    extensions: Sequence[str] | None = None,
    broken: str = "raise",
    n_jobs: int | None = None,
    return_X_y: bool = False,
) -> Any:
    """Find the images in a folder that has one sub-folder for each class.

    Each sub-folder is a class; images are taken from it and from all folders within it, in the order of their paths.
    Files and folders whose name begins with a dot, and files of other extensions, are ignored. In the manner of
    :func:`sklearn.datasets.load_files`, but nothing is held in memory: the paths are what the estimators read.

    Parameters
    ----------
    path : str or path-like
        The folder.
    categories : sequence of str, default=None
        Names of the sub-folders that are taken. None: all.
    extensions : sequence of str, default=None
        Extensions of images, such as ``[".jpg"]``; upper and lower case are the same. None: those of the usual formats
        (JPEG, PNG, WebP, TIFF, BMP, GIF, AVIF, JPEG 2000, PBM, PGM and PPM).
    broken : {"raise", "skip", "ignore"}, default="raise"
        What is done about files that cannot be decoded. ``"raise"``: an error that names up to ten of them. ``"skip"``:
        they are left out, with a warning that names them. Both decode each file once, one at a time for each thread.
        ``"ignore"``: no file is opened; the estimators raise when they come to one.
    n_jobs : int or None, default=None
        Threads that decode the files. None is 1 unless in a ``joblib.parallel_config``, -1 is one for each processor.
    return_X_y : bool, default=False
        Whether to return ``(paths, target)`` alone.

    Returns
    -------
    data : :class:`~sklearn.utils.Bunch`
        A dict whose entries are attributes, too.

        paths : ndarray of shape (n,)
            Paths of the images, as str.
        target : ndarray of shape (n,)
            Their classes, as int: places in `target_names`.
        target_names : list of str
            Names of the sub-folders that hold images, in sorted order.
    (paths, target) : tuple
        If `return_X_y`.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, or no image in it.
    ValueError
        If a parameter is not one of the above, the folder has no sub-folders, or files cannot be decoded.

    Warns
    -----
    UserWarning
        If sub-folders hold no image, images lie in no sub-folder, or there is one class alone.

    See Also
    --------
    ImageReader : Makes one array of paths.

    Examples
    --------
    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from PIL import Image
    >>> from sklearn_lqf import load_image_folder
    >>> with TemporaryDirectory() as folder:
    ...     for name in ("cat", "dog"):
    ...         Path(folder, name).mkdir()
    ...         Image.new("RGB", (8, 8)).save(Path(folder, name, "1.png"))
    ...     data = load_image_folder(folder)
    >>> data.target_names, data.target.tolist()
    (['cat', 'dog'], [0, 1])
    """
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"{str(root)!r} is no folder: pass the one that has a sub-folder for each class.")
    if broken not in _BROKEN:
        raise ValueError(f"broken must be one of {list(_BROKEN)}, got {broken!r}.")
    threads = checked_n_jobs(n_jobs)
    endings = _checked_extensions(extensions)
    files = {name: _images(root / name, endings) for name in _classes(root, categories)}
    _check_folders(root, files, endings)
    names = [name for name, found in files.items() if found]
    paths = [file for name in names for file in files[name]]
    target = np.repeat(np.arange(len(names)), [len(files[name]) for name in names])
    if broken != "ignore":
        sound = _sound(paths, threads, broken)
        paths, target = [file for file, good in zip(paths, sound, strict=True) if good], target[sound]
    if not paths:
        raise FileNotFoundError(f"{str(root)!r} has no image that can be decoded.")
    found = np.array(paths)
    return (found, target) if return_X_y else Bunch(paths=found, target=target, target_names=names)


def _checked_extensions(extensions: Sequence[str] | None) -> tuple[str, ...]:
    if extensions is None:
        return _EXTENSIONS
    if isinstance(extensions, str) or not extensions or not all(isinstance(e, str) for e in extensions):
        raise ValueError(f"extensions must be a sequence of str, such as ['.jpg'], got {extensions!r}.")
    return tuple("." + extension.lower().removeprefix(".") for extension in extensions)


def _classes(root: Path, categories: Sequence[str] | None) -> list[str]:
    """Names of the sub-folders that are taken."""
    there = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if categories is None:
        return there
    if isinstance(categories, str):
        raise ValueError(f"categories must be a sequence of names of sub-folders, got the str {categories!r}.")
    absent = sorted(set(categories) - set(there))
    if absent:
        raise ValueError(f"categories names {absent}, but the sub-folders of {str(root)!r} are {there}.")
    return sorted(set(categories))


def _images(folder: Path, extensions: tuple[str, ...]) -> list[str]:
    """Paths of the images in a folder and all those within it."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        shown = [name for name in files if not name.startswith(".") and name.lower().endswith(extensions)]
        found += [os.path.join(place, name) for name in shown]
    return sorted(found)


def _check_folders(root: Path, files: dict[str, list[str]], extensions: tuple[str, ...]) -> None:
    """Raise unless there are images in sub-folders; warn of what is left out."""
    stray = [p.name for p in root.iterdir() if p.is_file() and p.name.lower().endswith(extensions)]
    stray = [name for name in stray if not name.startswith(".")]
    if not any(files.values()):
        where = f", but {len(stray)} in itself: images lie in the folder of their class" if stray else ""
        raise FileNotFoundError(
            f"{str(root)!r} has no image in its {len(files)} sub-folders, each of which is to be a class{where}. "
            f"Extensions that are read: {', '.join(extensions)}."
        )
    empty = [name for name, found in files.items() if not found]
    if empty:
        _warn(f"{len(empty)} sub-folders of {str(root)!r} hold no image and are no class: {_listed(empty)}.")
    if stray:
        _warn(f"{len(stray)} images in {str(root)!r} itself are left out: images lie in the folder of their class.")
    if len(files) - len(empty) == 1:
        (name,) = (name for name, found in files.items() if found)
        within = " If its sub-folders are the classes, pass that folder." * any((root / name).glob("*/"))
        _warn(f"All images in {str(root)!r} are of one class, {name!r}; a classifier needs two.{within}")


def _sound(paths: list[str], threads: int, broken: str) -> np.ndarray:
    """Whether each file can be decoded; raises or warns if one cannot."""
    if threads == 1:
        problems = [_problem(file) for file in paths]
    else:
        with ThreadPoolExecutor(threads) as pool:
            problems = list(pool.map(_problem, paths))
    found = [problem for problem in problems if problem]
    if found:
        shown = "\n".join(found[:_NAMED]) + f"\nand {len(found) - _NAMED} more" * (len(found) > _NAMED)
        if broken == "raise":
            raise ValueError(
                f"{len(found)} of {len(paths)} files cannot be decoded:\n{shown}\nRepair or remove them, or leave them "
                "out by broken='skip'."
            )
        _warn(f"{len(found)} of {len(paths)} files cannot be decoded and are left out:\n{shown}")
    return np.array([problem is None for problem in problems])


def _problem(file: str) -> str | None:
    """Why a file cannot be decoded."""
    try:
        decode(file, repr(file), -1, 3)
    except (UnreadableError, FileNotFoundError) as error:
        return str(error)
    return None


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:_NAMED])) + f" and {len(names) - _NAMED} more" * (len(names) > _NAMED)


def _warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=4)
