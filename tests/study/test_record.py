"""study.json and what a study that goes on finds done, from folders as runs leave them, without training anything."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpp.config import to_yaml
from mpp.downstream.finetune_result import RESULT, Inputs, Result, write_record
from mpp.downstream.labelled import open_labelled
from mpp.downstream.settings import FinetuneConfig
from mpp.errors import UserError
from mpp.study import tasks
from mpp.study.equal_time import EqualTime
from mpp.study.frozen import saved_figures
from mpp.study.plan import Plan, Pretraining, pretrainings
from mpp.study.record import Record
from mpp.study.run import check_apart, check_finished
from mpp.study.scheduler import run_tasks
from mpp.study.settings import StudyConfig
from tests.study.test_plan import labelled, planned, study

FIRST, SECOND = ({"commit": commit, "versions": {}, "hardware": {"cores": 2}} for commit in "ab")


def end(run: Pretraining, *starts: dict[str, Any]) -> None:
    """Leaves the files of a pretraining of 101 steps, and its starts."""
    (run.folder / "model").mkdir(parents=True)
    (run.folder / "model" / "config.json").write_text("{}")
    (run.folder / "config.yaml").write_text(to_yaml(run.config))
    rows = [
        {"step": step, "images": 16 * step, "loss": loss, "accuracy_masked": 0.5, "lr": 1.0, "time/load": 1.0}
        for step, loss in ((50, 9.0), (100, 2.0), (101, 53.0))
    ]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    starts_of = [{"time": str(number), "step": 0, "command": "x", **start} for number, start in enumerate(starts)]
    (run.folder / "environment.json").write_text(json.dumps(starts_of))


def end_tuning(config: FinetuneConfig, written: FinetuneConfig | None = None, sweep: bool = False) -> None:
    """Leaves the files of a fine-tuning run, of the config `written` if that is another, and of its sweep."""
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(written or config).replace("batch_size: auto", "batch_size: 512"))
    (folder / "metrics.jsonl").write_text("")
    if sweep:
        (folder / "sweep.csv").write_text("lr,held_out_top1,held_out_images,chosen\n2.0,0.5,40,1\n")
    write_record(folder / RESULT, Result(0.5, None, 0.5, (0.4, 0.6), 4, 80, 4, 2.0, 9, config.init))


def end_frozen(config: StudyConfig, side: str, seed: int, figures: dict[str, Any]) -> Inputs:
    """Leaves the figures of an encoder that was read frozen."""
    settings = {"shots": [1, 5, 10, 25], "draws": 3, "l2": "1024", "layers": [-1], "pool": ["mean", "token"]}
    train, inputs = config.finetune.train, Inputs("x", "y", "z")
    settings |= {"probe": False, "device": train.device, "precision": train.precision}
    path = Path(config.run_dir) / "frozen" / side / f"seed_{seed}.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"of": asdict(inputs) | settings, "figures": figures}))
    return inputs


def written(plan: Plan, timed: EqualTime | None = None) -> dict[str, Any]:
    """study.json of a plan."""
    Record(plan, timed=timed).write()
    return json.loads((Path(plan.config.run_dir) / "study.json").read_text())


def test_test_images_among_the_pretraining_data_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "train.npz", images=images[:12], labels=np.arange(12) % 3)
    np.savez(tmp_path / "test.npz", images=images[12:20], labels=np.arange(8) % 3)
    np.save(tmp_path / "more.npy", images[17:])
    data, test, more = (f"array:{tmp_path}/{name}" for name in ("train.npz", "test.npz", "more.npy"))
    arms = ("a", f"b: --data.source {more}", f"c: --data.source {more} --objective.ratio 0.7")
    config = study(run_dir=str(tmp_path / "s"), data=data, test=test, arms=arms)
    of = open_labelled(data, test)
    seen = check_apart(config, of)
    assert seen == {"b": 3, "c": 3}
    (line,) = capsys.readouterr().err.splitlines()
    which = f"the pretraining data of b, {more}, 3 byte for byte, such as image 5"
    assert line.startswith(f"WARNING: 3 of the 8 test images are in {which}")
    document = Record(Plan(config, of, [], []), seen).document["data"]
    assert (document["test_images"], document["test_images_seen"]) == (8, seen)
    # Images that are gone are missed where they are still to be trained on.
    (tmp_path / "more.npy").unlink()
    with pytest.raises(UserError, match=r"there is no file .*more\.npy"):
        check_apart(config, of)
    for run in pretrainings(config):
        end(run)
    assert check_apart(config, of) == {}
    Record(Plan(config, of, pretrainings(config), []), {**seen, "gone": 5}).write()
    assert check_apart(config, of) == seen  # as it was found while they were there
    assert "test images were not compared with those that b was pretrained on: array:" in capsys.readouterr().err


def test_arms_in_equal_time_are_known_when_their_images_are_gone(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "train.npz", images=images[:12], labels=np.arange(12) % 3)
    np.savez(tmp_path / "test.npz", images=images[12:], labels=np.arange(8) % 3)
    data, test = (f"array:{tmp_path}/{name}.npz" for name in ("train", "test"))
    arms = ("a", f"b: --data.source array:{tmp_path}/gone.npy")
    config = study(run_dir=str(tmp_path / "s"), data=data, test=test, arms=arms, equal_time=True)
    timed = EqualTime({"a": {"images": 1600}, "b": {"images": 800}})
    for run in pretrainings(config, timed):
        end(run)
    with pytest.raises(UserError, match="gone"):
        check_apart(config, open_labelled(data, test))
    assert check_apart(config, open_labelled(data, test), timed) == {}


def test_what_other_processes_did_is_written_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = replace(planned(study(run_dir=str(tmp_path), pretrain_seeds=(0, 1))), finetunings=[])
    end(plan.pretrainings[0], FIRST, SECOND)
    end(plan.pretrainings[2], FIRST)
    # The second of them ends, the last is stopped.
    monkeypatch.setattr(tasks, "pretrain", lambda of: 75 if of.train.seed else (end(plan.pretrainings[1], FIRST) or 0))
    assert run_tasks(tasks.StudyTasks(plan, Record(plan)).tasks()) == 75
    document = json.loads((tmp_path / "study.json").read_text())
    assert [(run["arm"], run["seed"]) for run in document["pretraining"]] == [("a", 0), ("b", 0), ("a", 1)]


def test_a_fine_tuning_does_not_compare_the_images_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(study(run_dir=str(tmp_path), labels=("50%",), seeds=(0,)))
    monkeypatch.setattr(tasks, "finetune", lambda config, compare=True: 1 if compare else (end_tuning(config) or 0))
    monkeypatch.setattr(tasks.StudyTasks, "_inputs_of", lambda self, start: Inputs("x", "y", "z"))
    assert tasks.StudyTasks(plan, Record(plan)).tasks()[len(plan.pretrainings)].do() == 0


def test_runs_stand_in_order_with_all_that_made_them(tmp_path: Path) -> None:
    plan = replace(planned(study(run_dir=str(tmp_path), equal_time=True)), finetunings=[])
    end(plan.pretrainings[1], FIRST)
    end(plan.pretrainings[0], FIRST, FIRST, SECOND)
    chosen = {"layer": -1, "pool": "quarters", "held_out": 0.6, "top1": 0.7}
    end_frozen(plan.config, "a", 0, {"fewshot": [], "probe": 0.5, "probe_chosen": chosen})
    timed = EqualTime({"b": {"ratio": 1.0, "images": 1, "flags": "--data.source folder:/home/me/x"}})
    document = written(plan, timed)
    assert [run["arm"] for run in document["pretraining"]] == ["a", "b"]
    # A twentieth of 101 steps: one at 53, and fifty at 2.
    final = document["pretraining"][0]["final"]
    assert final == {"loss": pytest.approx(3.0), "accuracy_masked": pytest.approx(0.5)}
    assert document["environment"] == {"time": "2", **SECOND}
    assert document["environments"] == [{**FIRST, "runs": 2}, {**SECOND, "runs": 1}]
    assert document["probes"] == [{"side": "a", "pretrain_seed": 0, "top1": 0.5, "chosen": chosen}]
    assert document["equal_time"] == {
        "arms": {"b": timed.arms["b"] | {"flags": "--data.source folder:x"}},
        "longer": {},
    }
    longer = {"1%": {"ratio": 2.0, "images": 800}}
    assert written(plan, replace(timed, longer=longer))["equal_time"]["longer"] == longer


@pytest.mark.parametrize("same", [True, False])
def test_a_run_of_another_config_is_not_the_study_s(same: bool, tmp_path: Path) -> None:
    plan = planned(study(run_dir=str(tmp_path), labels=("50%",), seeds=(0, 1)))
    assert written(plan)["finetuning"] == []
    run = plan.finetunings[-1]
    config = plan.finetune_config(run)
    end_tuning(config, None if same else replace(config, loss=replace(config.loss, smoothing=0.3)))
    found = [(run["side"], run["seed"], run["top1"]) for run in written(plan)["finetuning"]]
    assert found == ([(run.side, 1, 0.5)] if same else [])


def test_a_setting_that_changes_finished_runs_is_refused(tmp_path: Path) -> None:
    config = study(run_dir=str(tmp_path), labels=("50%",), seeds=(0, 1))
    config = replace(config, finetune=replace(config.finetune, optim=replace(config.finetune.optim, lr=(1.0, 2.0))))
    plan = planned(config)
    run = next(run for run in plan.finetunings if (run.side, run.seed) == ("a", 1))
    end_tuning(plan.finetune_config(run, 2.0), sweep=True)
    check_finished(plan, config)  # with one of the learning rates to be tried
    for changed in ({"pretrain_seeds": (0, 1)}, {"lengths": ("9 steps",)}):
        with pytest.raises(UserError, match=f"seed_1 holds a run .*, for {next(iter(changed))} of the study changed"):
            check_finished(planned(replace(config, **changed)), config)
    check_finished(planned(replace(config, labels=("50%", "100%"), arms=(*config.arms, "c"))), config)


def test_seeds_put_before_others_take_the_rate_that_was_chosen(tmp_path: Path) -> None:
    config = study(run_dir=str(tmp_path), labels=("50%",), seeds=(0,))
    config = replace(config, finetune=replace(config.finetune, optim=replace(config.finetune.optim, lr=(1.0, 2.0))))
    for run in (plan := planned(config)).finetunings:
        end_tuning(plan.finetune_config(run, 2.0), sweep=True)
    more = planned(replace(config, seeds=(1, 0)))
    assert [(run.side, run.seed) for run in more.choosers.values()] == [(side, 0) for side in ("scratch", "a", "b")]
    check_finished(more, config)
    # A share that is to choose anew might choose another rate than the one that finished runs have.
    anew = planned(replace(config, labels=("50%", "100%"), tune_at=("100%",)))
    assert {run.labels for run in anew.choosers.values()} == {"100%"}
    with pytest.raises(UserError, match="seed_0 has the learning rate that another run chose, and scratch, 100% of"):
        check_finished(anew, config)
    force = replace(config.finetune, resume="force")
    check_finished(planned(replace(anew.config, finetune=force)), config)
    # Nor is the rate of another share one that a share has chosen.
    both = replace(config, labels=("50%", "100%"))
    for run in (plan := planned(both)).finetunings:
        if run.labels == "100%":
            end_tuning(plan.finetune_config(run, 2.0))
    check_finished(planned(replace(both, tune_at=("50%",))), both)
    with pytest.raises(UserError, match="100/seed_0 has a learning rate that it did not choose, and scratch, 100%"):
        check_finished(plan, both)
    check_finished(planned(replace(both, finetune=force)), both)


def test_figures_of_frozen_encoders_are_found_by_their_settings(tmp_path: Path) -> None:
    config, figures = study(run_dir=str(tmp_path)), {"fewshot": [], "probe": None}
    inputs = end_frozen(config, "a", 0, figures)
    assert saved_figures(config, "a", 0, None) == saved_figures(config, "a", 0, inputs) == figures
    assert saved_figures(config, "a", 0, replace(inputs, weights="w")) is None
    assert saved_figures(config, "a", 1, None) is None
    assert saved_figures(replace(config, draws=4), "a", 0, None) is None


def test_labelled_images_without_pretraining(tmp_path: Path) -> None:
    config = study(run_dir=str(tmp_path), arms=(), init="runs/first")
    plan = Plan(config, labelled(8), pretrainings(config), [])
    assert plan.pretrainings == []
    assert set(plan.encoders.values()) == {("random", None), ("pretrained", None)}
    few = {"5": 4, "10": 4, "25": 4}  # of the shots that it would draw of each class
    assert written(plan)["data"] == {"train_images": 8, "test_images": 4, "classes": 4, "short_classes": few}
