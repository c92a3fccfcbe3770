"""The study as one runs it: a tiny problem, from pretraining to the table."""

import csv
import dataclasses
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from mpp.cli import study
from mpp.run_page.wording import points
from mpp.weights.base import Weights, build
from mpp.weights.timm_folder import write_timm_folder
from tests import runs

STUDY = runs.ROOT / "tools" / "study.py"
ARMS = ("default", "75 %")
SETTINGS = {
    "arms": "default,75 %: --objective.ratio 0.75 --log.no-report",
    "pretrain_seeds": "0,1",
    "labels": "50%,100%",
    "lengths": "4 steps,6 steps",
    "longer": "50%",
    "tune_at": "50%",
    "seeds": "0,1",
    "shots": "1,2",
    "layers": "-1,-2",
    "pretrain.model.name": "vit_tiny_patch16_224",
    "pretrain.model.img_size": "32",
    "pretrain.model.patch_size": "8",
    "pretrain.model.embed_dim": "48",
    "pretrain.model.num_heads": "3",
    "pretrain.model.depth": "2",
    "pretrain.train.length": "8 steps",
    "pretrain.train.batch_size": "16",
    "pretrain.data.workers": "0",
    "pretrain.log.pictures": "",
    "finetune.data.workers": "0",
    "finetune.train.batch_size": "8",
    "finetune.optim.name": "adamw",
    "finetune.optim.lr": "1e-3,3e-3",
}


TAKEN = {"arms": "", "pretrain_seeds": "0", "longer": "", "tune_at": ""}
"""Settings of a study that pretrains nothing."""


def command(source: str, run_dir: Path, **changed: str) -> list[str]:
    test = runs.write_images(Path(source.partition(":")[2]).parent / "test", 24, seed=1)
    settings = SETTINGS | {"data": source, "test": test, "run_dir": str(run_dir)}
    settings |= {name.replace("__", "."): value for name, value in changed.items()}
    empty = ("arms", "longer", "lengths")  # lists that may be
    words = [
        word for name, value in settings.items() if value or name not in empty
        for word in (f"--{name}", *(value.split(",") if value else [""]))
    ]  # fmt: skip
    return [str(STUDY), *words]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def done(source: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished study and what it printed."""
    folder = tmp_path_factory.mktemp("study")
    return folder, runs.finish(command(source, folder))[0]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def sides(share: str) -> list[str]:
    return ["scratch", *(["scratch, longer"] if share == "50%" else []), *ARMS]


def cell(folder: Path, side: str, share: str, seed: int) -> Path:
    """The folder of one fine-tuning run."""
    name = {"scratch, longer": "scratch_longer", "75 %": "75"}.get(side, side)
    return folder / "finetune" / name / f"labels_{share.rstrip('%')}" / f"seed_{seed}"


def result(folder: Path, side: str, share: str, seed: int) -> dict[str, Any]:
    return json.loads((cell(folder, side, share, seed) / "result.json").read_text())


@pytest.mark.slow
def test_the_table_is_that_of_its_runs(done: tuple[Path, str]) -> None:
    folder, printed = done
    table = {(row["labels"], row["side"]): row for row in rows(folder / "table.csv")}
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
    pages = [folder / "pretrain" / "default" / f"seed_{seed}" / "report.html" for seed in (0, 1)]
    assert all('id="downstream"' in page.read_text() for page in pages)


@pytest.mark.slow
def test_all_sides_have_the_same_labels_steps_and_architecture(done: tuple[Path, str]) -> None:
    folder, _ = done
    for share, images, steps in (("50%", 20, 4), ("100%", 40, 6)):
        for seed in (0, 1):
            of = {side: result(folder, side, share, seed) for side in sides(share)}
            for side, found in of.items():
                # A longer one has the 8 x 16 images of the pretraining more, in steps of 8.
                assert (found["train_images"], found["steps"]) == (images, steps + 16 * (side == "scratch, longer"))
            assert of["scratch"]["init"] == f"random:{folder / 'pretrain' / 'default' / 'seed_0'}"
            assert of["default"]["init"] == str(folder / "pretrain" / "default" / f"seed_{seed}")
            assert of["75 %"]["init"] == str(folder / "pretrain" / "75" / f"seed_{seed}")
            models = [cell(folder, side, share, seed) / "model" / "config.json" for side in of]
            args = [json.loads(path.read_text())["model_args"] for path in models]
            assert all(one == args[0] for one in args)


@pytest.mark.slow
def test_each_side_s_learning_rate_is_chosen_once(done: tuple[Path, str]) -> None:
    folder, _ = done
    found = rows(folder / "runs.csv")
    assert len(found) == 14
    rates = {side: {row["lr"] for row in found if row["side"] == side} for side in sides("50%")}
    assert all(len(of) == 1 for of in rates.values())
    assert rates["scratch, longer"] == rates["scratch"]
    swept = {path.parent for path in folder.glob("finetune/*/*/*/sweep.csv")}
    assert swept == {cell(folder, side, "50%", 0) for side in ("scratch", *ARMS)}  # longer takes scratch's
    assert not list(folder.glob("finetune/**/checkpoints"))


@pytest.mark.slow
def test_few_shot_stands_for_all_encoders_poolings_and_layers(done: tuple[Path, str]) -> None:
    folder, _ = done
    names = {(row["encoder"], row["pretrain_seed"], row["pool"], row["layer"]) for row in rows(folder / "fewshot.csv")}
    encoders = [("random", ""), *((arm, seed) for arm in ARMS for seed in "01")]
    assert names == {(*of, pool, layer) for of in encoders for pool in ("mean", "token") for layer in ("-1", "-2")}
    for picture in ("finetune.png", "fewshot.png", "layers.png"):
        assert (folder / picture).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_its_data_file_holds_every_run_and_no_folder(done: tuple[Path, str]) -> None:
    folder, _ = done
    text = (folder / "study.json").read_text()
    told = json.loads(text)
    assert str(folder.parent) not in text
    assert str(runs.ROOT) not in text
    assert told["finished"]
    assert told["name"] == folder.name
    assert told["data"] == {"train_images": 40, "test_images": 24, "classes": 4}
    assert {"versions", "hardware", "commit"} <= told["environment"].keys()
    assert [(run["arm"], run["seed"]) for run in told["pretraining"]] == [
        (arm, seed) for seed in (0, 1) for arm in ARMS
    ]
    for run in told["pretraining"]:
        assert (run["images"], run["steps"], run["batch_size"]) == (128, 8, 16)
        assert run["flags"] == ("" if run["arm"] == "default" else "--objective.ratio 0.75 --log.no-report")
        assert {"loss", "accuracy", "accuracy_masked", "accuracy_baseline_neighbours", "grad_norm"} <= run[
            "final"
        ].keys()
        assert run["curve"] == [[128, run["final"]["accuracy_masked"]]]
        assert run["parameters"] > 48 * 48 * 12 * 2  # the matrices of its two blocks
    for run in told["finetuning"]:
        of = result(folder, run["side"], run["labels"], run["seed"])
        assert {key: run[key] for key in ("top1", "balanced", "lr", "steps", "train_images")} == {
            key: of[key] for key in ("top1", "balanced", "lr", "steps", "train_images")
        }
        assert run["images"] == 8 * run["steps"]
        assert run["pretrain_seed"] == (run["seed"] if run["side"] in ARMS else None)
        swept = (run["labels"], run["seed"]) == ("50%", 0) and run["side"] != "scratch, longer"
        assert (run["sweep"] is not None) == swept
        assert run["sweep"] is None or (run["sweep"].keys() == {"0.001", "0.003"} and f"{run['lr']:g}" in run["sweep"])
    parts = [run["seconds"] for key in ("pretraining", "finetuning") for run in told[key]]
    assert min(parts) > 0
    assert told["device_seconds"] > sum(parts)  # the sweeps beside them


@pytest.mark.slow
def test_what_is_done_is_not_done_again(done: tuple[Path, str], source: str) -> None:
    folder, first = done
    kept = [path for path in folder.rglob("*") if path.name in ("model.safetensors", "study.json", "report.html")]
    before = {path: path.stat().st_mtime_ns for path in kept}
    out, _ = runs.finish(command(source, folder))
    assert out.count("was done before") == 4 + 14
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert out[out.index("Fine-tuning, test") :] == first[first.index("Fine-tuning, test") :]


@pytest.mark.slow
def test_other_weights_under_the_same_name_are_refused(source: str, tmp_path: Path) -> None:
    init = tmp_path / "init"
    for depth, code in (("1", 0), ("2", 2)):
        weights = Weights(
            "vit_tiny_patch16_224",
            {"patch_size": [8, 8], "embed_dim": 48, "num_heads": 3, "depth": int(depth)},
            None,
            (32, 32),
        )
        state = build(weights).state_dict()
        write_timm_folder(dataclasses.replace(weights, state=state), init)
        one = TAKEN | {"init": str(init), "labels": "100%", "lengths": "6 steps", "seeds": "0", "layers": "-1"}
        _, err = runs.finish(command(source, tmp_path / "study", **one), code)
        assert ("the weights it started from have changed since" in err) == (code == 2)


@pytest.mark.slow
def test_another_config_is_refused(done: tuple[Path, str], source: str) -> None:
    _, err = runs.finish(command(source, done[0], pretrain__train__length="30 steps"), 2)
    assert "another config" in err
    assert "8 steps" in err
    assert err.count("\n") == 1 + err.count("note:")


@pytest.mark.slow
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
    again, _ = runs.finish(words)
    assert again.count("was done before") == 4
    assert again[again.index("Fine-tuning, test") :] == out[out.index("Fine-tuning, test") :]

    def known(folder: Path, arm: str) -> dict[tuple[str, str], str]:
        """What both studies did: scratch twice, and the first seed of the pretraining once."""
        found = [row for row in rows(folder / "runs.csv") if row["labels"] == "50%"]
        told = {(row["side"], row["seed"]): row["top1"] for row in found}
        return {("arm", "0"): told[arm, "0"], **{("scratch", seed): told["scratch", seed] for seed in "01"}}

    assert known(tmp_path, "pretrained") == known(done[0], "default")
    ours, theirs = ([row for row in rows(of / "fewshot.csv") if row["layer"] == "-1"] for of in (tmp_path, done[0]))
    assert [row["accuracy"] for row in ours] == [row["accuracy"] for row in theirs[: len(ours)]]
    probes = json.loads((tmp_path / "study.json").read_text())["probes"]
    assert [probe["side"] for probe in probes] == ["random", "pretrained"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"data": ""}, "--data"),
        ({"data": "folder:/nowhere"}, "/nowhere"),
        (TAKEN | {"init": "/nowhere/run"}, "/nowhere/run"),
        ({"init": "/nowhere/run"}, "leave out arms"),
        ({"labels": "0%", "lengths": "", "longer": "", "tune_at": ""}, "labels"),
        ({"lengths": "6 steps"}, "lengths"),
        ({"seeds": "0,0"}, "seeds"),
        ({"finetune__init": "resnet18"}, "finetune.init is set by the study; use init"),
        ({"finetune__data__labels": "50%"}, "use labels"),
        ({"finetune__train__length": "9 steps"}, "lengths and finetune.train.length"),
        ({"longer": "10%"}, "longer takes shares that labels has, 50%, 100%"),
        ({"tune_at": "10%"}, "tune_at takes shares"),
        ({"pretrain__train__seed": "3"}, "use pretrain_seeds"),
        ({"arms": "a,b: --objective.rato 0.7"}, "arms: b: no setting '--objective.rato'; did you mean"),
        ({"arms": "a,75 % --data.source folder:/x"}, "arms: '75 % --data.source folder': put a colon before the flags"),
        ({"pretrain__data__keep": "true"}, "data.keep is for remote shards"),
        ({"finetune__data__keep": "true"}, "data.keep is for remote shards"),
        ({"labels": "50%,0.5"}, "labels takes different shares"),
        ({"arms": "a,b: --objective.ratio 7"}, "arms: b: objective.ratio must be in (0, 1]"),
        ({"arms": "a,b: --objective.target 'x"}, "arms: b: No closing quotation"),
        ({"arms": "a,A"}, "its folder would be that of 'a'"),
        ({"arms": "a,scratch longer"}, "that of 'scratch, longer'"),
        ({"arms": "a,b: --run-dir x"}, "arms: b: run_dir is the same for all arms"),
        ({"arms": "a,b: --model.num_heads 5"}, "b: "),
        # What would otherwise be met after hours of pretraining:
        ({"test": ""}, "would see the images held out"),
        ({"test": "", "pretrain__data__source": "DATA"}, "would see the images held out"),
        ({"layers": "-9"}, "layer"),
        ({"labels": "4%,100%", "longer": "", "tune_at": ""}, "no class of"),
        ({"finetune__loss__mixup": "0.5", "finetune__train__batch_size": "7"}, "7"),
    ],
)
def test_wrong_input_is_one_line(
    changed: dict[str, str], words: str, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = {name: source if value == "DATA" else value for name, value in changed.items()}
    assert study(command(source, tmp_path / "study", **changed)[1:]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("how", ["spelling", "relative", "link", "copy", "mixture"])
def test_it_does_not_pretrain_on_its_test_images(
    how: str, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = command(source, tmp_path / "study")
    test = Path(words[words.index("--test") + 1].removeprefix("array:"))
    (tmp_path / "link.npz").symlink_to(test)
    shutil.copy(test, tmp_path / "copy.npz")
    monkeypatch.chdir(test.parent)
    names = {
        "spelling": f"array:{test.parent}/../{test.parent.name}//{test.name}",
        "relative": f"array:{test.name}",
        "link": f"array:{tmp_path}/link.npz",
        "copy": f"array:{tmp_path}/copy.npz",
        "mixture": f"{source} + array:{tmp_path}/link.npz",
    }
    assert study(command(source, tmp_path / "study", pretrain__data__source=names[how])[1:]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(
        f"study: error: default would be pretrained on the test images: all 24 of array:{test} are in"
    )
    assert line.endswith("; name other images for one of them, by --test or --pretrain.data.source")
    assert not (tmp_path / "study").exists()


# The last one, for it adds to the study that the others look at.
@pytest.mark.slow
def test_a_share_of_the_labels_may_be_added(done: tuple[Path, str], source: str) -> None:
    more = {
        "labels": "50%,75%,100%",
        "lengths": "4 steps,4 steps,6 steps",
        "layers": "-1",
        "pretrain.log.report": "false",
    }
    out, _ = runs.finish(command(source, done[0], **more))
    assert out.count("was done before") == 4 + 14
    assert list(dict.fromkeys(row["labels"] for row in rows(done[0] / "table.csv"))) == ["50%", "75%", "100%"]
