"""What the benchmarks of speed share: rows kept as they come, contenders in turns, peaks of memory, digits repeated."""

import argparse
import functools
import json
import multiprocessing
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import write_report
from sklearn.datasets import load_digits
from torch import Tensor, nn

from sklearn_lqf.backbones.loading import load_backbone
from sklearn_lqf.network.prepared import PreparedNetwork

RESULTS = Path(__file__).parent / "results"
BACKBONE = "efficientnet_lite0"
BATCH = 64
HELD_OUT = 500  # digits, the last: no training image is made of them
_ROUNDS_MIN, _ROUNDS_SECONDS = 3, 120  # rounds go on up to --repeats while they took less
_NOISE = 8  # gray levels, of repeated images
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_SAMPLED = 0.05  # seconds between two looks at the memory

Run = Callable[[], Any]


class Report:
    """Rows by section, written after each measurement."""

    def __init__(self, path: Path, device: torch.device, benchmark: str, **about: Any):
        self.path, self.device = path, torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self.content |= {"benchmark": benchmark, **about}
        threads = self.content.get("threads", torch.get_num_threads())
        if threads != torch.get_num_threads():  # which also decides whose seconds are counted
            raise SystemExit(f"{path} was measured with {threads} threads: use --threads {threads}, or other --results")

    def has(self, section: str, **key: Any) -> bool:
        """Whether a row is there."""
        return any(key.items() <= row.items() for row in self.rows(section))

    def add(self, section: str, **row: Any) -> None:
        """Keep a row."""
        self.rows(section).append(row)
        write_report(self.path, self.content, self.device)
        print(section, json.dumps(row), flush=True)

    def rows(self, section: str) -> list[dict[str, Any]]:
        """The rows of a section."""
        return self.content.setdefault(section, [])


def run_sections(
    parser: argparse.ArgumentParser, name: str, measures: dict[str, Callable[..., None]], **about: Any
) -> None:
    """Run the sections of a benchmark that its arguments name, on the device and with the threads that they name."""
    parser.add_argument("--only", nargs="+", choices=list(measures), default=list(measures))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each comparison")
    parser.add_argument(
        "--results", type=Path, help=f"file of the results, default: benchmarks/results/{name}-DEVICE.json"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    report = Report(args.results or RESULTS / f"{name}-{args.device}.json", device, name, **about)
    for section in args.only:
        measures[section](report, args, device)


def said(error: BaseException) -> str:
    """Kind and text of an error, without folders of this machine."""
    folder = str(Path(__file__).resolve().parents[1])
    return f"{type(error).__name__}: {error}".replace(folder, "").strip()


# ------------------------------------------------------------------------------------------------------ timing


def now(device: torch.device, wall: bool = False) -> float:
    """Seconds when all that was asked of the device is done; with one thread of a CPU, seconds of the processor.

    Those do not count other work on the machine; with several threads, of torch or of others (``wall``), they would
    count waiting for each other.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.perf_counter() if wall or torch.get_num_threads() > 1 else time.process_time()


def interleaved(
    contenders: dict[str, Run], repeats: int, device: torch.device, wall: bool = False
) -> dict[str, list[float]]:
    """Seconds of each contender in each round."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    begin = time.perf_counter()
    for done in range(repeats):
        if done >= _ROUNDS_MIN and time.perf_counter() - begin > _ROUNDS_SECONDS:
            break
        for name, run in contenders.items():
            start = now(device, wall)
            run()
            found[name].append(round(now(device, wall) - start, 6))
    return found


def ratios(seconds: dict[str, list[float]], base: str) -> dict[str, float]:
    """Medians over the rounds of what each takes over what ``base`` takes in the same round."""
    return {name: float(np.median(np.divide(s, seconds[base]))) for name, s in seconds.items()}


# ------------------------------------------------------------------------------------------------------ memory


def _held(name: str) -> int:
    """Bytes by a line of the status of this process."""
    return next(int(line.split()[1]) << 10 for line in _STATUS.read_text().splitlines() if line.startswith(name))


class Memory:
    """Memory of this process within a ``with``, above what it held before.

    Attributes
    ----------
    peak : int
        Most bytes. Pages of files that are mapped count, though the system may take them back.
    anonymous : int or None
        Most bytes without those, as seen now and then. None where the system does not say.
    """

    peak, anonymous = 0, None

    def __enter__(self) -> "Memory":
        self._known = _STATUS.exists()
        if self._known:
            try:
                _RESET.write_text("5")  # the peak begins here
                self._before = _held("VmRSS")
            except OSError:
                self._before = _held("VmHWM")
            self._least = self._most = _held("RssAnon")
            self._ended = threading.Event()
            self._thread = threading.Thread(target=self._look, daemon=True)
            self._thread.start()
        else:
            self._before = self._highest()
        return self

    def __exit__(self, *error: object) -> None:
        if self._known:
            self._ended.set()
            self._thread.join()
            self.anonymous = self._most - self._least
        self.peak = self._highest() - self._before

    def _look(self) -> None:
        while not self._ended.wait(_SAMPLED):
            self._most = max(self._most, _held("RssAnon"))

    def _highest(self) -> int:
        if self._known:  # the other figure begins, on Linux, with that of the parent process
            return _held("VmHWM")
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1 << 10)


def in_own_process(work: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """What a function returns that runs in a fresh process, whose peak of memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, args)


# ------------------------------------------------------------------------------------------------------ images


@functools.cache
def batch_for(size: int, device: torch.device) -> int:
    """Images that the package evaluates at once in the trunk; its opponents get batches of the same size."""
    backbone = load_backbone(BACKBONE)
    shape, preprocessing = (3, size, size), backbone.preprocessing
    network = PreparedNetwork(backbone, shape, "head", 0.0, False, preprocessing, torch.float32, device)
    return min(BATCH, network.rows_of_trunk()) if device.type == "cpu" else BATCH


def forward(module: nn.Module, preprocessing: Any, X: np.ndarray, device: torch.device) -> Tensor:
    """The network's own forward pass of images (n, H, W, C)."""
    with torch.inference_mode():
        parts = torch.from_numpy(X).permute(0, 3, 1, 2).split(batch_for(X.shape[1], device))
        normalized = (
            preprocessing.normalize(x.to(device)).contiguous(memory_format=torch.channels_last) for x in parts
        )
        return torch.cat([module(x) for x in normalized]).cpu()


def repeated_digits(n: int, held_out: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Raveled digits with a little noise, as often as it takes, and their labels.

    The last digits are held out: they are the others, for tests, and make no training image.
    """
    X, y = load_digits(return_X_y=True)
    X, y = (X[-HELD_OUT:], y[-HELD_OUT:]) if held_out else (X[:-HELD_OUT], y[:-HELD_OUT])
    rows = np.arange(n) % len(X)
    noise = np.random.default_rng(int(held_out)).integers(0, _NOISE, (n, X.shape[1]))
    return np.clip(X[rows] * (255 / 16) + noise, 0, 255).astype(np.uint8), y[rows]
