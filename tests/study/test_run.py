"""The study as one runs it: a tiny problem, from pretraining to the table."""

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from mpp.report.wording import points
from mpp.system.files import read_csv
from mpp.weights.base import Weights, build
from mpp.weights.timm_folder import write_timm_folder
from tests import runs
from tests.study.commands import ARMS, TAKEN, command

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def done(source: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished study and what it printed."""
    folder = tmp_path_factory.mktemp("study")
    return folder, runs.call(command(source, folder))[0]


def sides(share: str) -> list[str]:
    return ["scratch", *(["scratch, longer"] if share == "50%" else []), *ARMS]


def cell(folder: Path, side: str, share: str, seed: int) -> Path:
    """The folder of one fine-tuning run."""
    name = {"scratch, longer": "scratch_longer", "75 %": "75"}.get(side, side)
    return folder / "finetune" / name / f"labels_{share.rstrip('%')}" / f"seed_{seed}"


def result(folder: Path, side: str, share: str, seed: int) -> dict[str, Any]:
    return json.loads((cell(folder, side, share, seed) / "result.json").read_text())


def test_the_tables_are_those_of_its_runs(done: tuple[Path, str]) -> None:
    folder, printed = done
    table = {(row["labels"], row["side"]): row for row in read_csv(folder / "table.csv")}
    assert list(table) == [(share, side) for share in ("50%", "100%") for side in sides(share)]
    for (share, side), row in table.items():
        top1, scratch = (
            np.array([result(folder, of, share, seed)["top1"] for seed in (0, 1)]) for of in (side, "scratch")
        )
        assert float(row["top1"]) == pytest.approx(top1.mean())
        assert float(row["std"]) == pytest.approx(top1.std(ddof=1))
        text = f"{100 * top1.mean():.1f} ± {100 * top1.std(ddof=1):.1f}"
        if side == "scratch":
            assert row["gain"] == ""
        else:
            assert float(row["gain"]) == pytest.approx((top1 - scratch).mean())
            half = stats.t.ppf(0.975, 1) * stats.sem(top1 - scratch)
            assert float(row["interval95"]) == pytest.approx(half, rel=1e-4)
            assert row["over"] == "2 pretrainings" if side in ARMS else "2 fine-tuning seeds"
            text += f" | {points((top1 - scratch).mean())} ± {100 * half:.1f}"
        assert text in printed
        assert text in (folder / "study.md").read_text()
    read = {
        (row["encoder"], row["pretrain_seed"], row["pool"], row["layer"]) for row in read_csv(folder / "fewshot.csv")
    }
    encoders = [("random", ""), *((arm, seed) for arm in ARMS for seed in "01")]
    assert read == {(*of, pool, layer) for of in encoders for pool in ("mean", "token") for layer in ("-1", "-2")}
    for picture in ("finetune.png", "fewshot.png", "layers.png"):
        assert (folder / picture).read_bytes()[:4] == b"\x89PNG"
    pages = [folder / "pretrain" / "default" / f"seed_{seed}" / "report.html" for seed in (0, 1)]
    assert all('id="downstream"' in page.read_text() for page in pages)


def test_all_sides_have_the_same_labels_steps_and_architecture(done: tuple[Path, str]) -> None:
    folder, _ = done
    for share, images, steps in (("50%", 20, 4), ("100%", 40, 6)):
        for seed in (0, 1):
            of = {side: result(folder, side, share, seed) for side in sides(share)}
            for side, found in of.items():
                # A longer one has the 8 x 16 images of the pretraining more, in steps of 8.
                assert (found["train_images"], found["steps"]) == (images, steps + 16 * (side == "scratch, longer"))
            assert of["scratch"]["init"] == f"random:{folder / 'pretrain' / 'default' / 'seed_0'}"
            for arm, name in (("default", "default"), ("75 %", "75")):
                assert of[arm]["init"] == str(folder / "pretrain" / name / f"seed_{seed}")
            models = [cell(folder, side, share, seed) / "model" / "config.json" for side in of]
            args = [json.loads(path.read_text())["model_args"] for path in models]
            assert all(one == args[0] for one in args)


def test_each_side_s_learning_rate_is_chosen_once(done: tuple[Path, str]) -> None:
    folder, _ = done
    found = read_csv(folder / "runs.csv")
    assert len(found) == 14
    rates = {side: {row["lr"] for row in found if row["side"] == side} for side in sides("50%")}
    assert all(len(of) == 1 for of in rates.values())
    swept = {path.parent for path in folder.glob("finetune/*/*/*/sweep.csv")}
    assert swept == {cell(folder, side, "50%", 0) for side in sides("50%")}
    assert not list(folder.glob("finetune/**/checkpoints"))


def test_its_data_file_holds_every_run_and_no_folder(done: tuple[Path, str]) -> None:
    folder, _ = done
    text = (folder / "study.json").read_text()
    document = json.loads(text)
    assert str(folder.parent) not in text
    assert str(runs.ROOT) not in text
    assert (document["finished"], document["name"]) == (True, folder.name)
    assert document["data"] == {"train_images": 40, "test_images": 24, "classes": 4}
    assert {"versions", "hardware", "commit"} <= document["environment"].keys()
    assert [(run["arm"], run["seed"]) for run in document["pretraining"]] == [
        (arm, seed) for seed in (0, 1) for arm in ARMS
    ]
    for run in document["pretraining"]:
        assert (run["images"], run["steps"], run["batch_size"]) == (128, 8, 16)
        assert run["flags"] == ("" if run["arm"] == "default" else "--objective.ratio 0.75 --log.no-report")
        final = run["final"]
        assert {"loss", "accuracy", "accuracy_masked", "accuracy_baseline_neighbours", "grad_norm"} <= final.keys()
        assert run["curve"] == [[128, final["accuracy_masked"]]]
        assert run["parameters"] > 48 * 48 * 12 * 2  # the matrices of its two blocks
    for run in document["finetuning"]:
        of = result(folder, run["side"], run["labels"], run["seed"])
        for key in ("top1", "balanced", "lr", "steps", "train_images"):
            assert run[key] == of[key]
        assert run["images"] == 8 * run["steps"]
        assert run["pretrain_seed"] == (run["seed"] if run["side"] in ARMS else None)
        swept = (run["labels"], run["seed"]) == ("50%", 0)
        assert (run["sweep"] is not None) == swept
        assert run["sweep"] is None or (run["sweep"].keys() == {"0.001", "0.003"} and f"{run['lr']:g}" in run["sweep"])
    parts = [run["seconds"] for key in ("pretraining", "finetuning") for run in document[key]]
    assert min(parts) > 0
    assert document["device_seconds"] > sum(parts)  # the sweeps beside them


def test_what_is_done_is_not_done_again_and_another_config_is_refused(done: tuple[Path, str], source: str) -> None:
    folder, first = done
    kept = [path for path in folder.rglob("*") if path.name in ("model.safetensors", "study.json", "report.html")]
    before = {path: path.stat().st_mtime_ns for path in kept}
    out, _ = runs.call(command(source, folder))
    assert out.count("was done before") == 4 + 14
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert out[out.index("Fine-tuning, test") :] == first[first.index("Fine-tuning, test") :]
    _, err = runs.call(command(source, folder, pretrain__train__length="30 steps"), 2)
    assert "another config" in err
    assert "8 steps" in err
    assert err.count("\n") == 1 + err.count("note:")


def test_other_weights_under_the_same_name_are_refused(source: str, tmp_path: Path) -> None:
    init = tmp_path / "init"
    one = TAKEN | {"init": str(init), "labels": "100%", "lengths": "6 steps", "seeds": "0", "layers": "-1"}
    for depth, code in ((1, 0), (2, 2)):
        args = {"patch_size": [8, 8], "embed_dim": 48, "num_heads": 3, "depth": depth}
        weights = Weights("vit_tiny_patch16_224", args, None, (32, 32))
        write_timm_folder(replace(weights, state=build(weights).state_dict()), init)
        _, err = runs.call(command(source, tmp_path / "study", **one), code)
        assert ("the weights it started from have changed since" in err) == (code == 2)


def test_two_processes_share_a_study_and_one_goes_on_for_a_killed_one(
    done: tuple[Path, str], source: str, tmp_path: Path
) -> None:
    """Here one of a pretraining that is taken; a pretraining goes on by itself (tests/test_resume.py)."""
    init = done[0] / "pretrain" / "default" / "seed_0"
    words = command(
        source, tmp_path, **TAKEN, init=str(init), labels="50%", lengths="4 steps", layers="-1", probe="true"
    )
    killed, other = runs.start(words), runs.start(words)
    while killed.poll() is None and not list(tmp_path.glob("finetune/*/*/*/result.json")):
        pass
    assert killed.poll() is None
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    out, err = other.communicate(timeout=600)
    assert other.returncode == 0, err
    assert "| labels | images | steps | from scratch | pretrained | gain |" in out
    started = [json.loads(path.read_text()) for path in tmp_path.glob("finetune/*/*/*/environment.json")]
    assert sorted(map(len, started)) in ([1, 1, 1, 1], [1, 1, 1, 2])  # all but the killed one's once
    again, _ = runs.call(words)
    assert again.count("was done before") == 4
    assert again[again.index("Fine-tuning, test") :] == out[out.index("Fine-tuning, test") :]
    # What both studies did: scratch twice, and the first seed of the pretraining once.
    ours, theirs = (
        {(row["side"], row["seed"]): row["top1"] for row in read_csv(folder / "runs.csv") if row["labels"] == "50%"}
        for folder in (tmp_path, done[0])
    )
    assert ours["pretrained", "0"] == theirs["default", "0"]
    assert all(ours["scratch", seed] == theirs["scratch", seed] for seed in "01")
    ours, theirs = (
        [row["accuracy"] for row in read_csv(of / "fewshot.csv") if row["layer"] == "-1"] for of in (tmp_path, done[0])
    )
    assert ours == theirs[: len(ours)]
    probes = json.loads((tmp_path / "study.json").read_text())["probes"]
    assert [probe["side"] for probe in probes] == ["random", "pretrained"]
    for probe in probes:
        layer, pool = probe["chosen"]["layer"], probe["chosen"]["pool"]
        assert (layer, pool) in {(-1, "mean"), (-1, "token")}
        assert pool == "token" or probe["chosen"]["top1"] == probe["top1"]


def test_in_equal_time_longer_training_goes_by_its_own_step(source: str, tmp_path: Path) -> None:
    few = {"arms": "", "pretrain_seeds": "0", "seeds": "0", "layers": "-1", "pretrain__train__length": "64 steps"}
    words = command(source, tmp_path, equal_time="true", **few)
    runs.call(words)
    measured = json.loads((tmp_path / "study.json").read_text())["equal_time"]["longer"]["50%"]
    assert measured["images"] == 8 * round(64 * 16 / measured["ratio"] / 8)
    steps = [result(tmp_path, side, "50%", 0)["steps"] for side in ("scratch", "scratch, longer")]
    assert steps[1] - steps[0] == measured["images"] // 8
    out, _ = runs.call(words)  # with what was measured before
    assert out.count("was done before") == 1 + 5


# The last one, for it adds to the study that the others look at.
def test_a_share_of_the_labels_may_be_added(done: tuple[Path, str], source: str) -> None:
    more = {"labels": "50%,75%,100%", "lengths": "4 steps,4 steps,6 steps", "layers": "-1"}
    out, _ = runs.call(command(source, done[0], **more, pretrain__log__report="false"))
    assert out.count("was done before") == 4 + 14
    assert list(dict.fromkeys(row["labels"] for row in read_csv(done[0] / "table.csv"))) == ["50%", "75%", "100%"]
