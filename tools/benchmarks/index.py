"""A very long index of shards: how fast it opens, how fast a run goes on in the middle, whether memory stays flat."""

import io
import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import simplejpeg

from mpp.data.loader import stream
from mpp.data.settings import DataConfig, DecodeOptions
from mpp.data.sources.names import Ignored
from mpp.data.sources.opening import open_source
from mpp.data.sources.tar_index import TarIndex, index_tar, sidecar_name
from mpp.data.transform import TrainTransform
from mpp.errors import UserError
from mpp.training.timing import timed

_SIDE = 16
_BATCH = 256
_PER_SHARD = 10_000
_LOOKS = 10


def index(entries: int, reads: int) -> None:
    """Makes shards whose index names `entries` images, opens them in a process of its own, and prints what it took.

    The images are 16 x 16 pixels; few lie in the shards, and the index names each of them again and again, for
    neither time nor memory of the index depend on what the images are.
    """
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), entries)
        print(f"Shards of {entries:,} images, indexed:")
        for name, what in (("a fresh start", "open"), ("in the middle of an epoch", "resume")):
            figures = _measured(folder, what)
            print(
                f"  {name:36} {figures['opened']:.2f} s to open, {figures['first']:.2f} s more to the first batch of "
                f"{_BATCH}, {figures['rss'] / 2**20:,.0f} MiB resident"
            )
        if reads:
            figures = _measured(folder, "read", str(reads))
            least, most = (f"{value / 2**20:,.1f}" for value in (figures["least"], figures["most"]))
            grown = (figures["last"] - figures["early"]) / 2**20
            print(
                f"  {f'a worker over {reads:,} reads':36} {least} to {most} MiB resident, {grown:+.1f} MiB from the "
                f"first tenth to the last; {figures['rate']:,.0f} images/s\n"
            )


def _write(folder: Path, entries: int) -> None:
    rng = np.random.default_rng(0)
    first = folder / "000000.tar"
    with tarfile.open(first, "w") as tar:
        for number in range(50):
            pixels = rng.integers(0, 256, (_SIDE, _SIDE, 3), dtype=np.uint8)
            data = simplejpeg.encode_jpeg(pixels, quality=90)
            member = tarfile.TarInfo(f"{number:06d}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    held = index_tar(first)
    for shard, begin in enumerate(range(0, entries, _PER_SHARD)):
        path = folder / f"{shard:06d}.tar"
        if path != first:
            os.link(first, path)
        of = np.arange(min(_PER_SHARD, entries - begin)) % len(held.blocks)
        repeated = TarIndex(held.blocks[of], held.sizes[of], held.labels[of], Ignored(), held.tar_size)
        Path(sidecar_name(str(path))).write_bytes(repeated.to_bytes())


def _measured(folder: str, *what: str) -> dict[str, float]:
    """Runs this file's `main` in a fresh process."""
    # Python starts with the folder of bench.py among its own, in which this package lies; a new process does not.
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = [sys.executable, "-m", "benchmarks.index", folder, *what]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": path}, check=False, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"the index could not be measured: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def main(folder: str, what: str, reads: str = "0") -> dict[str, float]:
    """What one process measures: opening and the first batch, or the memory of a worker over very many reads."""
    source, opened = timed(lambda: open_source(f"shards:{folder}/*.tar"))
    start = len(source) // 2 // _BATCH * _BATCH if what == "resume" else 0
    transform = TrainTransform(DataConfig(), (_SIDE, _SIDE), 3)
    workers = 1 if what == "read" else 0
    batches = stream(
        source, transform, DecodeOptions(3), seed=0, batch_size=_BATCH, micro_batch=_BATCH, start=start, workers=workers
    )
    _, first = timed(lambda: next(batches))
    if what != "read":
        return {"opened": opened, "first": first, "rss": _resident(os.getpid())}
    (worker,) = multiprocessing.active_children()
    looks, rounds = [], max(1, int(reads) // _BATCH // _LOOKS)
    start = time.perf_counter()
    for _ in range(_LOOKS):
        for _ in range(rounds):
            next(batches)
        looks.append(_resident(worker.pid or 0))
    rate = rounds * _LOOKS * _BATCH / (time.perf_counter() - start)
    batches.close()
    return {"least": min(looks), "most": max(looks), "early": looks[0], "last": looks[-1], "rate": rate}


def _resident(pid: int) -> float:
    """Bytes in memory that are this process's or shared."""
    for line in Path(f"/proc/{pid}/status").read_text("utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return float(line.split()[1]) * 1024
    raise UserError("only Linux says how much memory a process takes: leave this part out with --entries 0")


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
