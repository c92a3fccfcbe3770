import errno
import itertools
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mpp.checking.scan import scan
from mpp.data import sending
from mpp.data.config import DataConfig, Reading
from mpp.data.decode import BadImage
from mpp.data.loader import permutation, sequential, stream, worker_count
from mpp.data.transform import EvalTransform, TrainTransform
from mpp.errors import RunError, UserError
from mpp.sources.base import ListSource, Subset
from mpp.sources.mixture import MixtureSource
from mpp.sources.opening import open_source
from tests.sources.test_shards import write_tar


def numbered(length, side=12, bad=()):
    """Images that hold their own index; those in `bad` are no images."""
    images = [b"broken" if i in bad else np.full((side, side, 3), i, dtype=np.uint8) for i in range(length)]
    return ListSource(images, [i % 3 for i in range(length)])


def run(source, batches, transform=None, **options):
    """The first batches of a stream, closed after."""
    settings = {"seed": 7, "batch_size": 8, "micro_batch": 4, "start": 0, **options}
    it = stream(source, transform or EvalTransform((4, 4)), Reading(3), **settings)
    try:
        return list(itertools.islice(it, batches))
    finally:
        it.close()


def joined(batches, key):
    return torch.cat([batch[key] for batch in batches])


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("images", "index", "label"))
        assert a["bad"] == b["bad"]


@pytest.fixture(scope="module")
def pictures():
    """Noise large enough that torch would share out the sums of contrast between threads."""
    generator = np.random.default_rng(0)
    return ListSource(list(generator.integers(0, 256, (13, 230, 260, 3), dtype=np.uint8)))


@pytest.fixture
def augment():
    config = DataConfig(jitter=(0.4, 0.4, 0.2, 0.1), grayscale=0.2)
    return TrainTransform(config, (224, 224), 3)


def test_each_epoch_holds_each_index_once_in_its_permutation():
    batches = run(numbered(22), 11)  # 44 images: two epochs, which batches straddle
    index = joined(batches, "index").numpy()
    for epoch in range(2):
        part = index[22 * epoch : 22 * (epoch + 1)]
        np.testing.assert_array_equal(part, permutation(7, epoch, 22))
        assert sorted(part) == list(range(22))
    assert not np.array_equal(index[:22], index[22:])
    assert torch.equal(joined(batches, "images")[:, 0, 0, 0], joined(batches, "index").to(torch.uint8))
    assert torch.equal(joined(batches, "label"), joined(batches, "index") % 3)


def test_shapes_and_types():
    (batch,) = run(numbered(9), 1)
    assert batch["images"].shape == (4, 3, 4, 4)
    assert batch["images"].dtype == torch.uint8
    assert batch["index"].dtype == batch["label"].dtype == torch.int64
    assert batch["bad"] == []
    unlabelled = ListSource([np.zeros((4, 4, 3), dtype=np.uint8)])
    assert run(unlabelled, 1)[0]["label"].tolist() == [-1] * 4


def test_a_source_smaller_than_a_batch():
    batches = run(numbered(3), 4, batch_size=16, micro_batch=8)
    index = joined(batches, "index").numpy()
    expected = np.concatenate([permutation(7, epoch, 3) for epoch in range(11)])[:32]
    np.testing.assert_array_equal(index, expected)


def test_workers_and_threads_change_nothing(pictures, augment):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        alone = run(pictures, 4, augment)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(threads)
    assert_same(alone, run(pictures, 4, augment, workers=2))


def test_more_workers_than_cores_do_not_warn():
    source = numbered(9)
    assert_same(run(source, 6), run(source, 6, workers=8))


@pytest.mark.parametrize("workers", [0, 2])
def test_resumption(pictures, augment, workers):
    whole = run(pictures, 6, augment)
    assert_same(whole[4:], run(pictures, 2, augment, start=16, workers=workers))


def test_ranks_share_each_batch():
    source = numbered(11)
    whole = run(source, 4, batch_size=12, micro_batch=6)
    first = run(source, 4, batch_size=12, micro_batch=3, rank=0, world=2)
    second = run(source, 4, batch_size=12, micro_batch=3, rank=1, world=2)
    for half, (a, b) in enumerate(zip(whole[::2], whole[1::2], strict=True)):
        for mine, theirs in ((first, a), (second, b)):
            part = mine[2 * half : 2 * half + 2]
            assert torch.equal(joined(part, "index"), theirs["index"])
            assert torch.equal(joined(part, "images"), theirs["images"])


def test_micro_batches_change_nothing(pictures, augment):
    large, small = run(pictures, 1, augment, micro_batch=8), run(pictures, 4, augment, micro_batch=2)
    assert torch.equal(large[0]["images"], joined(small, "images"))


def test_a_mixture_is_drawn_by_its_weights():
    parts = [ListSource(list(np.full((n, 8, 8, 3), n, dtype=np.uint8))) for n in (4, 12)]
    weighted = MixtureSource("mixed", parts, (3, 1))
    whole = run(weighted, 16, micro_batch=8)  # 128 images: eight epochs of 16, 12 of each from the small part
    index = joined(whole, "index").numpy()
    for epoch in range(8):
        np.testing.assert_array_equal(index[16 * epoch :][:16], weighted.draw(7, epoch)[1])
    times = np.bincount(index)
    assert times[:4].tolist() == [24] * 4
    assert set(times[4:].tolist()) <= {2, 3}
    assert_same(whole[10:], run(weighted, 6, micro_batch=8, start=80, workers=2))
    halves = [run(weighted, 8, rank=rank, world=2) for rank in range(2)]
    together = torch.stack([joined(half, "index").view(-1, 4) for half in halves], dim=1)
    assert together.flatten().tolist() == index[:64].tolist()


def test_an_image_that_comes_twice_in_an_epoch_is_cropped_anew(augment):
    noise = np.random.default_rng(0).integers(0, 256, (1, 40, 40, 3), dtype=np.uint8)
    mixed = MixtureSource("mixed", [ListSource(list(noise)), ListSource(list(noise))], (1, 1))
    images = joined(run(mixed, 1, augment, micro_batch=8), "images")
    assert len(torch.unique(images.flatten(1).sum(1))) == 8


def test_draws_differ_by_epoch_and_seed(pictures, augment):
    one = Subset(pictures, [0])
    images = joined(run(one, 2, augment), "images")
    assert len(torch.unique(images.flatten(1).sum(1))) == 8
    assert not torch.equal(images, joined(run(one, 2, augment, seed=8), "images"))


def test_global_generators_are_left_alone(pictures, augment):
    torch.manual_seed(3)
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()
    run(pictures, 2, augment)
    run(pictures, 2, augment, workers=2)
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpys)


def test_bad_images_are_replaced_and_named():
    source = numbered(20, bad=(4, 5, 17))
    batches = run(source, 5)
    index = joined(batches, "index")
    reported = [entry for batch in batches for entry in batch["bad"]]
    assert {bad.index for bad in reported} == {4, 5, 17}
    assert {bad.kind for bad in reported} == {"not an image"}
    assert not {4, 5, 17} & set(index.tolist())
    assert torch.equal(joined(batches, "images")[:, 0, 0, 0], index.to(torch.uint8))
    order = permutation(7, 0, 20)
    good = ~np.isin(order, (4, 5, 17))
    np.testing.assert_array_equal(index.numpy()[good], order[good])
    assert_same(batches, run(source, 5, workers=2))
    assert_same(batches[2:], run(source, 3, start=8))


def test_unreadable_files_are_bad_too(picture_folder):
    from mpp.sources.opening import open_source

    folder = picture_folder("0.png", "1.png", "2.png")
    source = open_source(f"folder:{folder}")
    (folder / "1.png").unlink()
    bad = [entry for batch in run(source, 2) for entry in batch["bad"]]
    assert bad
    assert all((one.index, one.kind, one.where) == (1, "missing", str(folder / "1.png")) for one in bad)
    (folder / "1.png").write_bytes(b"")
    bad = [entry for batch in run(source, 2) for entry in batch["bad"]]
    assert {(one.kind, str(one)) for one in bad} == {("empty", f"{folder / '1.png'}: empty file")}


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_but_bad_images_ends_in_one_line(workers):
    with pytest.raises(BadImage, match=r"^20 images in a row could not be decoded; .*known format") as caught:
        run(numbered(6, bad=range(6)), 1, workers=workers)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "sizes",
    [
        {"batch_size": 9, "world": 2},
        {"batch_size": 8, "micro_batch": 3},
        {"start": 4},
        {"start": -8},
        {"rank": 2, "world": 2},
    ],
)
def test_sizes_that_do_not_divide(sizes):
    with pytest.raises(ValueError, match=r"equal|multiple"):
        run(numbered(5), 1, **sizes)


@pytest.mark.parametrize("workers", [0, 2])
def test_sequential(workers):
    source = numbered(20, bad=(3, 9))
    transform = EvalTransform((4, 4))
    wanted = [9, 2, 3, 11, 0, 9, 19]
    batches = list(sequential(source, transform, Reading(3), wanted, batch_size=3, workers=workers))
    assert [batch["index"].tolist() for batch in batches] == [[2], [11, 0], [19]]
    assert [[bad.index for bad in batch["bad"]] for batch in batches] == [[9, 3], [9], []]
    assert [batch["label"].tolist() for batch in batches] == [[2], [2, 0], [1]]
    assert batches[1]["images"][:, 0, 0, 0].tolist() == [11, 0]


def test_sequential_of_bad_images_and_of_nothing():
    transform = EvalTransform((4, 6))
    (batch,) = sequential(numbered(4, bad=(1,)), transform, Reading(3), [1], batch_size=2)
    assert batch["images"].shape == (0, 3, 4, 6)
    assert batch["index"].shape == (0,)
    assert list(sequential(numbered(4), transform, Reading(3), [], batch_size=2, workers=2)) == []


class Failing(ListSource):
    """Images of which one does something else when it is read."""

    def __init__(self, act, length=64):
        super().__init__(list(np.zeros((length, 8, 8, 3), dtype=np.uint8)))
        self.act = act

    def read(self, index):
        if index == 5:
            self.act()
        return super().read(index)


def raising(error):
    def act(*_):
        raise error

    return act


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "was killed, perhaps for want of memory: take fewer workers"),
        (lambda: os.kill(os.getpid(), signal.SIGBUS), r"had no shared memory left, .*--shm-size"),
        (lambda: os._exit(3), "ended with exit status 3"),
        (raising(KeyError("what")), r"failed: KeyError: 'what' \(test_loader.py, line \d+\); with 0 workers"),
        (raising(UserError("take another")), "^take another$"),
        (raising(OSError(errno.EMFILE, "Too many open files")), r"too many open files: .*\(ulimit -n\)"),
    ],
    ids=["killed", "bus", "exit", "bug", "setting", "files"],
)
def test_what_a_worker_dies_of_is_one_line(act, said):
    with pytest.raises(UserError, match=said) as caught:
        run(Failing(act), 40, workers=2)
    assert "\n" not in str(caught.value)


def test_a_worker_that_crashes_says_where(capfd):
    with pytest.raises(RunError, match=r"a loader process crashed \(SIGSEGV\); the stack above says where"):
        run(Failing(lambda: os.kill(os.getpid(), signal.SIGSEGV)), 40, workers=1)
    said = capfd.readouterr().err
    assert "Fatal Python error: Segmentation fault" in said
    assert re.search(r'File ".*test_loader.py", line \d+ in read\b', said)


def test_a_worker_that_dies_ends_the_training_where_it_takes_a_batch():
    """Not where it happens to be when the signal comes, as torch has it."""
    batches = stream(
        Failing(int, 8), EvalTransform((4, 4)), Reading(3), seed=0, batch_size=4, micro_batch=4, start=0, workers=1
    )
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
    time.sleep(0.05)  # torch's handler has run
    with pytest.raises(RunError, match="a loader process was killed"):
        list(itertools.islice(batches, 9))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_memory_does_not_hold_is_its_own_fault(workers):
    """Be it while it is read or while its crop is made; a batch that finds no memory ends the run in one line."""

    class Greedy(EvalTransform):
        def __call__(self, image, draws=()):
            if image.pixels()[0, 0, 0] == 3:
                torch.empty(2**62, dtype=torch.uint8)
            return super().__call__(image, draws)

    transform, settings = Greedy((4, 4)), {"workers": workers, "micro_batch": 8}
    for bad, (batch,) in (
        (5, run(Failing(raising(MemoryError()), 8), 1, **settings)),
        (3, run(numbered(8), 1, transform, **settings)),
        (3, sequential(numbered(8), transform, Reading(3), range(8), batch_size=8, workers=workers)),
    ):
        said = {(each.index, each.kind, each.reason) for each in batch["bad"]}
        assert said == {(bad, "too large", "takes more memory than there is")}
        assert bad not in batch["index"]
    with pytest.raises(RunError, match=r"^no memory for a batch of 4 images of \d+ x \d+: take fewer workers"):
        run(numbered(8), 1, EvalTransform((2**29, 2**29)), workers=workers)


def test_a_limit_in_bytes_reaches_what_the_workers_read(tmp_path):
    for name, side in (("a", 40), ("b", 8)):
        Image.fromarray(np.zeros((side, side, 3), dtype=np.uint8)).save(tmp_path / f"{name}.bmp")
    source = open_source(f"folder:{tmp_path}")
    (batch,) = sequential(source, EvalTransform((4, 4)), Reading(max_bytes=1000), range(2), batch_size=2, workers=1)
    assert batch["index"].tolist() == [1]
    assert [str(bad).partition(": ")[2] for bad in batch["bad"]] == ["0.0 MB, more than data.max_image_mb 0 allows"]


@pytest.fixture
def allow_files():
    """`allow_files(n)`: this process may open so many more files, until the end of the test."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def allow(more):
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/dev/fd").iterdir())) - 1 + more, before[1]))

    yield allow
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_many_shards_within_few_open_files(tmp_path, encode, allow_files, monkeypatch):
    """Of which each worker wants to keep some open, or one line that names the limit."""
    monkeypatch.setenv("MPP_CACHE", str(tmp_path / "cache"))
    for number in range(60):
        picture = encode(np.full((96, 96, 3), number, dtype=np.uint8))
        write_tar(tmp_path / f"{number:02d}.tar", [("a.png", picture)])
    source, settings = open_source(f"shards:{tmp_path}/*.tar"), {"transform": EvalTransform((96, 96)), "workers": 2}
    expected = run(source, 20, **{**settings, "workers": 0})
    for more in (26, 30, 50):
        allow_files(more)
        assert_same(run(open_source(f"shards:{tmp_path}/*.tar"), 20, **settings), expected)
    allow_files(20)
    with pytest.raises(RunError, match=r"a process may have \d+ here \(ulimit -n\), and 2 workers need 24 more"):
        run(source, 20, **settings)


def test_a_batch_that_cannot_be_sent_is_not_waited_for(monkeypatch, capfd):
    monkeypatch.setattr(sending._ByPipe, "__reduce__", raising(OSError(errno.EMFILE, "Too many open files")))
    with pytest.raises(RunError, match="a loader process ended with exit status 1, for the reason above"):
        run(numbered(8), 1, workers=1)
    assert "a batch cannot be sent: OSError: [Errno 24] Too many open files" in capfd.readouterr().err


@pytest.mark.parametrize(("number", "said"), [(errno.EAGAIN, "no process can be started"), (errno.EMFILE, "ulimit -n")])
def test_workers_that_cannot_be_started(number, said, monkeypatch):
    monkeypatch.setattr(os, "fork", raising(OSError(number, os.strerror(number))))
    with pytest.raises(RunError, match=said):
        run(numbered(4), 1, workers=1)
    with pytest.raises(RunError, match=said):
        scan(numbered(4), Reading(), np.arange(4), 2)


@pytest.mark.parametrize("room", [0, 10**9])
def test_batches_travel_with_and_without_shared_memory(room, monkeypatch, capfd):
    monkeypatch.setattr(sending, "shared_memory", lambda: room)
    monkeypatch.setattr(sending, "_told", [])
    transform, source = EvalTransform((96, 96)), numbered(20, bad=(3,))
    settings = {"transform": transform, "batch_size": 16, "micro_batch": 16}
    batches = run(source, 4, workers=2, **settings)
    assert_same(batches, run(source, 4, workers=0, **settings))
    assert [batch["images"].is_shared() for batch in batches] == [room > 0] * 4
    assert not batches[0]["index"].is_shared()  # an open file less
    assert capfd.readouterr().err.count("--shm-size") == (room == 0)
    (batch,) = sequential(source, transform, Reading(3), range(16), batch_size=16, workers=1)
    assert batch["images"].is_shared() == (room > 0)
    assert batch["index"].tolist() == [number for number in range(16) if number != 3]


def test_worker_count(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert [worker_count(-1, ranks) for ranks in (1, 2, 4, 8, 16)] == [8, 4, 2, 0, 0]
    assert worker_count(0, 1) == 0
    assert worker_count(3, 8) == 3


SCRIPT = """
    import multiprocessing, os, signal, sys, time
    import numpy as np
    from mpp.data.config import Reading
    from mpp.data.loader import stream
    from mpp.sources.base import ListSource
    from mpp.data.transform import EvalTransform

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    source = ListSource(list(np.zeros((9, 8, 8, 3), dtype=np.uint8)))
    transform = EvalTransform((4, 4))
    batches = stream(source, transform, Reading(3), seed=0, batch_size=4, micro_batch=4, start=0, workers=2)
    next(batches)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.killpg(0, number)
    time.sleep(0.2)
    for _ in range(20):
        next(batches)
    print("alive", flush=True)
    if sys.argv[1] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def exists(pid):
    """Whether a process runs; one that has ended and only waits for its new parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at processes in /proc")
def test_workers_ignore_the_groups_signals_and_end_with_their_parent():
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(SCRIPT)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    processes = {how: subprocess.Popen([*command, how], **pipes) for how in ("end", "die")}
    for how, process in processes.items():
        out, err = process.communicate(timeout=60)
        pids, alive = out.splitlines()
        assert alive == "alive"
        assert process.returncode == (0 if how == "end" else -signal.SIGKILL)
        assert err == ""
        deadline = time.monotonic() + 10
        while any(exists(pid) for pid in pids.split()):
            assert time.monotonic() < deadline, "workers outlive their parent"
            time.sleep(0.1)


@pytest.mark.slow
def test_a_worker_whose_parent_has_died_while_it_started_ends() -> None:
    code = "from mpp.data.loader import _start_worker; _start_worker({}, 0); print('works')"
    for parent, said in (("__import__('os').getppid()", "works\n"), ("__import__('os').getppid() + 1", "")):
        done = subprocess.run([sys.executable, "-c", code.format(parent)], capture_output=True, text=True)
        assert (done.stdout, done.returncode) == (said, 0 if said else 1), done.stderr
