"""Batches on their way from the loader's workers."""

import errno

import pytest

from mpp.data import shared_memory
from mpp.data.loader import sequential
from mpp.data.settings import DecodeOptions
from mpp.data.transform import EvalTransform
from mpp.errors import RunError
from tests.data.streams import assert_same, numbered, raising, run


def test_a_batch_that_cannot_be_sent_is_not_waited_for(monkeypatch, capfd):
    monkeypatch.setattr(shared_memory._ByPipe, "__reduce__", raising(OSError(errno.EMFILE, "Too many open files")))
    with pytest.raises(RunError, match="a loader process ended with exit status 1, for the reason above"):
        run(numbered(8), 1, workers=1)
    assert "a batch cannot be sent: OSError: [Errno 24] Too many open files" in capfd.readouterr().err


@pytest.mark.parametrize("room", [0, 10**9])
def test_batches_travel_with_and_without_shared_memory(room, monkeypatch, capfd):
    monkeypatch.setattr(shared_memory, "free_bytes", lambda: room)
    monkeypatch.setattr(shared_memory, "_noted", False)
    transform, source = EvalTransform((96, 96)), numbered(20, bad=(3,))
    settings = {"transform": transform, "batch_size": 16, "micro_batch": 16}
    batches = run(source, 4, workers=2, **settings)
    assert_same(batches, run(source, 4, workers=0, **settings))
    assert [batch["images"].is_shared() for batch in batches] == [room > 0] * 4
    assert not batches[0]["index"].is_shared()  # an open file less
    assert capfd.readouterr().err.count("--shm-size") == (room == 0)
    (batch,) = sequential(source, transform, DecodeOptions(3), range(16), batch_size=16, workers=1)
    assert batch["images"].is_shared() == (room > 0)
    assert batch["index"].tolist() == [number for number in range(16) if number != 3]
