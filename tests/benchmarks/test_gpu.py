"""The one table of a CUDA device: its rows, from figures made by hand, and what is said without such a device."""

from benchmarks.gpu import step_lines
from benchmarks.step import OURS, StepRow

ROW = StepRow(
    "vit_base_patch16_224",
    OURS,
    batch=256,
    precision="bf16",
    compiled=True,
    images_per_second=(1000.0, 1100.0, 1200.0),
    faster=(1.0, 1.0, 1.0),
    flops=1e11,
    ceiling=(2e14, 2e14, 2e14),
    state_bytes=2**30,
    step_bytes=2**31,
    parts=(("attention", 1.0), ("MLP", 3.0)),
)


def test_a_row_says_rate_share_memory_and_parts() -> None:
    other = StepRow("vit_base_patch16_224", "another", "pip install it")
    assert [*step_lines([ROW, other])] == [
        (
            "vit_base_patch16_224, mpp, bf16, compiled, batch 256",
            "1,100 images/s (1,000 to 1,200), 55.0% of the matrix product's rate, 3.00 GiB",
        ),
        ("  its parts", "attention 25.0%, MLP 75.0%"),
        ("vit_base_patch16_224, another", "left out: pip install it"),
    ]
