"""Speed: Gauss-Newton products, the preconditioner, the solvers, whole fits, and how a fit grows.

Every figure is a ratio, or seconds beside those of an opponent, taken in one run: contenders are timed in turns
(a b c a b c ...), so that other work on the machine meets all of them alike. Contenders that should compute the same
vector are compared first, and a difference ends the run. Random images and random weights serve where only the time
matters. Results are kept after each measurement, and a run that was stopped goes on where it was.

    python benchmarks/speed.py --data-dir FOLDER [--only product kfac] [--networks resnet18] [--device cuda]
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import _nft
import numpy as np
import torch
from _common import DEFAULT_SIZE, SIZES, read_images, split, write_report
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp

from sklearn_lqf import LQFClassifier, LQFClassifierCV
from sklearn_lqf.backbones import load_backbone
from sklearn_lqf.head import orthogonal_head
from sklearn_lqf.kfac import KFAC
from sklearn_lqf.linearize import _full_precision
from sklearn_lqf.model import LinearModel
from sklearn_lqf.objective import Quadratic, build_kfac
from sklearn_lqf.problem import probe_outputs
from sklearn_lqf.solvers import SolverResult, Status, pcg, sgd

RESULTS = Path(__file__).parent / "results"
SECTIONS = ("product", "kfac", "solver", "fit", "growth", "search", "many")
BACKBONE = "efficientnet_lite0"  # with weights; the others have random ones
BATCHES = {  # (pixels, images) of one product; the position embedding of the ViT has one size
    BACKBONE: (128, 32), "resnet18": (128, 32), "resnet50": (128, 32), "mobilenet_v2": (128, 32),
    "convnext_tiny": (128, 32), "vit_b_16": (224, 8),
}  # fmt: skip
_WHOLE_ON_GPU_ONLY = ("vit_b_16",)  # "all" layers: more than a minute for each round on two cores
KFAC_NETWORKS = (BACKBONE, "resnet18", "resnet50", "mobilenet_v2", "convnext_tiny")
_FEW_OUTPUTS, _MANY_OUTPUTS = 10, 1000
_KFAC_IMAGES, _KFAC_BATCH, _KFAC_SIZE = 256, 64, 128
_ONE_BY_ONE = ("convnext_tiny",)  # at many outputs: Jacobians of its norms take minutes, so only few are measured
_RTOL = 1e-3  # of products that must agree, in float32
_ROUNDS_MIN, _ROUNDS_SECONDS = 3, 60  # rounds go on up to --repeats while they took less
PER_CLASS = 50
_ITERATIONS = 1000  # cap of the solver without K-FAC
_NEAR = (0.1, 0.01)  # of the objective at the optimum
_RATES = (1e-3, 3e-3, 1e-2)  # of Adam, in the units of the solver
_ADAM_BATCH = 64
_FIT_EPOCHS, _FIT_RATE, _FIT_ROUNDS, _PREDICTED = 25, 3e-3, 3, 512
GROWTH = [  # each varies one thing
    *({"varied": "images", "n": n} for n in (200, 1000, 5000)),
    *({"varied": "classes", "n": 1000, "classes": c} for c in (2, 10, 100, 1000)),
    *({"varied": "layers", "n": 200, "layers": k} for k in ("head", 1, 2, 4, "all")),
    *({"varied": "pixels", "n": 200, "size": s} for s in (64, 96, 128, 224)),
    *({"varied": "cache", "n": 1000, "size": 128, "layers": "all", "cache": c} for c in ("memory", "disk")),
]
_NOISE = 8  # gray levels, of repeated images
_SEARCH_ALPHAS, _SEARCH_FOLDS, _SEARCH_PER_CLASS = (1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0), 3, 20
_MANY, _MANY_SIZE, _MANY_BATCH = 20_000, 32, 512

Run = Callable[[], Any]


class Report:
    """Rows by section, written after each measurement."""

    def __init__(self, path: Path, device: torch.device):
        self.path, self.device = path, torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"benchmark": "speed"}
        threads = self.content.get("threads", torch.get_num_threads())
        if threads != torch.get_num_threads():  # which also decides whose seconds are counted
            raise SystemExit(f"{path} was measured with {threads} threads: use --threads {threads}, or other --results")

    def has(self, section: str, **key: Any) -> bool:
        """Whether a row is there."""
        return any(key.items() <= row.items() for row in self._rows(section))

    def add(self, section: str, **row: Any) -> None:
        """Keep a row."""
        self._rows(section).append(row)
        write_report(self.path, self.content, self.device)
        print(section, json.dumps(row), flush=True)

    def _rows(self, section: str) -> list[dict[str, Any]]:
        return self.content.setdefault(section, [])


# ------------------------------------------------------------------------------------------------------ timing


def now(device: torch.device) -> float:
    """Seconds when all that was asked of the device is done; with one thread of a CPU, seconds of the processor.

    Those do not count other work on the machine; with several threads they would count waiting for each other.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def interleaved(contenders: dict[str, Run], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each contender in each round."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    begin = time.perf_counter()
    for done in range(repeats):
        if done >= _ROUNDS_MIN and time.perf_counter() - begin > _ROUNDS_SECONDS:
            break
        for name, run in contenders.items():
            start = now(device)
            run()
            found[name].append(round(now(device) - start, 6))
    return found


def ratios(seconds: dict[str, list[float]], unit: str) -> dict[str, float]:
    """Median over the rounds of each contender's seconds over those of one."""
    return {name: float(np.median(np.divide(s, seconds[unit]))) for name, s in seconds.items() if name != unit}


# ---------------------------------------------------------------------------------------------------- products


class Outputs(nn.Module):
    """Trunk activations to outputs in one module, as code that knows no trunk would have it."""

    def __init__(self, model: LinearModel):
        super().__init__()
        network, standardization = model.network, model.standardization
        assert network is not None and standardization is not None
        self.tail, self.standardization = network.module, standardization
        self.head = nn.Linear(*reversed(network.weight.shape), device=network.weight.device)
        self.head.weight.data, self.head.bias.data = network.weight.clone(), network.bias.clone()
        self.names = [*(f"tail.{n}" for n in network.names), "head.weight", "head.bias"]
        self.points = [self.get_parameter(n) for n in self.names]

    def forward(self, activations: dict[str, Tensor]) -> Tensor:
        return self.head(self.standardization(self.tail(*activations.values())))

    def flat(self, parts: Sequence[Tensor | None]) -> Tensor:
        """One vector (P,) of tensors in the shapes of the parameters."""
        pairs = zip(parts, self.points, strict=True)
        return torch.cat([(torch.zeros_like(p) if x is None else x).reshape(-1) for x, p in pairs])

    def shaped(self, vector: Tensor) -> dict[str, Tensor]:
        """The reverse, by name."""
        parts = vector.split([p.numel() for p in self.points])
        return {n: x.view(p.shape) for n, x, p in zip(self.names, parts, self.points, strict=True)}


class Part:
    """The linearized part of a network on random images."""

    def __init__(self, name: str, size: int, layers: Any, sizes: Sequence[int], n_outputs: int, device: torch.device):
        backbone = load_backbone(name, "auto" if name == BACKBONE else None, random_state=0)
        self.model = LinearModel(
            backbone, (3, size, size), layers, 0.0, True, backbone.preprocessing, torch.float32, device
        )
        generator = torch.Generator().manual_seed(0)
        self.batches = [self.model.activations(torch.rand(k, 3, size, size, generator=generator)) for k in sizes]
        features = torch.cat([self.model.features(z) for z in self.batches])
        self.weights = torch.ones(len(features), device=device)
        self.model.standardize(features, self.weights)
        head = orthogonal_head(n_outputs, features.shape[1], generator)
        self.network = self.model.set_head(head, torch.zeros(n_outputs))
        self.outputs = Outputs(self.model)
        self.named = [{str(i): x for i, x in enumerate(z)} for z in self.batches]
        self.vector = torch.randn(self.network.n_parameters, generator=generator).to(device)

    def quadratic(self, kept: bool) -> Quadratic:
        """With targets of zero and hardly a penalty; whether points are kept between products."""
        targets = torch.zeros(len(self.weights), len(self.network.weight), device=self.weights.device)
        quadratic = Quadratic(self.network, self.batches, targets, self.weights, 1e-30)
        quadratic._free = 1 << 50 if kept else 0
        return quadratic

    def forward_backward(self) -> None:
        """What an ordinary step of training costs, without the step."""
        for z in self.named:
            torch.autograd.grad(self.outputs(z).square().mean(), self.outputs.points, allow_unused=True)

    def functional(self) -> Tensor:
        """The product by jvp and vjp of torch.func, which evaluate the network once each."""
        points = {n: p.detach() for n, p in zip(self.outputs.names, self.outputs.points, strict=True)}
        total = torch.zeros_like(self.vector)
        for z in self.named:

            def outputs(p: dict[str, Tensor], z: dict[str, Tensor] = z) -> Tensor:
                return functional_call(self.outputs, p, (z,))

            _, dot = jvp(outputs, (points,), (self.outputs.shaped(self.vector),))
            _, pull = vjp(outputs, points)
            total += self.outputs.flat(list(pull(dot)[0].values()))
        return total

    def curvlinops(self) -> Run:
        """The product of curvlinops; MSELoss has twice the identity as its Hessian."""
        from curvlinops import GGNLinearOperator  # the other sections do without it

        n, c = len(self.weights), len(self.network.weight)
        zeros = torch.zeros(n, c, device=self.weights.device).split([len(z["0"]) for z in self.named])
        operator = GGNLinearOperator(
            self.outputs, nn.MSELoss(reduction="sum"), self.outputs.points, list(zip(self.named, zeros, strict=True)),
            check_deterministic=False, num_data=n, batch_size_fn=lambda z: len(z["0"]),
        )  # fmt: skip
        return lambda: operator @ self.vector / 2

    def check(self, products: dict[str, Run]) -> dict[str, int]:
        """Raise unless all products are one vector, in the tail and in the head; peak memory of each in bytes."""
        device, tail = self.vector.device, self.network.slices["head.weight"].start
        found, peaks = {}, {}
        for name, run in products.items():
            before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            found[name] = run()
            if device.type == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated(device) - before
        reference = found["product"]
        for name, value in found.items():
            for part in (slice(0, tail), slice(tail, None)):
                error, size = float((value - reference)[part].norm()), float(reference[part].norm())
                assert error <= _RTOL * size, f"{name} differs from product: {error:.2e} of {size:.2e}"
        return peaks


def measure_products(report: Report, args: argparse.Namespace, device: torch.device) -> None:
    """One product over one forward and backward pass of the same part."""
    for name in args.networks or BATCHES:
        size, batch = BATCHES[name]
        for layers in (int(k) if k.isdigit() else k for k in args.layers):
            key = {"network": name, "layers": layers, "size": size, "batch": batch}
            slow = layers == "all" and name in _WHOLE_ON_GPU_ONLY and device.type == "cpu"
            if slow or report.has("product", **key):
                continue
            part = Part(name, size, layers, [batch], _FEW_OUTPUTS, device)
            fresh, kept = part.quadratic(False), part.quadratic(True)
            products = {
                "product": lambda fresh=fresh, v=part.vector: fresh.matvec(v),
                "product_kept": lambda kept=kept, v=part.vector: kept.matvec(v),
                "torch_func": part.functional,
                "curvlinops": part.curvlinops(),
            }
            with _full_precision():
                peaks = part.check(products)  # the first evaluation, which is not timed
                part.forward_backward()
                seconds = interleaved({"forward_backward": part.forward_backward, **products}, args.repeats, device)
            row = {"parameters": part.network.n_parameters, "kept_bytes": kept._point(0).nbytes, "peak_bytes": peaks}
            report.add("product", **key, **row, ratio=ratios(seconds, "forward_backward"), seconds=seconds)


def measure_kfac(report: Report, args: argparse.Namespace, device: torch.device) -> None:
    """The preconditioner over one forward and backward pass of all images."""
    for name in [n for n in KFAC_NETWORKS if n in (args.networks or KFAC_NETWORKS)]:
        for n_outputs in (_FEW_OUTPUTS, _MANY_OUTPUTS):
            key = {"network": name, "outputs": n_outputs, "size": _KFAC_SIZE, "n": _KFAC_IMAGES}
            if report.has("kfac", **key) or (name in _ONE_BY_ONE and n_outputs == _MANY_OUTPUTS):
                continue
            batches = [_KFAC_BATCH] * (_KFAC_IMAGES // _KFAC_BATCH)
            part = Part(name, _KFAC_SIZE, 1, batches, n_outputs, device)
            fresh, kept = part.quadratic(False), part.quadratic(True)
            kept.matvec(part.vector)
            probes = probe_outputs(len(part.weights), n_outputs).to(part.weights)
            built: list[KFAC] = []

            def build(part: Part = part, probes: Tensor = probes, built: list[KFAC] = built) -> None:
                built[:] = [build_kfac(part.network, part.batches, part.weights, probes)]

            def factorize(part: Part = part, built: list[KFAC] = built) -> None:
                unit = built[0].output_trace
                built[0].factorize(0.1 * unit / len(part.weights), torch.float32, 0.1 * unit)

            contenders = {
                "forward_backward": part.forward_backward,
                "build": build,
                "factorize": factorize,
                "apply": lambda built=built, v=part.vector: built[0](v),
                "product": lambda fresh=fresh, v=part.vector: fresh.matvec(v),
                "product_kept": lambda kept=kept, v=part.vector: kept.matvec(v),
            }
            with _full_precision():
                for run in contenders.values():
                    run()
                seconds = interleaved(contenders, args.repeats, device)
            ratio = ratios(seconds, "forward_backward")
            ratio |= {f"apply_over_{p}": ratios(seconds, p)["apply"] for p in ("product", "product_kept")}
            report.add("kfac", **key, parameters=part.network.n_parameters, ratio=ratio, seconds=seconds)


# ----------------------------------------------------------------------------------------------------- solvers


class Posed(LQFClassifier):
    """The estimator, which stops where it would solve: ``quadratic_`` and ``kfac_`` are what it would solve with."""

    def _solve(self, quadratic: Quadratic, preconditioner: KFAC, *_: Any) -> SolverResult:
        self.quadratic_, self.kfac_ = quadratic, preconditioner
        return SolverResult(torch.empty(0), Status.CONVERGED, 0, [1.0])

    def _set_solution(self, result: SolverResult) -> None:
        """Leaves the network in the units of the solver."""

    def fresh(self) -> Quadratic:
        """The quadratic without what products of others have kept."""
        q = self.quadratic_
        return Quadratic(q.network, q.batches, torch.cat(q.targets), torch.cat(q.weights), q.alpha)

    def preconditioner(self) -> KFAC:
        """Built and factorized as by fit; the network has the prior of its tail already."""
        q = self.quadratic_
        targets, weights = torch.cat(q.targets), torch.cat(q.weights)
        kfac = build_kfac(q.network, q.batches, weights, probe_outputs(*targets.shape).to(targets))
        return kfac.factorize(q.alpha, targets.dtype, self.damping * kfac.output_trace)


class Curve:
    """Excess of the objective over its minimum against seconds; the evaluations themselves are not counted."""

    def __init__(self, quadratic: Quadratic, minimum: float, limit: float, device: torch.device):
        self.quadratic, self.minimum, self.limit, self.device = quadratic, minimum, limit, device
        self.points: list[tuple[float, float]] = []
        self._not_counted = 0.0
        self._start = now(device)

    def seconds(self) -> float:
        return now(self.device) - self._start - self._not_counted

    def add(self, d: Tensor) -> bool:
        """Evaluate at d; true when it is near enough, or time is up."""
        seconds = self.seconds()
        start = now(self.device)
        excess = self.quadratic.value(d) / self.minimum - 1
        self._not_counted += now(self.device) - start
        self.points.append((round(seconds, 4), excess))
        return excess <= _NEAR[-1] / 10 or seconds > self.limit

    def within(self) -> dict[str, float | None]:
        """Seconds until the objective was near its minimum; None when it was not."""
        return {str(near): next((t for t, e in self.points if e <= near), None) for near in _NEAR}


def iterations(posed: Posed) -> dict[str, Any]:
    """Iterations of conjugate gradients to two tolerances: with K-FAC as in fit, from zero, and without."""
    quadratic, kfac = posed.quadratic_, posed.kfac_
    with mock.patch("sklearn_lqf.kfac._WHOLE_MAX", sys.maxsize):
        whole = posed.preconditioner()
    with mock.patch.object(posed, "damping", 0.0):
        undamped = posed.preconditioner()
    b = quadratic.rhs()
    found: dict[str, Any] = {}
    for name, precondition, start in (
        ("kfac", kfac, kfac.head_solution(b)),
        ("kfac_whole", whole, whole.head_solution(b)),  # no factor approximated
        ("kfac_undamped", undamped, undamped.head_solution(b)),
        ("kfac_from_zero", kfac, None),
        ("identity", lambda v: v, None),
    ):
        result = pcg(quadratic.matvec, b, precondition, 1e-3, _ITERATIONS, start=start)
        norms = result.residual_norms
        found[name] = {str(tol): next((i for i, r in enumerate(norms) if r <= tol), None) for tol in (1e-2, 1e-3)}
        found[name] |= {"first": norms[0], "last": norms[-1]}
    return found


def run_ours(posed: Posed, name: str, curve: Curve) -> None:
    """Conjugate gradients or the paper's optimizer, the preconditioner included."""
    kfac, quadratic = posed.preconditioner(), posed.fresh()
    b = quadratic.rhs()
    start = kfac.head_solution(b)
    if curve.add(start):
        return

    def see(_: int, __: float, x: Tensor) -> bool:
        return curve.add(x)

    if name == "pcg":
        pcg(quadratic.matvec, b, kfac, 1e-6, 200, see, start)
    else:
        generator, count = torch.Generator().manual_seed(0), len(quadratic.batches)
        sgd(quadratic.matvec, quadratic.batch_matvec, count, b, kfac, 1e-6, 1000, generator, see, start)


def run_adam(posed: Posed, rate: float, start: Tensor, curve: Curve) -> None:
    """Adam on the outputs of a functional jvp, the way published code trains linearized networks.

    It gets the same trunk activations, head and coordinates as the solver.
    """
    q, outputs = posed.quadratic_, Outputs(posed._model)
    points = {n: p.detach() for n, p in zip(outputs.names, outputs.points, strict=True)}
    inputs = [torch.cat(z) for z in zip(*q.batches, strict=True)]
    targets, weights = torch.cat(q.targets), torch.cat(q.weights)
    scale = torch.ones_like(start)
    scale[: q.network.slices["head.weight"].start] = q.network.tail_scale
    d = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([d], lr=rate)
    generator = torch.Generator().manual_seed(0)
    while True:
        for rows in torch.randperm(len(targets), generator=generator).split(_ADAM_BATCH):
            z = {str(i): x[rows] for i, x in enumerate(inputs)}
            _, dot = jvp(lambda p, z=z: functional_call(outputs, p, (z,)), (points,), (outputs.shaped(scale * d),))
            loss = (weights[rows] * (dot - targets[rows]).square().sum(1)).sum() * (len(targets) / len(rows))
            optimizer.zero_grad()
            (loss + q.alpha * d.square().sum()).backward()
            optimizer.step()
        # Evaluations cost as much as half an epoch: later ones are spread evenly over the logarithm of time.
        due = not curve.points or curve.seconds() > min(1.05 * curve.points[-1][0], curve.limit)
        if due and curve.add(d.detach()):
            return


def measure_solvers(report: Report, args: argparse.Namespace, device: torch.device) -> None:
    """Iterations, and the objective against seconds, on real images."""
    for dataset in ("trashnet", "digits"):
        wanted = ["iterations", "pcg", "sgd", *(f"adam {r:g}" for r in _RATES), "adam from the head's solution"]
        key = {"dataset": dataset, "per_class": PER_CLASS}
        if all(report.has("solver", **key, what=w) for w in wanted):
            continue
        size = SIZES.get(dataset, DEFAULT_SIZE)
        X, codes = read_images(dataset, args.data_dir, size)
        train, _ = split(codes, PER_CLASS, 0)
        posed = Posed(BACKBONE, device=device).fit(X[train], codes[train])
        judge = posed.quadratic_
        b = judge.rhs()
        head = posed.kfac_.head_solution(b)
        optimum = pcg(judge.matvec, b, posed.kfac_, 1e-6, 200, start=head)
        minimum = judge.value(optimum.x)
        key |= {"size": size, "n": len(train), "minimum": minimum, "minimum_residual": optimum.residual_norms[-1]}
        if not report.has("solver", dataset=dataset, what="iterations"):
            report.add("solver", **key, what="iterations", parameters=len(b), **iterations(posed))
        for what in wanted[1:]:
            if report.has("solver", dataset=dataset, what=what):
                continue
            curve = Curve(judge, minimum, args.limit, device)
            if what in ("pcg", "sgd"):
                run_ours(posed, what, curve)
            else:
                at_head = what == "adam from the head's solution"
                rate = best_rate(report, dataset) if at_head else float(what.split()[1])
                run_adam(posed, rate, head if at_head else torch.zeros_like(b), curve)
            report.add("solver", **key, what=what, within=curve.within(), limit=args.limit, curve=curve.points)


def best_rate(report: Report, dataset: str) -> float:
    """The learning rate with which Adam came furthest."""
    rows = [r for r in report.content["solver"] if r["dataset"] == dataset and r["what"].startswith("adam ")]
    return float(min(rows, key=lambda r: r["curve"][-1][1])["what"].split()[1])


# -------------------------------------------------------------------------------------------------- whole fits


def tune_tail(X: np.ndarray, codes: np.ndarray, device: torch.device) -> None:
    """Ordinary fine-tuning of the last stage alone, from cached activations of the trunk."""
    backbone = load_backbone(BACKBONE)
    model = LinearModel(backbone, (3, *X.shape[1:3]), 1, 0.0, False, backbone.preprocessing, torch.float32, device)
    found = [model.activations(x) for x in torch.from_numpy(X).permute(0, 3, 1, 2).split(64)]
    inputs = [torch.cat(z) for z in zip(*found, strict=True)]
    y = torch.from_numpy(codes).to(device)
    tail, head = model.split.tail, nn.Linear(model.split.n_features, int(codes.max()) + 1, device=device)
    parameters = [p.requires_grad_() for n, p in tail.named_parameters() if n in set(model.split.tangent)]
    parameters += head.parameters()
    optimizer = torch.optim.SGD(
        parameters, lr=_FIT_RATE, momentum=_nft.MOMENTUM, nesterov=True, weight_decay=_nft.WEIGHT_DECAY
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(_FIT_EPOCHS):
        for rows in torch.randperm(len(y), generator=generator).tensor_split(-(-len(y) // _nft.BATCH)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(tail(*(z[rows] for z in inputs))), y[rows]).backward()
            optimizer.step()


def last_features(module: nn.Module, preprocessing: Any, X: np.ndarray, device: torch.device) -> Tensor:
    """The network's own forward pass."""
    with torch.inference_mode(), _full_precision():
        parts = torch.from_numpy(X).permute(0, 3, 1, 2).split(64)
        normalized = (
            preprocessing.normalize(x.to(device)).contiguous(memory_format=torch.channels_last) for x in parts
        )
        return torch.cat([module(x) for x in normalized]).cpu()


def measure_fits(report: Report, args: argparse.Namespace, device: torch.device) -> None:
    """Whole fits and predictions beside those of fine-tuning and of a linear probe."""
    key = {"dataset": "trashnet", "per_class": PER_CLASS, "size": DEFAULT_SIZE}
    if report.has("fit", **key):
        return
    X, codes = read_images("trashnet", args.data_dir, DEFAULT_SIZE)
    train, test = split(codes, PER_CLASS, 0)
    X_test = X[np.random.default_rng(0).permutation(test)[:_PREDICTED]]
    X, codes = X[train], codes[train]
    backbone = load_backbone(BACKBONE)
    module = backbone.module.to(device, memory_format=torch.channels_last).eval()
    estimator = LQFClassifier(BACKBONE, device=device)

    def probe() -> None:
        loaded = load_backbone(BACKBONE)
        loaded.module.to(device, memory_format=torch.channels_last).reset_classifier(0)
        features = last_features(loaded.module, loaded.preprocessing, X, device).numpy()
        LogisticRegression(max_iter=1000).fit(features, codes)

    contenders: dict[str, Run] = {"lqf": lambda: estimator.fit(X, codes)}
    contenders["lqf_head"] = lambda: LQFClassifier(BACKBONE, tangent_layers="head", device=device).fit(X, codes)
    if device.type == "cpu":  # the opponent of the accuracy benchmark runs on the CPU alone
        schedule = _nft.Schedule(_FIT_RATE, _FIT_EPOCHS, frozen=True, flips=True)
        contenders["nft"] = lambda: _nft.train(X, codes, schedule, 0)
    contenders |= {"nft_tail": lambda: tune_tail(X, codes, device), "logistic": probe}
    contenders["predict"] = lambda: estimator.predict(X_test)
    contenders["forward"] = lambda: last_features(module, backbone.preprocessing, X_test, device)
    seconds = interleaved(contenders, min(args.repeats, _FIT_ROUNDS), device)
    ratio = {f"lqf_over_{n}": ratios(seconds, n)["lqf"] for n in ("nft", "nft_tail", "logistic") if n in seconds}
    ratio["predict_over_forward"] = ratios(seconds, "forward")["predict"]
    row = {"n": len(X), "n_predicted": len(X_test), "n_iter": estimator.n_iter_, "epochs": _FIT_EPOCHS}
    report.add("fit", **key, **row, ratio=ratio, seconds=seconds)


# ------------------------------------------------------------------------------------------------------ growth


def peak_memory() -> int:
    """Most bytes of host memory that this process has held."""
    status = Path("/proc/self/status")
    if status.exists():  # the other figure begins, on Linux, with that of the parent process
        return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if "VmHWM" in line)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1 << 10)


def repeated_digits(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Raveled digits with a little noise, as often as it takes, and their labels."""
    X, y = load_digits(return_X_y=True)
    rows = np.arange(n) % len(X)
    noise = np.random.default_rng(0).integers(0, _NOISE, (n, X.shape[1]))
    return np.clip(X[rows] * (255 / 16) + noise, 0, 255).astype(np.uint8), y[rows]


def grow(case: dict[str, Any], threads: int, device_name: str) -> dict[str, Any]:
    """Seconds and memory of one fit, in a process of its own."""
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    X, y = repeated_digits(case["n"])
    if case["varied"] == "classes":
        y = np.random.default_rng(0).permutation(case["n"]) % case["classes"]
    estimator = LQFClassifier(
        BACKBONE, image_shape=(8, 8), image_size=case["size"], tangent_layers=case["layers"],
        cache=case.get("cache", "auto"), device=device,
    )  # fmt: skip
    before, start = peak_memory(), now(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the number of iterations is reported
        estimator.fit(X, y)
    found = {"seconds": round(now(device) - start, 3), "host_bytes": peak_memory() - before}
    if device.type == "cuda":
        found["device_bytes"] = torch.cuda.max_memory_allocated(device)
    return {**found, "n_iter": estimator.n_iter_, "parameters": estimator.n_parameters_}


def measure_growth(report: Report, args: argparse.Namespace, device: torch.device) -> None:
    """One fit for each case, in fresh processes."""
    context = multiprocessing.get_context("spawn")
    for varied in GROWTH:
        case = {"classes": 10, "layers": 1, "size": 64, **varied}
        if not report.has("growth", **case):
            with context.Pool(1) as pool:
                found = pool.apply(grow, (case, args.threads, str(device)))
            report.add("growth", **case, **found)


# ------------------------------------------------------------------------------------- searches and many images


def measure_searches(report: Report, args: argparse.Namespace, device: torch.device) -> None:
    """A grid search with the trunk activations shared between its fits, and without, beside LQFClassifierCV."""
    X, codes = read_images("trashnet", args.data_dir, DEFAULT_SIZE)
    train, _ = split(codes, _SEARCH_PER_CLASS, 0)
    for layers in (1, "head"):
        key = {"dataset": "trashnet", "size": DEFAULT_SIZE, "n": len(train), "layers": layers}
        if report.has("search", **key):
            continue
        found: dict[str, Any] = {}
        seconds: dict[str, float] = {}
        with tempfile.TemporaryDirectory() as folder:
            for name, memory in (("shared", folder), ("alone", None)):
                estimator = LQFClassifier(BACKBONE, tangent_layers=layers, memory=memory, device=device)
                search = GridSearchCV(estimator, {"alpha": list(_SEARCH_ALPHAS)}, cv=_SEARCH_FOLDS, refit=False)
                start = now(device)
                found[name] = search.fit(X[train], codes[train]).cv_results_["mean_test_score"]
                seconds[name] = now(device) - start
        start = now(device)
        path = LQFClassifierCV(
            BACKBONE, tangent_layers=layers, alphas=_SEARCH_ALPHAS, cv=_SEARCH_FOLDS, device=device
        ).fit(X[train], codes[train])
        seconds["path"] = now(device) - start  # the final fit included
        found["path"] = path.cv_results_["mean_test_score"]
        difference = float(np.abs(found["shared"] - found["alone"]).max())
        ratio = seconds["shared"] / seconds["alone"]
        fits = len(_SEARCH_ALPHAS) * _SEARCH_FOLDS
        report.add(
            "search", **key, fits=fits, seconds=seconds, ratio=ratio, ratio_path=seconds["path"] / seconds["alone"],
            largest_difference_of_scores=difference,
            largest_difference_of_path=float(np.abs(found["path"] - found["alone"]).max()),
        )  # fmt: skip


def measure_many(report: Report, args: argparse.Namespace, device: torch.device) -> None:
    """Whether batches pay where a full pass is long: conjugate gradients and variance-reduced SGD on many images."""
    if report.has("many"):
        return
    X, y = repeated_digits(_MANY)
    posed = Posed(
        BACKBONE, image_shape=(8, 8), image_size=_MANY_SIZE, batch_size=_MANY_BATCH, device=device
    ).fit(X, y)  # fmt: skip
    curves = {}
    for what in ("pcg", "sgd"):
        curves[what] = Curve(posed.quadratic_, 1.0, 2 * args.limit, device)
        run_ours(posed, what, curves[what])
    # The minimum itself would take longer than both: the excess is that over the lowest value that was seen.
    lowest = 1 + min(excess for curve in curves.values() for _, excess in curve.points)
    for what, curve in curves.items():
        points = [(seconds, (1 + excess) / lowest - 1) for seconds, excess in curve.points]
        report.add("many", n=_MANY, size=_MANY_SIZE, batch_size=_MANY_BATCH, what=what, curve=points)


MEASURES = {
    "product": measure_products, "kfac": measure_kfac, "solver": measure_solvers, "fit": measure_fits,
    "growth": measure_growth, "search": measure_searches, "many": measure_many,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--networks", nargs="+", choices=list(BATCHES), help="of the sections product and kfac")
    parser.add_argument(
        "--layers", nargs="+", choices=("1", "all"), default=["1", "all"], help="of the section product"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7, help="rounds of each comparison")
    parser.add_argument("--limit", type=float, default=45, help="seconds after which a solver is stopped")
    parser.add_argument(
        "--results", type=Path, help="file of the results, default: benchmarks/results/speed-DEVICE.json"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for message in ("`torch.jit", "There is a performance drop"):  # of torch and curvlinops; nobody can act on them
        warnings.filterwarnings("ignore", message)
    device = torch.device(args.device)
    report = Report(args.results or RESULTS / f"speed-{args.device}.json", device)
    for section in args.only:
        MEASURES[section](report, args, device)


if __name__ == "__main__":
    main()
