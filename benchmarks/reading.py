"""Reading: photographs in JPEG decoded and resized by one thread and by several.

The images of a folder are stored anew, as photographs of 500 x 400 pixels, and read in batches as a fit reads them,
with no network behind. Numbers of threads are timed in turns (1 2 1 2 ...), so that other work on the machine meets all
of them alike, and the fastest round of each is reported. Two figures tell what other work did to them: seconds of
processor time, and the speed-up of a control, hashing, which threads share without loss. Where the control gains
nothing from a second thread, the machine had no second processor to give. Before, untimed, the tensors of each number
of threads are compared with those of the first.

    python benchmarks/reading.py --data-dir FOLDER [--dataset caltech101] [--jobs 1 2] [--repeats 7]
"""

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from _common import read_folder, write_report
from PIL import Image, ImageOps
from torch import Tensor

from sklearn_lqf.images.digests import image_digest
from sklearn_lqf.images.reading import ImageInputs

RESULTS = Path(__file__).parent / "results"
STORED, QUALITY = (500, 400), 90  # width and height of the photographs, and what JPEG keeps of them
SIZE, BATCH = 224, 64
HASHED, HASHES = bytes(1 << 23), 32  # of the control


def photographs(source: Path, folder: Path, count: int) -> list[str]:
    """Paths of images stored anew, repeated where there are too few."""
    paths, _ = read_folder(source)
    made = []
    for index in range(count):
        path = folder / f"{index:04}.jpg"
        with Image.open(paths[index % len(paths)]) as image:
            ImageOps.fit(image.convert("RGB"), STORED).save(path, quality=QUALITY)
        made.append(str(path))
    return made


def read(paths: list[str], jobs: int, see: Callable[[Tensor], Any] = lambda batch: None) -> tuple[float, float, list]:
    """Seconds, seconds of all processors, and what is seen of the batches."""
    start, used = time.perf_counter(), time.process_time()
    inputs = ImageInputs(paths, image_size=SIZE, n_jobs=jobs)
    seen = [see(inputs.batch(row, row + BATCH)) for row in range(0, len(paths), BATCH)]
    return time.perf_counter() - start, time.process_time() - used, seen


def control(jobs: int) -> float:
    """Seconds that hashing takes."""
    start = time.perf_counter()
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda _: hashlib.blake2b(HASHED).digest(), range(HASHES)))
    return time.perf_counter() - start


def report(options: argparse.Namespace, seconds: dict, used: dict, controls: dict, loads: list[float]) -> None:
    """Write what was measured up to now."""
    first = options.jobs[0]
    rows: list[dict[str, Any]] = [
        {
            "n_jobs": jobs,
            "seconds": min(seconds[jobs]),
            "median_seconds": statistics.median(seconds[jobs]),
            "all_seconds": seconds[jobs],
            "processor_seconds": min(used[jobs]),
            "images_per_second": options.images / min(seconds[jobs]),
            "speedup": min(seconds[first]) / min(seconds[jobs]),
            "speedup_of_medians": statistics.median(seconds[first]) / statistics.median(seconds[jobs]),
            "speedup_of_control": min(controls[first]) / min(controls[jobs]),
        }
        for jobs in options.jobs
    ]
    found = {
        "dataset": options.dataset,
        "images": options.images,
        "stored": STORED,
        "image_size": SIZE,
        "batch_size": BATCH,
        "rounds": len(loads),
        "processors": os.cpu_count(),
        "load_average": {"lowest": min(loads), "highest": max(loads)},
        "same_tensors": True,  # asserted before
        "results": rows,
    }
    write_report(options.out, found, "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--dataset", default="caltech101")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of torch in the caller, which resize for one job"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "reading.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    seconds: dict[int, list[float]] = {jobs: [] for jobs in options.jobs}
    used: dict[int, list[float]] = {jobs: [] for jobs in options.jobs}
    controls: dict[int, list[float]] = {jobs: [] for jobs in options.jobs}
    loads = []
    with tempfile.TemporaryDirectory() as folder:
        paths = photographs(options.data_dir / options.dataset, Path(folder), options.images)
        expected, *others = (read(paths, jobs, image_digest)[2] for jobs in options.jobs)
        assert all(found == expected for found in others)  # the same tensors; the files are in memory from here on
        for _ in range(options.repeats):
            loads.append(os.getloadavg()[0])
            for jobs in options.jobs:
                wall, cpu, _ = read(paths, jobs)
                seconds[jobs].append(wall)
                used[jobs].append(cpu)
                controls[jobs].append(control(jobs))
                print(
                    f"n_jobs={jobs}: {wall:.2f} s, {cpu:.2f} s of processors, control {controls[jobs][-1]:.2f} s, "
                    f"load {loads[-1]:.1f}",
                    flush=True,
                )
            report(options, seconds, used, controls, loads)


if __name__ == "__main__":
    main()
