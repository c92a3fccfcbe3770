"""A run that was stopped anywhere, by anything, and started again ends in the same bits as one that was not."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from mpp.cli import finetune, pretrain
from mpp.pretraining.survey import FILE
from mpp.training.checkpoint import Checkpoints, load_checkpoint
from mpp.training.loop import EXIT_REQUEUE
from mpp.training.rows import read_rows
from tests import runs

import timm  # isort: skip  (after mpp, which makes it importable beside the CPU build of torch)


@pytest.fixture(scope="session")
def uninterrupted(source: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run from start to end, and the seconds between its first checkpoint and its end."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    process = runs.start(runs.command(source, run_dir))
    runs.wait_for_checkpoint(process, run_dir)
    began = time.monotonic()
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return run_dir, time.monotonic() - began


def kill_and_restart(source: str, run_dir: Path, moment: float, first_workers: str, then_workers: str) -> None:
    process = runs.start(runs.command(source, run_dir, data__workers=first_workers))
    runs.wait_for_checkpoint(process, run_dir)
    time.sleep(moment)
    runs.kill(process)
    runs.call(runs.command(source, run_dir, data__workers=then_workers))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [("0", "0"), ("2", "2"), ("2", "0"), ("0", "2")])
def test_killed_at_a_random_moment(
    workers: tuple[str, str], source: str, uninterrupted: tuple[Path, float], tmp_path: Path
) -> None:
    reference, seconds = uninterrupted
    kill_and_restart(source, tmp_path / "run", random.Random("".join(workers)).uniform(0, seconds), *workers)
    runs.assert_same_run(tmp_path / "run", reference)


@pytest.mark.slow
def test_killed_again_and_again(source: str, uninterrupted: tuple[Path, float], tmp_path: Path) -> None:
    reference, seconds = uninterrupted
    draw = random.Random(7)
    for _ in range(5):
        process = runs.start(runs.command(source, tmp_path / "run"))
        runs.wait_for_checkpoint(process, tmp_path / "run")
        time.sleep(draw.uniform(0, seconds / 3))
        runs.kill(process)
    runs.call(runs.command(source, tmp_path / "run"))
    runs.assert_same_run(tmp_path / "run", reference)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_stop_saves_and_exits_with_the_requeue_code(
    number: signal.Signals, source: str, uninterrupted: tuple[Path, float], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = runs.start(runs.command(source, run_dir, data__workers="2"), start_new_session=True)
    runs.wait_for_checkpoint(process, run_dir, step=7)
    os.killpg(process.pid, number)  # as a scheduler does: to the workers too
    _, err = process.communicate(timeout=60)
    assert process.returncode == EXIT_REQUEUE, err
    assert "the same command again goes on" in err
    assert "Traceback" not in err
    stopped = runs.final_state(run_dir)["images_seen"]
    assert 7 * 16 <= stopped < 60 * 16
    _, err = runs.call(runs.command(source, run_dir))
    assert f"at step {stopped // 16} of 60" in err
    runs.assert_same_run(run_dir, uninterrupted[0])


# Files of a run may not be larger than so many bytes.
SMALL = """
import resource, sys
from mpp.cli import pretrain

resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
sys.exit(pretrain())
"""


@pytest.mark.slow
def test_full_disk_leaves_the_last_good_checkpoint(
    source: str, uninterrupted: tuple[Path, float], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    # The first checkpoint has no optimiser state yet, so a limit between its size and a later one's lets it through.
    later = Checkpoints(uninterrupted[0] / "checkpoints").latest()
    assert later is not None
    limit = int(later.stat().st_size * 0.8)
    (tmp_path / "small.py").write_text(SMALL.format(limit=limit))
    _, err = runs.finish([str(tmp_path / "small.py"), *runs.command(source, run_dir)[1:]], code=1)
    assert "Traceback" not in err
    assert "File too large" in err.splitlines()[-1]
    assert "the last good checkpoint is" in err.splitlines()[-1]
    checkpoints = Checkpoints(run_dir / "checkpoints")
    assert checkpoints.steps() == [0]
    assert load_checkpoint(checkpoints.path(0))["images_seen"] == 0
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step_000000000.pt"]
    runs.call(runs.command(source, run_dir))
    runs.assert_same_run(run_dir, uninterrupted[0])


def again(source: str, run_dir: Path, *flags: str, **changed: str) -> int:
    """The command of a short run, in this process."""
    return pretrain(
        runs.command(source, run_dir, *flags, **{"train__length": "10 steps", "fewshot__data": "", **changed})[1:]
    )


@pytest.fixture(scope="module")
def ended(source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    run_dir = tmp_path_factory.mktemp("ended") / "run"
    assert again(source, run_dir) == 0
    return run_dir


@pytest.fixture
def copy(ended: Path, tmp_path: Path) -> Path:
    """The finished run, to be spoilt."""
    return shutil.copytree(ended, tmp_path / "copy")


def test_a_finished_run_whose_figures_are_gone_says_so(
    source: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "metrics.jsonl").unlink()
    assert again(source, copy) == 0
    assert f"note: {copy / 'metrics.jsonl'} has no figures any more" in capsys.readouterr().out


def test_a_finished_run_is_left_as_it_is_and_refused_where_it_does_not_fit(
    source: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = runs.figures(copy)
    assert again(source, copy) == 0
    assert "is finished (10 steps)" in capsys.readouterr().err
    assert runs.figures(copy) == before
    assert again(source, copy, optim__lr="2e-3") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "optim.lr: 0.001 -> 0.002" in line
    assert "--resume force" in line
    latest = Checkpoints(copy / "checkpoints").path(10)
    latest.write_bytes(latest.read_bytes()[:-1000])
    assert again(source, copy) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "it is truncated or not a checkpoint" in line
    assert str(latest) in line


def test_forced_resume_goes_on_with_the_changed_config(
    source: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert again(source, copy, "--resume", "force", train__length="12 steps", optim__weight_decay="0.25") == 0
    assert "at step 10 of 12" in capsys.readouterr().err
    state = runs.final_state(copy)
    assert state["images_seen"] == 12 * 16
    assert [group["weight_decay"] for group in state["optimizer"]["param_groups"]] == [0.25, 0.0]


BOTH = {
    "pretrain": (pretrain, runs.command, "mpp.pretraining.recipe"),
    "finetune": (finetune, runs.finetune_command, "mpp.downstream.finetune"),
}


@pytest.mark.parametrize("tool", BOTH)
def test_the_model_of_an_earlier_end_stays_until_there_is_a_new_one(
    tool: str,
    source: str,
    ended: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (make, command, module), run_dir = BOTH[tool], tmp_path / "run"
    if tool == "pretrain":
        shutil.copytree(ended, run_dir)
    else:
        assert make(command(source, run_dir, train__length="4 steps")[1:]) == 0
    model = (run_dir / "model" / "model.safetensors").read_bytes()
    more = {"train__length": "12 steps"} | ({"fewshot__data": ""} if tool == "pretrain" else {})
    longer = command(source, run_dir, "--resume", "force", **more)[1:]
    with monkeypatch.context() as patch:
        patch.setattr(f"{module}.train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        for _ in range(2):
            assert make(longer) == 130
    assert not (run_dir / "model").exists()
    assert (run_dir / "model_before" / "model.safetensors").read_bytes() == model
    assert capsys.readouterr().err.count(f"the model of the run's earlier end is {run_dir / 'model_before'}") == 1
    assert make(longer) == 0
    assert (run_dir / "model" / "model.safetensors").read_bytes() != model
    assert not (run_dir / "model_before").exists()


@pytest.mark.slow
@pytest.mark.parametrize("tool", BOTH)
def test_a_resumed_run_computes_attention_as_it_began(
    tool: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, command, _ = BOTH[tool]

    def run(cache: str, folder: Path) -> None:
        monkeypatch.setenv("MPP_CACHE", str(tmp_path / cache))  # as of another machine
        short = {"train__length": "4 steps", "checkpoint__every": "2 steps"}
        assert make(command(source, folder, **short, **({"fewshot__data": ""} if tool == "pretrain" else {}))[1:]) == 0

    for kernel, slow in (("explicit", "sdpa"), ("sdpa", "explicit")):
        times = {kernel: 1.0, slow: 2.0}
        monkeypatch.setattr("mpp.model.kernel_choice.time_kernels", lambda *_, times=times, **__: times)
        run(kernel, tmp_path / kernel)
    monkeypatch.setattr("mpp.model.kernel_choice.time_kernels", lambda *_, **__: pytest.fail("it was timed again"))
    resumed = shutil.copytree(tmp_path / "explicit", tmp_path / "resumed")
    (resumed / "checkpoints" / "step_000000004.pt").unlink()
    run("sdpa", resumed)
    runs.assert_same_run(resumed, tmp_path / "explicit")
    assert runs.final_state(resumed)["attention"] == "explicit cpu"
    with pytest.raises(AssertionError):  # the kernels do differ in bits
        runs.assert_same_run(tmp_path / "explicit", tmp_path / "sdpa")


def test_a_folder_of_the_user_s_own_called_model_is_left_alone(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "code.py").write_text("mine")
    assert again(source, tmp_path / "run", train__length="1 steps") == 2
    assert "holds a model that no run wrote; choose another --run-dir" in capsys.readouterr().err.splitlines()[-1]
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")] == ["run/model/code.py"]


def test_a_start_without_a_checkpoint_does_not_bind_its_config(source: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("optim:\n  lr: 0.5\n")
    assert again(source, tmp_path, train__length="1 steps") == 0


@pytest.mark.slow
def test_visual_words_are_learnt_once_and_a_run_goes_on_with_them(source: str, tmp_path: Path) -> None:
    run, settings = tmp_path / "run", {"objective__words": "4", "checkpoint__every": "4 steps"}
    assert again(source, run, **settings) == 0
    first, *_, last = Checkpoints(run / "checkpoints").steps()
    states = [load_checkpoint(Checkpoints(run / "checkpoints").path(step))["model"] for step in (first, last)]
    for name in ("words.whitening", "words.words", "words.usual", "image_words.words", "image_words.usual"):
        assert torch.equal(*(state[name] for state in states))
        assert states[0][name].any()
    losses = {"loss_words", "loss_words_seen", "loss_words_image"}
    assert sum(losses <= row.keys() for row in read_rows(run / "metrics.jsonl")) == 2
    reference = shutil.copytree(run, tmp_path / "reference")
    for left in ("with", "without"):
        Checkpoints(run / "checkpoints").path(last).unlink()
        if left == "without":
            (run / FILE).unlink()
        assert again(source, run, **settings) == 0
        runs.assert_same_run(run, reference)
    assert not any(
        "words" in name for name in timm.create_model(f"local-dir:{run / 'model'}", pretrained=True).state_dict()
    )
