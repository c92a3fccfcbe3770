"""What befalls a run on many machines: ranks that die or fail, a network that is cut. Real processes, over gloo."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests import runs
from tests.cluster import launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of two ranks that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    words = [*launch.launcher("--standalone"), *launch.command(source, folder / "run")]
    with launch.started(words, folder / "log") as process:
        launch.end(process, folder / "log")
    return folder / "run"


@pytest.mark.parametrize(("rendezvous", "kills"), [("c10d", 2), ("static", 1)])
def test_ranks_that_are_killed_leave_no_trace(
    rendezvous: str, kills: int, source: str, undisturbed: Path, tmp_path: Path
) -> None:
    options = ["--standalone"] if rendezvous == "c10d" else ["--master-port", str(launch.free_port())]
    run_dir, log, chance = tmp_path / "run", tmp_path / "log", random.Random(3)
    words = [*launch.launcher(*options, "--max-restarts", "3"), *launch.command(source, run_dir)]
    with launch.started(words, log) as process:
        for kill in range(kills):
            # Past the start of this attempt, so that the victim is one of the new ranks.
            launch.wait(lambda: log.read_text().count("resumed from") == kill, log)  # noqa: B023
            launch.wait(lambda: launch.newest(run_dir) >= 14 + 21 * kill, log)  # noqa: B023
            os.kill(launch.ranks(process)[chance.choice([0, 1])], signal.SIGKILL)
        assert launch.end(process, log).count("resumed from") == kills
    runs.assert_same_run(undisturbed, run_dir)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_rank_that_is_killed_on_its_gpu_leaves_no_trace(source: str, tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    settings = launch.command(source, run_dir, train__device="cuda", train__compile="off")
    with launch.started([*launch.launcher("--standalone", "--max-restarts", "1"), *settings], log) as process:
        launch.wait(lambda: launch.newest(run_dir) >= 14, log)
        os.kill(launch.ranks(process)[1], signal.SIGKILL)
        assert launch.end(process, log).count("resumed from") == 1
    assert launch.newest(run_dir) == launch.STEPS


BROKEN = """
import os, sys
from mpp.cli import pretrain
from mpp.training import loop

update = loop.update

def broken(*given):
    if os.environ["RANK"] == "1" and given[-1] == 4:
        raise {error}
    return update(*given)

loop.update = broken
sys.exit(pretrain())
"""


@pytest.mark.parametrize(
    ("error", "line", "tracebacks"),
    [
        ("ValueError('a bug')", "ValueError: a bug", 1),
        ("OSError(28, 'No space left on device')", "No space left on device", 0),
    ],
)
def test_a_rank_that_fails_is_the_only_one_to_report(
    error: str, line: str, tracebacks: int, source: str, tmp_path: Path
) -> None:
    script, log = tmp_path / "broken.py", tmp_path / "log"
    script.write_text(BROKEN.format(error=error))
    words = [*launch.launcher("--standalone"), str(script), *launch.command(source, tmp_path / "run")[1:]]
    with launch.started(words, log) as process:
        text = launch.end(process, log, code=1)
    (found,) = [each for each in text.splitlines() if each.startswith("pretrain: error: ")]
    assert found.startswith("pretrain: error: [rank 1 on ")
    assert line in found
    assert f"traceback : {found}" in text  # torchrun's summary names the cause, and its rank
    assert text.count("]: Traceback") == tracebacks
    assert "Connection closed by peer" not in text


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[Callable[[bool], None]]:
    """Two hosts, the namespaces mpp-host1 and mpp-host2 (10.213.7.1 and .2); the value cuts and mends their link."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("needs root and iproute2, to make network namespaces")
    try:
        ip("netns", "add", "mpp-host1")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not allowed here: {error.stderr.decode().strip()}")
    try:
        ip("netns", "add", "mpp-host2")
        # Each end in its host; the cut takes the carrier away from both.
        peer = ("type", "veth", "peer", "name", "mpp-v2", "netns", "mpp-host2")
        ip("link", "add", "mpp-v1", "netns", "mpp-host1", *peer)
        for n in "12":
            host = ("-n", f"mpp-host{n}")
            ip(*host, "addr", "add", f"10.213.7.{n}/24", "dev", f"mpp-v{n}")
            ip(*host, "link", "set", "lo", "up")
            ip(*host, "link", "set", f"mpp-v{n}", "up")
        yield lambda up: ip("-n", "mpp-host2", "link", "set", "mpp-v2", "up" if up else "down")
    finally:
        for n in "12":
            subprocess.run(["ip", "netns", "del", f"mpp-host{n}"], capture_output=True)


def test_a_network_cut_for_half_a_minute_restarts_the_run(
    source: str, undisturbed: Path, hosts: Callable[[bool], None], tmp_path: Path
) -> None:
    run_dir, logs = tmp_path / "run", [tmp_path / "log1", tmp_path / "log2"]

    def host(number: int):
        """This host's torchrun. Names do not resolve in there, so what torchrun would find by them is given."""
        options = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "10.213.7.1:29400", "--rdzv-id", "cut"]
        options += ["--rdzv-conf", f"is_host={int(number == 1)},read_timeout=600"]
        options += ["--local-addr", f"10.213.7.{number}", "--max-restarts", "3"]
        words = [*launch.launcher(*options, nproc=1), *launch.command(source, run_dir)]
        environment = {"GLOO_SOCKET_IFNAME": f"mpp-v{number}", "MPP_TIMEOUT": "20"}
        return launch.started(["ip", "netns", "exec", f"mpp-host{number}", *words], logs[number - 1], **environment)

    with host(1) as one, host(2) as two:
        launch.wait(lambda: launch.newest(run_dir) >= 21, logs[0])
        hosts(False)
        time.sleep(30)  # and 20 are waited for an answer
        assert launch.newest(run_dir) < launch.STEPS
        hosts(True)
        launch.end(one, logs[0])
        launch.end(two, logs[1])
    text = logs[0].read_text()
    assert text.count("resumed from") == 1
    assert text.count("pretrain: error: [rank 0 on ") == 1
    assert "Traceback" not in text
    runs.assert_same_run(undisturbed, run_dir)
