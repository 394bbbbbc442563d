"""Vision transformers: sizes, positions, tokens, initialisation, exchange of weights with timm."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sslbench_plugins.backbones import vit
from torch import Tensor, nn

from sslbench.engine.recompute import checkpoint_activations
from sslbench.nn.positions import resized_table, sincos_table
from sslbench.nn.transformer import Attention, Block, DropPath
from sslbench.nn.vit import VisionTransformer
from sslbench.plugin.api import Features
from sslbench.testing import check_backbone

CLASSES = {cls.name: cls for cls in vit.sslbench_backbones()}
SMALL: dict[str, object] = {"depth": 2}


def build(name: str = "vit_tiny", image_size: int = 32, seed: int = 0, **options: object) -> VisionTransformer:
    torch.manual_seed(seed)
    return CLASSES[name](CLASSES[name].Config(**options), image_size)


def images(count: int = 2, *sides: int) -> Tensor:
    return torch.randn(count, 3, *(sides or (32, 32)), generator=torch.Generator().manual_seed(count))


# ---------------------------------------------------------------- blocks


def numpy_block(block: Block, x: np.ndarray) -> np.ndarray:
    """Equations 2, 3 and 5 to 8 of the paper, head by head."""
    w = {name: value.detach().double().numpy() for name, value in block.named_parameters()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        return (
            centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * w[f"{name}.weight"]
            + w[f"{name}.bias"]
        )

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    q, k, v = np.split(linear(norm(x, "norm1"), "attn.qkv"), 3, axis=-1)
    width = q.shape[-1] // block.attn.heads
    heads = []
    for start in range(0, q.shape[-1], width):
        part = slice(start, start + width)
        weights = np.exp(q[..., part] @ k[..., part].swapaxes(1, 2) / math.sqrt(width))
        heads.append(weights / weights.sum(-1, keepdims=True) @ v[..., part])
    x = x + linear(np.concatenate(heads, axis=-1), "attn.proj")
    hidden = linear(norm(x, "norm2"), "mlp.fc1")
    gelu = hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) / 2
    return x + linear(gelu, "mlp.fc2")


def test_a_block_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    block = Block(12, 3)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    tokens = torch.randn(2, 5, 12)
    expected = numpy_block(block, tokens.double().numpy())
    torch.testing.assert_close(block(tokens), torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-4)


def test_attention_does_not_see_the_order() -> None:
    attention, tokens = Attention(8, 2), torch.randn(1, 6, 8)
    torch.testing.assert_close(attention(tokens.flip(1)), attention(tokens).flip(1))


def test_dropped_paths_are_of_whole_images_and_keep_the_mean() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25)
    dropped = drop(torch.ones(4000, 3, 2))
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(dropped.amin((1, 2)), dropped.amax((1, 2)))
    assert dropped.mean().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(drop.eval()(torch.ones(2, 3, 2)), torch.ones(2, 3, 2))


def test_the_rate_of_dropped_paths_rises_with_depth() -> None:
    rates = [block.drop_path.rate for block in build(depth=5, drop_path=0.2).blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


# ---------------------------------------------------------------- positions


def test_worked_sines_and_cosines() -> None:
    """Width 8 has the frequencies 1 and 1/100; the first half tells the column, the second the row."""
    table = sincos_table(8, 2, 3)
    assert table.shape == (6, 8)
    torch.testing.assert_close(table[0], torch.tensor([0.0, 0, 1, 1, 0, 0, 1, 1]))
    row, column = 1, 2
    expected = [
        *(math.sin(column), math.sin(column / 100), math.cos(column), math.cos(column / 100)),
        *(math.sin(row), math.sin(row / 100), math.cos(row), math.cos(row / 100)),
    ]
    torch.testing.assert_close(table[row * 3 + column], torch.tensor(expected))


def test_the_distance_of_two_places_depends_on_their_offset_only() -> None:
    table = sincos_table(64, 6, 6).unflatten(0, (6, 6))
    products = [(table[y, x] @ table[y + 2, x + 1]).item() for y in range(4) for x in range(5)]
    assert products == pytest.approx([products[0]] * 20, rel=1e-5)


def test_widths_that_cannot_be_quartered_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 4, got 10"):
        sincos_table(10, 2, 2)


@pytest.mark.parametrize("wanted", [(4, 4), (14, 14), (5, 9), (1, 1)])
def test_positions_are_interpolated_as_torch_does_it(wanted: tuple[int, int]) -> None:
    table = torch.randn(1, 56, 6)
    expected = nn.functional.interpolate(table.unflatten(1, (7, 8)).permute(0, 3, 1, 2), wanted, mode="bicubic")
    found = resized_table(table, (7, 8), wanted)
    torch.testing.assert_close(found, expected.flatten(2).mT, rtol=1e-4, atol=1e-5)


def test_positions_of_the_same_grid_are_the_table_itself() -> None:
    table = torch.randn(1, 12, 4)
    assert resized_table(table, (3, 4), (3, 4)) is table


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize(
    ("name", "parameters", "dim"),
    [("vit_tiny", 5_524_416, 192), ("vit_small", 21_665_664, 384), ("vit_base", 85_798_656, 768)],
)
def test_parameter_counts_are_those_of_deit(name: str, parameters: int, dim: int) -> None:
    with torch.device("meta"):
        backbone = build(name, 224)
    assert sum(p.numel() for p in backbone.parameters()) == parameters
    assert (backbone.dim, backbone.stride, backbone.pos_embed.shape) == (dim, 16, (1, 197, dim))
    assert len(backbone.segments()) == 12


@pytest.mark.slow
def test_weights_of_timm_load_and_agree() -> None:
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    ours = build(image_size=224).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    batch = images(1, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(batch).pooled, theirs(batch), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("size", "patch"), [(28, 4), (32, 4), (64, 8), (96, 8), (160, 16), (224, 16)])
def test_patches_fit_the_images(size: int, patch: int) -> None:
    assert build(image_size=size, depth=1).stride == patch
    assert build(image_size=size, depth=1, patch_size=14).stride == 14


@pytest.mark.parametrize("sides", [(32, 32), (16, 16), (48, 20), (33, 47)])
@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_other_sizes(sides: tuple[int, int], positions: str) -> None:
    backbone = build(positions=positions, **SMALL)
    grid = sides[0] // 4, sides[1] // 4
    pooled, feature_map, stem, tokens = backbone(images(2, *sides))
    assert pooled.shape == (2, 192)
    assert feature_map.shape == (2, 192, *grid)
    assert stem is None
    assert tokens.shape == (2, 1 + math.prod(grid), 192)


def test_pooling() -> None:
    by_class, by_mean = build(**SMALL)(images()), build(pool="mean", **SMALL)(images())
    torch.testing.assert_close(by_class.pooled, by_class.tokens[:, 0])
    torch.testing.assert_close(by_mean.pooled, by_mean.map.mean((2, 3)))
    torch.testing.assert_close(by_class.tokens, by_mean.tokens)


def test_patches_know_their_places() -> None:
    """Without positions, moving the pixels would only move the tokens."""
    backbone = build(**SMALL)
    turned = backbone(images().flip(3)).pooled
    assert not torch.allclose(turned, backbone(images()).pooled, atol=1e-3)


def test_visible_patches_alone_make_the_tokens() -> None:
    backbone, batch = build(**SMALL), images()
    visible = torch.tensor([[3, 0, 63], [10, 11, 12]])
    found: Features = backbone(batch, visible)
    assert found.tokens.shape == (2, 4, 192)
    assert found.map.shape == (2, 192, 1, 3)
    other = torch.randn_like(batch)
    for image, numbers in enumerate(visible.tolist()):
        for number in numbers:
            rows, columns = (slice(4 * place, 4 * place + 4) for place in divmod(number, 8))
            other[image, :, rows, columns] = batch[image, :, rows, columns]
    torch.testing.assert_close(backbone(other, visible).tokens, found.tokens)
    torch.testing.assert_close(backbone(batch, visible.flip(1)).tokens[:, 1:], found.tokens[:, 1:].flip(1))


def test_initial_values() -> None:
    published = build()
    assert published.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert published.pos_embed.std().item() == pytest.approx(0.02, rel=0.03)
    biases = [value for name, value in published.blocks.named_parameters() if name.endswith("bias")]
    assert all((value == 0).all() for value in biases)
    mae = build(init="xavier", positions="sincos")
    bound = math.sqrt(6 / (192 + 768))
    assert mae.blocks[0].mlp.fc1.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert mae.patch_embed.proj.weight.abs().max().item() == pytest.approx(math.sqrt(6 / (192 + 48)), rel=0.01)
    assert "pos_embed" not in dict(mae.named_parameters())
    torch.testing.assert_close(mae.pos_embed[0, 1:], sincos_table(192, 8, 8))
    assert (mae.pos_embed[0, 0] == 0).all()


def test_computing_blocks_again_gives_the_same_gradients() -> None:
    gradients = []
    for again in (False, True):
        backbone = build(drop_path=0.3, **SMALL)
        if again:
            checkpoint_activations(backbone)
        torch.manual_seed(1)
        backbone(images()).pooled.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in backbone.parameters()]))
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 0}, "patch_size"),
        ({"depth": 0}, "depth"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"pool": "max"}, "pool"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        build(**options)


@pytest.mark.parametrize("options", [{}, {"pool": "mean", "positions": "sincos", "init": "xavier"}])
def test_it_keeps_the_contract(options: dict[str, object]) -> None:
    check_backbone("vit_tiny", options={**SMALL, **options}, compiled=False).raise_if_broken()
