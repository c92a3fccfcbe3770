"""How ranks find each other at a restart, and who speaks when they fail."""

import datetime
import json
import os
import re
import shlex
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import DistBackendError, DistNetworkError, DistStoreError, TCPStore

from mpp import dist
from mpp.cli import _ALIASES
from mpp.config import parse
from mpp.dist import World, store_of_this_attempt
from mpp.errors import ConfigError, RunError, UserError
from mpp.pretraining.settings import PretrainConfig
from mpp.system import failure
from tests import runs

PATIENCE = datetime.timedelta(seconds=20)


@pytest.fixture
def lent(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The store that torchrun lends to its ranks."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    return store


def meet() -> list[Any]:
    """The stores of ranks 0 and 1; rank 1 comes well before rank 0."""
    stores: dict[int, Any] = {}

    def join() -> None:
        stores[1] = store_of_this_attempt(World(1, 2), PATIENCE)

    other = threading.Thread(target=join)
    other.start()
    other.join(0.3)
    stores[0] = store_of_this_attempt(World(0, 2), PATIENCE)
    other.join(PATIENCE.total_seconds())
    return [stores[0], stores[1]]


@pytest.mark.parametrize("before", ["nothing", "a dead rank 0", "a living rank 0", "another's port"])
def test_ranks_meet_whatever_an_earlier_attempt_left(before: str, lent: Any) -> None:
    earlier = meet() if before != "nothing" else []
    if before == "a dead rank 0":
        earlier.clear()  # the server goes with its store
    elif before == "another's port":
        lent.set("mpp/store", f"{lent.port} 0123456789abcdef")
    first, second = meet()
    first.set("said by", "rank 0")
    assert second.get("said by") == b"rank 0"
    assert second.timeout == PATIENCE
    assert second.port == first.port
    assert all(store.port != first.port for store in earlier)


class Board:
    """Sums up what two ranks, each a thread, ask; `wait` returns when both have asked."""

    def __init__(self) -> None:
        self.asked: list[list[torch.Tensor]] = [[], []]
        self.waits = [0, 0]
        self.changed = threading.Condition()
        self.own = threading.local()

    def all_reduce(self, told: torch.Tensor, op: Any, async_op: bool) -> Any:
        assert op == torch.distributed.ReduceOp.MAX
        assert async_op
        rank, number = self.own.rank, len(self.asked[self.own.rank])
        with self.changed:
            self.asked[rank].append(told.clone())
            self.changed.notify_all()

        def wait() -> None:
            with self.changed:
                self.waits[rank] += len(self.asked[1 - rank]) <= number
                assert self.changed.wait_for(lambda: len(self.asked[1 - rank]) > number, 10)
            told.copy_(torch.maximum(self.asked[0][number], self.asked[1][number]))

        return SimpleNamespace(wait=wait)


@pytest.mark.parametrize(
    ("seconds", "wanted", "stop"),
    [((0.1, 0.1), 3, 4), ((0.1, 0.1), 0, 0), ((9.0, 9.0), 3, 3), ((0.1, 2.0), 3, 3), ((2.0, 0.1), 3, 3)],
)
def test_ranks_stop_together_at_once_or_after_one_short_step_more(
    seconds: tuple[float, float], wanted: int, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`seconds` are those of each rank's steps; rank 1 wants to stop from step `wanted` on."""
    board, stopped = Board(), [-1, -1]
    monkeypatch.setattr(torch.distributed, "all_reduce", board.all_reduce)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(dist.time, "monotonic", lambda: board.own.now)

    def run(rank: int) -> None:
        board.own.rank, board.own.now = rank, 0.0
        poll = dist.Poll()
        for step in range(9):
            board.own.now += seconds[rank]
            if poll(rank == 1 and step >= wanted):
                stopped[rank] = step
                return

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stopped == [stop, stop]


def test_a_rank_goes_on_before_the_others_have_done_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board()
    monkeypatch.setattr(torch.distributed, "all_reduce", board.all_reduce)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    board.own.rank, poll = 0, dist.Poll()
    board.asked[1].append(torch.zeros(2))
    assert not poll(False)
    for _ in range(5):  # rank 1 has answered up to the step before
        assert not poll(False)
        board.asked[1].append(torch.zeros(2))
    assert board.waits == [0, 0]


def test_a_rank_0_that_never_comes_is_an_error(lent: Any) -> None:
    lent.set("mpp/store", "1 0123456789abcdef")
    with pytest.raises(RunError, match="rank 0 on localhost did not come within 0:00:01"):
        store_of_this_attempt(World(1, 2), datetime.timedelta(seconds=1))


@pytest.mark.parametrize("told", ["soon", "0", "-5", "1.5"])
def test_a_bad_timeout_is_an_error(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPP_TIMEOUT", told)
    with pytest.raises(UserError, match=f"MPP_TIMEOUT is '{told}'"):
        dist.start(World(1, 2), torch.device("cpu"))


GLOO = "[/w/pytorch/third_party/gloo/gloo/transport/tcp/"
LOST = [
    (RuntimeError("Application timeout caused pair closure"), "Application timeout caused pair closure"),
    (RuntimeError(f"{GLOO}pair.cc:547] Connection closed by peer [127.0.0.1]:13"), "Connection closed by peer"),
    (
        RuntimeError(f"{GLOO}unbound_buffer.cc:78] Timed out waiting 20000ms for recv"),
        "Timed out waiting 20000ms for recv",
    ),
    (DistBackendError("NCCL error in: x.cpp:9, ncclRemoteError: A call failed\nLast error:"), "ncclRemoteError"),
    (DistNetworkError("failed to recv, got 0 bytes"), "failed to recv"),
    (DistStoreError("wait timeout after 600000ms"), "wait timeout"),
]


@pytest.mark.parametrize(("error", "part"), LOST)
def test_what_tells_of_another_rank(error: Exception, part: str) -> None:
    text = failure.lost_another(error)
    assert part in text
    assert "pair.cc" not in text
    assert "\n" not in text


OWN = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    DistBackendError("NCCL error: ncclInvalidUsage: Duplicate GPU detected : rank 0 and rank 1"),
    ConnectionError(f"{GLOO}pair.cc:547] not an error of torch's"),
]


@pytest.mark.parametrize("error", OWN)
def test_what_is_this_rank_s_own_error(error: Exception) -> None:
    assert failure.lost_another(error) == ""


def test_the_first_of_a_machine_s_ranks_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoke, own = [], tmp_path
    for attempt in range(2):
        for rank in range(3):
            own = tmp_path / f"attempt_{attempt}" / str(rank)
            own.mkdir(parents=True)
            monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(own / "error.json"))
            monkeypatch.setenv("RANK", str(rank))
            spoke.append(failure.is_first_to_report(alike=rank % 2 == 0))
    assert spoke == [True, False, False] * 2
    failure.report_to_torchrun("no room")
    assert json.loads((own / "error.json").read_text())["message"]["message"] == "no room"


def test_without_torchrun_all_speak_but_of_what_they_have_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    for rank, alike, speaks in [("0", True, True), ("0", False, True), ("1", True, False), ("1", False, True)]:
        monkeypatch.setenv("RANK", rank)
        assert failure.is_first_to_report(alike) == speaks
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert failure.rank_name() == f"[rank 1 on {os.uname().nodename}] "


SAME = {"optim.lr": "0.1", "images": "40 images", "log.every": '"5%"', "newest checkpoint in run_dir": "none"}


def agree(monkeypatch: pytest.MonkeyPatch, *ranks: dict[str, str]) -> None:
    """As the ranks of a group that know this."""
    monkeypatch.setattr(dist.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "gather", lambda own: [(f"node{rank // 2}", known) for rank, known in enumerate(ranks)])
    dist.agree(lambda: ranks[0])


def test_ranks_that_know_the_same_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    agree(monkeypatch, SAME, SAME, SAME)
    monkeypatch.setattr(dist.dist, "is_initialized", lambda: False)
    dist.agree(lambda: {}[""])  # alone there is nothing to compare, and so nothing is asked


@pytest.mark.parametrize(
    ("ranks", "told"),
    [
        ([{}, {"images": "41 images"}], "rank 1 on node0 differs from the other ranks: images 41 images (elsewhere 40"),
        ([{"images": "1"}, {}, {}], "rank 0 on node0 differs from the other ranks: images 1 (elsewhere 40 images); g"),
        (
            [{}, {}, {"optim.lr": "1"}, {}, {"optim.lr": "2"}],
            "rank 2 on node1 and 1 more differ from the other ranks: o",
        ),
        ([{}, dict.fromkeys(SAME, "x")], 'images x (elsewhere 40 images); log.every x (elsewhere "5%"); 1 more; give'),
        ([{}, {"new": "x"}], "new x (elsewhere None)"),
    ],
)
def test_the_rank_that_differs_is_named_with_what_it_has(
    ranks: list[dict[str, str]], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)) as caught:
        agree(monkeypatch, *(SAME | changed for changed in ranks))
    assert str(caught.value).endswith("the same run folder and equal copies of the images")


PAGE = re.sub(r" \\\n#? +", " ", (runs.ROOT / "docs" / "cluster.md").read_text())
COMMANDS = re.findall(r"^ {4}(?:torchrun|sbatch) .*?tools/(?:pretrain\.py|slurm\.sh) (.*)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("settings", COMMANDS)
def test_the_commands_of_the_page_parse(settings: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs.ROOT)
    assert parse(PretrainConfig, shlex.split(settings), "pretrain", "", _ALIASES).data.source == "folder:/my/images"


def test_the_page_has_every_way_to_start() -> None:
    assert len(COMMANDS) == 4
