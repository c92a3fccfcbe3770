"""study.json and what a study that goes on finds done, from folders as runs leave them, without training anything."""

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpp.config import to_yaml
from mpp.downstream.finetune_result import Result
from mpp.downstream.labelled import open_labelled
from mpp.errors import UserError
from mpp.pretraining.settings import PretrainConfig
from mpp.study import work
from mpp.study.arms import Pretraining, pretrainings
from mpp.study.cells import Cell, cell_config, cells, starting_points
from mpp.study.frozen import earlier
from mpp.study.record import Record
from mpp.study.settings import StudyConfig
from mpp.study.turns import take_turns
from tests.study.test_arms import labelled, study

study_run = import_module("mpp.study.run")  # where the package has the function of that name
FIRST, SECOND = ({"commit": commit, "versions": {}, "hardware": {"cores": 2}} for commit in "ab")


def end(run: Pretraining, *starts: dict[str, Any]) -> None:
    """Leaves what a pretraining of 101 steps does, and its starts."""
    (run.folder / "model").mkdir(parents=True)
    (run.folder / "model" / "config.json").write_text("{}")
    (run.folder / "config.yaml").write_text(to_yaml(run.config))
    rows = [
        {"step": step, "images": 16 * step, "loss": loss, "accuracy_masked": 0.5, "lr": 1.0, "time/load": 1.0}
        for step, loss in ((50, 9.0), (100, 2.0), (101, 53.0))
    ]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = [{"time": str(number), "step": 0, "command": "x", **start} for number, start in enumerate(starts)]
    (run.folder / "environment.json").write_text(json.dumps(told))


def written(config: StudyConfig) -> dict[str, Any]:
    return json.loads((Path(config.run_dir) / "study.json").read_text())


def test_test_images_among_the_pretraining_data_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "train.npz", images=images[:12], labels=np.arange(12) % 3)
    np.savez(tmp_path / "test.npz", images=images[12:20], labels=np.arange(8) % 3)
    np.save(tmp_path / "more.npy", images[17:])
    data, test, more = (f"array:{tmp_path}/{name}" for name in ("train.npz", "test.npz", "more.npy"))
    arms = ("a", f"b: --data.source {more}", f"c: --data.source {more} --objective.ratio 0.7")
    config = study(run_dir=str(tmp_path / "s"), data=data, test=test, arms=arms)
    of = open_labelled(data, test)
    seen = study_run._check_apart(config, of)
    assert seen == {"b": 3, "c": 3}
    (line,) = capsys.readouterr().err.splitlines()
    expected = (
        f"WARNING: 3 of the 8 test images are in the pretraining data of b, {more}, 3 byte for byte, such as image 5"
    )
    assert line.startswith(expected)
    told = Record(config, of, (), (), (), seen).document["data"]
    assert (told["test_images"], told["test_images_seen"]) == (8, seen)
    # Images that are gone are missed where they are still to be trained on.
    (tmp_path / "more.npy").unlink()
    with pytest.raises(UserError, match=r"there is no file .*more\.npy"):
        study_run._check_apart(config, of)
    for run in pretrainings(config, {}):
        end(run)
    assert study_run._check_apart(config, of) == {}
    assert "test images were not compared with those that b was pretrained on: array:" in capsys.readouterr().err


def test_what_is_done_is_told_from_the_first_write_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = study(run_dir=str(tmp_path), pretrain_seeds=(0, 1))
    runs = pretrainings(config, {})
    end(runs[0], FIRST, SECOND)
    end(runs[2], FIRST)

    def pretrain(told: PretrainConfig) -> int:
        """The second of them ends, the last is stopped."""
        if told.train.seed:
            return 75
        end(runs[1], FIRST)
        return 0

    monkeypatch.setattr(work, "pretrain", pretrain)
    record = Record(config, labelled(8), runs, (), ())
    assert take_turns(work.Work(config, labelled(8), runs, (), {}, record).parts()) == 75
    told = written(config)["pretraining"]
    assert [(run["arm"], run["seed"]) for run in told] == [("a", 0), ("b", 0), ("a", 1)]


def test_runs_stand_in_order_with_all_that_made_them(tmp_path: Path) -> None:
    config = study(run_dir=str(tmp_path), equal_time=True)
    runs = pretrainings(config, {})
    record = Record(config, labelled(8), runs, (), [("random", None), ("a", 0)])
    record.set_equal_time({"b": {"ratio": 1.0, "images": 1, "flags": "--data.source folder:/home/me/x"}})
    end(runs[0], FIRST, FIRST, SECOND)
    end(runs[1], FIRST)
    for run in reversed(runs):
        record.add_pretraining(run)
    record.add_frozen("a", 0, {"fewshot": [], "probe": 0.5})
    record.write()
    told = written(config)
    assert [run["arm"] for run in told["pretraining"]] == ["a", "b"]
    # A twentieth of 101 steps: one at 53, and fifty at 2.
    assert told["pretraining"][0]["final"] == {"loss": pytest.approx(3.0), "accuracy_masked": pytest.approx(0.5)}
    assert told["environment"] == {"time": "2", **SECOND}
    assert told["environments"] == [{**FIRST, "runs": 2}, {**SECOND, "runs": 1}]
    assert told["probes"] == [{"side": "a", "pretrain_seed": 0, "top1": 0.5}]
    assert told["equal_time"]["arms"]["b"]["flags"] == "--data.source folder:x"


def test_a_setting_that_changes_finished_runs_is_refused(tmp_path: Path) -> None:
    config = study(run_dir=str(tmp_path), labels=("50%",), seeds=(0, 1))
    config = replace(config, finetune=replace(config.finetune, optim=replace(config.finetune.optim, lr=(1.0, 2.0))))

    def check(config: StudyConfig, before: StudyConfig) -> None:
        inits = starting_points(config, pretrainings(config, {}))
        study_run._check_done(config, before, cells(config, labelled(160), 1600), inits)

    cell = Cell("a", "50%", config.finetune.train.length, 1, 0)
    one = cell_config(config, cell, starting_points(config, pretrainings(config, {})), 2.0)
    folder = Path(one.run_dir)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(one))
    check(config, config)  # which goes on
    Result(0.5, None, 0.5, (0.4, 0.6), 4, 80, 4, 2.0, 9, one.init).write(folder)
    check(config, config)  # with one of the learning rates to be tried
    for changed in ({"pretrain_seeds": (0, 1)}, {"lengths": ("9 steps",)}):
        with pytest.raises(UserError, match=f"seed_1 holds a run .*, for {next(iter(changed))} of the study changed"):
            check(replace(config, **changed), config)
    check(replace(config, labels=("50%", "100%"), arms=(*config.arms, "c")), config)


@pytest.mark.parametrize("length", ["the study's", "7 steps"])
def test_what_others_did_is_told_too(length: str, tmp_path: Path) -> None:
    config = study(run_dir=str(tmp_path), labels=("50%",), seeds=(0, 1))
    runs, inits = pretrainings(config, {}), starting_points(config, pretrainings(config, {}))
    todo = cells(config, labelled(160), 1600)
    record = Record(config, labelled(160), runs, todo, ())
    whole = work.Work(config, labelled(160), runs, todo, inits, record)
    whole.tell_what_is_done()
    record.write()
    assert written(config)["pretraining"] == written(config)["finetuning"] == []
    one = cell_config(config, todo[-1], inits)
    there = one if length == "the study's" else replace(one, train=replace(one.train, length=length))
    end(runs[0], FIRST)
    folder = Path(one.run_dir)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(there))
    (folder / "metrics.jsonl").write_text("")
    Result(0.5, None, 0.5, (0.4, 0.6), 4, 80, 4, 2.0, 9, one.init).write(folder)
    whole.tell_what_is_done()
    record.write()
    assert [(run["arm"], run["seed"]) for run in written(config)["pretraining"]] == [("a", 0)]
    expected = [(todo[-1].side, 1, 0.5)] if there is one else []  # one of another config is not the study's
    assert [(run["side"], run["seed"], run["top1"]) for run in written(config)["finetuning"]] == expected


def test_figures_of_frozen_encoders_are_found_by_their_settings(tmp_path: Path) -> None:
    config = study(run_dir=str(tmp_path))
    figures = {"fewshot": [], "probe": None}
    settings = {"shots": [1, 5, 10, 25], "draws": 3, "l2": "1024", "layers": [-1], "pool": ["mean", "token"]}
    train = config.finetune.train
    settings |= {"probe": False, "device": train.device, "precision": train.precision}
    (tmp_path / "frozen" / "a").mkdir(parents=True)
    kept = {"of": {"weights": "x", "train": "y", "test": "z", **settings}, "figures": figures}
    (tmp_path / "frozen" / "a" / "seed_0.json").write_text(json.dumps(kept))
    assert earlier(config, "a", 0) == figures
    assert earlier(config, "a", 1) is None
    assert earlier(replace(config, draws=4), "a", 0) is None
