"""Ordinary non-linear fine-tuning (NFT), tuned as an expert would: the opponent of the benchmarks."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from sklearn_lqf.backbones.loading import load_backbone

BATCH = 16
MOMENTUM, WEIGHT_DECAY, WARM_UP = 0.9, 1e-4, 0.1
VALIDATION = 0.2  # part of the training images
FROZEN_RATES = (1e-3, 3e-3, 1e-2)
UNFROZEN_RATES = (3e-3, 1e-2, 3e-2)
_LAST_STAGE = 5  # the first block of the last run at one resolution: what `tangent_layers=1` linearizes


Train = Callable[[np.ndarray, np.ndarray, "Schedule", int], Any]


@dataclass(frozen=True)
class Schedule:
    """Learning rate at its peak, epochs, whether BatchNorm keeps its statistics, whether images are mirrored."""

    lr: float
    epochs: int
    frozen: bool
    flips: bool


def epochs(n: int) -> tuple[int, int]:
    """A short and a long schedule for n images."""
    for limit, short, long in ((100, 40, 100), (250, 25, 60), (600, 12, 25)):
        if n < limit:
            return short, long
    return 10, 20


def _network(n_classes: int, seed: int) -> tuple[nn.Module, Any]:
    backbone = load_backbone("efficientnet_lite0")
    generator = torch.Generator().manual_seed(seed)
    module = backbone.module.requires_grad_(True).to(memory_format=torch.channels_last)
    head = nn.Linear(module.classifier.in_features, n_classes)
    bound = head.in_features**-0.5
    for p in head.parameters():  # torch's own initialization, by a generator of its own
        nn.init.uniform_(p, -bound, bound, generator=generator)
    module.classifier = head
    return module, backbone.preprocessing


def train(X: np.ndarray, codes: np.ndarray, schedule: Schedule, seed: int) -> Any:
    """SGD with Nesterov momentum, one cycle of the learning rate; returns X -> log-probabilities."""
    module, preprocessing = _network(int(codes.max()) + 1, seed)
    generator = torch.Generator().manual_seed(seed)
    x = preprocessing.normalize(torch.from_numpy(X).permute(0, 3, 1, 2))

    def batch(rows: Tensor, mirrored: Tensor | None) -> Tensor:
        found = x[rows]
        if mirrored is not None:
            found[mirrored] = found[mirrored].flip(-1)
        return found.contiguous(memory_format=torch.channels_last)

    _descend(module, batch, torch.from_numpy(codes), schedule, generator)
    return _predictor(module, preprocessing)


def train_last_stage(X: np.ndarray, codes: np.ndarray, schedule: Schedule, seed: int) -> Any:
    """The same for the last stage and the head alone, BatchNorm frozen: what is before is evaluated once.

    Once more for the mirrored images, where the schedule has them.
    """
    module, preprocessing = _network(int(codes.max()) + 1, seed)
    generator = torch.Generator().manual_seed(seed)
    trunk = nn.Sequential(module.conv_stem, module.bn1, *module.blocks[:_LAST_STAGE]).eval()
    tail = nn.Sequential(
        *module.blocks[_LAST_STAGE:], module.conv_head, module.bn2, module.global_pool, module.classifier
    )
    x = preprocessing.normalize(torch.from_numpy(X).permute(0, 3, 1, 2))
    cached = []
    with torch.no_grad():
        for images in (x, x.flip(-1))[: 1 + schedule.flips]:
            parts = images.split(64)
            cached.append(torch.cat([trunk(p.contiguous(memory_format=torch.channels_last)) for p in parts]))

    def batch(rows: Tensor, mirrored: Tensor | None) -> Tensor:
        found = cached[0][rows]
        if mirrored is not None:
            found[mirrored] = cached[1][rows[mirrored]]
        return found.contiguous(memory_format=torch.channels_last)

    _descend(tail, batch, torch.from_numpy(codes), schedule, generator)
    return _predictor(module, preprocessing)


def _descend(
    module: nn.Module,
    batch: Callable[[Tensor, Tensor | None], Tensor],
    y: Tensor,
    schedule: Schedule,
    generator: torch.Generator,
) -> None:
    """Train a module, in place; ``batch`` gives its inputs by their rows, and which of them are mirrored."""
    optimizer = torch.optim.SGD(
        module.parameters(), lr=schedule.lr, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    n_batches = -(-len(y) // BATCH)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, schedule.lr, total_steps=schedule.epochs * n_batches, pct_start=WARM_UP, cycle_momentum=False
    )
    module.train(not schedule.frozen)
    for _ in range(schedule.epochs):
        for rows in torch.randperm(len(y), generator=generator).tensor_split(n_batches):
            mirrored = torch.rand(len(rows), generator=generator) < 0.5 if schedule.flips else None
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(batch(rows, mirrored)), y[rows]).backward()
            optimizer.step()
            cycle.step()
    module.eval()


def _predictor(module: nn.Module, preprocessing: Any) -> Callable[[np.ndarray], np.ndarray]:
    module.eval()

    def predict(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            parts: Sequence[Tensor] = torch.from_numpy(images).permute(0, 3, 1, 2).split(64)
            found = [module(preprocessing.normalize(p).contiguous(memory_format=torch.channels_last)) for p in parts]
        return torch.cat(found).log_softmax(1).double().numpy()

    return predict


def search(splits: Sequence[tuple[np.ndarray, np.ndarray]], flips: bool) -> tuple[Schedule, list[dict[str, Any]]]:
    """The schedule with the best accuracy on held-out parts of the training images, and all that was tried.

    Short schedules decide learning rate and BatchNorm; a long one then competes at the best of them.
    ``splits`` are training sets (X, codes), over which accuracies are averaged.
    """
    short, long = epochs(len(splits[0][1]))
    candidates = [Schedule(lr, short, True, flips) for lr in FROZEN_RATES]
    candidates += [Schedule(lr, short, False, flips) for lr in UNFROZEN_RATES]
    tried: list[dict[str, Any]] = [_validate(splits, s) for s in candidates]
    best = max(tried, key=_rank)
    tried.append(_validate(splits, Schedule(best["lr"], long, best["frozen"], flips)))
    best = max(tried, key=_rank)
    return Schedule(best["lr"], best["epochs"], best["frozen"], flips), tried


def _rank(row: dict[str, Any]) -> tuple[float, float]:
    return row["validation_accuracy"], -row["validation_log_loss"]


def best_rate(
    X: np.ndarray, codes: np.ndarray, schedules: Sequence[Schedule], method: Train = train
) -> tuple[Schedule, list[dict[str, Any]]]:
    """The schedule with the best accuracy on a held-out part of the training images, and all that was tried."""
    tried = [_validate([(X, codes)], schedule, method) for schedule in schedules]
    return schedules[tried.index(max(tried, key=_rank))], tried


def _validate(
    splits: Sequence[tuple[np.ndarray, np.ndarray]], schedule: Schedule, method: Train = train
) -> dict[str, Any]:
    start = time.process_time()
    accuracies, losses = [], []
    for seed, (X, codes) in enumerate(splits):
        fit, held_out = train_test_split(
            np.arange(len(codes)), test_size=max(VALIDATION, (codes.max() + 1) / len(codes)), stratify=codes,
            random_state=seed,
        )  # fmt: skip
        log_p = method(X[fit], codes[fit], schedule, seed)(X[held_out])
        accuracies.append(float((log_p.argmax(1) == codes[held_out]).mean()))
        p = np.exp(np.nan_to_num(log_p, nan=-50.0))
        p /= p.sum(1, keepdims=True)
        losses.append(float(log_loss(codes[held_out], p, labels=np.arange(p.shape[1]))))
    return {
        **asdict(schedule),
        "validation_accuracy": float(np.mean(accuracies)),
        "validation_log_loss": float(np.mean(losses)),
        "cpu_seconds": time.process_time() - start,
    }
