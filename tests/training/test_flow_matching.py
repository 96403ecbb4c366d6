"""DiT by name, its start, and the loss of flow matching."""

from functools import partial

import pytest
import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from helpers import noise

from hieratok_hf.training.alignment import BlockAlignment
from hieratok_hf.training.flow_matching import VelocityTraining, dit_from_size, flow_draws
from hieratok_hf.utils.choices import DIT_SIZES

SMALL = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}


def small_dit(**overrides) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    sizes = {"in_channels": 4, "sample_size": 6, "num_classes": 3, **SMALL, **overrides}
    return dit_from_size("dit-tiny", **sizes)


@pytest.mark.parametrize("size", DIT_SIZES)
def test_the_named_sizes_have_the_papers_shapes(size):
    with torch.device("meta"):
        model = dit_from_size(size, in_channels=4, sample_size=32, num_classes=1000, patch_size=2)
    width, depth = model.inner_dim, len(model.transformer_blocks)
    papers = {"dit-s": (384, 12), "dit-b": (768, 12), "dit-l": (1024, 24), "dit-xl": (1152, 28)}
    assert (width, depth) == papers.get(size, (256, 5))
    assert model.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.num_embeddings == 1001


def test_a_dit_begins_as_the_identity_and_gives_nothing():
    model = small_dit()
    assert not model.training
    hidden = noise(2, 36, 16)
    time, labels = torch.tensor([1.0, 900.0]), torch.tensor([0, 3])
    for block in model.transformer_blocks:
        assert torch.equal(block(hidden, timestep=time, class_labels=labels), hidden)
    assert not model(noise(2, 4, 6, 6), timestep=time, class_labels=labels).sample.any()


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("size", {"size": "dit-xxl"}),
        ("foo", {"foo": 5}),
        ("num_embeds_ada_norm", {"num_embeds_ada_norm": 5}),
        ("patch_size", {"patch_size": 4}),
        ("patch_size", {"patch_size": 0}),
    ],
)
def test_what_a_size_cannot_be_is_refused(name, given):
    with pytest.raises(ValueError, match=name):
        dit_from_size(**{"size": "dit-tiny", "in_channels": 4, "sample_size": 6, "num_classes": 3, **given})


class Fixed(torch.nn.Module):
    """Gives a velocity that is known, and keeps what it was asked."""

    def __init__(self, velocity):
        super().__init__()
        self.velocity, self.asked = velocity, {}

    def forward(self, hidden_states, **asked):
        self.asked = {"hidden_states": hidden_states, **asked}
        return (self.velocity,)


def test_the_loss_is_that_of_the_velocity():
    latents, eps = noise(3, 4, 6, 6), noise(3, 4, 6, 6, seed=1)
    times, labels = torch.tensor([0.0, 0.25, 1.0]), torch.tensor([0, 1, 3])
    perfect = Fixed(eps - latents)
    assert VelocityTraining(perfect)(latents, eps, times, labels)["loss"] == 0
    assert torch.equal(perfect.asked["timestep"], times * FlowMatchEulerDiscreteScheduler().config.num_train_timesteps)
    assert torch.equal(perfect.asked["class_labels"], labels)
    # The line between the two, as diffusers' scheduler draws it.
    fed = perfect.asked["hidden_states"]
    torch.testing.assert_close(fed[0], latents[0])
    torch.testing.assert_close(fed[2], eps[2])
    torch.testing.assert_close(fed[1], 0.75 * latents[1] + 0.25 * eps[1])
    # The variance that a model may predict does not count.
    both = Fixed(torch.cat([eps - latents, noise(3, 4, 6, 6, seed=2)], dim=1))
    assert VelocityTraining(both)(latents, eps, times, labels)["loss"] == 0
    off = VelocityTraining(Fixed(eps - latents + 2))(latents, eps, times, labels)["loss"]
    torch.testing.assert_close(off, torch.tensor(4.0))


def test_labels_are_not_dropped_inside():
    model = VelocityTraining(small_dit()).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise(*parameter.shape), alpha=0.1)
    given = noise(64, 4, 6, 6), noise(64, 4, 6, 6, seed=1), torch.full((64,), 0.5), torch.arange(64) % 4
    losses = [model(*given)["loss"] for _ in range(4)]
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    assert model.training and model.transformer.training
    assert not torch.equal(model(*given[:3], torch.full((64,), 3))["loss"], losses[0])


def aligned(weight, block=1, **overrides):
    """A DiT whose weights are random, aligned with one map of 5 channels, and what it is given."""
    model = small_dit(**overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise(*parameter.shape), alpha=0.1)
    given = noise(3, 4, 6, 6), noise(3, 4, 6, 6, seed=1), torch.tensor([0.2, 0.5, 0.9]), torch.tensor([0, 2, 3])
    alignment = BlockAlignment(model.inner_dim, [(torch.zeros(5), torch.ones(5))])
    return VelocityTraining(model, alignment, weight, block).train(), (*given, noise(3, 5, 4, 4))


def gradients_of(module):
    return {name: weight.grad for name, weight in module.named_parameters()}


def test_an_alignment_of_no_weight_leaves_the_training_as_it_is_to_the_bit():
    module, given = aligned(0.0)
    losses = module(*given)
    losses["loss"].backward()
    found = gradients_of(module.transformer)
    module.zero_grad()
    plain = VelocityTraining(module.transformer).train()(*given[:4])["loss"]
    plain.backward()
    assert torch.equal(losses["loss"], plain) and torch.equal(losses["velocity"], plain) and losses["alignment"] > 0.1
    torch.testing.assert_close(gradients_of(module.transformer), found, rtol=0, atol=0)


def test_an_alignment_is_of_the_tokens_that_a_block_gives_and_adds_to_the_loss():
    for block in (1, 2):
        module, given = aligned(0.5, block, patch_size=2)
        losses = module(*given)
        noisy = torch.lerp(*given[:2], given[2][:, None, None, None])
        tokens = module.transformer.pos_embed(noisy)
        for layer in module.transformer.transformer_blocks[:block]:
            tokens = layer(tokens, timestep=given[2] * 1000, class_labels=given[3])
        expected = module.alignment(tokens.reshape(3, 3, 3, -1), given[4:])
        torch.testing.assert_close(losses["alignment"], expected)
        torch.testing.assert_close(losses["loss"], losses["velocity"] + 0.5 * losses["alignment"])


def test_gradients_of_an_alignment_are_the_same_with_checkpoints():
    found = []
    for checkpointing in (False, True):
        module, given = aligned(0.5)
        if checkpointing:
            module.transformer.enable_gradient_checkpointing()
        module(*given)["loss"].backward()
        found.append(gradients_of(module))
    assert all(x is not None for x in found[0].values())  # DDP asks for the gradient of every weight
    assert found[0]["alignment.projector.1.weight"].any()
    torch.testing.assert_close(*found)


def test_draws_are_a_function_of_seed_and_step_however_divided():
    draws = partial(flow_draws, count=12, rows=torch.arange(12), shape=(4, 3, 3))
    torch.set_default_dtype(torch.float64)
    try:
        elsewhere = draws(0, 0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(*pair) for pair in zip(elsewhere, draws(0, 0)))
    whole = draws(1, 7)
    for rows in (torch.arange(0, 6), torch.arange(6, 12), torch.tensor([11, 0, 5])):
        for part, all_rows in zip(draws(1, 7, rows=rows), whole):
            assert torch.equal(part, all_rows[rows])
    assert all(not torch.equal(draws(*other)[0], whole[0]) for other in ((1, 8), (2, 7)))


def test_the_times_are_logit_normal_and_shifted():
    draws = partial(flow_draws, 0, 0, 20_000, rows=torch.arange(20_000), shape=(1,), mean=0.3, std=0.8)
    _, times, dropping = draws()
    logits = torch.logit(times.double())
    assert logits.mean() == pytest.approx(0.3, abs=0.03) and logits.std() == pytest.approx(0.8, abs=0.03)
    assert (dropping < 0.1).float().mean() == pytest.approx(0.1, abs=0.01)
    _, shifted, _ = draws(shift=3.0)
    torch.testing.assert_close(shifted, 3 * times / (1 + 2 * times))
