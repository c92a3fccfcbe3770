"""The loader: which images a stream holds, in which order, and what becomes of bad ones."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from mpp.data.decoding import BadImage
from mpp.data.loader import sequential
from mpp.data.seeds import permutation
from mpp.data.settings import DataConfig, DecodeOptions
from mpp.data.sources.base import Subset
from mpp.data.sources.in_memory import ListSource
from mpp.data.sources.mixture import MixtureSource
from mpp.data.sources.opening import open_source
from mpp.data.transform import EvalTransform, TrainTransform
from mpp.data.workers import worker_count
from mpp.errors import ConfigError, RunError
from tests.data.picture_files import noise
from tests.data.streams import Failing, assert_same, joined, numbered, raising, run

SMALL = EvalTransform((4, 4))


@pytest.fixture(scope="module")
def pictures():
    """Noise large enough that torch would share out the sums of contrast between threads."""
    return ListSource(list(noise((13, 230, 260, 3))))


@pytest.fixture(scope="module")
def augment():
    return TrainTransform(DataConfig(jitter=(0.4, 0.4, 0.2, 0.1), grayscale=0.2), (224, 224), 3)


@pytest.fixture(scope="module")
def whole(pictures, augment):
    """The first six batches of the stream, read by this process."""
    return run(pictures, 6, augment)


def test_each_epoch_holds_each_index_once_in_its_permutation():
    batches = run(numbered(22), 11)  # 44 images: two epochs, which batches straddle
    index = joined(batches, "index").numpy()
    for epoch in range(2):
        part = index[22 * epoch : 22 * (epoch + 1)]
        np.testing.assert_array_equal(part, permutation(7, epoch, 22))
        assert sorted(part) == list(range(22))
    assert not np.array_equal(index[:22], index[22:])
    assert batches[0]["images"].shape == (4, 3, 4, 4)
    assert [batches[0][key].dtype for key in ("images", "index", "label")] == [torch.uint8, torch.int64, torch.int64]
    assert torch.equal(joined(batches, "images")[:, 0, 0, 0], joined(batches, "index").to(torch.uint8))
    assert torch.equal(joined(batches, "label"), joined(batches, "index") % 3)
    unlabelled = ListSource([np.zeros((4, 4, 3), dtype=np.uint8)])
    assert run(unlabelled, 1)[0]["label"].tolist() == [-1] * 4
    few = joined(run(numbered(3), 4, batch_size=16, micro_batch=8), "index").numpy()  # a source smaller than a batch
    np.testing.assert_array_equal(few, np.concatenate([permutation(7, epoch, 3) for epoch in range(11)])[:32])


@pytest.mark.slow
def test_workers_threads_micro_batches_and_resumption_change_nothing(pictures, augment, whole):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert_same(run(pictures, 2, augment), whole[:2])
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(threads)
    assert_same(whole, run(pictures, 6, augment, workers=2))
    for workers in (0, 2):
        assert_same(whole[4:], run(pictures, 2, augment, start=16, workers=workers))
    assert torch.equal(joined(whole[:2], "images"), joined(run(pictures, 4, augment, micro_batch=2), "images"))
    assert_same(run(numbered(9), 6), run(numbered(9), 6, workers=8))  # more than cores, without a warning


def test_a_mixture_is_drawn_by_its_weights(augment):
    parts = [ListSource(list(np.full((n, 8, 8, 3), n, dtype=np.uint8))) for n in (4, 12)]
    weighted = MixtureSource("mixed", parts, (3, 1))
    whole = run(weighted, 16, micro_batch=8)  # 128 images: eight epochs of 16, 12 of each from the small part
    index = joined(whole, "index").numpy()
    for epoch in range(8):
        np.testing.assert_array_equal(index[16 * epoch :][:16], weighted.draw(7, epoch)[1])
    times = np.bincount(index)
    assert times[:4].tolist() == [24] * 4
    assert set(times[4:].tolist()) <= {2, 3}
    assert_same(whole[10:], run(weighted, 6, micro_batch=8, start=80, workers=2))
    halves = [run(weighted, 8, rank=rank, world=2) for rank in range(2)]
    together = torch.stack([joined(half, "index").view(-1, 4) for half in halves], dim=1)
    assert together.flatten().tolist() == index[:64].tolist()
    # An image that comes twice in an epoch is cropped anew.
    one = ListSource([noise((40, 40, 3))])
    images = joined(run(MixtureSource("mixed", [one, one], (1, 1)), 1, augment, micro_batch=8), "images")
    assert len(torch.unique(images.flatten(1).sum(1))) == 8


def test_draws_differ_by_epoch_and_seed_and_leave_global_generators_alone(pictures, augment):
    torch.manual_seed(3)
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()
    one = Subset(pictures, [0])
    images = joined(run(one, 2, augment), "images")
    assert len(torch.unique(images.flatten(1).sum(1))) == 8
    assert not torch.equal(images, joined(run(one, 2, augment, seed=8, workers=2), "images"))
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpys)


def test_bad_images_are_replaced_and_named():
    source = numbered(20, bad=(4, 5, 17))
    batches = run(source, 5)
    index = joined(batches, "index")
    reported = [entry for batch in batches for entry in batch["bad"]]
    assert {bad.index for bad in reported} == {4, 5, 17}
    assert {bad.kind for bad in reported} == {"not an image"}
    assert not {4, 5, 17} & set(index.tolist())
    assert torch.equal(joined(batches, "images")[:, 0, 0, 0], index.to(torch.uint8))
    order = permutation(7, 0, 20)
    good = ~np.isin(order, (4, 5, 17))
    np.testing.assert_array_equal(index.numpy()[good], order[good])
    assert_same(batches, run(source, 5, workers=2))
    assert_same(batches[2:], run(source, 3, start=8))


def test_unreadable_files_are_bad_too(picture_folder):
    folder = picture_folder("0.png", "1.png", "2.png")
    source = open_source(f"folder:{folder}")
    (folder / "1.png").unlink()
    bad = {entry for batch in run(source, 2) for entry in batch["bad"]}
    assert {(one.index, one.kind, one.where) for one in bad} == {(1, "missing", str(folder / "1.png"))}
    (folder / "1.png").write_bytes(b"")
    bad = {entry for batch in run(source, 2) for entry in batch["bad"]}
    assert {(one.kind, str(one)) for one in bad} == {("empty", f"{folder / '1.png'}: empty file")}


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_but_bad_images_ends_in_one_line(workers):
    with pytest.raises(BadImage, match=r"^20 images in a row could not be decoded; .*known format") as caught:
        run(numbered(6, bad=range(6)), 1, workers=workers)
    assert "\n" not in str(caught.value)


def test_sizes_that_do_not_divide():
    ranks, parts = {"batch_size": 9, "world": 2}, {"batch_size": 8, "micro_batch": 3}
    for sizes in (ranks, parts, {"start": 4}, {"start": -8}, {"rank": 2, "world": 2}):
        with pytest.raises(ValueError, match=r"equal|multiple"):
            run(numbered(5), 1, **sizes)


@pytest.mark.parametrize("workers", [0, 2])
def test_sequential(workers):
    source, settings = numbered(20, bad=(3, 9)), {"batch_size": 3, "workers": workers}
    batches = list(sequential(source, SMALL, DecodeOptions(3), [9, 2, 3, 11, 0, 9, 19], **settings))
    assert [batch["index"].tolist() for batch in batches] == [[2], [11, 0], [19]]
    assert [[bad.index for bad in batch["bad"]] for batch in batches] == [[9, 3], [9], []]
    assert [batch["label"].tolist() for batch in batches] == [[2], [2, 0], [1]]
    assert batches[1]["images"][:, 0, 0, 0].tolist() == [11, 0]
    (batch,) = sequential(source, EvalTransform((4, 6)), DecodeOptions(3), [3], **settings)  # bad images alone
    assert batch["images"].shape == (0, 3, 4, 6)
    assert batch["index"].shape == (0,)
    assert list(sequential(source, SMALL, DecodeOptions(3), [], **settings)) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_memory_does_not_hold_is_its_own_fault(workers):
    """Be it while it is read or while its crop is made; a batch that finds no memory ends the run in one line."""

    class Greedy(EvalTransform):
        def __call__(self, image, draws=()):
            if image.pixels()[0, 0, 0] == 3:
                torch.empty(2**62, dtype=torch.uint8)
            return super().__call__(image, draws)

    transform, settings = Greedy((4, 4)), {"workers": workers, "micro_batch": 8}
    for bad, (batch,) in (
        (5, run(Failing(raising(MemoryError()), 8), 1, **settings)),
        (3, run(numbered(8), 1, transform, **settings)),
        (3, sequential(numbered(8), transform, DecodeOptions(3), range(8), batch_size=8, workers=workers)),
    ):
        said = {(each.index, each.kind, each.reason) for each in batch["bad"]}
        assert said == {(bad, "too large", "takes more memory than there is")}
        assert bad not in batch["index"]
    with pytest.raises(RunError, match=r"^no memory for a batch of 4 images of \d+ x \d+: take fewer workers"):
        run(numbered(8), 1, EvalTransform((2**29, 2**29)), workers=workers)


def test_a_limit_in_bytes_reaches_what_the_workers_read(tmp_path):
    for name, side in (("a", 40), ("b", 8)):
        Image.fromarray(np.zeros((side, side, 3), dtype=np.uint8)).save(tmp_path / f"{name}.bmp")
    options, source = DecodeOptions(max_bytes=1000), open_source(f"folder:{tmp_path}")
    (batch,) = sequential(source, SMALL, options, range(2), batch_size=2, workers=1)
    assert batch["index"].tolist() == [1]
    assert [str(bad).partition(": ")[2] for bad in batch["bad"]] == ["0.0 MB, more than data.max_image_mb 0 allows"]


def test_worker_count(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert [worker_count(-1, ranks) for ranks in (1, 2, 4, 8, 16)] == [8, 4, 2, 0, 0]
    assert [worker_count(-1, ranks, computing=True) for ranks in (1, 2, 4, 8)] == [8, 4, 0, 0]
    assert [worker_count(*given) for given in ((0, 1), (3, 8), (256, 1))] == [0, 3, 256]
    with pytest.raises(ConfigError, match=r"^1,000 workers are too many for 8 cores: take up to 256$"):
        worker_count(1000, 1)
