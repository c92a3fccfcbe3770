"""What a run finds out of its images before it trains."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mpp.data.transform import EvalTransform
from mpp.objective.image_words import COMPONENTS, ImageComponents
from mpp.pretraining import survey
from mpp.pretraining.build import PretrainingRun
from mpp.pretraining.step import components_of, training_step
from mpp.pretraining.survey import FILE, MOST_LEARNT, survey_source, survey_whole_images, surveyed_images
from tests import runs
from tests.pretraining.test_build import built

WORDS = {"objective__words": "1", "model__img_size": "16", "model__patch_size": "8"}


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "SURVEY_IMAGES", 64)


@pytest.fixture
def source(tmp_path: Path) -> str:
    """80 images that differ by more than noise."""
    coarse = np.random.default_rng(0).integers(0, 256, (80, 4, 4, 3), np.uint8)
    np.save(tmp_path / "images.npy", coarse.repeat(5, axis=1).repeat(5, axis=2))
    return f"array:{tmp_path}/images.npy"


def built_in(folder: Path, source: str, **changed: str) -> PretrainingRun:
    run = built(source, **WORDS, **changed)
    run.config = replace(run.config, run_dir=str(folder))
    return run


def surveyed(source: str, folder: Path, **changed: str) -> PretrainingRun:
    run = built_in(folder, source, **changed)
    folder.mkdir(exist_ok=True)
    images = surveyed_images(run)
    survey_source(run, images)
    survey_whole_images(run, images)
    return run


def table(run: PretrainingRun) -> Tensor:
    """A row for each image of the source."""
    assert run.components is not None
    return run.components.of(torch.arange(len(run.source)))


def test_the_model_learns_its_words(source: str, tmp_path: Path) -> None:
    run = surveyed(source, tmp_path / "run", optim__ema_decay="0.9")
    assert run.exported is not run.model
    for name in ("words", "image_words"):
        learnt, exported = (dict(getattr(model, name).named_buffers()) for model in (run.model, run.exported))
        assert learnt["words"].any()
        assert all(torch.equal(learnt[key], exported[key]) for key in learnt)


def test_every_image_is_seen_whole(source: str, tmp_path: Path) -> None:
    run = surveyed(source, tmp_path / "run", data__hflip="0.5")
    pixels = np.load(source.removeprefix("array:"))
    whole = torch.stack([EvalTransform((16, 16))(image) for image in pixels])
    learnt = ImageComponents((2, 2), (8, 8), 3, flips=(False, True))
    learnt.words.learn(surveyed_images(run))
    learnt.learn(learnt.quarters(whole))
    assert table(run).dtype == torch.float16
    np.testing.assert_allclose(table(run).float(), learnt.of(learnt.quarters(whole)), rtol=1e-2, atol=1e-2)


def test_of_many_images_some_teach_and_the_drawn_ones_are_known(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = surveyed(source, tmp_path / "a")
    monkeypatch.setattr(survey, "MOST_LEARNT", 80 // 2)
    monkeypatch.setattr(survey, "MOST_KNOWN", 60)
    read: list[int] = []
    extract: Any = survey.extract_by_all
    monkeypatch.setattr(survey, "extract_by_all", lambda *a, **k: (read.append(len(a[2])), extract(*a, **k))[1])
    run = surveyed(source, tmp_path / "b")
    assert read == [40, 20]
    known = table(run).isfinite().all(dim=1)
    assert known.sum() == 60 == len(run.components.rows if run.components else ())
    assert table(run)[~known].isnan().all()
    assert not torch.equal(table(run)[known], table(every)[known])


def again(first: PretrainingRun, source: str) -> PretrainingRun:
    """The run that goes on from the checkpoint of another, perhaps with other images."""
    run = built_in(first.folder, source)
    run.model.load_state_dict(first.model.state_dict())
    return run


def test_a_run_that_goes_on_reads_what_it_kept_or_finds_it_again(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = surveyed(source, tmp_path / "run")
    for damage in (None, b"", b"cut", (tmp_path / "run" / FILE).read_bytes()[:-99]):
        if damage is not None:
            (tmp_path / "run" / FILE).write_bytes(damage)
        later = again(first, source)
        with monkeypatch.context() as patched:
            if damage is None:
                patched.setattr(survey, "extract_by_all", lambda *_, **__: pytest.fail("images were read again"))
            survey_whole_images(later)
        assert torch.equal(table(later), table(first))
        runs.assert_same(later.model.state_dict(), first.model.state_dict())
        with np.load(tmp_path / "run" / FILE) as kept:
            assert torch.equal(torch.from_numpy(kept["rows"]), table(first))
    with monkeypatch.context() as patched:  # as where another machine has no such file
        patched.setattr(survey.dist, "any_rank", lambda _: True)
        later.components = None
        survey_whole_images(later)
        assert torch.equal(table(later), table(first))


def test_a_run_that_goes_on_with_other_images_keeps_what_they_are_compared_with(source: str, tmp_path: Path) -> None:
    first = surveyed(source, tmp_path / "run")
    pixels = np.load(source.removeprefix("array:"))
    for name, other in (("more", np.concatenate([pixels[:1], pixels])), ("moved", np.roll(pixels, 1, axis=0))):
        np.save(tmp_path / f"{name}.npy", other)
        later = again(first, f"array:{tmp_path}/{name}.npy")
        survey_whole_images(later)
        np.testing.assert_allclose(table(later)[1:80], table(first)[:79], rtol=1e-2, atol=1e-2)
        runs.assert_same(later.model.state_dict(), first.model.state_dict())


def test_a_dry_run_keeps_nothing(source: str, tmp_path: Path) -> None:
    run = built_in(tmp_path / "run", source)
    images = surveyed_images(run)
    survey_source(run, images)
    survey_whole_images(run, images, dry=True)
    assert table(run).isfinite().all(dim=1).sum() == 64
    assert not (tmp_path / "run").exists()


def test_an_image_that_cannot_be_decoded_has_no_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = next(number for number in range(999) if np.random.default_rng(number).permutation(30)[-1] == 12)
    folder = runs.write_folder(tmp_path / "images", *(f"{number:02}.png" for number in range(30)))
    (tmp_path / "images" / "12.png").write_bytes(b"no picture")
    for some in (MOST_LEARNT, 29):  # also where it is the only one left for a second pass
        monkeypatch.setattr(survey, "MOST_LEARNT", some)
        monkeypatch.setattr(survey, "derive_seed", lambda *_: seed)
        run = surveyed(folder, tmp_path / "run")
        known = table(run).isfinite().all(dim=1)
        assert known.sum() == len(run.source) - 1
        assert run.source.location(int((~known).nonzero())).endswith("12.png")


def test_the_step_gives_the_model_the_rows_of_its_images(source: str, tmp_path: Path) -> None:
    run = surveyed(source, tmp_path / "run")
    given: list[Any] = []
    run.wrapped.register_forward_pre_hook(lambda _, inputs: given.append(inputs))
    batches = run.batches()
    batch = next(batches)
    batches.close()
    training_step(run)(run.wrapped, batch)
    assert torch.equal(given[0][2], table(run)[batch["index"]])
    assert len(batch["index"].unique()) == len(batch["index"])


def test_without_words_or_before_the_survey_nothing_is_known(source: str) -> None:
    index = torch.tensor([3, 1])
    plain = built(source, model__img_size="16", model__patch_size="8")
    survey_whole_images(plain)
    assert plain.components is None
    assert components_of(plain, index) is None
    found = components_of(built(source, **WORDS), index)
    assert found is not None
    assert found.shape == (2, COMPONENTS)
    assert found.isnan().all()
