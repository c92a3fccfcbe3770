"""The study as one runs it: a tiny problem, from pretraining to the table."""

import csv
import dataclasses
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mpp.cli import study
from mpp.weights.base import Weights, build
from mpp.weights.timm_folder import write_timm_folder
from tests import runs

STUDY = runs.ROOT / "tools" / "study.py"
SETTINGS = {
    "labels": "50%,100%",
    "lengths": "6 steps,12 steps",
    "seeds": "0,1",
    "shots": "1,2",
    "layers": "-1,-2",
    "pretrain.model.name": "vit_tiny_patch16_224",
    "pretrain.model.img_size": "32",
    "pretrain.model.patch_size": "8",
    "pretrain.model.embed_dim": "48",
    "pretrain.model.num_heads": "3",
    "pretrain.model.depth": "2",
    "pretrain.train.length": "20 steps",
    "pretrain.train.batch_size": "16",
    "pretrain.data.workers": "0",
    "pretrain.log.pictures": "",
    "finetune.data.workers": "0",
    "finetune.train.batch_size": "8",
    "finetune.optim.name": "adamw",
    "finetune.optim.lr": "1e-3,3e-3",
}


def command(source: str, run_dir: Path, **changed: str) -> list[str]:
    test = runs.write_images(Path(source.partition(":")[2]).parent / "test", 24)
    settings = SETTINGS | {"data": source, "test": test, "run_dir": str(run_dir)}
    settings |= {name.replace("__", "."): value for name, value in changed.items()}
    words = [word for name, value in settings.items() for word in (f"--{name}", *(value.split(",") if value else [""]))]
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


@pytest.mark.slow
def test_the_table_is_that_of_its_runs(done: tuple[Path, str]) -> None:
    folder, printed = done
    table = rows(folder / "table.csv")
    assert [row["labels"] for row in table] == ["50%", "100%"]
    for row in table:
        for side in ("scratch", "pretrained"):
            share = row["labels"].rstrip("%")
            found = [folder / "finetune" / side / f"labels_{share}" / f"seed_{seed}" / "result.json" for seed in (0, 1)]
            top1 = [json.loads(path.read_text())["top1"] for path in found]
            assert float(row[side]) == pytest.approx(np.mean(top1))
            assert float(row[f"{side}_std"]) == pytest.approx(np.std(top1, ddof=1))
            text = f"{100 * np.mean(top1):.1f} ± {100 * np.std(top1, ddof=1):.1f}"
            assert text in printed
            assert text in (folder / "study.md").read_text()
        assert float(row["gain"]) == pytest.approx(float(row["pretrained"]) - float(row["scratch"]))
    assert 'id="downstream"' in (folder / "pretrain" / "report.html").read_text()  # which tells the same


@pytest.mark.slow
def test_both_sides_have_the_same_labels_steps_and_architecture(done: tuple[Path, str]) -> None:
    folder, _ = done
    for share, images, steps in (("50", 20, 6), ("100", 40, 12)):
        for seed in (0, 1):
            runs_of = [
                folder / "finetune" / side / f"labels_{share}" / f"seed_{seed}" for side in ("scratch", "pretrained")
            ]
            scratch, pretrained = (json.loads((path / "result.json").read_text()) for path in runs_of)
            for result in (scratch, pretrained):
                assert (result["train_images"], result["steps"]) == (images, steps)
            assert scratch["init"] == f"random:{pretrained['init']}"
            models = [json.loads((path / "model" / "config.json").read_text())["model_args"] for path in runs_of]
            assert models[0] == models[1]


@pytest.mark.slow
def test_each_side_s_learning_rate_is_chosen_once_a_share(done: tuple[Path, str]) -> None:
    folder, _ = done
    found = rows(folder / "runs.csv")
    assert len(found) == 8
    for side in ("scratch", "pretrained"):
        for share in ("50%", "100%"):
            assert len({row["lr"] for row in found if (row["side"], row["labels"]) == (side, share)}) == 1
    assert len(list(folder.glob("finetune/*/*/*/sweep.csv"))) == 4


@pytest.mark.slow
def test_few_shot_stands_for_both_encoders_poolings_and_layers(done: tuple[Path, str]) -> None:
    folder, _ = done
    names = {row["encoder"] for row in rows(folder / "fewshot.csv")}
    parts = {(encoder, how) for encoder in ("random", "pretrained") for how in ("mean", "token")}
    assert names == {f"{e} ({how}{layer})" for e, how in parts for layer in ("", ", layer -2")}
    for picture in ("finetune.png", "fewshot.png"):
        assert (folder / picture).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_what_is_done_is_not_done_again(done: tuple[Path, str], source: str) -> None:
    folder, first = done
    before = {path: path.stat().st_mtime_ns for path in folder.glob("finetune/**/model.safetensors")}
    out, _ = runs.finish(command(source, folder))
    assert out.count("was done before") == 8
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
        one = {"init": str(init), "labels": "100%", "lengths": "6 steps", "seeds": "0", "layers": "-1"}
        _, err = runs.finish(command(source, tmp_path / "study", **one), code)
        assert ("the weights it started from have changed since" in err) == (code == 2)


@pytest.mark.slow
def test_another_config_is_refused(done: tuple[Path, str], source: str) -> None:
    _, err = runs.finish(command(source, done[0], pretrain__train__length="30 steps"), 2)
    assert "another config" in err
    assert "20 steps" in err
    assert err.count("\n") == 1 + err.count("note:")


@pytest.mark.slow
def test_a_study_that_is_stopped_goes_on_where_it_was(done: tuple[Path, str], source: str, tmp_path: Path) -> None:
    process = runs.start(command(source, tmp_path))
    while process.poll() is None and not list(tmp_path.glob("finetune/pretrained/*/*/result.json")):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    out, _ = runs.finish(command(source, tmp_path))
    assert "was done before" in out
    assert rows(tmp_path / "runs.csv") == rows(done[0] / "runs.csv")
    assert rows(tmp_path / "fewshot.csv") == rows(done[0] / "fewshot.csv")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"data": ""}, "--data"),
        ({"data": "folder:/nowhere"}, "/nowhere"),
        ({"init": "/nowhere/run"}, "/nowhere/run"),
        ({"labels": "0%", "lengths": ""}, "labels"),
        ({"lengths": "6 steps"}, "lengths"),
        ({"seeds": "0,0"}, "seeds"),
        ({"finetune__init": "resnet18"}, "finetune.init is set by the study; use init"),
        ({"finetune__data__labels": "50%"}, "use labels"),
        ({"finetune__train__length": "9 steps"}, "lengths and finetune.train.length"),
        # What would otherwise be met after hours of pretraining:
        ({"test": ""}, "would see the images held out"),
        ({"layers": "-9"}, "layer"),
        ({"labels": "4%,100%"}, "no class of"),
        ({"finetune__loss__mixup": "0.5", "finetune__train__batch_size": "7"}, "7"),
    ],
)
def test_wrong_input_is_one_line(
    changed: dict[str, str], words: str, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study(command(source, tmp_path / "study", **changed)[1:]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "study").exists()


# The last one, for it adds to the study that the others look at.
@pytest.mark.slow
def test_a_share_of_the_labels_may_be_added(done: tuple[Path, str], source: str) -> None:
    more = {"labels": "50%,75%,100%", "lengths": "6 steps,6 steps,12 steps", "layers": "-1"}
    out, _ = runs.finish(command(source, done[0], **more))
    assert out.count("was done before") == 8
    assert [row["labels"] for row in rows(done[0] / "table.csv")] == ["50%", "75%", "100%"]
