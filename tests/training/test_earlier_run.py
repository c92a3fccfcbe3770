"""What bars going on with the run that a folder holds."""

from pathlib import Path

import pytest

from mpp import dist
from mpp.data.sources.contents import Contents
from mpp.downstream.settings import FinetuneConfig
from mpp.errors import UserError
from mpp.training.earlier_run import changes, check_contents, earlier
from tests.training.test_run_folder import Config, saved, start


def test_one_rank_s_other_images_stop_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, here = (["3 images then, 4 now"], Contents(3, "0"))
    monkeypatch.setattr(dist, "gather", lambda value: [value, there])
    with pytest.raises(UserError, match="3 images then, 4 now"):
        check_contents(here, here.to_dict(), tmp_path, force=False)


def test_an_init_is_the_same_by_whatever_path_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ("here", "there"):
        (tmp_path / place / "first").mkdir(parents=True)

    def changed(init: str, folder: str, before: str = "here/first", began: str = "here/run") -> list[str]:
        return changes(FinetuneConfig(init=before, run_dir=began), FinetuneConfig(init=init, run_dir=folder))

    assert changed(f"{tmp_path}/here/first", "here/run") == []
    assert changed("there/../here/first", f"{tmp_path}/here/run") == []
    assert changed("there/first", "there/run") == []  # moved, or copied, with the run
    assert changed("random:there/first", "there/run", "random:here/first") == []
    refused = [("there/first", "here/run"), ("here/first", "here/run", "random:here/first"), ("none", "here/run")]
    refused += [("resnet18", "there/run", "resnet34"), ("there/gone", "there/run", "here/gone")]
    assert [changed(*words)[0].partition(":")[0] for words in refused] == ["init"] * 5


def test_runs_of_another_kind_are_left_alone(tmp_path: Path) -> None:
    path, another = tmp_path / "config.yaml", "holds a run of another kind; choose another --run-dir"
    path.write_text("whatever: 3")
    with pytest.raises(UserError, match=another):
        start(Config(str(tmp_path)))
    assert path.read_text() == "whatever: 3"
    path.unlink()
    saved(tmp_path)
    path.write_text(path.read_text() + "unknown: 3\n")
    with pytest.raises(UserError, match=another):
        earlier(Config(str(tmp_path)))
    path.unlink()
    with pytest.raises(UserError, match=r"has checkpoints but no config\.yaml"):
        earlier(Config(str(tmp_path)))
