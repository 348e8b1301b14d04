"""What is left behind when a fit of many images ends badly: killed, without room on the disk, without its partner.

All fits are of digits enlarged to 32 pixels, whose features are forced to the disk: a fit is told that the machine has
64 MiB of memory, so that its budget is a quarter of that. TMPDIR is an empty folder, or a small file system of its own
where one may be mounted. Each fit runs in a process of its own. Results are kept after each measurement, and a run that
was stopped goes on where it was.

    python benchmarks/faults.py [--only killed disk process] [--images 20000] [--disk-images 2000]
"""

import argparse
import contextlib
import hashlib
import multiprocessing
import os
import resource
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from _timing import BACKBONE, RESULTS, Report, repeated_digits, said

from sklearn_lqf import LQFClassifier
from sklearn_lqf.runtime import memory, tables

IMAGES, DISK_IMAGES, SIZE = 20000, 2000, 32
PRETENDED = 64 << 20  # bytes of memory of the machine that a fit is told
ROW_BYTES = 1 << 15  # of the features of an image, about
TIMEOUT, PATIENCE = 20, 300  # seconds: of the group of processes, and until a process is given up
_ITERATIONS = 3  # of a fit that ends: what is measured is not its solution
_FILLER = "of-another-program"
_PROCESSES = multiprocessing.get_context("spawn")


# --------------------------------------------------------------------------------------- in the process of a fit


def prepare(folder: str) -> None:
    """One thread, little memory, and temporary files in a folder."""
    torch.set_num_threads(1)
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    memory.machine_memory = lambda *args: PRETENDED


def classifier(**execution: Any) -> LQFClassifier:
    """One that takes conjugate gradients, since no closed form fits the budget."""
    return LQFClassifier(
        BACKBONE, image_shape=(8, 8), image_size=SIZE, prior="equal", max_iter=_ITERATIONS,
        execution={"device": "cpu", **execution},
    )  # fmt: skip


def watch(see: Callable[[int], None]) -> None:
    """Call ``see(rows)`` after each batch of features that is kept."""
    append = tables.RowTable.append

    def seen(table: tables.RowTable, rows: np.ndarray) -> None:
        append(table, rows)
        see(table._filled)

    tables.RowTable.append = seen


def fit_watched(n: int, folder: str, rows: Any, link: Connection) -> None:
    """A fit that says how many rows were read; and, if it comes to its end, how it went."""
    prepare(folder)
    watch(lambda filled: setattr(rows, "value", filled))
    estimator = classifier()
    estimator.fit(*repeated_digits(n))
    link.send({"solver": estimator.solver_, "n_features": estimator.coef_.shape[1]})


def fill_up(folder: str) -> Callable[[int], None]:
    """Take all room that a file system has, when something was read for the first time."""
    path, done = Path(folder) / _FILLER, list[int]()

    def fill(rows: int) -> None:
        done.append(rows)
        if len(done) > 1:
            return
        with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)) == size:
                        pass

    return fill


def fit_without_room(n: int, folder: str, way: str, link: Connection) -> None:
    """A fit that finds no room: what it says, and how it leaves the user's data and the estimator."""
    prepare(folder)
    X, y = repeated_digits(n)
    estimator = classifier()
    estimator.fit(X[:20], y[:20])  # that of before
    parameters, digest = repr(estimator.get_params()), _digest(X, y)
    if way == "filled while it reads":
        watch(fill_up(folder))
    if way == "a limit to the size of files":
        resource.setrlimit(resource.RLIMIT_FSIZE, (n * ROW_BYTES // 2, resource.RLIM_INFINITY))
    try:
        estimator.fit(X, y)
        message = "no error"
    except Exception as error:
        message = said(error).replace(folder, "TMPDIR")
    (Path(folder) / _FILLER).unlink(missing_ok=True)
    fitted = sorted(k for k in vars(estimator) if k.endswith("_") and not k.startswith("_"))
    found = {
        "message": message,
        "same_data": _digest(X, y) == digest,
        "same_parameters": repr(estimator.get_params()) == parameters,
        "fitted_attributes": fitted,
        "left_behind": os.listdir(folder),
        "bytes_left_behind": _used(folder),
    }
    estimator.fit(X[:20], y[:20])
    link.send({**found, "fits_afterwards": hasattr(estimator, "coef_")})


def _digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()


def _used(folder: str) -> int | None:
    """Bytes in use of a file system of its own; None where the folder is none."""
    if not os.path.ismount(folder):
        return None
    found = os.statvfs(folder)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def fit_shared(rank: int, n: int, folder: str, group: str, rows: Any, link: Connection) -> None:
    """A fit of two processes."""
    prepare(folder)
    read_at = [time.time()]

    def see(filled: int) -> None:
        rows.value, read_at[0] = filled, time.time()

    store = dist.FileStore(group, 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT))
    watch(see)
    try:
        classifier(distributed=True).fit(*repeated_digits(n))
        message = "no error"
    except Exception as error:
        message = said(error)
    link.send({"message": message, "ended_at": time.time(), "read_at": read_at[0]})
    os._exit(0)  # a group without its partner waits when it is destroyed


# ------------------------------------------------------------------------------------------------- around it


def start(function: Callable[..., None], *args: Any) -> tuple[BaseProcess, Connection]:
    """A process, and where it sends what it found."""
    mine, its = _PROCESSES.Pipe(duplex=False)
    process = _PROCESSES.Process(target=function, args=(*args, its), daemon=True)
    process.start()
    its.close()
    return process, mine


def outcome(process: BaseProcess, link: Connection) -> dict[str, Any]:
    """What a process sent; or that it sent nothing."""
    found: dict[str, Any] = {}
    with contextlib.suppress(EOFError):
        found = link.recv() if link.poll(PATIENCE) else {"message": f"nothing within {PATIENCE} s"}
    process.join(5)
    process.kill()
    process.join()
    return {"exit_code": process.exitcode, **found}


def wait_for(rows: Any, count: int, process: BaseProcess) -> None:
    """Return when so many rows were read."""
    end = time.monotonic() + PATIENCE
    while rows.value < count and process.is_alive() and time.monotonic() < end:
        time.sleep(0.01)


def open_files(process: BaseProcess, folder: str) -> list[int] | None:
    """Sizes of the files that a process has open in a folder, those without a name too; None if it cannot be seen."""
    found = []
    try:
        for link in Path(f"/proc/{process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if os.readlink(link).startswith(folder):
                    found.append(link.stat().st_size)
    except OSError:
        return None
    return found


@contextlib.contextmanager
def file_system(size: int) -> Iterator[str | None]:
    """A folder that is a file system of so many bytes; None where it cannot be mounted."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            yield None
            return
        try:
            yield folder
        finally:
            subprocess.run(["umount", folder], check=True)


def measure_killed(report: Report, args: argparse.Namespace) -> None:
    """Killed in the middle of the reading; and, for comparison, a smaller fit that comes to its end."""
    for way, n in (("killed", args.images), ("ended", args.images // 10)):
        if report.has("killed", way=way, n=n):
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows = _PROCESSES.Value("q", 0)
            process, link = start(fit_watched, n, folder, rows)
            wait_for(rows, n // 2, process)
            read, files = rows.value, open_files(process, folder)
            if way == "killed":
                os.kill(process.pid, signal.SIGKILL)
            found = outcome(process, link)
            left = os.listdir(folder)
        report.add("killed", way=way, n=n, rows_read=read, bytes_of_files=files, left_behind=left, **found)


def measure_disk(report: Report, args: argparse.Namespace) -> None:
    """No room from the beginning, none while it reads, and a limit to the size of files."""
    n = args.disk_images
    sizes = {
        "small from the beginning": n * ROW_BYTES // 2,
        "filled while it reads": 4 * n * ROW_BYTES,
        "a limit to the size of files": None,
    }
    for way, size in sizes.items():
        if report.has("disk", way=way, n=n):
            continue
        with tempfile.TemporaryDirectory() if size is None else file_system(size) as folder:
            if folder is None:
                report.add("disk", way=way, n=n, message="not measured: no file system may be mounted here")
                continue
            found = outcome(*start(fit_without_room, n, folder, way))
            report.add("disk", way=way, n=n, **found, left_afterwards=os.listdir(folder))


def measure_process(report: Report, args: argparse.Namespace) -> None:
    """One of two processes is killed while it reads; the other one's error."""
    n = args.disk_images
    for killed in (1, 0):
        if report.has("process", killed=killed, n=n):
            continue
        with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as folder:
            rows = [_PROCESSES.Value("q", 0) for _ in range(2)]
            group = str(Path(name) / "group")
            both = [start(fit_shared, rank, n, folder, group, rows[rank]) for rank in range(2)]
            wait_for(rows[killed], n // 8, both[killed][0])  # a quarter of its share
            read, files = rows[killed].value, open_files(both[killed][0], folder)
            os.kill(both[killed][0].pid, signal.SIGKILL)
            killed_at = time.time()
            ended = outcome(*both[killed])["exit_code"]
            found = outcome(*both[1 - killed])
            left = os.listdir(folder)
        if "ended_at" in found:
            found["seconds"] = round(found.pop("ended_at") - killed_at, 2)
            found["seconds_after_reading"] = round(found["seconds"] - max(found.pop("read_at") - killed_at, 0), 2)
        found |= {"exit_code_of_killed": ended, "rows_read": read, "bytes_of_files": files, "left_behind": left}
        report.add("process", killed=killed, n=n, timeout=TIMEOUT, **found)


MEASURES = {"killed": measure_killed, "disk": measure_disk, "process": measure_process}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="not read, the images are digits; make bench gives it to all benchmarks")
    parser.add_argument("--only", nargs="+", choices=list(MEASURES), default=list(MEASURES))
    parser.add_argument("--images", type=int, default=IMAGES, help="of the fit that is killed")
    parser.add_argument("--disk-images", type=int, default=DISK_IMAGES, help="of the other fits")
    parser.add_argument("--results", type=Path, default=RESULTS / "faults.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = Report(args.results, torch.device("cpu"), "faults", backbone=BACKBONE, size=SIZE, pretended=PRETENDED)
    for section in args.only:
        MEASURES[section](report, args)


if __name__ == "__main__":
    main()
