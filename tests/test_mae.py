"""MAE against the paper's description in numpy: masks, patches, targets, the loss on hidden patches alone."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from methods_kit import batch, make, rows
from pydantic import ValidationError
from sslbench_plugins.methods.mae import MAE, Decoder, patchify, standardised, taken
from torch import Tensor

from sslbench.errors import ConfigError
from sslbench.nn.positions import sincos_table
from sslbench.plugin.api import Batch, ViewSpec

SMALL: dict[str, Any] = {"decoder_dim": 16, "decoder_heads": 2, "decoder_depth": 1}


def mae(seed: int = 0, **options: Any) -> MAE:
    """On 16 patches of 8 pixels."""
    return make(MAE, seed, **{**SMALL, **options})  # type: ignore[return-value]


class Witness:
    """Notes what the decoder is given, and may answer in its place."""

    def __init__(self, method: MAE, answer: Any = None) -> None:
        def noted(_module: object, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            self.tokens, self.visible, self.hidden = args
            return None if answer is None else answer(self.hidden, output)

        method.decoder.register_forward_hook(noted)


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize(("masked", "visible"), [(0.75, 4), (0.5, 8), (0.9, 1)])
def test_every_image_hides_the_same_exact_share(masked: float, visible: int) -> None:
    method = mae(masked=masked)
    witness = Witness(method)
    method(batch(8, views=1))
    assert witness.visible.shape == (8, visible)
    assert witness.tokens.shape == (8, 1 + visible, 16)
    together = torch.cat([witness.visible, witness.hidden], dim=1).sort(dim=1).values
    assert torch.equal(together, torch.arange(16).expand(8, -1))


def test_masks_are_drawn_per_image_and_step_and_uniformly() -> None:
    method = mae()
    witness = Witness(method)
    counts, seen = torch.zeros(16), set()
    for step in range(100):
        method(batch(8, views=1, step=step))
        counts += torch.bincount(witness.visible.flatten(), minlength=16)
        seen |= {tuple(sorted(numbers)) for numbers in witness.visible.tolist()}
    assert len(seen) > 500
    assert ((counts - 200).abs() < 60).all()


def test_masks_do_not_depend_on_how_the_batch_is_shared() -> None:
    method = mae()
    witness, data = Witness(method), batch(8, views=1, step=3)
    whole = method(data)["loss"]
    visible = witness.visible
    parts = []
    for start, stop in ((0, 5), (5, 8)):
        parts.append((stop - start) * method(rows(batch(8, views=1, step=3), start, stop))["loss"])
        assert torch.equal(witness.visible, visible[start:stop])
    torch.testing.assert_close(sum(parts) / 8, whole)


# ---------------------------------------------------------------- patches and targets


def numpy_patches(images: Tensor, patch: int) -> np.ndarray:
    """Patch by patch, pixel by pixel, colour by colour."""
    pixels = images.numpy()
    count, _, height, width = pixels.shape
    found = []
    for image in range(count):
        patches = []
        for y in range(0, height - patch + 1, patch):
            for x in range(0, width - patch + 1, patch):
                cell = pixels[image, :, y : y + patch, x : x + patch]
                patches.append([cell[c, i, j] for i in range(patch) for j in range(patch) for c in range(3)])
        found.append(patches)
    return np.array(found)


@pytest.mark.parametrize("sides", [(32, 32), (16, 24), (19, 21)])
def test_patches_are_cut_row_by_row(sides: tuple[int, int]) -> None:
    images = torch.randn(2, 3, *sides)
    np.testing.assert_array_equal(patchify(images, 8).numpy(), numpy_patches(images, 8))


def test_patches_can_be_put_together_again() -> None:
    images = torch.randn(2, 3, 16, 24)
    cells = patchify(images, 8).view(2, 2, 3, 8, 8, 3)
    assert torch.equal(cells.permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 16, 24), images)


def test_patches_are_those_that_the_backbone_embeds() -> None:
    """Same numbers, same pixels: the projection is a product with the patch."""
    method, images = mae(), batch(2, views=1).views[0].images
    weight = method.backbone.patch_embed.proj.weight
    embedded = patchify(images, 8) @ weight.permute(0, 2, 3, 1).flatten(1).T
    expected = method.backbone.patch_embed(images) - method.backbone.patch_embed.proj.bias[:, None, None]
    torch.testing.assert_close(embedded.mT, expected.flatten(2), rtol=1e-4, atol=1e-5)


def test_targets_have_mean_zero_and_unit_variance() -> None:
    patches = 5 + 3 * torch.randn(2, 4, 192)
    found = standardised(patches)
    torch.testing.assert_close(found.mean(-1), torch.zeros(2, 4), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.var(-1), torch.ones(2, 4), rtol=1e-5, atol=0)
    assert (standardised(torch.full((1, 1, 192), 3.0)) == 0).all()
    torch.testing.assert_close(standardised(2 * patches - 1), found, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("normalized", [True, False])
def test_the_loss_is_that_of_the_paper(normalized: bool) -> None:
    method, data, painted = mae(normalized=normalized), batch(5, views=1), []
    witness = Witness(method, lambda _, output: painted.append(output) or output)
    loss = method(data)["loss"].item()
    targets = numpy_patches(data.views[0].images, 8).astype(np.float64)
    if normalized:
        deviation = np.sqrt(targets.var(-1, ddof=1, keepdims=True) + 1e-6)
        targets = (targets - targets.mean(-1, keepdims=True)) / deviation
    errors = [
        ((painted[0][image, place].detach().double().numpy() - targets[image, number]) ** 2).mean()
        for image in range(5)
        for place, number in enumerate(witness.hidden[image].tolist())
    ]
    assert len(errors) == 5 * 12
    assert loss == pytest.approx(float(np.mean(errors)), rel=1e-5)


def test_perfect_paintings_cost_nothing_and_blank_ones_the_variance() -> None:
    data = batch(4, views=1)
    targets = standardised(patchify(data.views[0].images, 8))
    perfect, blank = mae(), mae()
    Witness(perfect, lambda hidden, _: taken(targets, hidden))
    Witness(blank, lambda _, output: torch.zeros_like(output))
    assert perfect(data)["loss"].item() == 0
    assert blank(data)["loss"].item() == pytest.approx(191 / 192, rel=1e-4)  # unbiased variances are 1


def test_hidden_pixels_change_the_target_only() -> None:
    method, data = mae(), batch(3, views=1)
    witness, painted = Witness(method, lambda _, output: painted.append(output) or output), []
    method(data)
    cells = torch.zeros(3, 16).scatter(1, witness.visible, 1.0).view(3, 1, 4, 4)
    shown = cells.repeat_interleave(8, 2).repeat_interleave(8, 3)
    other = data.views[0].images * shown + 9 * (1 - shown) * torch.randn(3, 3, 32, 32)
    method(Batch((data.views[0]._replace(images=other),), data.index, data.draws))
    torch.testing.assert_close(*painted)


def test_visible_pixels_have_no_target() -> None:
    """A decoder that is asked for hidden patches alone cannot be judged by others."""
    method = mae()
    witness = Witness(method, lambda hidden, output: torch.zeros_like(output))
    data = batch(2, views=1)
    expected = method(data)["loss"]
    cells = torch.zeros(2, 16).scatter(1, witness.visible, 1.0).view(2, 1, 4, 4)
    shown = cells.repeat_interleave(8, 2).repeat_interleave(8, 3)
    other = data.views[0].images * (1 - shown) + 5 * shown
    found = method(Batch((data.views[0]._replace(images=other),), data.index, data.draws))["loss"]
    torch.testing.assert_close(found, expected)


def test_every_trainable_parameter_gets_a_gradient() -> None:
    method = mae()
    method(batch(views=1))["loss"].backward()
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


# ---------------------------------------------------------------- decoder


def test_the_published_decoder_counts() -> None:
    """Of ViT-B: 8 blocks of width 512, 16 heads, 16x16 patches of three colours."""
    cfg = MAE.Config(decoder_dim=512, decoder_depth=8, decoder_heads=16)
    with torch.device("meta"):
        decoder = Decoder(cfg, 768, 14, 768)
    block = 4 * 512 + (512 * 1536 + 1536) + (512 * 512 + 512) + (512 * 2048 + 2048) + (2048 * 512 + 512)
    ends = (768 * 512 + 512) + 512 + 2 * 512 + (512 * 768 + 768)
    assert sum(p.numel() for p in decoder.parameters()) == 8 * block + ends
    assert "positions" not in decoder.state_dict()


def test_the_decoder_knows_patches_by_their_positions_alone() -> None:
    """Whatever the order of visible and hidden patches, a place is painted the same."""
    torch.manual_seed(0)
    decoder = Decoder(MAE.Config(**SMALL), 8, 4, 192)
    torch.testing.assert_close(decoder.positions, sincos_table(16, 4, 4))
    tokens, numbers = torch.randn(1, 5, 8), torch.randperm(16)[None]
    visible, hidden = numbers[:, :4], numbers[:, 4:]
    painted = decoder(tokens, visible, hidden)
    turned = decoder(tokens[:, [0, 4, 3, 2, 1]], visible.flip(1), hidden.flip(1))
    torch.testing.assert_close(turned, painted.flip(1), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(painted[0, 0], painted[0, 1], atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": (ViewSpec(count=2),)}, "one view of each image, got 2"),
        ({"decoder_heads": 5}, "decoder_heads 5 must divide decoder_dim 16"),
        ({"decoder_dim": 18}, "multiple of 4"),
    ],
)
def test_wrong_options_are_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MAE.Config(**{**SMALL, **options})


def test_nothing_to_see_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method.masked=0.99 of 16 patches leaves 0 to be seen"):
        mae(masked=0.99)


# ---------------------------------------------------------------- training


def steps(method: MAE, count: int, start: int = 0, one_colour: bool = False) -> list[float]:
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    losses = []
    for step in range(start, start + count):
        data = batch(views=1, seed=step, step=step)
        if one_colour:
            images = data.views[0].images[:, :, :1, :1].expand(-1, -1, 32, 32)
            data = Batch((data.views[0]._replace(images=images),), data.index, data.draws)
        loss = method(data)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_loss_falls() -> None:
    """What patches hide can be seen in any other."""
    losses = steps(mae(normalized=False), 50, one_colour=True)
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])


def test_state_dict_continues_identically() -> None:
    first = mae()
    steps(first, 3)
    second = mae(seed=5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert steps(first, 3, start=3) == steps(second, 3, start=3)
