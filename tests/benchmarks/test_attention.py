"""The comparison of attention kernels: what it measures and how it says so; the times are the machine's."""

import re

import pytest
import torch
from bench import bench
from benchmarks.attention import measure
from benchmarks.settings import AttentionBench

TINY = AttentionBench(sizes=("16/4", "24/4"), tokens=100, heads=2, width=8, device="cpu", precision="fp32", repeats=3)


def test_every_kernel_that_runs_here_is_timed_at_every_size() -> None:
    rows = measure(TINY)
    for size, tokens, batch in (("16/4", 17, 5), ("24/4", 37, 2)):
        of_size = {row.kernel: row for row in rows if row.size == size}
        assert set(of_size) == {"xformers", "sdpa", "sdpa flash", "sdpa cuDNN", "sdpa efficient", "explicit"}
        for row in of_size.values():
            assert (row.tokens, row.batch) == (tokens, batch)
            # Two products of 2 N^2 E operations forward, five backward, for each image and head.
            assert row.flops == batch * 2 * 7 * 2 * tokens**2 * 8
            assert bool(row.seconds) != bool(row.left_out)
        assert all(len(of_size[name].seconds) == 3 for name in ("sdpa", "explicit"))
        assert "cpu" in of_size["xformers"].left_out
        assert [row.kernel for row in of_size.values() if row.chosen] in (["sdpa"], ["explicit"])


def test_it_prints_times_rates_and_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--sizes 16/4 --tokens 100 --heads 2 --width 8 --device cpu --precision fp32 --repeats 3"
    assert bench(["attention", *flags.split()]) == 0
    out = capsys.readouterr().out
    assert "16/4: 17 tokens, 5 images" in out
    assert re.search(r"sdpa +\S+ ms \(.*\) +\S+ TFLOP/s \(.*\) +1 x \(1 to 1\)(  <- auto)?\n", out)
    assert out.count("<- auto") == 1
    assert re.search(r"explicit +\S+ ms \(.*\) +\S+ TFLOP/s \(.*\) +\S+ x \(.*\)(  <- auto)?\n", out)
    assert "xformers         left out: " in out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernels_of_cuda_are_all_timed() -> None:
    rows = measure(AttentionBench(sizes=("224/16",), tokens=4096, repeats=2))
    assert {row.kernel for row in rows if row.seconds} >= {"sdpa", "explicit"}
    assert all(bool(row.seconds) != bool(row.left_out) for row in rows)
    assert sum(row.chosen for row in rows) == 1
