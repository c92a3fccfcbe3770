"""Models of shapes alone."""

import timm
import torch

from mpp.system.meta_device import building_on, on_meta


def test_models_are_those_of_torch_s_meta_device() -> None:
    for name in ("vit_tiny_patch16_224", "vit_tiny_r_s16_p8_224", "test_resnet"):
        with torch.device("meta"):
            theirs = timm.create_model(name)
        with on_meta():
            ours = timm.create_model(name)
        for some, others in ((ours.state_dict(), theirs.state_dict()), (ours._buffers, theirs._buffers)):
            facts = [{n: (t.shape, t.dtype, t.device, t.requires_grad) for n, t in of.items()} for of in (some, others)]
            assert facts[0] == facts[1]


def test_real_tensors_get_their_values() -> None:
    with building_on("meta"):
        empty, real = torch.zeros(2), torch.zeros(2, device="cpu").fill_(3).add_(1)
        assert torch.nn.Linear(2, 2, device="cpu").weight.abs().sum() > 0
    assert (empty.is_meta, real.tolist()) == (True, [4, 4])
    with building_on("cuda:0"):
        assert torch.zeros(1).add_(1).tolist() == [1]
