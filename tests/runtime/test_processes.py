"""Fits shared by three processes against those of one; grid searches on a Dask cluster.

The other processes are started once. They and the test process, which is rank 0, run all cases in the same order.
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

from sklearn_lqf import LQFClassifier, LQFClassifierCV
from sklearn_lqf.runtime.processes import ProcessGroup, _message_device, default_group

pytestmark = pytest.mark.skipif(
    torch.__version__ < "2.7", reason="processes do not find each other in a second group with this torch"
)
SIZE = 3
X, Y = make_images(n=61)  # shares of 20, 20 and 21
WEIGHTS = np.random.default_rng(0).integers(0, 3, len(X)) * 0.7  # a third of the rows is left out
BOTH = ("identity", "flip")
# Parameters, number of images, weights.
CASES = {
    "float64": ({}, len(X), False),
    "directions": ({"tangents": "both", "tangent_layers": "all", "sketch_size": 4}, len(X), True),
    "views and weights": ({"views": BOTH, "class_weight": "balanced", "prior": "evidence"}, len(X), True),
    "conjugate gradients": ({"solver": "pcg", "tol": 1e-10}, len(X), False),
    "more rows than features": ({"prior": "last"}, len(X), True),
    "path": ({"alphas": [0.01, 0.3]}, len(X), True),
    "few images": ({}, 4, False),
    "vectors": ({"backbone": "auto"}, len(X), True),
    "float32": ({"execution": {"dtype": "float32"}, "views": BOTH}, len(X), True),
}


def classifier(**parameters) -> LQFClassifier | LQFClassifierCV:
    kind = LQFClassifierCV if "alphas" in parameters else LQFClassifier
    return kind(**merged({"backbone": tiny_net(), "execution": {"dtype": "float64"}}, parameters))


def shared(**parameters) -> LQFClassifier | LQFClassifierCV:
    return classifier(**merged({"execution": {"distributed": True}}, parameters))


def images(case: str) -> np.ndarray:
    return X.reshape(len(X), -1)[:, :8].astype(float) if case == "vectors" else X


def fit(case: str, **more) -> LQFClassifier | LQFClassifierCV:
    parameters, n, weighted = CASES[case]
    return classifier(**merged(parameters, more)).fit(images(case)[:n], Y[:n], WEIGHTS[:n] if weighted else None)


def answer(case: str, clf: LQFClassifier | LQFClassifierCV) -> dict[str, np.ndarray]:
    names = ("coef_", "intercept_", "alpha_", "noise_variance_", "temperature_")
    found = {name: np.array(getattr(clf, name)) for name in names}
    return {**found, "prior_": np.array(list(clf.prior_.values())), "decision": clf.decision_function(images(case))}


# --------------------------------------------------------------------------------- what all processes run


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
        "first": group.of_the_first(rank),
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
# What differs where ``odd`` is 1, on rank 1, or is wrong on all; what rank 1 is told, if it is another message, last.
ERRORS = {
    "paper": (lambda odd: shared(model="paper").fit(X, Y), "does not support distributed=True"),
    "folds": (lambda odd: shared(alphas=[1.0], cv=3).fit(X, Y), "set cv=None"),
    "stored": (lambda odd: shared(store_data=True).fit(X, Y), "does not support distributed=True"),
    "seed": (lambda odd: shared(random_state=None).fit(X, Y), "must be an int"),
    "labels": (lambda odd: shared().fit(X, np.roll(Y, odd)), "the targets y of process(es) [1]"),
    "number": (lambda odd: shared().fit(X[odd:], Y[odd:]), "the numbers of images of process(es) [1]"),
    "lengths": (
        lambda odd: shared().fit(X, Y[odd:]),
        "Process 1: ValueError: Found input variables with inconsistent", "inconsistent numbers of samples",
    ),
    "weights": (lambda odd: shared().fit(X, Y, None if odd else ONES), "the sample weights of process(es) [1]"),
    "parameters": (lambda odd: shared(max_iter=100 + odd).fit(X, Y), "parameters of process(es) [1]"),
    "invalid": (
        lambda odd: shared(max_iter=odd).fit(X, Y),
        "'max_iter' parameter", "Process 0: InvalidParameterError: The 'max_iter' parameter",
    ),
    "network": (
        lambda odd: shared(backbone=tiny_net(seed=odd)).fit(X, Y), "the backbone's weights of process(es) [1]"
    ),
    "too few": (lambda odd: shared().fit(X, Y, np.arange(len(X)) == 1), "3 processes cannot share 1 image"),
}  # fmt: skip


@contextlib.contextmanager
def process_group(rank: int, folder, seconds: float = 60):
    store = dist.FileStore(str(folder / "group"), SIZE)
    store.set(str(rank), "is there")  # a process may take longer to start than the time limit is
    store.wait([str(i) for i in range(SIZE)], timedelta(seconds=60))
    store = dist.PrefixStore("fit", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE, timeout=timedelta(seconds=seconds))
    try:
        yield
    finally:
        dist.destroy_process_group()


def succeed(rank: int, folder) -> dict:
    """Fits, operations and errors after which the processes go on."""
    with process_group(rank, folder):
        found = {case: answer(case, fit(case, execution={"distributed": True})) for case in CASES}
        found |= {f.__name__: f(rank, folder) for f in (group_operations, bars, a_file_that_one_cannot_read)}
        found |= {f"error: {k}": _message(lambda call=call: call(int(rank == 1))) for k, (call, *_) in ERRORS.items()}
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


def fail(rank: int, folder) -> dict:
    """Fits of which one process is slower than the time limit, or ends: what each is told, and after how long."""
    found = {}
    for name, seconds in FAILURES.items():
        (folder / name).mkdir(exist_ok=True)
        with process_group(rank, folder / name, seconds=2), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a network that cannot be traced
            start = time.monotonic()
            message = _message(lambda seconds=seconds: shared(backbone=Ends(seconds)).fit(X, Y))
            found[name] = message, time.monotonic() - start
    return found


def _other_rank(rank: int, folder) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "`torch.jit.script", FutureWarning)
    warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
    for work in (succeed, fail):
        try:
            found = work(rank, folder)
        except BaseException:
            found = traceback.format_exc()
        (folder / f"{work.__name__}-{rank}.pkl").write_bytes(pickle.dumps(found))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def found_by_all(one_thread, tmp_path_factory):
    """What ``succeed`` and ``fail`` return in each process."""
    folder = tmp_path_factory.mktemp("ranks")
    for i in range(12):
        Image.fromarray(X[i]).save(folder / f"{i}.png")
    (folder / "11.png").write_bytes(b"no image")
    start = multiprocessing.get_context("spawn").Process
    others = [start(target=_other_rank, args=(rank, folder)) for rank in range(1, SIZE)]
    for process in others:
        process.start()
    try:
        found = [[work(0, folder)] for work in (succeed, fail)]
    finally:
        for process in others:
            process.join(60)
            process.kill()
    for values, name in zip(found, ("succeed", "fail"), strict=True):
        paths = [folder / f"{name}-{rank}.pkl" for rank in range(1, SIZE)]
        values += [pickle.loads(path.read_bytes()) if path.exists() else None for path in paths]
    return found


@pytest.fixture(scope="module")
def ranks(found_by_all):
    """What each process found in ``succeed``."""
    assert all(isinstance(found, dict) for found in found_by_all[0]), found_by_all[0][1:]
    return found_by_all[0]


# ---------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("case", CASES)
def test_several_processes_find_the_model_of_one(ranks, case):
    first, *others = (found[case] for found in ranks)
    for name, value in first.items():  # the solution of the first process is that of all
        assert all(np.array_equal(value, other[name]) for other in others), f"{name} differs between the processes"
    # The search for the prior magnifies rounding, as it does for another batch_size on one process.
    tolerance = 1e-3 if case == "float32" else 1e-6
    for name, value in answer(case, fit(case)).items():
        np.testing.assert_allclose(first[name], value, rtol=0, atol=tolerance * np.abs(value).max(), err_msg=name)


def test_a_process_that_is_slow_or_ends_is_an_error_on_all_others(found_by_all):
    first, ended, third = found_by_all[1]
    assert ended is None
    for found in (first, third):
        for message, seconds in (found[name] for name in FAILURES):
            assert "could not communicate: one of them ended, or did not answer" in message
            assert seconds < 15


def test_operations_of_a_group(ranks):
    for rank, found in enumerate(ranks):
        operations = found["group_operations"]
        assert operations["size and rank"] == (SIZE, rank)
        assert operations["share"] == (slice(0, 2), slice(2, 4), slice(4, 7))[rank]
        assert operations["sum"] == ([3.0, 3.0], True)
        assert operations["columns"] == [[0, 9], [3, 12], [6, 15]]
        assert operations["rows"] == [[[k, k]] * 2 for k in (0, 1, 1, 2, 2, 2)]
        assert operations["no rows"] == [0, 1, 0, 1, 2, 3]
        assert operations["first"] == 0
        assert operations["together"] == (3, 1)
        assert "but the others of process(es) [1, 2] differ from those of process 0" in operations["different"]


def test_shares_cover_all_rows_once():
    for size in (1, 3, 8):
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
    assert [found["bars"] for found in ranks] == [True, False, False]


def test_a_file_that_one_process_cannot_read_is_named_by_all(ranks):
    *others, last = (found["a_file_that_one_cannot_read"] for found in ranks)
    for message in others:
        assert message.startswith("RuntimeError: Another process of this fit failed.\nProcess 2: ")
        assert "11.png" in message
    assert not last.startswith("RuntimeError")
    assert "11.png" in last


@pytest.mark.parametrize("name", ERRORS)
def test_every_process_is_told(ranks, name):
    _, message, *of_rank_1 = ERRORS[name]
    for rank, found in enumerate(ranks):
        assert (of_rank_1[0] if of_rank_1 and rank == 1 else message) in found[f"error: {name}"]


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
    ProcessGroup().check_same({"anything": "at all"})


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
