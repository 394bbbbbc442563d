"""One lightly training, measured: its transforms, heads and losses in the raw PyTorch loop it documents.

    PEER_PYTHON benchmarks/lightly_loop.py METHOD --images FILE [--backbone conv4] [--seconds 4] [--ceiling 1.5]

Imports nothing of sslbench. Prints one JSON line. Views are those lightly documents for CIFAR-10 (other sizes: its
defaults); widths of heads are given by the caller so that both sides compute the same.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import torchvision
from lightly.loss import NegativeCosineSimilarity, NTXentLoss, SwaVLoss
from lightly.models import utils
from lightly.models.modules import heads
from lightly.transforms import BYOLTransform, MoCoV2Transform, SimCLRTransform, SwaVTransform
from lightly.transforms.byol_transform import BYOLView1Transform, BYOLView2Transform
from lightly.utils.scheduler import cosine_schedule
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from window import Window

SMALL = 64
"""Up to this side CIFAR's settings hold."""
STEPS = 100_000


class Images(Dataset[Any]):
    """uint8 images in memory, as torchvision's CIFAR10 has them; an epoch outlasts any window."""

    def __init__(self, path: str, transform: Callable[[Image.Image], list[Tensor]]) -> None:
        self.images = np.load(path, allow_pickle=False)
        self.transform = transform

    def __len__(self) -> int:
        return max(len(self.images), 100_000)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        return self.transform(Image.fromarray(self.images[index % len(self.images)])), 0


def conv4() -> nn.Module:
    blocks: list[nn.Module] = []
    for channels, following in ((3, 8), (8, 16), (16, 32), (32, 64)):
        conv = nn.Conv2d(channels, following, 3, padding=1, bias=False)
        blocks += [conv, nn.BatchNorm2d(following), nn.ReLU(inplace=True), nn.AvgPool2d(2)]
    return nn.Sequential(*blocks[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())


def resnet(name: str, side: int) -> nn.Module:
    network = getattr(torchvision.models, name)()
    if side <= SMALL:
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    network.fc = nn.Identity()
    return network  # type: ignore[no-any-return]


class SimCLR(nn.Module):
    def __init__(self, backbone: nn.Module, dim: int, hidden: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(backbone, heads.SimCLRProjectionHead(dim, hidden, 128))
        self.criterion = NTXentLoss(temperature=0.5)

    def forward(self, views: list[Tensor], step: int) -> Tensor:
        return self.criterion(self.encoder(views[0]), self.encoder(views[1]))  # type: ignore[no-any-return]


class BYOL(nn.Module):
    def __init__(self, backbone: nn.Module, dim: int, hidden: int) -> None:
        super().__init__()
        self.online = nn.Sequential(backbone, heads.BYOLProjectionHead(dim, hidden, 256))
        self.predictor = heads.BYOLPredictionHead(256, hidden, 256)
        self.target = copy.deepcopy(self.online)
        utils.deactivate_requires_grad(self.target)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, views: list[Tensor], step: int) -> Tensor:
        utils.update_momentum(self.online, self.target, m=cosine_schedule(step, STEPS, 0.996, 1))
        predictions = [self.predictor(self.online(view)) for view in views]
        targets = [self.target(view).detach() for view in views]
        losses = [self.criterion(predictions[0], targets[1]), self.criterion(predictions[1], targets[0])]
        return 0.5 * (losses[0] + losses[1])  # type: ignore[no-any-return]


class MoCo(nn.Module):
    def __init__(self, backbone: nn.Module, dim: int, hidden: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(backbone, heads.MoCoProjectionHead(dim, hidden, 128))
        self.key_encoder = copy.deepcopy(self.encoder)
        utils.deactivate_requires_grad(self.key_encoder)
        self.criterion = NTXentLoss(temperature=0.1, memory_bank_size=(4096, 128))

    def forward(self, views: list[Tensor], step: int) -> Tensor:
        utils.update_momentum(self.encoder, self.key_encoder, m=cosine_schedule(step, STEPS, 0.996, 1))
        return self.criterion(self.encoder(views[0]), self.key_encoder(views[1]).detach())  # type: ignore[no-any-return]


class SwAV(nn.Module):
    def __init__(self, backbone: nn.Module, dim: int, hidden: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(backbone, heads.SwaVProjectionHead(dim, hidden, 128))
        self.prototypes = heads.SwaVPrototypes(128, 512)
        self.criterion = SwaVLoss()

    def forward(self, views: list[Tensor], step: int) -> Tensor:
        self.prototypes.normalize()
        embeddings = [nn.functional.normalize(self.encoder(view), dim=1) for view in views]
        scores = [self.prototypes(embedding) for embedding in embeddings]
        return self.criterion(scores[:2], scores[2:])  # type: ignore[no-any-return]


METHODS: dict[str, type[nn.Module]] = {"simclr": SimCLR, "byol": BYOL, "moco": MoCo, "swav": SwAV}


def transform(method: str, side: int, size: int) -> Any:
    """The views; ``side`` of the images and ``size`` of the views in pixels."""
    if method == "moco":
        return MoCoV2Transform(input_size=size)
    if method == "swav" and side > SMALL:
        return SwaVTransform(crop_sizes=(size, max(16, size * 3 // 7)))
    if method == "swav":
        return SwaVTransform(crop_sizes=[size], crop_counts=[2], crop_min_scales=[0.14], crop_max_scales=[1.0])
    blur = {"gaussian_blur": 0.0} if side <= SMALL else {}
    if method == "simclr":
        return SimCLRTransform(input_size=size, **blur)
    return BYOLTransform(BYOLView1Transform(input_size=size, **blur), BYOLView2Transform(input_size=size, **blur))


def main() -> None:
    options = parse()
    device = torch.device(options.device)
    waits = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    side = np.load(options.images, mmap_mode="r", allow_pickle=False).shape[1]
    data = Images(options.images, transform(options.method, side, options.size or side))
    loader = DataLoader(data, options.batch, shuffle=True, drop_last=True, num_workers=options.workers)
    backbone = conv4() if options.backbone == "conv4" else resnet(options.backbone, side)
    dim = backbone(torch.zeros(2, 3, options.size or side, options.size or side)).shape[1]
    model = METHODS[options.method](backbone, dim, options.hidden).to(device)
    run = partial(train, model, device=device, bf16=options.bf16)
    window = Window(options.seconds, options.warmup, synchronize=waits)
    last = run(epochs(loader), window)
    result: dict[str, Any] = window.result(options.batch)
    if options.ceiling:
        again = Window(options.ceiling, warmup=0, warmup_steps=1, synchronize=waits)
        run(forever([view.to(device) for view in last]), again)
        result["ceiling"] = again.result(options.batch)
    names = ("lightly", "torch", "torchvision", "pillow")
    result |= {"threads": torch.get_num_threads(), "versions": {name: version(name) for name in names}}
    print(json.dumps(result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--images", required=True, help="uint8 [N,H,W,3] of numpy.save")
    parser.add_argument("--backbone", default="conv4")
    parser.add_argument("--size", type=int, help="side of the views; unset: of the images")
    parser.add_argument("--hidden", type=int, default=256, help="hidden width of the heads")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast, which its raw loops do not")
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--warmup", type=float, default=1.5)
    parser.add_argument("--ceiling", type=float, default=0)
    return parser.parse_args()


def train(
    model: nn.Module, batches: Iterator[list[Tensor]], window: Window, *, device: torch.device, bf16: bool
) -> list[Tensor]:
    """Train until the window is over; the last batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
    model.train()
    total = torch.zeros((), device=device)
    for step, batch in enumerate(batches):
        views = [view.to(device) for view in batch]
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = model(views, step)
        total += loss.detach().squeeze()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if window.step():
            break
    return batch


def epochs(loader: DataLoader[Any]) -> Iterator[list[Tensor]]:
    while True:
        for views, _ in loader:
            yield views


def forever(views: list[Tensor]) -> Iterator[list[Tensor]]:
    while True:
        yield views


if __name__ == "__main__":
    main()
