"""Fits shared by two and four processes against those of one; grid searches on a Dask cluster.

The other processes are started once for each number of them. They and the test process, which is rank 0, run all cases
in the same order.
"""

import contextlib
import io
import multiprocessing
import os
import pickle
import time
import traceback
import warnings
from datetime import timedelta

import joblib
import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from sklearn.model_selection import GridSearchCV
from support.data import make_images, merged, tiny_net

from sklearn_lqf import LQFClassifier
from sklearn_lqf.runtime.processes import ALONE, ProcessGroup, _message_device, default_group

X, Y = make_images(n=61)  # shares of 30 and 31
WEIGHTS = np.random.default_rng(0).integers(0, 3, len(X)) * 0.7  # a third of the rows is left out
BOTH = ("identity", "flip")
# Parameters, number of images, weights.
CASES = {
    "float64": ({}, len(X), False),
    "directions": ({"tangents": "both", "tangent_layers": "all", "sketch_size": 4}, len(X), True),
    "views and weights": ({"views": BOTH, "class_weight": "balanced", "prior": "evidence"}, len(X), True),
    "conjugate gradients": ({"solver": "pcg", "tol": 1e-10}, len(X), False),
    "more rows than features": ({"prior": "last"}, len(X), True),
    "few images": ({}, 4, False),
    "vectors": ({"backbone": "auto"}, len(X), True),
    "float32": ({"execution": {"dtype": "float32"}, "views": BOTH}, len(X), True),
}


def classifier(**parameters) -> LQFClassifier:
    return LQFClassifier(**merged({"backbone": tiny_net(), "execution": {"dtype": "float64"}}, parameters))


def shared(**parameters) -> LQFClassifier:
    return classifier(**merged({"execution": {"distributed": True}}, parameters))


def images(case: str) -> np.ndarray:
    return X.reshape(len(X), -1)[:, :8].astype(float) if case == "vectors" else X


def fit(case: str, **more) -> LQFClassifier:
    parameters, n, weighted = CASES[case]
    return classifier(**merged(parameters, more)).fit(images(case)[:n], Y[:n], WEIGHTS[:n] if weighted else None)


def answer(case: str, clf: LQFClassifier) -> dict[str, np.ndarray]:
    names = ("coef_", "intercept_", "alpha_", "noise_variance_", "temperature_")
    found = {name: np.array(getattr(clf, name)) for name in names}
    return {**found, "prior_": np.array(list(clf.prior_.values())), "decision": clf.decision_function(images(case))}


# -------------------------------------------------------------------------------- what both processes run


def group_operations(rank: int, folder) -> dict:
    group = default_group(torch.device("cpu"))
    summed = torch.tensor([1.0, rank], dtype=torch.float64)
    returned = group.all_reduce(summed)
    columns = torch.arange(6, dtype=torch.float64).view(2, 3).T  # not contiguous
    group.all_reduce(columns)
    group.check_same({"all": "equal", "tensors": [torch.ones(2), torch.tensor(3), torch.ones(2, dtype=torch.bfloat16)]})
    return {
        "size and rank": (group.size, group.rank),
        "share": group.share(7),
        "sum": (summed.tolist(), returned is summed),
        "columns": columns.tolist(),
        "rows": group.all_gather_rows(torch.full((1 + rank, 2, 2), float(rank)).mT).tolist(),
        "no rows": group.all_gather_rows(torch.arange(2 * rank)).tolist(),
        "together": group.together(divmod, 7, 2),
        "different": _message(lambda: group.check_same({"one": "same", "the others": str(rank)})),
    }


def a_file_that_one_cannot_read(rank: int, folder) -> str:
    paths = [folder / f"{i}.png" for i in range(12)]
    return _message(lambda: shared().fit(paths, Y[:12]))


def bars(rank: int, folder) -> bool:
    """Whether a verbose fit writes to stderr."""
    with contextlib.redirect_stderr(io.StringIO()) as written:
        shared(verbose=1).fit(X, Y)
    return bool(written.getvalue())


def _message(call) -> str:
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


ONES = np.ones(len(X))
# What differs on rank 1, or is wrong on both, and what each is told; the same where there is one message.
ERRORS = {
    "paper": (lambda rank: shared(model="paper").fit(X, Y), "does not support distributed=True"),
    "stored": (lambda rank: shared(store_data=True).fit(X, Y), "does not support distributed=True"),
    "seed": (lambda rank: shared(random_state=None).fit(X, Y), "must be an int"),
    "labels": (lambda rank: shared().fit(X, np.roll(Y, rank)), "the targets y of process(es) [1]"),
    "number": (lambda rank: shared().fit(X[rank:], Y[rank:]), "the numbers of images of process(es) [1]"),
    "lengths": (
        lambda rank: shared().fit(X, Y[rank:]),
        "Process 1: ValueError: Found input variables with inconsistent", "inconsistent numbers of samples",
    ),
    "weights": (lambda rank: shared().fit(X, Y, None if rank else ONES), "the sample weights of process(es) [1]"),
    "parameters": (lambda rank: shared(max_iter=100 + rank).fit(X, Y), "parameters of process(es) [1]"),
    "invalid": (
        lambda rank: shared(max_iter=rank).fit(X, Y),
        "'max_iter' parameter", "Process 0: InvalidParameterError: The 'max_iter' parameter",
    ),
    "network": (
        lambda rank: shared(backbone=tiny_net(seed=rank)).fit(X, Y), "the backbone's weights of process(es) [1]"
    ),
    "too few": (lambda rank: shared().fit(X, Y, np.arange(len(X)) == 1), "2 processes cannot share 1 image"),
}  # fmt: skip


@contextlib.contextmanager
def process_group(rank: int, folder, size: int, seconds: float = 60):
    store = dist.FileStore(str(folder / "group"), size)
    store.set(str(rank), "is there")  # a process may take longer to start than the time limit is
    store.wait([str(i) for i in range(size)], timedelta(seconds=60))
    store = dist.PrefixStore("fit", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=seconds))
    try:
        yield
    finally:
        dist.destroy_process_group()


def run_all(rank: int, folder, size: int) -> dict:
    """Everything that needs several processes; called by each."""
    with process_group(rank, folder, size):
        found = {case: answer(case, fit(case, execution={"distributed": True})) for case in CASES}
        if size > 2:
            return found
        found |= {f.__name__: f(rank, folder) for f in (group_operations, bars)}
        found[a_file_that_one_cannot_read.__name__] = a_file_that_one_cannot_read(rank, folder)
        found |= {f"error: {name}": _message(lambda call=call: call(rank)) for name, (call, *_) in ERRORS.items()}
        found["afterwards"] = answer("float64", fit("float64", execution={"distributed": True}))
    return found


class Ends(torch.nn.Module):
    """A backbone that makes its process wait, or ends it, when it sees images on rank 1."""

    def __init__(self, seconds: float | None = None):
        super().__init__()
        self.net, self.seconds = tiny_net(), seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 4 and dist.is_initialized() and dist.get_rank() == 1:  # not when it is prepared
            if self.seconds is None:
                os._exit(1)
            time.sleep(self.seconds)
        return self.net(x)


FAILURES = {"slow": 5, "ended": None}  # seconds that rank 1 waits


def fail(rank: int, folder, size: int) -> dict:
    """Fits of which one process is slower than the time limit, or ends: what each is told, and after how long."""
    found = {}
    for name, seconds in FAILURES.items():
        (folder / name).mkdir(exist_ok=True)
        with process_group(rank, folder / name, size, seconds=2), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a network that cannot be traced
            start = time.monotonic()
            message = _message(lambda seconds=seconds: shared(backbone=Ends(seconds)).fit(X, Y))
            found[name] = message, time.monotonic() - start
    return found


def _other_rank(rank: int, folder, size: int, work) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "`torch.jit.script", FutureWarning)
    warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
    try:
        found = work(rank, folder, size)
    except BaseException:
        found = traceback.format_exc()
    (folder / f"found-{rank}.pkl").write_bytes(pickle.dumps(found))


def on_processes(size: int, folder, work) -> list:
    """What ``work(rank, folder, size)`` returns in each process; None of one that ended."""
    start = multiprocessing.get_context("spawn").Process
    others = [start(target=_other_rank, args=(rank, folder, size, work)) for rank in range(1, size)]
    for process in others:
        process.start()
    try:
        found = [work(0, folder, size)]
    finally:
        for process in others:
            process.join(60)
            process.kill()
    paths = [folder / f"found-{rank}.pkl" for rank in range(1, size)]
    return found + [pickle.loads(path.read_bytes()) if path.exists() else None for path in paths]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    for i in range(12):
        Image.fromarray(X[i]).save(folder / f"{i}.png")
    (folder / "11.png").write_bytes(b"no image")
    first, second = on_processes(2, folder, run_all)
    assert isinstance(second, dict), second
    return first, second


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    """What each of four processes found."""
    return on_processes(4, tmp_path_factory.mktemp("four"), run_all)


# ---------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("processes", ["ranks", "four_ranks"])
@pytest.mark.parametrize("case", CASES)
def test_several_processes_find_the_model_of_one(request, processes, case):
    first, *others = (found[case] for found in request.getfixturevalue(processes))
    for name, value in first.items():  # the solution of the first process is that of all
        assert all(np.array_equal(value, other[name]) for other in others), f"{name} differs between the processes"
    # The search for the prior magnifies rounding, as it does for another batch_size on one process.
    tolerance = 1e-3 if case == "float32" else 1e-6
    for name, value in answer(case, fit(case)).items():
        np.testing.assert_allclose(first[name], value, rtol=0, atol=tolerance * np.abs(value).max(), err_msg=name)


def test_a_process_that_is_slow_or_ends_is_an_error_on_all_others(tmp_path):
    first, _, third = on_processes(3, tmp_path, fail)
    for found in (first, third):
        for message, seconds in (found[name] for name in FAILURES):
            assert "could not communicate: one of them ended, or did not answer" in message
            assert seconds < 15


def test_operations_of_a_group(ranks):
    for rank, found in enumerate(ranks):
        operations = found["group_operations"]
        assert operations["size and rank"] == (2, rank)
        assert operations["share"] == (slice(0, 3), slice(3, 7))[rank]
        assert operations["sum"] == ([2.0, 1.0], True)
        assert operations["columns"] == [[0, 6], [2, 8], [4, 10]]
        assert operations["rows"] == [[[0, 0]] * 2, [[1, 1]] * 2, [[1, 1]] * 2]
        assert operations["no rows"] == [0, 1]
        assert operations["together"] == (3, 1)
        assert "but the others of process(es) [1] differ from those of process 0" in operations["different"]


def test_a_group_of_one_does_nothing():
    tensor = torch.ones(2)
    assert ALONE.all_reduce(tensor) is tensor
    assert ALONE.all_gather_rows(tensor) is tensor
    assert ALONE.share(5) == slice(0, 5)
    assert ALONE.together(divmod, 7, 2) == (3, 1)
    ALONE.check_same({"anything": "at all"})


@pytest.mark.parametrize("size", [1, 3, 8])
def test_shares_cover_all_rows_once(size):
    for n in (size, 13, 100):
        shares = [range(n)[ProcessGroup(size, rank).share(n)] for rank in range(size)]
        assert [row for share in shares for row in share] == list(range(n))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("config", "device", "expected"),
    [
        ("cpu:gloo,cuda:nccl", "cuda:1", "cuda:1"), ("cpu:gloo,cuda:nccl", "cpu", "cpu"), ("cuda:nccl", "cuda", "cuda"),
        ("cpu:gloo,cuda:gloo", "cuda", "cpu"), ("cpu:gloo", "cuda", "cpu"), ("cuda:nccl", "cpu", None),
    ],
)  # fmt: skip
def test_tensors_are_communicated_where_the_backend_can(monkeypatch, config, device, expected):
    monkeypatch.setattr(dist, "get_backend_config", lambda: config)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    if expected is None:
        with pytest.raises(ValueError, match=r"(?s)nccl.*'cpu'.*gloo"):
            _message_device(torch.device(device))
    else:
        assert _message_device(torch.device(device)) == torch.device(expected)


def test_one_process_shows_bars(ranks):
    pytest.importorskip("tqdm")
    assert [found["bars"] for found in ranks] == [True, False]


def test_a_file_that_one_process_cannot_read_is_named_by_all(ranks):
    first, second = (found["a_file_that_one_cannot_read"] for found in ranks)
    assert first.startswith("RuntimeError: Another process of this fit failed.\nProcess 1: ")
    assert not second.startswith("RuntimeError")
    assert "11.png" in first
    assert "11.png" in second


@pytest.mark.parametrize("name", ERRORS)
def test_every_process_is_told(ranks, name):
    _, first, *second = ERRORS[name]
    for found, message in zip(ranks, [first, *(second or [first])], strict=True):
        assert message in found[f"error: {name}"]


def test_a_fit_after_errors_is_as_before(ranks):
    for found in ranks:
        assert np.array_equal(found["afterwards"]["coef_"], found["float64"]["coef_"])


def test_without_a_group_the_error_says_what_to_do(monkeypatch):
    with pytest.raises(ValueError, match=r"(?s)torchrun.*init_process_group"):
        shared().fit(X, Y)
    monkeypatch.setattr(dist, "is_available", lambda: False)
    with pytest.raises(ValueError, match="lacks"):
        shared().fit(X, Y)
    with pytest.raises(ValueError, match=r"distributed.*must be"):
        classifier(execution={"distributed": None}).fit(X, Y)


def test_a_group_of_one_process_fits_as_without(tmp_path):
    dist.init_process_group("gloo", init_method=(tmp_path / "group").as_uri(), rank=0, world_size=1)
    try:
        shared = fit("float64", execution={"distributed": True})
    finally:
        dist.destroy_process_group()
    assert np.array_equal(shared.coef_, fit("float64").coef_)


def test_grid_search_on_a_dask_cluster():
    distributed = pytest.importorskip("distributed")
    search = GridSearchCV(classifier(), {"alpha": ["auto", 0.1]}, cv=2)
    search.fit(X, Y)
    cluster = distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None, memory_limit=None
    )
    with cluster, distributed.Client(cluster), joblib.parallel_config(backend="dask"):
        shared = GridSearchCV(**search.get_params(deep=False)).fit(X, Y)
    assert set(shared.cv_results_) == set(search.cv_results_)
    for name, values in search.cv_results_.items():
        if "time" not in name:
            assert np.array_equal(shared.cv_results_[name], values), name
    np.testing.assert_allclose(shared.decision_function(X), search.decision_function(X), rtol=1e-9, atol=1e-9)
