"""What the tensors of one of several ranks take in a step, printed: the product's own step without any other rank.

    python -m tests.benchmarks.cost.ranks_memory SOURCE ddp|fsdp BATCH MICRO_BATCH true|false

DDP runs in a gloo group of one, FSDP as rank 0 of 4 whose collectives do nothing; what they allocate is real.
"""

import sys
import tempfile

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

import mpp.system.torchvision_import  # noqa: F401
from mpp import dist as ours
from mpp.dist import World
from mpp.model.settings import ModelConfig
from mpp.pretraining.settings import PretrainConfig
from mpp.training.settings import TrainConfig
from tests.benchmarks.cost.test_memory import Steps, living

RANKS = 4
MODEL = {"img_size": (96,), "depth": 3, "attention": "sdpa"}


def main(source: str, parallel: str, batch: str, micro: str, checkpointing: str) -> None:
    model = ModelConfig("vit_tiny_patch16_224", **MODEL, grad_checkpointing=checkpointing == "True")  # pyright: ignore[reportArgumentType]
    train = TrainConfig(batch_size=int(batch), micro_batch=int(micro), precision="fp32", parallel=parallel)  # pyright: ignore[reportArgumentType]
    config = PretrainConfig(model=model, train=train)
    torch.set_num_threads(1)
    ours._patient.append(None)  # the group of those who wait for the data, which has nobody else in it
    if parallel == "fsdp":
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
        steps = Steps(source, config, "cpu", World(0, RANKS, 0, RANKS))
    else:
        with tempfile.NamedTemporaryFile() as file:
            dist.init_process_group("gloo", init_method=f"file://{file.name}", rank=0, world_size=1)
        steps = Steps(source, config, "cpu")
        steps.run.wrapped = DistributedDataParallel(steps.run.model, gradient_as_bucket_view=True)
    print("living", living(steps))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
