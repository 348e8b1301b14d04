"""Tables of the pages on speed and scale for `_report.py`."""

import json
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
NOT_MEASURED = "not measured yet"

Rows = list[dict[str, Any]]


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) if rows else NOT_MEASURED


def read(name: str) -> dict[str, Any]:
    """A file of results; empty where it is not there."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def fit_table(rows: Rows) -> str:
    names = {
        "forward": "the network's own forward pass", "logistic": "logistic probe", "lqf": "LQF, defaults",
        "lqf, no tangents": "`tangents=None`", "lqf, mirrored": '`views=("identity", "flip")`',
        **{f"lqf, network tangents, {k}": f'`tangents="network", n_directions={k}`' for k in (1, 4, 8)},
    }  # fmt: skip
    found = []
    for r in rows:
        for key, name in names.items():
            cells = []
            for kind in ("", "_predict"):
                seconds = r[f"seconds{kind}"].get(key)
                cells += [f"{np.median(seconds):.1f}", f"{r[f'ratio{kind}'][key]:.2f}"] if seconds else ["", ""]
            found.append([name, *cells])
    n = f"{rows[0]['n']}, {rows[0]['n_predicted']}" if rows else ""
    header = [f"images: {n}", "fit, s", "over the forward pass", "predict, s", "over the forward pass"]
    return table(header, found)


def mib(size: float) -> str:
    """Bytes in MiB."""
    return f"{size / 2**20:.0f}"


def growth_table(rows: Rows) -> str:
    found = []
    before: dict[str, Any] = {}
    for r in rows:
        further = ""
        if r["varied"] == before.get("varied") and r["n"] > before["n"]:
            further = f"{1000 * (r['seconds'] - before['seconds']) / (r['n'] - before['n']):.1f}"
        amounts = [f"{r['seconds']:.1f}", f"{1000 * r['seconds'] / r['n']:.1f}", further]
        memory = [mib(r["host_bytes"]), mib(r["budget"]) if "budget" in r else ""]
        accuracy = f"{100 * r['accuracy']:.1f}" if "accuracy" in r else ""
        varied = f'`tangents="{r["tangents"]}"`, all layers' if "tangents" in r else r["varied"]
        cells = [varied, *(str(r[k]) for k in ("n", "classes", "size", "n_features", "solver"))]
        found.append([*cells, *amounts, *memory, accuracy, f"{r['ms_predict']:.1f}"])
        before = r
    header = ["varied", "images", "classes", "pixels", "features", "`solver_`", "seconds", "ms an image"]
    header += ["ms a further image", "memory, MiB", "budget, MiB", "held-out accuracy, %"]
    return table([*header, "ms to predict an image"], found)


def solver_table(rows: Rows) -> str:
    found = []
    for r in rows:
        for form in ("closed", "pcg"):
            part = r[form]
            name = f"closed form, {part['method']}" if form == "closed" else "conjugate gradients"
            cells = [f"{part['seconds']:.1f}", str(part.get("n_iter", "")), mib(part["host_bytes"])]
            agreement = ["", ""]
            if form == "pcg":
                agreement = [f"{r['largest_difference']:.1e}", f"{100 * r['same_class']:.1f}"]
            found.append([str(r["n"]), str(r["n_features"]), name, *cells, *agreement])
    header = ["images", "features", "solver", "seconds", "iterations", "memory, MiB"]
    return table([*header, "largest difference of outputs", "same class, %"], found)


def search_table(rows: Rows) -> str:
    found = [
        [f"`{r['tangents']!r}`".replace("'", '"'), str(r["n"]), str(r["fits"]), f"{r['seconds']['alone']:.0f}",
         f"{r['seconds']['shared']:.0f}", f"{r['ratio']:.2f}", f"{r['seconds']['path']:.0f}", f"{r['ratio_path']:.2f}",
         f"{r['largest_difference_of_scores']:.3f}, {r['largest_difference_of_path']:.3f}"]
        for r in rows
    ]  # fmt: skip
    header = ["`tangents`", "images", "fits", "without `memory`, s", "with it, s", "ratio", "`LQFClassifierCV`, s"]
    return table([*header, "ratio", "largest differences of scores"], found)


def distributed_table(rows: Rows) -> str:
    found = [
        [f'`"{r["tangents"]}"`', part, f"{r['seconds']['one'][key]:.1f}", f"{r['seconds']['two'][key]:.1f}",
         f"{r['speed_up'][key]:.2f}", f"{r['relative_difference']:.0e}"]
        for r in rows
        for key, part in (("read", "reading features"), ("fit", "whole fit"))
    ]  # fmt: skip
    header = ["`tangents`", "work", "one process, s", "two processes, s", "times faster"]
    return table([*header, "largest relative difference of `coef_`"], found)


def shared_table(rows: Rows) -> str:
    found = []
    for r in rows:
        parts = [max(s[part] for s in r["seconds"]) for part in ("read", "fit")]
        same = "yes" if all(r["same_on_all"].values()) else ", ".join(k for k, v in r["same_on_all"].items() if not v)
        as_one = "yes" if all(r["same_as_one"].values()) else ", ".join(k for k, v in r["same_as_one"].items() if not v)
        differences = [f"{r[f'difference_of_{k}']:.0e}" if r["processes"] > 1 else "" for k in ("coef", "decision")]
        names = [r["kind"], *(str(r[k]) for k in ("n_images", "n_features", "solver", "processes"))]
        memory = ", ".join(mib(b) for b in r["host_bytes"])
        found.append([*names, *(f"{p:.1f}" for p in parts), memory, *differences, same, as_one])
    header = ["features read", "images", "features", "`solver_`", "processes", "reading, s", "fit, s"]
    header += ["memory of each, MiB", "largest difference of `coef_`", "of decision values"]
    return table([*header, "the same on all", "status as of one"], found)


def predict_layers_table(rows: Rows) -> str:
    names = {
        "forward": "the network's own forward pass", "lqf": "LQF, defaults", "lqf, no tangents": "`tangents=None`",
        **{f"lqf, network tangents, layers {k}": f'`tangents="network", tangent_layers={v}`'
           for k, v in (("1", "1"), ("2", "2"), ("all", '"all"'))},
    }  # fmt: skip
    found = [
        [names[k], str(r["n_features"].get(k, "")), f"{r['images_a_second'][k]:.0f}", f"{r['ratio'][k]:.2f}",
         f"{1 / r['ratio'][k]:.2f}"]
        for r in rows
        for k in r["seconds"]
    ]  # fmt: skip
    n = rows[0]["n_predicted"] if rows else ""
    header = [f"images: {n}", "features", "images a second", "time over the forward pass"]
    return table([*header, "throughput over the forward pass"], found)


def predict_classes_table(rows: Rows) -> str:
    found = [
        ["the network's own forward pass" if k == "forward" else k, f"{r['images_a_second'][k]:.0f}", f"{v:.2f}"]
        for r in rows
        for k, v in r["ratio"].items()
    ]
    return table(["classes", "images a second", "time over the forward pass"], found)


def predict_paths_table(rows: Rows) -> str:
    names = {
        "decoding": "decoding alone", "forward": "the network's own forward pass alone",
        "decoding and forward": "both, one after the other", "array": "LQF, from an array",
    }  # fmt: skip
    found = [
        [names.get(k, f"LQF, from files, `{k}`"), f"{np.median(s):.2f}", f"{r['images_a_second'][k]:.0f}",
         f"{r['ratio_decoded'][k]:.2f}"]
        for r in rows
        for k, s in sorted(r["seconds"].items(), key=lambda item: item[0] not in names)
    ]  # fmt: skip
    return table(["", "seconds", "images a second", "time over decoding and forward pass"], found)


def batches_table(rows: Rows) -> str:
    found = []
    for r in rows:
        milliseconds = [1000 * float(np.median(s)) / r["n_predicted"] for s in r["seconds"].values()]
        found.append([str(r["size"]), *(f"{m:.1f}" for m in milliseconds), str(r["chosen"])])
    sizes = list(rows[0]["seconds"]) if rows else []
    return table(["pixels", *(f"{size} at once" for size in sizes), "the package takes"], found)


def module_table(rows: Rows) -> str:
    names = {
        "forward": "the network's own forward pass", "predict": "`decision_function`", "eager": "`to_module()`",
        "compiled": "`torch.compile(to_module())`", "program, compiled": "its program of `torch.export`, compiled",
        "onnxruntime": "its ONNX program, by onnxruntime",
    }  # fmt: skip
    found = []
    for r in rows:
        for name, label in names.items():
            made = r["made"].get(name, {})
            if "failed" in made:
                found.append([label, "", "", "", made["failed"].splitlines()[0].replace("|", "/")[:100]])
                continue
            amounts = [f"{r['images_a_second'][name]:.0f}", f"{r['ratio'][name]:.2f}"]
            extra = [f"{made['seconds_to_make']:.0f}", f"{made['largest_difference']:.0e}"] if made else ["", ""]
            found.append([label, *amounts, *extra])
    header = ["", "images a second", "time over the forward pass", "seconds to make"]
    return table([*header, "largest difference of outputs, relative"], found)


def alternatives_table(rows: Rows) -> str:
    """Seconds over those of LQF, and points of accuracy above it, means over the splits."""
    names = {
        "lqf": "LQF", "logistic": "logistic regression on the last features, penalty by cross-validation",
        "nft-last-stage": "fine-tuning of the last stage, the rest cached", "nft": "fine-tuning of all",
    }  # fmt: skip
    of = {(r["dataset"], r["split"], r["method"]): r for r in rows}
    found = []
    for dataset in dict.fromkeys(r["dataset"] for r in rows):
        for method, name in names.items():
            splits = [s for d, s, m in of if d == dataset and m == method and (d, s, "lqf") in of]
            pairs = [(of[dataset, s, method], of[dataset, s, "lqf"]) for s in splits]
            if not pairs:
                continue
            seconds = np.mean([a["cpu_seconds"] for a, _ in pairs])
            accuracy = 100 * np.mean([a["accuracy"] for a, _ in pairs])
            less = 100 * np.mean([a["accuracy"] - b["accuracy"] for a, b in pairs])
            ratio = np.mean([a["cpu_seconds"] / b["cpu_seconds"] for a, b in pairs])
            cells = [f"{seconds:.1f}", f"{ratio:.1f}", f"{accuracy:.1f}", "" if method == "lqf" else f"{less:+.1f}"]
            found.append([dataset, str(pairs[0][0]["n_train"]), name, *cells])
    header = ["data", "images", "method", "seconds of a fit", "over those of LQF"]
    return table([*header, "accuracy, %", "minus that of LQF"], found)


def precision_table(rows: Rows) -> str:
    """Means over the splits of a data set."""
    found = []
    for dataset in dict.fromkeys(r["dataset"] for r in rows):
        mine = [r for r in rows if r["dataset"] == dataset]
        cells = [
            f"{np.mean([r[kind][name] for r in mine]) * factor:.{digits}f}"
            for name, factor, digits in (("seconds_fit", 1, 1), ("seconds_predict", 1, 1), ("accuracy", 100, 2))
            for kind in ("full", "bfloat16")
        ]
        found.append([dataset, *cells, f"{100 * np.mean([r['agreement'] for r in mine]):.1f}"])
    header = [f"{what}, {kind}" for what in ("fit, s", "predict, s", "accuracy, %") for kind in ("full", "bfloat16")]
    return table(["data", *header, "same class, %"], found)


def small_table(rows: Rows) -> str:
    found = [
        [r["phase"], *(f"{r[k]:.2f}" if r[k] or r["phase"] != "import" else "" for k in ("first", "second"))]
        for r in rows
    ]
    return table(["phase", "first fit of a process, s", "second, s"], found)


def faults_table(report: dict[str, Any]) -> str:
    killed = {"killed": "killed (SIGKILL) in the middle of the reading", "ended": "not disturbed"}
    rows = []

    def add(r: dict[str, Any], what: str, says: str) -> None:
        left = [*r.get("left_behind", []), *r.get("left_afterwards", [])]
        if "message" in r and "left_behind" not in r:  # not measured, or without an answer
            rows.append([what, str(r["n"]), "", says, ""])
            return
        size = r.get("bytes_of_files")
        rows.append([what, str(r["n"]), mib(sum(size)) if size else "", says, ", ".join(left) or "nothing"])

    def short(message: str) -> str:
        return message.replace("|", "/").partition(": make room")[0].partition(" (timeout of")[0]

    for r in report.get("killed", []):
        add(r, killed[r["way"]], f"exit code {r['exit_code']}")
    for r in report.get("disk", []):
        kept = [r.get("same_data"), r.get("same_parameters"), r.get("fits_afterwards")]
        as_before = "; data and parameters as before, fits again" if all(kept) else ""
        add(r, f"disk: {r['way']}", f"{short(r.get('message', ''))}{as_before}")
    for r in report.get("process", []):
        seconds = f"after {r['seconds']:.1f} s of at most {r['timeout']}: " if "seconds" in r else ""
        add(r, f"process {r['killed']} of two killed while it reads", f"{seconds}{short(r.get('message', ''))}")
    return table(["what happens", "images", "on the disk then, MiB", "what the fit says", "left behind"], rows)


def versions_table(rows: Rows) -> str:
    data = {"trashnet": "TrashNet", "digits": "digits"}
    work = {
        "fit": "fit", "predict": "prediction of {n_predicted} images", "search": "grid search, 18 fits",
        "search with memory": "the same with `memory`", "path": "`LQFClassifierCV`, the same penalties and folds",
    }  # fmt: skip
    found = []
    for r in rows:
        for key, seconds in r["seconds"].items():
            now, before = (float(np.median(s)) for s in seconds.values())
            accuracy = ", ".join(f"{100 * a:.1f}" for a in r["accuracy"].values()) if key == "predict" else ""
            cells = [data[r["data"]], str(r["n_train"]), str(r["size"]), work[key].format(**r)]
            found.append([*cells, f"{before:.1f}", f"{now:.1f}", f"{r['ratio'][key]:.2f}", accuracy])
    header = ["images", "number", "pixels", "work", "version 0.1, s", "this version, s", "ratio"]
    return table([*header, "accuracy, %: this version, 0.1"], found)


def newcomer_table(report: dict[str, Any]) -> str:
    commands = {
        "install": "installation, by the first of these commands", "demo": "`make demo`",
        "first fit": "the program above, its imports and the score included", "tests": "`make test`",
    }  # fmt: skip
    steps = report.get("steps", {})
    rows = [[commands[k], f"{v['seconds']:.0f}", v["last_line"].strip("= ")] for k, v in steps.items()]
    return table(["step", "seconds", "what it says last"], rows)


def tables() -> dict[str, str]:
    """All tables by the names of their places."""
    speed, predict, distributed = read("speed-cpu"), read("predict-cpu"), read("distributed")
    return {
        "fits": fit_table(speed.get("fit", [])),
        "growth": growth_table(speed.get("growth", [])),
        "solvers": solver_table(speed.get("solver", [])),
        "search": search_table(speed.get("search", [])),
        "predict-layers": predict_layers_table(predict.get("layers", [])),
        "predict-classes": predict_classes_table(predict.get("classes", [])),
        "predict-paths": predict_paths_table(predict.get("paths", [])),
        "predict-batches": batches_table(predict.get("batches", [])),
        "predict-module": module_table(predict.get("module", [])),
        "precision": precision_table(read("precision").get("rows", [])),
        "small": small_table(read("small").get("rows", [])),
        "alternatives": alternatives_table(read("alternatives").get("rows", [])),
        "versions": versions_table(read("versions").get("rows", [])),
        "faults": faults_table(read("faults")),
        "newcomer": newcomer_table(read("newcomer")),
        "distributed": distributed_table(distributed.get("rows", [])),
        "shared": shared_table(distributed.get("shared", [])),
    }
