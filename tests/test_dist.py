"""How ranks find each other at a restart, and who speaks when they fail."""

import datetime
import json
import os
import re
import shlex
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import DistBackendError, DistNetworkError, DistStoreError, TCPStore

from mpp import dist
from mpp.cli.commands import ALIASES
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
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(store_of_this_attempt, World(1, 2), PATIENCE)
        time.sleep(0.3)
        return [store_of_this_attempt(World(0, 2), PATIENCE), other.result()]


@pytest.mark.parametrize("before", ["nothing", *map(runs.slow, ("a dead rank 0", "a living rank 0", "another's port"))])
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
    lent.set("mpp/store", "1 0123456789abcdef")
    with pytest.raises(RunError, match="rank 0 on localhost did not come within 0:00:01"):
        store_of_this_attempt(World(1, 2), datetime.timedelta(seconds=1))


class Board:
    """Sums up what two ranks, each a thread, ask; `wait` returns when both have asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[list[torch.Tensor]] = [[], []]
        self.waits = [0, 0]
        self.changed, self.own = threading.Condition(), threading.local()
        monkeypatch.setattr(torch.distributed, "all_reduce", self.all_reduce)
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)

    def all_reduce(self, given: torch.Tensor, op: Any, async_op: bool) -> Any:
        assert (op, async_op) == (torch.distributed.ReduceOp.MAX, True)
        rank, number = self.own.rank, len(self.asked[self.own.rank])
        with self.changed:
            self.asked[rank].append(given.clone())
            self.changed.notify_all()

        def wait() -> None:
            with self.changed:
                self.waits[rank] += len(self.asked[1 - rank]) <= number
                assert self.changed.wait_for(lambda: len(self.asked[1 - rank]) > number, 10)
            given.copy_(torch.maximum(self.asked[0][number], self.asked[1][number]))

        return SimpleNamespace(wait=wait)


@pytest.mark.parametrize(
    ("seconds", "wanted", "stop"),
    [((0.1, 0.1), 3, 4), ((0.1, 0.1), 0, 0), ((9.0, 9.0), 3, 3), ((0.1, 2.0), 3, 3), ((2.0, 0.1), 3, 3)],
)
def test_ranks_stop_together_at_once_or_after_one_short_step_more(
    seconds: tuple[float, float], wanted: int, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`seconds` are those of each rank's steps; rank 1 wants to stop from step `wanted` on."""
    board = Board(monkeypatch)
    monkeypatch.setattr(dist.time, "monotonic", lambda: board.own.now)

    def run(rank: int) -> int:
        board.own.rank, board.own.now = rank, 0.0
        poll = dist.Poll()
        for step in range(9):
            board.own.now += seconds[rank]
            if poll(rank == 1 and step >= wanted):
                return step
        return -1

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, range(2))) == [stop, stop]


def test_a_rank_goes_on_before_the_others_have_done_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    board, poll = Board(monkeypatch), dist.Poll()
    board.own.rank = 0
    for _ in range(6):  # rank 1 has answered up to the step before
        board.asked[1].append(torch.zeros(2))
        assert not poll(False)
    assert board.waits == [0, 0]


@pytest.mark.parametrize("given", ["soon", "0", "-5", "1.5"])
def test_a_bad_timeout_is_an_error(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPP_TIMEOUT", given)
    with pytest.raises(UserError, match=f"MPP_TIMEOUT is '{given}'"):
        dist.start(World(1, 2), torch.device("cpu"))


GLOO = "[/w/pytorch/third_party/gloo/gloo/transport/tcp/"
RECV = "Timed out waiting 20000ms for recv"
FAILURES = [
    (RuntimeError("Application timeout caused pair closure"), "Application timeout caused pair closure"),
    (RuntimeError(f"{GLOO}pair.cc:547] Connection closed by peer [127.0.0.1]:13"), "Connection closed by peer"),
    (RuntimeError(f"{GLOO}unbound_buffer.cc:78] {RECV}"), RECV),
    (DistBackendError("NCCL error in: x.cpp:9, ncclRemoteError: A call failed\nLast error:"), "ncclRemoteError"),
    (DistNetworkError("failed to recv, got 0 bytes"), "failed to recv"),
    (DistStoreError("wait timeout after 600000ms"), "wait timeout"),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ""),
    (DistBackendError("NCCL error: ncclInvalidUsage: Duplicate GPU detected : rank 0 and rank 1"), ""),
    (ConnectionError(f"{GLOO}pair.cc:547] not an error of torch's"), ""),
]


@pytest.mark.parametrize(("error", "part"), FAILURES)
def test_errors_tell_of_another_rank_or_are_this_one_s_own(error: Exception, part: str) -> None:
    text = failure.lost_another(error)
    assert part in text
    assert bool(part) == bool(text)
    assert "pair.cc" not in text
    assert "\n" not in text


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
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")  # without torchrun all speak, but of what they have in common
    for rank, alike, speaks in [("0", True, True), ("0", False, True), ("1", True, False), ("1", False, True)]:
        monkeypatch.setenv("RANK", rank)
        assert failure.is_first_to_report(alike) == speaks
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert failure.rank_name() == f"[rank 1 on {os.uname().nodename}] "


SAME = {"optim.lr": "0.1", "images": "40 images", "log.every": '"5%"', "newest checkpoint in run_dir": "none"}
DIFFERENT = [
    ([{}, {"images": "41 images"}], "rank 1 on node0 differs from the other ranks: images 41 images (elsewhere 40"),
    ([{"images": "1"}, {}, {}], "rank 0 on node0 differs from the other ranks: images 1 (elsewhere 40 images); g"),
    ([{}, {}, {"optim.lr": "1"}, {}, {"optim.lr": "2"}], "rank 2 on node1 and 1 more differ from the other ranks: o"),
    ([{}, dict.fromkeys(SAME, "x")], 'images x (elsewhere 40 images); log.every x (elsewhere "5%"); 1 more; give'),
    ([{}, {"new": "x"}], "new x (elsewhere None)"),
]


@pytest.mark.parametrize(("ranks", "said"), DIFFERENT)
def test_the_rank_that_differs_is_named_with_what_it_has(
    ranks: list[dict[str, str]], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dist.agree(lambda: {}[""])  # alone there is nothing to compare, and so nothing is asked
    known = [SAME | changed for changed in ranks]
    monkeypatch.setattr(dist.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "gather", lambda own: [(f"node{rank // 2}", facts) for rank, facts in enumerate(known)])
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        dist.agree(lambda: known[0])
    assert str(caught.value).endswith("the same run folder and equal copies of the images")
    known = [SAME] * 3
    dist.agree(lambda: known[0])


PAGE = re.sub(r" \\\n#? +", " ", (runs.ROOT / "docs" / "cluster.md").read_text())
COMMANDS = re.findall(r"^ {4}(?:torchrun|sbatch) .*?tools/(?:pretrain\.py|slurm\.sh) (.*)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("number", range(4))
def test_the_four_commands_of_the_page_parse(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs.ROOT)
    assert len(COMMANDS) == 4
    config = parse(PretrainConfig, shlex.split(COMMANDS[number]), "pretrain", "", ALIASES)
    assert config.data.source == "folder:/my/images"
