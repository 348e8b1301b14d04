"""Ordinary non-linear fine-tuning (NFT), tuned as an expert would: the opponent of the benchmarks."""

import time
from collections.abc import Sequence
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
    n_classes = int(codes.max()) + 1
    module, preprocessing = _network(n_classes, seed)
    generator = torch.Generator().manual_seed(seed)
    x = preprocessing.normalize(torch.from_numpy(X).permute(0, 3, 1, 2))
    y = torch.from_numpy(codes)
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
            batch = x[rows]
            if schedule.flips:
                mirrored = torch.rand(len(rows), generator=generator) < 0.5
                batch[mirrored] = batch[mirrored].flip(-1)
            optimizer.zero_grad()
            outputs = module(batch.contiguous(memory_format=torch.channels_last))
            nn.functional.cross_entropy(outputs, y[rows]).backward()
            optimizer.step()
            cycle.step()
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


def _validate(splits: Sequence[tuple[np.ndarray, np.ndarray]], schedule: Schedule) -> dict[str, Any]:
    start = time.process_time()
    accuracies, losses = [], []
    for seed, (X, codes) in enumerate(splits):
        fit, held_out = train_test_split(
            np.arange(len(codes)), test_size=max(VALIDATION, (codes.max() + 1) / len(codes)), stratify=codes,
            random_state=seed,
        )  # fmt: skip
        log_p = train(X[fit], codes[fit], schedule, seed)(X[held_out])
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
