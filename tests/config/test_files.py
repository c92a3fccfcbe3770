"""The configs that come with the package, by their names."""

from pathlib import Path

import pytest

from mpp.config.files import config_file
from mpp.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("tool", "text", "file"),
    [
        ("pretrain", "base", "pretrain/base"),
        ("pretrain", "best", "pretrain/best_base"),
        ("pretrain", "pretrain/best", "pretrain/best_base"),
        ("plan", "demo", "pretrain/demo"),
        ("finetune", "modern", "finetune/modern"),
        ("finetune", "finetune/modern", "finetune/modern"),
        ("study", "benefit_cpu", "study/benefit_cpu"),
    ],
)
def test_a_name_is_a_shipped_config(tool: str, text: str, file: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert config_file(text, tool) == CONFIGS / f"{file}.yaml"
    (tmp_path / Path(text).name).mkdir()  # no file, so not meant
    assert config_file(text, tool) == CONFIGS / f"{file}.yaml"


def test_a_path_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").touch()
    for path in ("base", "none/such.yaml", "base.yml"):
        assert config_file(path, "pretrain") == Path(path)


@pytest.mark.parametrize(
    ("tool", "text", "line"),
    [
        ("finetune", "modren", "--config modren: no such file, and no config of that name; did you mean 'modern'? "),
        ("finetune", "", "--config : no such file, and no config of that name; there are modern, paper"),
        ("finetune", "../pretrain/base", "--config ../pretrain/base: no such file, and no config of that name; "),
        ("fewshot", "base", "--config base: there is no such file"),
    ],
)
def test_an_unknown_name_lists_the_names(tool: str, text: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_file(text, tool)
    assert str(caught.value).startswith(line)
    assert tool == "fewshot" or str(caught.value).endswith("here are modern, paper")
