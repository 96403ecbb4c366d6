"""Tests of `discriminator`: what a score sees, hinge losses by hand, learning, and the balance of gradients."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import images, noise
from torch import nn

from hieratok_hf.training.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_hinge_loss,
    generator_hinge_loss,
)


def discriminator(channels=8, num_layers=2):
    torch.manual_seed(0)
    return PatchDiscriminator(channels, num_layers)


def without_norms(module):
    return nn.Sequential(*(layer for layer in module.layers if not isinstance(layer, nn.GroupNorm)))


@pytest.mark.parametrize(("num_layers", "size"), [(1, 16), (3, 70)])
def test_a_score_sees_a_patch_of_the_documented_size(num_layers, size):
    side = 3 * size // 2**num_layers * 2**num_layers
    x = images(1, 3, side, side).requires_grad_()
    module = discriminator(4, num_layers)
    for local in (without_norms(module), module):
        scores = local(x)
        assert scores.shape == (1, 1, side // 2**num_layers - 2, side // 2**num_layers - 2)
        centre = scores.shape[2] // 2
        (gradient,) = torch.autograd.grad(scores[0, 0, centre, centre], x)
        seen = gradient[0].abs().sum(0)  # (side, side)
        if local is not module:
            rows, columns = (seen.sum(dim).nonzero().flatten() for dim in (1, 0))
            window = tuple(slice(int(places[0]), int(places[-1]) + 1) for places in (rows, columns))
            assert [part.stop - part.start for part in window] == [size, size]
    # With the norms, which know the whole image, a score still rests on its own patch.
    assert seen[window].mean() > 3 * (seen.sum() - seen[window].sum()) / (seen.numel() - size**2)


def test_the_convolutions_are_those_of_pix2pix():
    def layers_of(module, kind):
        return [layer for layer in module.layers if isinstance(layer, kind)]

    module = PatchDiscriminator()
    convolutions = layers_of(module, nn.Conv2d)
    assert [layer.out_channels for layer in convolutions] == [64, 128, 256, 512, 1]
    assert [layer.stride[0] for layer in convolutions] == [2, 2, 2, 1, 1]
    assert all(layer.kernel_size == (4, 4) and layer.padding == (1, 1) for layer in convolutions)
    assert [layer.negative_slope for layer in layers_of(module, nn.LeakyReLU)] == [0.2] * 4
    for layer in convolutions[1:-1]:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02)
    for tested, groups in ((module, [32, 32, 32]), (PatchDiscriminator(12), [2, 4, 8])):
        norms = layers_of(tested, nn.GroupNorm)
        assert [norm.num_groups for norm in norms] == groups
        assert all(norm.num_channels >= 4 * norm.num_groups for norm in norms)
    widths = [layer.out_channels for layer in layers_of(PatchDiscriminator(4, 6), nn.Conv2d)]
    assert widths == [4, 8, 16, 32, 32, 32, 32, 1]


def test_scores_do_not_depend_on_the_company_the_mode_or_autocast():
    module, x = discriminator().train(), images(4, 3, 40, 52)
    together = module(x)
    torch.testing.assert_close(together, torch.cat([module(x[i : i + 1]) for i in range(4)]), rtol=1e-4, atol=1e-5)
    assert torch.equal(together, module.eval()(x)) and together.std() > 0.01
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = module(x.bfloat16())
        loss = generator_hinge_loss(scores.bfloat16())
    assert scores.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(scores, together, rtol=0.1, atol=0.05)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_the_smallest_image_still_has_a_score_of_its_own():
    module = discriminator()
    with torch.no_grad():
        scores = module(images(3, 3, 12, 12))
    assert module.min_size == 12 and scores.shape == (3, 1, 1, 1) and scores.std() > 1e-3
    for shape in ((1, 3, 11, 40), (1, 3, 40, 11)):
        with pytest.raises(ValueError, match=rf"at least 12 pixels high and wide, got {shape[2]}x{shape[3]}"):
            module(torch.zeros(shape))


def test_hinge_losses_by_hand():
    real = torch.tensor([[2.0, 0.5], [1.0, -1.0]], requires_grad=True)
    fake = torch.tensor([[-3.0, 0.0, 0.5, -0.5]], requires_grad=True)
    loss = discriminator_hinge_loss(real, fake)
    assert loss.shape == () and loss.item() == pytest.approx(0.5 * ((0 + 0.5 + 0 + 2) / 4 + (0 + 1 + 1.5 + 0.5) / 4))
    loss.backward()
    assert real.grad.tolist() == [[0, -0.125], [0, -0.125]] and fake.grad.tolist() == [[0, 0.125, 0.125, 0.125]]
    assert discriminator_hinge_loss(torch.zeros(2), torch.zeros(3)).item() == 1
    assert discriminator_hinge_loss(torch.ones(2), -torch.ones(3)).item() == 0
    fake.grad = None
    loss = generator_hinge_loss(fake)
    assert loss.shape == () and loss.item() == pytest.approx(0.75)
    loss.backward()
    assert fake.grad.tolist() == [[-0.25] * 4]


def test_it_learns_to_tell_blurred_images_from_real_ones():
    module = discriminator(8)
    optimizer = torch.optim.Adam(module.parameters(), 2e-3, betas=(0.5, 0.9))

    def losses_of(seed):
        real = images(16, 3, 24, 24, seed=seed)
        blurred = F.avg_pool2d(F.pad(real, [2] * 4, mode="replicate"), 5, stride=1)
        return discriminator_hinge_loss(module(real), module(blurred))

    assert 0.9 < losses_of(100) < 1.1
    for step in range(30):
        optimizer.zero_grad()
        losses_of(step).backward()
        optimizer.step()
    assert losses_of(100) < 0.5


def test_the_weight_balances_the_gradients():
    module, target = discriminator(), images(2, 3, 32, 32)
    image = (target + 0.1 * noise(2, 3, 32, 32)).requires_grad_()
    losses = (F.l1_loss(image, target), generator_hinge_loss(module(image)))
    gradients = [torch.autograd.grad(loss, image, retain_graph=True)[0] for loss in losses]
    weight = adaptive_weight(*(gradient.square().sum() for gradient in gradients))
    norms = [float(np.linalg.norm(gradient.double().numpy())) for gradient in gradients]
    assert weight.item() == pytest.approx(norms[0] / (norms[1] + 1e-4), rel=1e-5)
    (weighted,) = torch.autograd.grad(weight * losses[1], image)
    assert weighted.norm().item() == pytest.approx(norms[0], rel=0.01)
    # Halves on two processes, added up, give the weight of the whole.
    halves = [sum(half.square().sum() for half in gradient.chunk(2)) for gradient in gradients]
    torch.testing.assert_close(adaptive_weight(*halves), weight)


def test_the_weight_is_a_number_without_a_graph_in_its_limits():
    zero, one, square = torch.tensor(0.0), torch.tensor(1.0), torch.tensor(4.0, requires_grad=True)
    weight = adaptive_weight(square * 4, square)
    assert weight.shape == () and weight.dtype == torch.float32 and not weight.requires_grad
    assert weight.item() == pytest.approx(2, abs=2e-4)
    assert adaptive_weight(square.bfloat16(), square.double()).dtype == torch.float32
    assert adaptive_weight(zero, one).item() == 0 and adaptive_weight(zero, zero).item() == 0
    assert adaptive_weight(torch.tensor(1e12), zero).item() == 1e4
