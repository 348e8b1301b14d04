"""What a newcomer waits for: a fresh clone's installation, its demo, a first fit on a folder of photographs, its tests.

The first fit is the program of docs/start.md that reads a folder, as it stands there, in a process of its own. What is
cloned is the last commit. Seconds of installation depend on the way to a package index.

    python benchmarks/newcomer.py --data-dir FOLDER [--dataset trashnet]
"""

import argparse
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import read_folder, split, write_report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "newcomer.json"
PER_CLASS = 20
_PROGRAM = re.compile(r"^```python\n((?:(?!^```).)*load_image_folder.*?)^```$", re.M | re.S)


def link_images(source: Path, target: Path) -> int:
    """Some images of each class in folders by class; how many."""
    paths, names = read_folder(source)
    chosen = [Path(paths[i]) for i in split(names, PER_CLASS, 0)[0]]
    for path in chosen:
        (target / path.parent.name).mkdir(parents=True, exist_ok=True)
        (target / path.parent.name / path.name).symlink_to(path.resolve())
    return len(chosen)


def run(command: list[str], folder: Path) -> tuple[float, str]:
    """Seconds and the last line that was printed."""
    print(" ".join(command), flush=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    seconds = round(time.perf_counter() - start, 1)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return seconds, done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--dataset", default="trashnet", help="sub-folder of the data with one folder for each class")
    args = parser.parse_args()
    steps: dict[str, dict[str, Any]] = {}
    report = {"benchmark": "newcomer", "dataset": args.dataset, "cpus": os.cpu_count(), "steps": steps}
    with tempfile.TemporaryDirectory() as name:
        clone = Path(name) / "sklearn_lqf"
        run(["git", "clone", "-q", "--no-hardlinks", str(ROOT), str(clone)], ROOT)
        program = clone / "first_fit.py"
        program.write_text(_PROGRAM.findall((clone / "docs" / "start.md").read_text(encoding="utf-8"))[0])
        report["n"] = link_images(args.data_dir / args.dataset, clone / "images")
        for step, command in (
            ("install", ["make", ".venv/.installed"]),
            ("demo", ["make", "demo"]),
            ("first fit", [".venv/bin/python", program.name]),
            ("tests", ["make", "test"]),
        ):
            seconds, said = run(command, clone)
            steps[step] = {"seconds": seconds, "last_line": said}
            write_report(RESULTS, report, "cpu")
            print(step, seconds, said, flush=True)


if __name__ == "__main__":
    main()
