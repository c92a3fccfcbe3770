"""What each measurement refuses, in one line."""

import shlex

import pytest
import torch
from bench import bench

NAMES = "step, training, plan, attention, saving, gpu, data, fewshot"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", f"bench: error: the first word names what to measure: {NAMES}; got nothing"),
        ("speed", f"bench: error: the first word names what to measure: {NAMES}; got 'speed'"),
        ("attention --sizes 224", "as 224/16, got '224'"),
        ("attention --sizes 224/15", "as 224/16, got '224/15'"),
        ("attention --sizes 0/4", "as 224/16, got '0/4'"),
        ("data --data folder:/nowhere", "there is no folder"),
        ("data --size 0", "size must be at least 8, got 0"),
        ("fewshot --repeat 3", "bench fewshot: error: no setting '--repeat'; did you mean '--repeats'?"),
        ("fewshot --classes 1", "bench fewshot: error: classes must be at least 2, got 1"),
        ("gpu", "needs a CUDA device"),
        (
            "saving --folder /nowhere --model vit_tiny_patch16_224",
            "cannot write to /nowhere: No such file or directory",
        ),
        ("saving --model vit_huge", "has no model 'vit_huge'"),
        ("step --models vit_tyni", "no model 'vit_tyni'; near it"),
        ("step --img-size 30", "multiple of"),
        ("training --against /nowhere", "a checkout of this project is needed, and /nowhere has no tools/pretrain.py"),
        ("training --recipes nothing.yaml", "nothing.yaml: cannot be read: No such file or directory"),
        ("training --recipes study/benefit_cpu.yaml", "names no images: give '"),
        ("training --recipes 'pretrain/demo.yaml: --optim.rate 1'", "demo.yaml: --optim.rate 1: no setting '--opt"),
        ('''training --recipes "pretrain/demo.yaml: --data.source 'a"''', "No closing quotation"),
        ("training --recipes", "recipes takes at least one, such as pretrain/demo.yaml"),
        ("training --steps 19", "steps must be at least 20, got 19"),
        ("training --device tpu", "tpu"),
        ("plan --device h20", "no device 'h20' in the plan's table; take h200"),
        ("plan --device a100", "no device 'a100' in the plan's table; take a100-80 or a100-40"),
        (
            "plan --devices 3 --batch-size 1024",
            "train.batch_size 1024 is not a multiple of 3 devices; take a batch of 1023 or 2 devices",
        ),
        ("plan --device v100 --precision bf16", "train.precision bf16 is not for the device v100; take auto"),
        ("plan --device v100 --parallel fsdp --devices 2", "train.parallel fsdp has no loss scaling for fp16"),
        ("plan --epochs 1e300 --images 1e300", "the run or what is between its checkpoints has no end"),
        ("plan --model resnet50", "'resnet50' is not a VisionTransformer"),
        ("plan --model vit_tiny_r_s16_p8_224", "is not a plain ViT "),
        ("plan --images many", "images takes a number such as 50000, 1.3M or 14M, got 'many'"),
        ("plan --images 1e400", "images takes a number such as 50000, 1.3M or 14M, got '1e400'"),
        ("plan --efficiency 1.1", "efficiency is a share, above 0 and at most 1, got 1.1"),
        ("plan --devices 0", "devices must be at least 1, got 0"),
        ("plan --epochs -1", "epochs must be above 0"),
        ("plan --images-per-second -1", "images_per_second must be at least 0"),
        ("plan --init-args mlp_ratio=2.0", "init_args is filled in from the weights of init"),
    ],
)
def test_an_error_is_one_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if words == "gpu" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert bench(shlex.split(words)) == (1 if "cannot write" in message else 2)
    out, err = capsys.readouterr()
    assert message in err
    assert len(err.splitlines()) == 1
    assert not out or words.startswith(("saving", "step"))  # which have named the hardware
