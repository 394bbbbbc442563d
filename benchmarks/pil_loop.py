"""Relational reasoning fed image by image: K views by PIL in loader workers, and our model's step in a plain loop.

    python benchmarks/pil_loop.py --images FILE --views 4 [--seconds 4] [--ceiling 1.5]

Prints one JSON line. Everything is as a plain PyTorch program would have it: no setting of ours is applied.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from training import COMMON, configure
from window import Window

from sslbench.engine.optim import build_optimizer
from sslbench.engine.setup import build_parts
from sslbench.plugin.api import Batch, Method, View
from sslbench.rng import Draws

JITTER = transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)


class Views(Dataset[list[Tensor]]):
    """K views of each image, one after another; an epoch outlasts any window."""

    def __init__(self, path: str, views: int) -> None:
        self.images = np.load(path, allow_pickle=False)
        self.views = views
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(self.images.shape[1], scale=(0.08, 1.0)),
                transforms.RandomHorizontalFlip(),
                transforms.RandomApply([JITTER], p=0.8),
                transforms.RandomGrayscale(p=0.2),
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    def __len__(self) -> int:
        return max(len(self.images), 100_000)

    def __getitem__(self, index: int) -> list[Tensor]:
        image = Image.fromarray(self.images[index % len(self.images)])
        return [self.transform(image) for _ in range(self.views)]


def main() -> None:
    options = parse()
    chosen = [
        *("method.name=relationnet", f"backbone.name={options.backbone}", f"train.batch_size={options.batch}"),
        *("dataset.name=array", f"dataset.images={options.images}", "train.device=cpu", "train.precision=fp32"),
        *("train.channels_last=false", f"method.views=[{{count: {options.views}}}]"),
    ]
    composed = configure([*COMMON, *chosen])
    parts = build_parts(composed, partial(print, file=sys.stderr))
    groups = parts.method.param_groups()
    optimizer = build_optimizer(composed.core.optim, groups, parts.method, options.batch)
    loader = DataLoader(
        Views(options.images, options.views),
        options.batch,
        shuffle=True,
        drop_last=True,
        num_workers=options.workers,
    )
    window = Window(options.seconds, options.warmup)
    last = train(parts.method, optimizer, epochs(loader), window)
    result: dict[str, Any] = window.result(options.batch)
    if options.ceiling:
        again = Window(options.ceiling, warmup=0, warmup_steps=1)
        train(parts.method, optimizer, forever(last), again)
        result["ceiling"] = again.result(options.batch)
    print(json.dumps(result | {"threads": torch.get_num_threads()}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="uint8 [N,H,W,3] of numpy.save")
    parser.add_argument("--backbone", default="conv4")
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--warmup", type=float, default=1.5)
    parser.add_argument("--ceiling", type=float, default=0)
    return parser.parse_args()


def train(
    method: Method, optimizer: torch.optim.Optimizer, batches: Iterator[list[Tensor]], window: Window
) -> list[Tensor]:
    """Train until the window is over; the last batch."""
    total = torch.zeros(())
    for step, views in enumerate(batches):
        loss = method(as_batch(views, step))["loss"]
        total += loss.detach()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if window.step():
            break
    return views


def as_batch(views: list[Tensor], step: int) -> Batch:
    index = torch.arange(len(views[0]))
    nowhere = torch.zeros(len(index), 4)
    given = tuple(View(images, nowhere, index > 0, nowhere[:, :2]) for images in views)
    return Batch(given, index, Draws(0, step, index))


def epochs(loader: DataLoader[list[Tensor]]) -> Iterator[list[Tensor]]:
    while True:
        yield from loader


def forever(views: list[Tensor]) -> Iterator[list[Tensor]]:
    while True:
        yield views


if __name__ == "__main__":
    main()
