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
        assert process.wait(200) == 0, (folder / "log").read_text()[-3000:]
    return folder / "run"


@pytest.mark.parametrize("rendezvous", [["--standalone"], ["--master-port", "0"]], ids=["c10d", "static"])
def test_ranks_that_are_killed_leave_no_trace(
    rendezvous: list[str], source: str, undisturbed: Path, tmp_path: Path
) -> None:
    if "0" in rendezvous:
        rendezvous = ["--master-port", str(launch.free_port())]
    run_dir, log = tmp_path / "run", tmp_path / "log"
    chance = random.Random(3)
    words = [*launch.launcher(*rendezvous, "--max-restarts", "3"), *launch.command(source, run_dir)]
    with launch.started(words, log) as process:
        for kill in range(3):
            # Past the start of this attempt, so that the victim is one of the new ranks.
            launch.wait(lambda: log.read_text().count("resumed from") == kill, log)  # noqa: B023
            launch.wait(lambda: launch.newest(run_dir) >= 14 + 21 * kill, log)  # noqa: B023
            os.kill(launch.ranks(process.pid)[chance.choice([0, 1])], signal.SIGKILL)
        assert process.wait(200) == 0, log.read_text()[-3000:]
    assert log.read_text().count("resumed from") == 3
    runs.assert_same_run(undisturbed, run_dir)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_rank_that_is_killed_on_its_gpu_leaves_no_trace(source: str, tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    settings = launch.command(source, run_dir, train__device="cuda", train__compile="off")
    with launch.started([*launch.launcher("--standalone", "--max-restarts", "1"), *settings], log) as process:
        launch.wait(lambda: launch.newest(run_dir) >= 14, log)
        os.kill(launch.ranks(process.pid)[1], signal.SIGKILL)
        assert process.wait(200) == 0, log.read_text()[-3000:]
    assert log.read_text().count("resumed from") == 1
    assert launch.newest(run_dir) == 120


FAILURES = [
    ("a bug", "ValueError: a bug", 1),
    ("no room", "No space left on device", 0),
]


@pytest.mark.parametrize(("what", "said", "tracebacks"), FAILURES)
def test_a_rank_that_fails_is_the_only_one_to_speak(
    what: str, said: str, tracebacks: int, source: str, tmp_path: Path
) -> None:
    _, *settings = launch.command(source, tmp_path / "run")
    script = tmp_path / "broken.py"
    error = {"a bug": "ValueError('a bug')", "no room": "OSError(28, 'No space left on device')"}[what]
    script.write_text(
        "import os, sys\nfrom mpp.cli import pretrain\nfrom mpp.training import loop\n"
        "update = loop.update\n"
        "def broken(*given):\n"
        f"    if os.environ['RANK'] == '1' and given[-1] == 4: raise {error}\n"
        "    return update(*given)\n"
        "loop.update = broken\nsys.exit(pretrain())\n"
    )
    log = tmp_path / "log"
    with launch.started([*launch.launcher("--standalone"), str(script), *settings], log) as process:
        assert process.wait(120) == 1
    text = log.read_text()
    lines = [line for line in text.splitlines() if line.startswith("pretrain: error: ")]
    assert len(lines) == 1, text[-4000:]
    assert lines[0].startswith("pretrain: error: [rank 1 on ")
    assert said in lines[0]
    assert f"traceback : {lines[0]}" in text  # torchrun's summary names the cause, and its rank
    assert text.count("]: Traceback") == tracebacks
    assert "Connection closed by peer" not in text


def test_a_wrong_setting_is_said_once(tmp_path: Path) -> None:
    words = [str(runs.TOOL), "--optim.lr", "fast"]
    with launch.started([*launch.launcher("--standalone"), *words], tmp_path / "log") as process:
        assert process.wait(120) == 1
    text = (tmp_path / "log").read_text()
    assert text.splitlines().count("pretrain: error: --optim.lr: takes a number, got 'fast'") == 1


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


def node(number: int, words: list[str], *options: str) -> list[str]:
    """The command that starts this host's torchrun."""
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "10.213.7.1:29400", "--rdzv-id", "cut"]
    # Names do not resolve in there, so what torchrun would find by them is said.
    options_here = ["--rdzv-conf", f"is_host={int(number == 1)},read_timeout=600", "--local-addr", f"10.213.7.{number}"]
    launcher = launch.launcher("--nnodes", "2", *meeting, *options_here, *options, nproc=1)
    return ["ip", "netns", "exec", f"mpp-host{number}", *launcher, *words]


def test_a_network_cut_for_a_minute_restarts_the_run(
    source: str, undisturbed: Path, hosts: Callable[[bool], None], tmp_path: Path
) -> None:
    run_dir, logs = tmp_path / "run", [tmp_path / "log1", tmp_path / "log2"]
    words = launch.command(source, run_dir)
    timeout = {"MPP_TIMEOUT": "20"}
    with (
        launch.started(node(1, words, "--max-restarts", "3"), logs[0], GLOO_SOCKET_IFNAME="mpp-v1", **timeout) as one,
        launch.started(node(2, words, "--max-restarts", "3"), logs[1], GLOO_SOCKET_IFNAME="mpp-v2", **timeout) as two,
    ):
        launch.wait(lambda: launch.newest(run_dir) >= 21, logs[0])
        hosts(False)
        time.sleep(60)
        assert launch.newest(run_dir) < 120
        hosts(True)
        assert [one.wait(200), two.wait(60)] == [0, 0], logs[0].read_text()[-3000:]
    text = logs[0].read_text()
    assert text.count("resumed from") == 1
    assert text.count("pretrain: error: [rank 0 on ") == 1
    assert "Traceback" not in text
    runs.assert_same_run(undisturbed, run_dir)
