"""What every long run does with its folder, whatever it trains: resume, save, stop when asked, say what is lacking."""

import contextlib
import errno
import json
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from mpp import dist
from mpp.config import by_name, to_yaml
from mpp.dist import World
from mpp.errors import RunError, TryLater, Unreachable, UserError
from mpp.system.files import LOCK, one_writer, write_whole
from mpp.system.process import memory_reused
from mpp.training.checkpoint import Checkpoints, load_checkpoint
from mpp.training.earlier_run import RunConfig, check_config, check_contents, earlier, schedule_change
from mpp.training.loop import EXIT_REQUEUE, Every, Interrupted, State, Step, StopSignal, fit
from mpp.training.parallel import choose_device, refuse_shared
from mpp.training.saving import Saving
from mpp.training.schedule import Schedule
from mpp.training.tensor_tree import like_these

_MAX_UNANSWERED = 3  # starts in a row that end without an answer at the same image; after them it is not queued again
_PER_MACHINE = ("run_dir", "out", "device", "workers", "download", "keep")  # last parts of names of settings

T = TypeVar("T")
C = TypeVar("C", bound=RunConfig)
Claim = Callable[[], None]
"""Makes sure that the run folder is this run's alone; for all ranks to call, before the first file is written there."""


@contextlib.contextmanager
def processes(config: Any, setting: str = "train.device") -> Iterator[tuple[World, torch.device]]:
    """Give this process among all and the device that `setting` names, in one process group while they are used.

    Raises UserError for a device that is not there or of another rank, and ranks with different settings or folders.
    """
    world = dist.world_from_environment()
    device = choose_device(attrgetter(setting)(config), world, setting)
    dist.start(world, device)
    refuse_shared(device, setting)

    def facts() -> dict[str, str]:
        settings = {name: v for name, v in by_name(config).items() if name.rpartition(".")[2] not in _PER_MACHINE}
        same = {name: json.dumps(value, ensure_ascii=False) for name, value in settings.items()}
        if folder := getattr(config, "run_dir", ""):
            latest = Checkpoints(Path(folder) / "checkpoints").latest()
            same["newest checkpoint in run_dir"] = latest.name if latest else "none"
        return same

    dist.agree(facts)
    with memory_reused() if device.type == "cpu" else contextlib.nullcontext():
        yield world, device
    dist.stop()  # not after an error: the others would learn of it before this rank has said why


def once_a_machine(world: World, opened: Callable[[], T]) -> T:
    """Call `opened` on each machine in one process first, so that downloads and indices are made once."""
    if world.local_rank:
        dist.barrier(patient=True)
    try:
        return opened()
    finally:
        if not world.local_rank:
            dist.barrier(patient=True)


def on_main(world: World, call: Callable[[], T]) -> T:
    """Give all ranks what rank 0 finds, or the UserError that it raises."""
    answer: Any = None
    if world.main:
        try:
            answer = call()
        except UserError as error:
            answer = error
    answer = dist.gather(answer)[0]
    if isinstance(answer, UserError):
        raise answer
    return answer


@contextlib.contextmanager
def claiming(config: RunConfig, world: World) -> Iterator[Claim]:
    """Give a function; within the context, once it was called, no other process or thread writes to the run folder.

    A folder that has had a run is claimed at once. Any other is made only when the function is called, so that bad
    input leaves nothing behind. Rank 0 claims for all. Both raise UserError where another one writes there or it cannot
    be written, the function also for a folder of something else.
    """
    folder, claimed = Path(config.run_dir), False
    with contextlib.ExitStack() as stack:

        def enter() -> None:
            nonlocal claimed
            claimed = True
            on_main(world, lambda: stack.enter_context(one_writer(folder, "--run-dir")))

        def claim() -> None:
            if not claimed:
                earlier(config)  # refuses a folder of something else
                enter()

        if dist.gather((folder / LOCK).is_file())[0]:
            enter()
        yield claim


@contextlib.contextmanager
def explained(config: RunConfig, device: torch.device) -> Iterator[None]:
    """Turn what the machine lacks (memory, disk, an answer from where images are stored) into one line with advice.

    Raises RunError, or TryLater where the same command goes on with the run once there is an answer.
    """
    newest = Checkpoints(Path(config.run_dir) / "checkpoints").latest
    try:
        yield
    except Unreachable as error:
        _count_unanswered(config, error, newest())
        raise
    except torch.OutOfMemoryError as error:
        now = config.train.micro_batch
        if now == "auto":
            now = (earlier(config) or config).train.micro_batch
        halve = f"halve --train.micro-batch (now {now})"
        if now == "auto":
            halve = "set --train.micro-batch to half of what auto chose, as the start says"
        raise RunError(
            f"out of memory on {device}: {halve}, which leaves the result as it is, or set "
            "--model.grad-checkpointing; then run the same command again"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise RunError(
            f"cannot write to {config.run_dir}: {error.strerror}; the last good checkpoint is {newest()}; make room "
            "and run the same command again"
        ) from error


def _count_unanswered(config: RunConfig, error: Unreachable, latest: Path | None) -> None:
    """Raise TryLater for a run whose images could not be fetched, where there is one to go on with.

    After too many such ends in a row, which a queue would start for ever, or of several processes it raises RunError.
    """
    folder = Path(config.run_dir)
    if getattr(config, "dry_run", False) or not config.run_dir or not folder.is_dir():
        return
    saved = sorted(str(path.relative_to(folder)) for path in folder.rglob("checkpoints/step_*"))
    if isinstance(error, UserError) and not saved:  # it has never answered, so it may be misspelt
        return
    resume = f"the same command goes on from {latest}" if latest else "run the same command again"
    if dist.rank_and_size()[1] > 1:  # torchrun ends with 1, whatever we say
        raise RunError(f"{error}; once it answers, {resume}") from error
    path = folder / "unanswered.json"
    try:
        before = json.loads(path.read_bytes())
        times = before["times"] + 1 if before["saved"] == saved else 1
    except (OSError, ValueError, KeyError, TypeError):
        times = 1
    if times >= _MAX_UNANSWERED:
        path.unlink(missing_ok=True)  # whoever starts it again has looked into it
        row = f"{times} starts in a row ended so at the same image"
        raise RunError(f"{error}; {row}; once it answers, {resume}") from error
    text = json.dumps({"times": times, "saved": saved, "error": str(error)}, indent=1)
    with contextlib.suppress(OSError):
        write_whole(path, text)
    raise TryLater(f"{error}; once it answers, {resume}") from error


def resume(
    config: C,
    state: State,
    schedule: Schedule,
    checkpoints: Checkpoints,
    main: bool,
    check: Callable[[C | None], None] = lambda before: None,
) -> int:
    """Load the newest checkpoint of the run, if any, and return its step; save the config.

    `check` gets the config of the saved run before anything is written, and may refuse, too. Raises UserError for a run
    of another config or other images, or a checkpoint that does not fit.
    """
    folder = Path(config.run_dir)
    latest, before = checkpoints.latest(), earlier(config)
    saved: dict[str, Any] = {}
    if latest and before:
        check_config(before, config)
        like = like_these(state.model, state.optimizer, state.ema) if state.sharded else None
        saved = load_checkpoint(latest, like)
    changed = check_contents(state.contents, saved.get("contents"), folder, config.resume == "force")
    if saved:
        try:
            state.load_state_dict(saved)
        except (KeyError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{latest} does not fit this model and optimiser: {reason}") from error
    if len(set(dist.gather(state.images_seen))) > 1:
        raise UserError(f"the processes see different checkpoints in {folder}; it must be a shared folder")
    if changed and main and before:
        print(f"note: the images have changed ({'; '.join(changed)})", file=sys.stderr)
        print(f"note: {schedule_change(before.train, saved['contents'], state, schedule)}", file=sys.stderr)
    check(before)
    if main:
        try:
            write_whole(folder / "config.yaml", to_yaml(config))
        except OSError as error:
            raise UserError(f"cannot write to the run folder {folder}: {error.strerror}") from error
    return schedule.step(state.images_seen)


def train(
    state: State,
    model: nn.Module,
    batches: Generator[Any],
    step: Step,
    schedule: Schedule,
    every: Sequence[Every],
    save: Saving,
    say: Callable[[str], None],
    each_step: Sequence[Callable[[State], None]] = (),
) -> int:
    """Train to the end, or until a signal asks to stop. Returns the exit status: 0, 75 or, after Ctrl-C, 130.

    Raises:
        NonFinite: a loss or gradient that is not finite.
        RunError: a state that could not be saved.
        Unreachable: what the images are read from gives no answer; of one process alone, the state is saved.
    """
    signals = StopSignal()
    try:
        with save:
            # What could not be written ends the run as a signal does: by another save, which raises that.
            fit(state, model, batches, step, schedule, every, lambda: signals() or save.failed, save, each_step)
    except Interrupted:
        dist.barrier(patient=True)  # torchrun ends all ranks soon after the first has left, while one may be writing
        by = signals.received.name if signals.received else "a signal to another process"
        say(f"stopped by {by}; saved as {save.checkpoints.latest()}; the same command again goes on")
        return signals.status or EXIT_REQUEUE
    finally:
        batches.close()
        signals.restore()
    return 0
