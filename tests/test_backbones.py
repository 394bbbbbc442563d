"""Built-in backbones: sizes, shapes, initialisation and exchange of weights with torchvision."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import torchvision
from sslbench_plugins.backbones import conv4, resnet, resnet_small
from torch import nn

from sslbench.plugin.api import Backbone

CLASSES = {cls.name: cls for module in (conv4, resnet_small, resnet) for cls in module.sslbench_backbones()}
SMALL = ("conv4", "resnet8", "resnet32", "resnet56")


def build(name: str, image_size: int = 32, seed: int = 0, **options: object) -> Backbone:
    cls = CLASSES[name]
    torch.manual_seed(seed)
    return cls(cls.Config(**options), image_size)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "parameters", "dim"),
    [
        ("conv4", 24_648, 64),
        ("resnet8", 77_392, 64),
        ("resnet32", 466_256, 64),
        ("resnet56", 855_120, 64),
        ("resnet18", 11_176_512, 512),
        ("resnet34", 21_284_672, 512),
        ("resnet50", 23_508_032, 2048),
        ("resnet101", 42_500_160, 2048),
        ("resnet50w2", 93_907_072, 4096),
        ("resnet50w4", 375_378_176, 8192),
        ("resnet50w5", 586_450_240, 10240),
    ],
)
def test_parameter_counts_and_dims(name, parameters, dim):
    with torch.device("meta"):
        backbone = build(name, image_size=224)
    assert count(backbone) == parameters
    assert backbone.dim == dim


@pytest.mark.parametrize("size", [16, 28, 33])
@pytest.mark.parametrize("name", ["conv4", "resnet8", "resnet56", "resnet18"])
def test_shapes_and_pooling(name, size):
    backbone = build(name, image_size=size)
    images = torch.randn(2, 3, size, size)
    for training in (True, False):
        pooled, feature_map, *_ = backbone.train(training)(images)
        assert pooled.shape == (2, backbone.dim)
        side = feature_map.shape[-1]
        assert feature_map.shape == (2, backbone.dim, side, side)
        assert side in (size // backbone.stride, math.ceil(size / backbone.stride))
        torch.testing.assert_close(pooled, feature_map.mean((2, 3)), rtol=0, atol=0)


@pytest.mark.parametrize(("name", "side"), [("conv4", 28), ("resnet8", 56), ("resnet18", 7)])
def test_large_images(name, side):
    backbone = build(name, image_size=224).eval()
    with torch.no_grad():
        pooled, feature_map, *_ = backbone(torch.randn(1, 3, 224, 224))
    assert pooled.shape == (1, backbone.dim)
    assert feature_map.shape == (1, backbone.dim, side, side)


@pytest.mark.parametrize(
    ("name", "size", "channels", "side"),
    [("conv4", 32, 8, 32), ("resnet8", 32, 16, 32), ("resnet18", 32, 64, 32), ("resnet18", 96, 64, 48)],
)
def test_stem_map_comes_before_any_pooling(name, size, channels, side):
    backbone = build(name, image_size=size).eval()
    convolution, norm = [m for m in backbone.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)][:2]
    images = torch.randn(2, 3, size, size)
    stem = backbone(images).stem
    assert "stem" in backbone.provides
    assert stem.shape == (2, channels, side, side)
    assert backbone.stem_dim == channels
    torch.testing.assert_close(stem, norm(convolution(images)).relu())


@pytest.mark.parametrize(("name", "width"), [("resnet50w2", 2), ("resnet50w4", 4), ("resnet50w5", 5)])
def test_wide_resnets_multiply_every_channel_of_resnet50(name, width):
    """All shapes follow from torchvision's, so do the keys: checkpoints of other code load as they are."""
    with torch.device("meta"):
        reference = torchvision.models.resnet50(weights=None).state_dict()
        weights = build(name, image_size=224).state_dict()
        stem = build(name, image_size=224)(torch.empty(2, 3, 224, 224)).stem
    assert list(weights) == [key for key in reference if not key.startswith("fc.")]
    for key, tensor in weights.items():
        narrow = reference[key].shape
        widened = [n if n == 3 or axis > 1 else n * width for axis, n in enumerate(narrow)]
        assert list(tensor.shape) == widened, key
    assert stem.shape == (2, 64 * width, 112, 112)


def test_wide_resnets_compute_what_torchvision_computes(monkeypatch):
    monkeypatch.setattr(CLASSES["resnet50w2"], "width", 1)
    monkeypatch.setattr(CLASSES["resnet50w2"], "stem_dim", 64)
    torch.manual_seed(1)
    reference = torchvision.models.resnet50(weights=None).eval()
    backbone = build("resnet50w2", image_size=224).eval()
    backbone.load_state_dict({k: v for k, v in reference.state_dict().items() if not k.startswith("fc.")})
    reference.fc = nn.Identity()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images).pooled, reference(images))


@pytest.mark.slow
def test_initial_values_of_wide_resnets():
    backbone = build("resnet50w2", image_size=224, zero_init_residual=True)
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            expected = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.05)
    assert (backbone.layer1[0].bn3.weight == 0).all()
    assert (backbone.layer1[0].bn2.weight == 1).all()


def test_conv4_pools_by_averages():
    backbone = build("conv4").eval()
    x = images = torch.randn(2, 3, 32, 32)
    for number in range(1, 5):
        block = getattr(backbone, f"block{number}")
        convolution, norm = (next(m for m in block if isinstance(m, kind)) for kind in (nn.Conv2d, nn.BatchNorm2d))
        assert (convolution.out_channels, convolution.bias) == (2 ** (2 + number), None)
        x = norm(convolution(x)).relu()
        if number < 4:
            x = x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5))
    torch.testing.assert_close(backbone(images).pooled, x.mean((2, 3)))


def test_conv4_takes_eight_pixels():
    assert build("conv4", 8)(torch.randn(2, 3, 8, 8)).map.shape == (2, 64, 1, 1)


@pytest.mark.parametrize("name", [*SMALL, "resnet18"])
def test_initialisation_follows_the_global_generator(name):
    first, same, other = build(name, seed=3), build(name, seed=3), build(name, seed=4)
    pairs = list(zip(first.parameters(), same.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert all(not torch.equal(a, c) for a, _, c in pairs if a.ndim > 1)


@pytest.mark.parametrize("name", [*SMALL, "resnet18"])
def test_initial_values(name):
    for module in build(name).modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 2000:
            expected = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.08)
            assert abs(module.weight.mean().item()) < 0.1 * expected
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_weights_load_strictly_and_agree(name):
    torch.manual_seed(1)
    reference = getattr(torchvision.models, name)(weights=None).eval()
    weights = {k: v for k, v in reference.state_dict().items() if not k.startswith("fc.")}
    backbone = build(name, image_size=224).eval()
    assert list(backbone.state_dict()) == list(weights)
    backbone.load_state_dict(weights, strict=True)
    reference.fc = nn.Identity()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images).pooled, reference(images))


@pytest.mark.parametrize(
    ("stem", "image_size", "stride"),
    [("auto", 32, 8), ("auto", 64, 8), ("auto", 96, 32), ("imagenet", 32, 32), ("cifar", 224, 8)],
)
def test_stem(stem, image_size, stride):
    backbone = build("resnet18", image_size=image_size, stem=stem)
    assert backbone.stride == stride
    assert backbone.conv1.kernel_size == ((3, 3) if stride == 8 else (7, 7))
    assert backbone(torch.randn(2, 3, 32, 32)).map.shape[-1] == 32 // stride


def test_zero_init_residual():
    zeros = [m.bn2.weight for m in build("resnet18", zero_init_residual=True).modules() if hasattr(m, "bn2")]
    assert len(zeros) == 8
    assert all((w == 0).all() for w in zeros)


def test_every_parameter_gets_a_gradient():
    for name in (*SMALL, "resnet18"):
        backbone = build(name)
        backbone(torch.randn(2, 3, 16, 16)).pooled.square().sum().backward()
        assert all(p.grad is not None for p in backbone.parameters())


def test_importing_the_plugin_does_not_import_torchvision():
    code = "import sys, sslbench_plugins.backbones.resnet; assert 'torchvision' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
