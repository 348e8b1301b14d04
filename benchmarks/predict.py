"""Prediction: what it takes over the network's own forward pass of the same images, and the model as a module.

By what is read of the network, by the number of classes, from a list of files, as a module of torch (eager, compiled,
and run by onnxruntime), and by the images of a batch. Contenders are timed in turns. Results are kept after each
measurement, and a run that was stopped goes on where it was.

    python benchmarks/predict.py --data-dir FOLDER [--only layers classes paths module batches] [--predicted 512]
"""

import argparse
import importlib.util
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from _common import DEFAULT_SIZE, read_folder, read_images, split
from _timing import BACKBONE, BATCH, Report, Run, batch_for, forward, interleaved, ratios, run_sections, said
from torch import Tensor

from sklearn_lqf import LQFClassifier
from sklearn_lqf.backbones.loading import load_backbone
from sklearn_lqf.images.reading import ImageInputs
from sklearn_lqf.network.prepared import PreparedNetwork

DATASET, PER_CLASS, PREDICTED = "trashnet", 10, 512
LAYERS: dict[str, dict[str, Any]] = {
    "lqf": {},
    "lqf, no tangents": {"tangents": None},
    **{
        f"lqf, network tangents, layers {k}": {"tangents": "network", "tangent_layers": k, "n_directions": 8}
        for k in (1, 2, "all")
    },
}
CLASSES, JOBS = (2, 10, 100, 1000), (1, 2)
BATCHED, BATCH_SIZES = {64: 384, 96: 192, 224: 64}, (64, 32, 16, 8, 4, 2, 1)  # pixels: images
_IMAGES_A_CLASS = 2  # of random labels

Outputs = Callable[[Tensor], Tensor]


def own_forward(X: np.ndarray, device: torch.device) -> Run:
    """The network's own forward pass of images (n, H, W, C), by plain torch."""
    backbone = load_backbone(BACKBONE)
    module = backbone.module.to(device, memory_format=torch.channels_last).eval()
    return lambda: forward(module, backbone.preprocessing, X, device)


def some_images(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images and codes to fit to, and other images to predict."""
    X, codes = read_images(DATASET, args.data_dir, args.size)
    train, test = split(codes, PER_CLASS, 0)
    return X[train], codes[train], X[np.random.default_rng(0).permutation(test)[: args.predicted]]


def summary(seconds: dict[str, list[float]], n: int) -> dict[str, Any]:
    """Seconds, images a second, and seconds over those of the forward pass."""
    throughput = {name: round(n / float(np.median(s)), 1) for name, s in seconds.items()}
    return {"n_predicted": n, "seconds": seconds, "images_a_second": throughput, "ratio": ratios(seconds, "forward")}


# ------------------------------------------------------------------------------------------- layers and classes


def measure_layers(report: Report, args: argparse.Namespace, device: torch.device) -> None:
    """By what is read of the network."""
    key = {"dataset": DATASET, "size": args.size}
    if report.has("layers", **key):
        return
    X, codes, X_test = some_images(args)
    fitted = {k: LQFClassifier(BACKBONE, execution={"device": device}, **v).fit(X, codes) for k, v in LAYERS.items()}
    contenders = {"forward": own_forward(X_test, device)}
    contenders |= {name: lambda e=e: e.predict(X_test) for name, e in fitted.items()}
    seconds = interleaved(contenders, args.repeats, device)
    features = {name: e.coef_.shape[1] for name, e in fitted.items()}
    report.add("layers", **key, **summary(seconds, len(X_test)), n_features=features)


def measure_classes(report: Report, args: argparse.Namespace, device: torch.device) -> None:
    """By the number of classes: random labels, and equal shares of all groups, which are quick to fit."""
    key = {"dataset": DATASET, "size": args.size, "classes": args.classes}
    if report.has("classes", **key):
        return
    X, _, X_test = some_images(args)
    contenders = {"forward": own_forward(X_test, device)}
    for count in args.classes:
        labels = np.arange(max(_IMAGES_A_CLASS * count, len(X))) % count
        images = X[np.random.default_rng(0).integers(0, len(X), len(labels))]
        estimator = LQFClassifier(BACKBONE, prior="equal", execution={"device": device}).fit(images, labels)
        contenders[str(count)] = lambda e=estimator: e.predict(X_test)
    seconds = interleaved(contenders, args.repeats, device)
    report.add("classes", **key, **summary(seconds, len(X_test)))


# ------------------------------------------------------------------------------------------------------- files


def measure_paths(report: Report, args: argparse.Namespace, device: torch.device) -> None:
    """From a list of photographs: while one or more threads decode, the network works. Seconds of the clock."""
    key = {"dataset": DATASET, "size": args.size, "jobs": args.jobs}
    if report.has("paths", **key):
        return
    paths, names = read_folder(args.data_dir / DATASET)
    train, test = split(np.unique(names, return_inverse=True)[1], PER_CLASS, 0)
    files = list(paths[np.random.default_rng(0).permutation(test)[: args.predicted]])
    estimators = {
        f"n_jobs={jobs}": LQFClassifier(BACKBONE, image_size=args.size, execution={"device": device, "n_jobs": jobs})
        for jobs in (None, *args.jobs)
    }
    for estimator in estimators.values():
        estimator.fit(list(paths[train]), names[train])

    def decode() -> np.ndarray:
        inputs = ImageInputs(files, image_size=args.size, in_channels=3, interpolation="bicubic")
        parts = [inputs.batch(i, min(i + BATCH, len(files))) for i in range(0, len(files), BATCH)]
        return torch.cat(parts).permute(0, 2, 3, 1).contiguous().numpy()

    X = decode()
    contenders: dict[str, Run] = {"decoding": decode, "forward": own_forward(X, device)}
    contenders["array"] = lambda: estimators["n_jobs=None"].predict(X)
    contenders |= {name: lambda e=e: e.predict(files) for name, e in estimators.items()}
    seconds = interleaved(contenders, args.repeats, device, wall=True)
    seconds["decoding and forward"] = [a + b for a, b in zip(seconds["decoding"], seconds["forward"], strict=True)]
    report.add(
        "paths", **key, **summary(seconds, len(files)), ratio_decoded=ratios(seconds, "decoding and forward"),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ module


def compiled(module: torch.nn.Module, x: Tensor) -> Outputs:
    """The module by inductor."""
    found = torch.compile(module, backend="inductor")
    with torch.inference_mode():
        found(x)  # which is when it is compiled
    return found


def compiled_program(module: torch.nn.Module, x: Tensor) -> Outputs:
    """The program of torch.export, which has forward operations alone, by inductor."""
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: batch},), strict=False)
    return compiled(program.module(), x)


def by_onnxruntime(module: torch.nn.Module, x: Tensor) -> Outputs:
    """The ONNX program by onnxruntime, on the CPU, with as many threads as torch."""
    absent = [name for name in ("onnxruntime", "onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if absent:
        raise ImportError(f"not installed: {', '.join(absent)}")
    import onnxruntime

    batch = torch.export.Dim("batch", min=1, max=1024)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.onnx"
        program = torch.onnx.export(
            module, (x,), dynamo=True, dynamic_shapes=({0: batch},), input_names=["images"], verbose=False
        )
        assert program is not None
        program.save(path)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


WAYS: dict[str, Callable[[torch.nn.Module, Tensor], Outputs]] = {
    "eager": lambda module, x: module,
    "compiled": compiled,
    "program, compiled": compiled_program,
    "onnxruntime": by_onnxruntime,
}


def outputs(function: Outputs, batches: list[Tensor]) -> Tensor:
    with torch.inference_mode():
        return torch.cat([function(x) for x in batches]).cpu()


def measure_module(report: Report, args: argparse.Namespace, device: torch.device) -> None:
    """The default model as a module, in whole batches; what could not be made says why."""
    batch = batch_for(args.size, device)
    key = {"dataset": DATASET, "size": args.size, "batch": batch}
    if report.has("module", **key):
        return
    X, codes, X_test = some_images(args)
    X_test = X_test[: len(X_test) // batch * batch]  # compiled programs are made for one size of a batch
    estimator = LQFClassifier(BACKBONE, execution={"device": device}).fit(X, codes)
    wanted = torch.from_numpy(estimator.decision_function(X_test))
    batches = [x.contiguous().to(device) for x in torch.from_numpy(X_test).permute(0, 3, 1, 2).split(batch)]
    contenders: dict[str, Run] = {
        "forward": own_forward(X_test, device),
        "predict": lambda: estimator.decision_function(X_test),
    }
    made: dict[str, Any] = {}
    logging.getLogger("torch").setLevel(logging.ERROR)
    for name, make in WAYS.items():
        start = time.perf_counter()
        try:
            function = make(estimator.to_module(), batches[0])
            difference = (outputs(function, batches) - wanted).abs().max() / wanted.abs().max()
        except Exception as error:  # of a compiler that is not there, of an operation that is not known, ...
            made[name] = {"failed": said(error)[:400]}
            continue
        made[name] = {
            "seconds_to_make": round(time.perf_counter() - start, 2), "largest_difference": float(difference)
        }  # fmt: skip
        contenders[name] = lambda f=function: outputs(f, batches)
    seconds = interleaved(contenders, args.repeats, device)
    report.add("module", **key, **summary(seconds, len(X_test)), made=made)


# ------------------------------------------------------------------------------------------------------ batches


def measure_batches(report: Report, args: argparse.Namespace, device: torch.device) -> None:
    """By the images that are evaluated at once, random ones, and how many of them the package takes by itself."""
    for size, n in BATCHED.items():
        key = {"size": size, "n_predicted": n}
        if report.has("batches", **key):
            continue
        X = np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
        estimator = LQFClassifier(BACKBONE, image_size=size, execution={"device": device})
        estimator.fit(X[:20], np.arange(20) % 2)

        def predict(count: int, estimator: LQFClassifier = estimator, X: np.ndarray = X) -> None:
            with mock.patch.object(PreparedNetwork, "rows_of_trunk", lambda _: count):
                estimator.predict(X)

        contenders: dict[str, Run] = {str(b): lambda b=b, p=predict: p(b) for b in BATCH_SIZES}
        seconds = interleaved(contenders, args.repeats, device)
        report.add("batches", **key, seconds=seconds, chosen=batch_for(size, device))


MEASURES = {
    "layers": measure_layers, "classes": measure_classes, "paths": measure_paths, "module": measure_module,
    "batches": measure_batches,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--predicted", type=int, default=PREDICTED, help="images")
    parser.add_argument("--size", type=int, default=DEFAULT_SIZE, help="pixels")
    parser.add_argument("--classes", type=int, nargs="+", default=list(CLASSES))
    parser.add_argument("--jobs", type=int, nargs="+", default=list(JOBS), help="n_jobs of the section paths")
    run_sections(parser, "predict", MEASURES, backbone=BACKBONE)


if __name__ == "__main__":
    main()
