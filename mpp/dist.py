"""Several processes under `torchrun`, or one without it: who we are, and what all processes agree on."""

import datetime
import os
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mpp.errors import ConfigError, RunError, UserError


@dataclass(frozen=True)
class World:
    """This process among all: rank of size, local_rank of local_size on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0


def world_from_environment() -> World:
    """What torchrun set, or a world of one."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return World(rank, size, int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


_patient: list[Any] = []  # the group of those who wait while one prepares the data, which may take hours


def timeout() -> datetime.timedelta:
    """How long a rank waits for the others, to join and in each collective: $MPP_TIMEOUT seconds, or ten minutes.

    Nothing else notices a machine that lost its power or its network. Raises UserError for no number of seconds.
    """
    text = os.environ.get("MPP_TIMEOUT") or "600"
    if not text.isdecimal() or not 0 < int(text) < 10**7:
        raise UserError(f"MPP_TIMEOUT is {text!r}; it takes the seconds that a rank waits for the others, such as 600")
    return datetime.timedelta(seconds=int(text))


def start(world: World, device: torch.device) -> None:
    """Joins the process group: nccl with gloo for CPU tensors on CUDA, gloo elsewhere. Nothing for a world of one.

    Raises UserError for a rank 0 that did not come in time, or a bad $MPP_TIMEOUT.
    """
    if world.size > 1 and not dist.is_initialized():
        patience = timeout()
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = store_of_this_attempt(world, patience)
            dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=patience)
        else:
            dist.init_process_group(backend, timeout=patience)
        _patient.append(dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7)))


def store_of_this_attempt(world: World, patience: datetime.timedelta) -> Any:
    """A key-value store that rank 0 serves, where the ranks find each other.

    torchrun lends its own, but keeps it over restarts (torch 2.13; no prefix by attempt), so that restarted ranks would
    find the addresses of the dead and wait for them. So it only says where ours is: a port and a token. Those may
    still be the dead rank 0's; then nobody answers there, or not to the token, or the seat of our rank is taken.
    Raises RunError where rank 0 did not come in time.
    """
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]  # not in every build

    host = os.environ["MASTER_ADDR"]
    lent = TCPStore(host, int(os.environ["MASTER_PORT"]), is_master=False, timeout=patience)
    key = "mpp/store"
    if world.rank == 0:
        token = secrets.token_hex(8)
        own = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=patience)
        own.set(token, "")
        lent.set(key, f"{own.port} {token}")
        return own
    deadline = time.monotonic() + patience.total_seconds()
    while time.monotonic() < deadline:
        port, token = lent.get(key).decode().split()
        try:
            # Asked first whether anybody listens: the store's own client would try again and again.
            socket.create_connection((host, int(port)), timeout=10).close()
            own = TCPStore(host, int(port), is_master=False, timeout=datetime.timedelta(seconds=30))
            if own.check([token]) and own.add(f"seat/{world.rank}", 1) == 1:
                own.set_timeout(patience)
                return own
        except (OSError, RuntimeError):
            pass
        time.sleep(0.1)
    raise RunError(f"rank 0 on {host} did not come within {patience} (hours:minutes:seconds); look into its log")


def stop() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        _patient.clear()
        dist.destroy_process_group()


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of processes, of the group that was started."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier(patient: bool = False) -> None:
    """Waits for all processes: $MPP_TIMEOUT seconds, or as long as preparing the data may take."""
    if dist.is_initialized():
        dist.barrier(_patient[0] if patient else None)


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum over all processes, on all of them."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
    return values


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any process; by CPU tensors, so that no device has to be waited for."""
    if not dist.is_initialized():
        return flag
    tensor = torch.tensor([int(flag)])
    dist.all_reduce(tensor)
    return bool(tensor.item())


class Poll:
    """Whether the flag of any process is set, asked after every step without a wait for the slowest process.

    A call returns the answer to the question of the call before; after a step of `LONG` seconds or more in any process,
    it waits for its own. All processes go by the same answers, so that they decide alike.
    """

    LONG = 1.0
    """Seconds, far less than a scheduler leaves between its signal and the end."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._asked: tuple[Any, Tensor] | None = None

    def __call__(self, flag: bool) -> bool:
        """Asks, for all processes together; of one process alone, `flag` itself."""
        if not dist.is_initialized():
            return flag
        now = time.monotonic()
        question = torch.tensor([float(flag), now - self._since], dtype=torch.float64)
        before, self._since = self._asked, now
        self._asked = dist.all_reduce(question, dist.ReduceOp.MAX, async_op=True), question
        anyone, seconds = 0.0, self.LONG
        if before is not None:
            before[0].wait()
            anyone, seconds = before[1].tolist()
        if not anyone and seconds >= self.LONG:
            self._asked[0].wait()
            anyone = question[0].item()
        return bool(anyone)


def agree(facts: Callable[[], Mapping[str, str]]) -> None:
    """Refuses to go on where a rank knows otherwise than the others; for all ranks together, before it can do harm.

    `facts`, texts by name, is called only where there are several ranks. Raises ConfigError on all of them, naming the
    first that differs from most, and in what.
    """
    if not dist.is_initialized():
        return
    ranks: list[tuple[str, dict[str, str]]] = gather((socket.gethostname(), dict(facts())))
    usual: dict[str, str] = dict(Counter(tuple(known.items()) for _, known in ranks).most_common(1)[0][0])
    odd = [(rank, host, known) for rank, (host, known) in enumerate(ranks) if known != usual]
    if odd:
        rank, host, known = odd[0]
        names = [name for name in {**usual, **known} if known.get(name) != usual.get(name)]
        lines = [f"{name} {known.get(name)} (elsewhere {usual.get(name)})" for name in names]
        others = f" and {len(odd) - 1} more differ" if odd[1:] else " differs"
        what = "; ".join([*lines[:3], *([f"{len(lines) - 3} more"] if lines[3:] else [])])
        raise ConfigError(
            f"rank {rank} on {host}{others} from the other ranks: {what}; "
            "give all ranks the same settings, the same run folder and equal copies of the images"
        )


def gather(value: Any) -> list[Any]:
    """Everybody's value (picklable), in order of rank, on all processes."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
