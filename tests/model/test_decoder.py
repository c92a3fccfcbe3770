"""The decoder against its parts put together by hand, one image at a time."""

import dataclasses

import pytest
import torch
from timm.layers.drop import DropPath

from mpp.model.decoder import Decoder
from mpp.model.encoder import Encoder, build_encoder
from mpp.model.settings import ModelConfig
from tests.model.test_encoder import CASES, TINY, build, pictures, scramble
from tests.model.test_places import choose

PARTS = {
    "plain": TINY,
    "registers, class without position": CASES["registers, class without position"],
    "stochastic depth": dataclasses.replace(TINY, drop_path=0.5),
    "checkpointing": dataclasses.replace(TINY, grad_checkpointing=True),
}


@pytest.fixture(params=list(PARTS))
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return build(dataclasses.replace(PARTS[request.param], depth=3))


@pytest.mark.parametrize("entering", [0, 2, 3])
def test_heads_read_what_the_decoder_makes_of_all_tokens(encoder: Encoder, entering: int) -> None:
    """With `entering` at the number of blocks the encoder knows nothing of the corrupted patches."""
    decoder = Decoder(encoder, 2).to(torch.float64).train()  # in training, too, for it drops nothing
    scramble(decoder)
    tokens, at = torch.randn(2, encoder.grid[0] * encoder.grid[1], encoder.embed_dim).double(), choose(encoder)
    every = encoder.encode(tokens, at=at, entering=entering, every=True)
    found = decoder(every, at)
    entered: list[torch.Tensor] = []
    hook = encoder.vit.blocks[0].register_forward_pre_hook(lambda _, given: entered.append(given[0]))
    encoder.encode(tokens)
    hook.remove()
    for image, x in enumerate(entered[0]):
        late = {encoder.num_prefix_tokens + int(place) for place in at[image]}
        early = [place for place in range(len(x)) if place not in late]
        alone = x[early][None]
        for block in encoder.vit.blocks[:entering]:
            alone = block(alone)
        whole = x.clone()[None]
        whole[0, early] = alone[0] if entering < 3 else encoder.vit.norm(alone)[0]
        for block in encoder.vit.blocks[entering:]:
            whole = block(whole)
        whole = whole if entering == 3 else encoder.vit.norm(whole)
        torch.testing.assert_close(every[image], whole[0], rtol=0, atol=1e-10)
        for block in decoder.blocks:
            whole = block(whole)
        expected = decoder.norm(whole)[0, at[image] + encoder.num_prefix_tokens]
        torch.testing.assert_close(found[image], expected, rtol=0, atol=1e-10)


def test_what_leaves_nothing_to_run_is_refused() -> None:
    encoder = build(dataclasses.replace(TINY, depth=3))
    tokens, at = torch.randn(2, encoder.grid[0] * encoder.grid[1], encoder.embed_dim).double(), choose(encoder)
    for entering, every in ((3, False), (4, True)):
        with pytest.raises(ValueError, match=f"entering {entering}: of 3 blocks the last must run"):
            encoder.encode(tokens, at=at, entering=entering, every=every)
    for depth in (0, 4):
        with pytest.raises(ValueError, match=f"takes 1 to 3 blocks, got {depth}"):
            Decoder(encoder, depth)


def test_everything_gets_a_gradient() -> None:
    encoder = build(dataclasses.replace(TINY, depth=3, grad_checkpointing=True)).train()
    decoder = Decoder(encoder, 1).double().train()
    images, at = pictures(TINY).to(next(encoder.parameters())), choose(encoder)
    decoder(encoder.encode(encoder.embed(images), at=at, entering=3, every=True), at).square().sum().backward()
    missing = [name for part in (encoder, decoder) for name, p in part.named_parameters() if p.grad is None]
    assert missing == []


def test_weights_are_new_and_drawn_as_timm_draws_them() -> None:
    def drawn(seed: int) -> tuple[Encoder, Decoder]:
        torch.manual_seed(seed)
        encoder = build_encoder(ModelConfig("vit_tiny_patch16_224", img_size=(32,), depth=3, drop_path=0.3))
        return encoder, Decoder(encoder, 2)

    (encoder, decoder), (_, again), (_, other) = drawn(0), drawn(0), drawn(1)
    weight = decoder.blocks[1].mlp.fc1.weight
    assert torch.equal(weight, again.blocks[1].mlp.fc1.weight)
    assert not torch.equal(weight, other.blocks[1].mlp.fc1.weight)
    assert not torch.equal(weight, encoder.vit.blocks[2].mlp.fc1.weight)
    assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not decoder.blocks[1].mlp.fc1.bias.any()
    rates = [
        module.drop_prob for part in (decoder, encoder) for module in part.modules() if isinstance(module, DropPath)
    ]
    assert rates == pytest.approx([0, 0, 0, 0, 0.15, 0.15, 0.3, 0.3])


def test_on_meta_nothing_is_allocated() -> None:
    decoder = Decoder(build_encoder(TINY, "meta"), 1)
    assert {parameter.device.type for parameter in decoder.parameters()} == {"meta"}
