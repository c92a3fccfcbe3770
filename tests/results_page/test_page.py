"""The page of results: what it says is what its data files say."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from make_results import make
from results_page import charts, figures, goals, making, tables
from results_page.data import Study, read_studies, written
from results_page.page import END, START, headline, in_headline, render, with_headline

from mpp.config import from_file, to_dict
from mpp.errors import UserError
from mpp.report.page import Picture
from mpp.study.settings import StudyConfig
from tests.results_page.invented import all_kinds, by_hand, check_tables, rows, study
from tests.runs import ROOT

RESULTS = ROOT / "docs" / "results"
DATA = sorted(RESULTS.glob("*.json"))
HEADINGS = {
    "benefit": "What pretraining is worth",
    "ablation": "What of the objective matters",
    "length": "How long to pretrain",
    "best": "Better than the default",
    "continue": "Going on from weights of another domain",
}
LAYERS = "\n## Which representation\n"
MARKED = f"before\n\n{START}\nold\n{END}\n\nafter\n"
OF_THE_MACHINE = ("run_dir", "data", "test", "source", "device", "workers")


@pytest.fixture(scope="module")
def studies() -> dict[str, Study]:
    return {name: Study(content, name) for name, content in all_kinds().items()}


@pytest.fixture(scope="module")
def rendered(studies: dict[str, Study]) -> dict[str, str]:
    return render(studies)


def readme() -> str:
    return (ROOT / "README.md").read_text("utf-8")


@pytest.mark.slow
def test_the_page_is_that_of_its_data() -> None:
    studies = read_studies(RESULTS)
    files = render(studies)
    for page in ("results.md", "studies.md"):
        assert (ROOT / "docs" / page).read_text("utf-8") == files.pop(page)
    assert sorted(path.name for path in RESULTS.glob("*.svg")) == sorted(name.partition("/")[2] for name in files)
    for name, text in files.items():
        there = (ROOT / "docs" / name).read_text("utf-8")
        # What a chart says is compared everywhere; where its lines lie, with the matplotlib that drew it.
        assert re.findall('aria-label="(.*?)"', there) == re.findall('aria-label="(.*?)"', text)
        if f"<!-- matplotlib {matplotlib.__version__} -->" in there:
            assert there == text
    assert with_headline(readme(), studies) == readme()


def test_sentences_say_what_the_studies_do() -> None:
    of = read_studies(RESULTS)
    ours, usual = (figures.gain(of["benefit_cpu"], arm, "1%")[1:] for arm in ("ours", "paper's objective"))
    few, finer = of["benefit_few_cpu"], "ours, finer, 3.2M images"
    words, (arm,) = of["benefit_words_cpu"], of["benefit_words_cpu"].arms
    over = [
        figures.gain(of["benefit_compute_cpu"], "words", share, "scratch, longer")[1:4]
        for share in ("1%", "10%", "100%")
    ]
    for sentence in (
        f"gained {ours} points over scratch at 1 % of the labels; the paper's gained {usual} ",
        f"gain {figures.fewshot_gain(words, arm, 10)} points with 10 shots (details, in as much time, "
        f"{figures.fewshot_gain(few, finer, 10)})",
        f"made for few labels, {figures.gain(words, arm, '1%')} at 1 % (details {figures.gain(few, finer, '1%')},",
        f"mean of the last layer | {figures.probe(few, finer)} | {figures.probe(words, arm)} |",
        f"(untrained {figures.probe_chosen(words, 'random')}) | - | {figures.probe_chosen(words, arm)} |",
        f"10 shots, mean of the last layer | {figures.fewshot(few, finer, 10)} | {figures.fewshot(words, arm, 10)} |",
        f"chosen by the shots | - | {figures.fewshot_chosen(words, arm, 10)} |",
        f"begins at the probe) | {figures.accuracy(few, finer, '1%')} | {figures.accuracy(words, arm, '1%')} |",
        f"pass it by {over[0]} points with 500 labels, by {over[1]} with 5,000, and by {over[2]} with 50,000",
        f"with 50,000, at equal compute, {over[2]} points remained",
    ):
        assert sentence in " ".join(f"{readme()} {(ROOT / 'docs' / 'pretraining.md').read_text('utf-8')}".split())


@pytest.mark.parametrize("path", DATA, ids=lambda path: path.stem)
def test_the_data_are_of_the_shipped_config_and_name_no_folder(path: Path) -> None:
    text = path.read_text("utf-8")
    assert not re.search(r'"(?:[^"]*[\s:=])?[/~][\w.-]+/', text)
    content = json.loads(text)
    assert text == written(content)
    config = from_file(StudyConfig, ROOT / "configs" / "study" / f"{path.stem}.yaml")
    shipped = json.loads(written(to_dict(config)))
    assert _different(content["config"], shipped) == []


def _different(ran: Any, shipped: Any, name: str = "") -> list[str]:
    """Settings in which a study differs from the config that its page links to, of those that both have.

    What is auto now had a value, which changed no figure: rows, the micro-batch, a length that the study overrides. A
    list may have been its only element, or "" for none.
    """
    if not isinstance(shipped, dict):
        same = ran == shipped or shipped in ("auto", [ran] if ran else [])
        return [] if same else [f"{name}: {ran} is not {shipped}"]
    keys = [key for key in shipped if key in ran and (key not in OF_THE_MACHINE or isinstance(ran[key], dict))]
    return [line for key in keys for line in _different(ran[key], shipped[key], f"{name}.{key}")]


@pytest.mark.slow
def test_the_sections_are_those_of_the_studies(studies: dict[str, Study], rendered: dict[str, str]) -> None:
    text = rendered["studies.md"]
    for name, of in studies.items():
        assert f"\n## {HEADINGS[of.kind]}\n" in text
        assert f"\n### `{name}`\n" in text
        assert f"\n    {making.command(of)}\n" in text
    assert LAYERS in text
    assert "\n### Layers and poolings of `benefit_cpu`\n" in text
    assert text.count("not measured") == 2  # the default's gain in half the time, by neither study
    lengths = re.findall(r"^\| ([\d,]+) \| (\w+)", text[text.index(HEADINGS["length"]) :], re.MULTILINE)
    assert lengths[:5] == [
        ("50,000", "usual"),
        *((f"{n:,}", "usual") for n in (150_000, 500_000, 1_500_000)),
        ("50,000", "late"),
    ]
    assert "late masks: 1% of the labels</text>" in rendered["results/length_cpu.svg"]
    alone = render({"length_cpu": studies["length_cpu"]})
    assert list(alone) == ["results.md", "studies.md", "results/length_cpu.svg"]
    assert [kind for kind, heading in HEADINGS.items() if heading in alone["studies.md"]] == ["length"]
    assert LAYERS not in alone["studies.md"]
    assert alone["studies.md"].count("| not measured |") == 7
    assert "\n## Closed-form few-shot against scikit-learn\n" in alone["studies.md"]
    check_tables(text)
    assert not re.search(r"nan|None|undefined|\n\n\n", text)


def test_the_charts_are_the_same_bytes_each_time(studies: dict[str, Study], rendered: dict[str, str]) -> None:
    again = render({name: studies[name] for name in ("benefit_cpu",)})
    charts = {name: text for name, text in again.items() if name.endswith(".svg")}
    assert len(charts) == 2
    assert all(rendered[name] == text for name, text in charts.items())
    shown = re.findall(r'<img src="([^"]+)" alt="[^"]+" width="\d+">', rendered["studies.md"])
    assert sorted(shown) == sorted(name for name in rendered if name.endswith(".svg"))
    chart = rendered["results/benefit_cpu.svg"]
    assert ">labelled training images</text>" in chart
    assert "background: #fff" in chart


@pytest.fixture
def blank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts have nothing on them."""
    monkeypatch.setattr(charts, "line_chart", lambda name, alt, *_, **__: Picture(name, alt, "<svg ></svg>"))


@pytest.mark.usefixtures("blank")
@pytest.mark.parametrize("kind", HEADINGS)
def test_a_study_that_still_runs(kind: str) -> None:
    content = study(f"{kind}_new", {"usual": ("", 0.1), "other": ("--x", 0.2)}, longer=("1%",))
    content |= {"finished": False, "fewshot": [], "probes": [], "pretraining": content["pretraining"][:1]}
    for cells in (0, 4):
        some = {**content, "finetuning": content["finetuning"][:cells]}
        text = render({content["name"]: Study(some, content["name"])})["studies.md"]
        assert f"**This study still runs:** {cells} fine-tunings of it are done." in text
        assert "300,032" in text
        check_tables(text)
    # With all of its cells there is no verdict yet, and README's headline stays.
    whole = study(content["name"], {"usual": ("", 0.1), "other": ("--x", 0.2)}) | {"finished": False}
    of = Study(whole, whole["name"])
    cells = [cell for _, *cells in goals.goal_rows(goals.columns([of])) for cell in cells if cell != "-"]
    assert len(cells) == {"benefit": 5, "best": 1}.get(kind, 0)
    assert all(cell.endswith(": still runs") for cell in cells)
    assert with_headline(MARKED, {of.name: of}) == MARKED
    done = all_kinds()["benefit_cpu"]
    assert of.name not in with_headline(MARKED, {of.name: of, done["name"]: Study(done, done["name"])})


def test_a_study_of_one_seed_answers_no_goal() -> None:
    content = study("benefit_one", {"usual": ("", 0.1)})
    assert goals.columns([Study(content, "benefit_one")])
    assert not goals.columns([Study({**content, "config": {**content["config"], "seeds": [0]}}, "benefit_one")])


def test_a_study_of_some_shares_is_not_in_the_headline() -> None:
    content = study("benefit_few", {"usual": ("", 0.1)})
    whole = Study(content, content["name"])
    assert list(in_headline({whole.name: whole})) == ["benefit_few"]
    runs = [run for run in content["finetuning"] if run["labels"] == "1%"]
    few = Study({**content, "finetuning": runs, "config": {**content["config"], "labels": ["1%"]}}, content["name"])
    assert not in_headline({few.name: few})
    assert not charts.pictures(few)  # of one share there is no line
    assert charts.pictures(whole)


def test_equal_device_time_stands_alone_in_the_headline() -> None:
    plain, timed = (study(f"benefit_{name}", {"usual": ("", 0.1)}, longer=("1%",)) for name in ("images", "time"))
    timed["equal_time"] = {"arms": {}, "longer": {"1%": {"ratio": 2.2, "images": 136_384}}}
    both = {of["name"]: Study(of, of["name"]) for of in (plain, timed)}
    assert list(in_headline(both)) == ["benefit_time"]
    assert "also gets the device time of the pretraining, as extra training" in headline(both)
    assert "| gain over scratch, longer |" in headline(both)
    assert " (over random) |\n" in headline(both)
    images = headline({"benefit_images": both["benefit_images"]})
    assert 'also gets as many images as "usual" saw, as' in images
    assert "| gain over scratch |" in images
    assert "(over random)" not in images


@pytest.mark.usefixtures("blank")
def test_longer_training_from_scratch_says_what_it_was_given() -> None:
    content = study("benefit_new", {"usual": ("", 0.1)}, longer=("1%",))
    assert "about equal total compute, counted in images" in " ".join(_page(content).split())
    content["equal_time"] = {"arms": {}, "longer": {"1%": {"ratio": 2.2, "images": 136_384}}}
    assert 'the pretraining "usual" (136,384 at 1 %; both steps timed side by side)' in " ".join(_page(content).split())


def _page(content: dict[str, Any]) -> str:
    return render({content["name"]: Study(content, content["name"])})["studies.md"]


@pytest.mark.usefixtures("blank")
def test_the_tool_says_that_the_headline_stays(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(root, [folder_of(root, study("benefit_new", {"usual": ("", 0.1)}) | {"finished": False})])
    assert (root / "README.md").read_text("utf-8") == MARKED
    assert capsys.readouterr().out.startswith("README.md: its headline stays as it is: ")


def test_the_page_names_the_images() -> None:
    of = by_hand()
    copy = "The images are a JPEG copy of CIFAR-10 (quality 75)"
    text = render({of.name: of})["studies.md"]
    train, test = ("`shards:cifar10-train-*.tar.gz`", "`shards:cifar10-test-*.tar.gz`")
    images = f"50,000 for training from {train}, 10,000 for the test from {test}, of 10 classes"
    assert f"\nImages: {images}.\n{copy}" in text
    assert "--data ... --test ... --run-dir" in making.command(of)
    config = of.config | {"data": "cifar10:data", "test": "", "pretrain": {"data": {"source": "folder:more"}}}
    other = Study({**of.content, "config": config}, of.name)
    images = "50,000 for training and 10,000 for the test from `cifar10:data`, of 10 classes"
    assert making.data(other) == f"{images}; pretrained on those of `folder:more`"
    assert not making.jpeg_copy(other)
    assert "--test" not in making.command(other)


def test_all_commits_and_machines_of_a_study_are_named() -> None:
    of = by_hand()
    first = of.content["environment"]
    gpu = {"hardware": {"devices": ["NVIDIA H200"]}, "versions": first["versions"] | {"cuda": "12.8"}, "commit": ""}
    made = making.making(Study({**of.content, "environments": [first | {"runs": 12}, gpu | {"runs": 1}]}, of.name))
    machines = "2 cores of AMD EPYC, 15.6 GiB of memory (12 runs), NVIDIA H200 (1 run); python 3.11.7, torch "
    assert made.startswith(machines)
    assert ", cuda 12.8 (1 run), " in made
    assert ", fp32 (12 runs), commit 0123456789ab (12 runs), not known (1 run); seeds" in made
    same = Study({**of.content, "environments": [first | {"runs": 12}]}, of.name)
    assert making.making(same) == making.making(of)
    assert "runs" not in making.making(of)


@pytest.mark.usefixtures("blank")
def test_names_with_signs_stay_readable_and_safe() -> None:
    names = ["paper's objective", "[mask] (late), 75 % | *x*"]
    content = study("best_names", dict.fromkeys(names, ("", 0.1)), layers=(-1, -2))
    seen = r"\[mask\] (late), 75 % \| \*x\*"
    files = render({"best_names": Study(content, "best_names")})
    assert "##" not in files.pop("results.md")  # nothing to tell of a study that it does not know
    text = files.pop("studies.md")
    check_tables(text)
    assert f"\n| {seen} | " in text
    assert "\n| **paper's objective** | " in text
    assert names[1] not in re.sub("<img .*>", "", text)
    assert list(files) == [
        "results/best_names_layers_paper_s_objective.svg",
        "results/best_names_layers_mask_late_75_x.svg",
    ]
    benefit = Study(content | {"name": "benefit_names"}, "benefit_names")
    assert f"{seen}: gain over scratch" in tables.finetuning_table(benefit)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository without any study."""
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "README.md").write_text(MARKED)
    return tmp_path


def folder_of(root: Path, content: Mapping[str, Any]) -> Path:
    folder = root / "runs" / content["name"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_text(json.dumps(content))
    return folder


@pytest.mark.usefixtures("blank")
def test_from_folders_to_the_page_and_again(root: Path) -> None:
    (root / "docs" / "results" / "old.svg").write_text("of a study that is gone")
    make(root, [folder_of(root, all_kinds()["benefit_cpu"])])
    made = {path: path.read_text("utf-8") for path in root.rglob("*") if path.is_file()}
    charts = ["benefit_cpu.svg", "benefit_cpu_layers_pretrained.svg"]
    assert sorted(path.name for path in made) == [
        "README.md",
        "benefit_cpu.json",
        *charts,
        "results.md",
        "studies.md",
        "study.json",
    ]
    kept = read_studies(root / "docs" / "results")
    assert made[root / "README.md"] == MARKED.replace("old", headline(kept))
    gained = figures.gain(kept["benefit_cpu"], "pretrained", "1%")
    assert rows(tables.headline_table(kept["benefit_cpu"]))["1% of the labels"][-1] == gained
    make(root)
    assert made == {path: path.read_text("utf-8") for path in made}


def test_the_copy_is_rounded_and_sorted() -> None:
    content = {"b": [{"y": 0.123456789, "x": 3e-4}], "a": {"lr": 1.5e-7, "n": 1234567}}
    text = written(content)
    assert text == '{\n "a": {\n  "lr": 1.5e-07,\n  "n": 1234567\n },\n "b": [\n  {"x": 0.0003, "y": 0.123457}\n ]\n}\n'
    assert written(json.loads(text)) == text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "mine"}, "'mine' must begin with one of benefit, ablation, length, best, continue"),
        ({"schema": 2}, "not the data of a study in schema 1"),
        ({"pretraining": [], "finetuning": [], "fewshot": []}, "no finished run to tell of yet"),
    ],
)
def test_what_is_no_study_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        make(tmp_path, [folder_of(tmp_path, all_kinds()["benefit_cpu"] | change)])
    with pytest.raises(UserError, match=r"holds no study\.json"):
        make(tmp_path, [tmp_path])
    assert not (tmp_path / "docs").exists()


def test_a_readme_without_marks_stays_and_one_with_half_of_them_is_refused(studies: dict[str, Study]) -> None:
    assert with_headline("text\n", studies) == "text\n"
    assert with_headline(MARKED, {}) == MARKED
    with pytest.raises(UserError, match="needs both marks"):
        with_headline(f"text {START}\n", studies)
