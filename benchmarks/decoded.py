"""Images a second from JPEG files to batches ready for a model: this program against torchvision on PIL images.

    python benchmarks/decoded.py --out results.md

Cuts its own photographs out of the two that scikit-learn ships, 256 pixels square and 500x375, into a temporary
folder. Every loader makes the same kind of views with the same number of worker processes; they take turns, so
that what else the machine does hits all of them. Files come from the page cache: no disk is measured.
"""

# ruff: noqa: E402 (the process is prepared before torch is imported)

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from sslbench.engine.machine import prepare_process

prepare_process()  # for all loaders alike

import PIL
import torch
import torchvision
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from sslbench.data.cropping import crop_image
from sslbench.data.decoding import _row
from sslbench.data.encoded import FileSource
from sslbench.data.loader import TrainLoader
from sslbench.data.paths import find_images
from sslbench.data.retouch import plan, retouch
from sslbench.data.store import DecodedStore, Unreadable
from sslbench.data.views import ViewExecutor
from sslbench.plugin.viewspec import Blur, Jitter, ViewSpec
from sslbench.rng import Draws

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = {"256x256": (256, 256), "500x375": (500, 375)}
COLORS = {
    "jitter": Jitter(p=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2),
    "gray": 0.2,
    "blur": Blur(p=0.5),
}
GLOBAL_CROP = ViewSpec(count=2, size=224, scale=(0.14, 1.0), **COLORS)
LOCAL_CROP = ViewSpec(count=6, size=96, scale=(0.05, 0.14), **COLORS)
VIEWS = {"2x224": (GLOBAL_CROP,), "2x224 + 6x96": (GLOBAL_CROP, LOCAL_CROP)}


def make_photos(root: Path, width: int, height: int, number: int) -> None:
    """Random cuts of two photographs, JPEG quality 90."""
    photos = [Image.fromarray(array) for array in load_sample_images().images]
    drawn = random.Random(0)
    root.mkdir()
    for n in range(number):
        photo = photos[n % 2]
        rows = int(photo.height * drawn.uniform(0.75, 1.0))
        columns = rows * width // height
        x, y = drawn.randint(0, photo.width - columns), drawn.randint(0, photo.height - rows)
        cut = photo.crop((x, y, x + columns, y + rows)).resize((width, height), Image.Resampling.BICUBIC)
        cut.save(root / f"{n:05d}.jpg", quality=90)


class PilBlur:
    """As SimCLR's and SwAV's programs in PyTorch blur."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def pil_view(spec: ViewSpec, blur: str) -> Callable[[Image.Image], torch.Tensor]:
    """A view with torchvision's transforms on PIL images."""
    assert spec.size is not None
    kernel = int(0.1 * spec.size) | 1
    blurs = PilBlur() if blur == "PIL" else T.GaussianBlur(kernel, (0.1, 2.0))
    return T.Compose([
        T.RandomResizedCrop(spec.size, spec.scale, interpolation=T.InterpolationMode.BICUBIC),
        T.RandomHorizontalFlip(),
        T.RandomApply([T.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
        T.RandomGrayscale(0.2),
        T.RandomApply([blurs], 0.5),
        T.ToTensor(),
        T.Normalize(MEAN, STD),
    ])  # fmt: skip


class PilDataset(Dataset[list[torch.Tensor]]):
    """Every view of every image, each image decoded once."""

    def __init__(self, root: Path, specs: tuple[ViewSpec, ...], blur: str) -> None:
        self.paths = sorted(root.iterdir())
        self.views = [pil_view(spec, blur) for spec in specs for _ in range(spec.count)]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        with Image.open(self.paths[index]) as image:
            rgb = image.convert("RGB")
        return [view(rgb) for view in self.views]


def pil_batches(root: Path, specs: tuple[ViewSpec, ...], blur: str, options: argparse.Namespace) -> Iterator[None]:
    data = PilDataset(root, specs, blur)
    while True:
        yield from (
            None
            for _ in DataLoader(
                data,
                options.batch,
                shuffle=True,
                num_workers=options.workers,
                drop_last=True,
                worker_init_fn=lambda _worker: torch.set_num_threads(1),
            )
        )


def executor(specs: tuple[ViewSpec, ...]) -> ViewExecutor:
    return ViewExecutor(specs, size=224, mean=MEAN, std=STD, device=torch.device("cpu"))


def own_batches(root: Path, specs: tuple[ViewSpec, ...], options: argparse.Namespace) -> Iterator[None]:
    source = FileSource(find_images(root), None)
    loader = TrainLoader(
        source,
        DecodedStore(Unreadable(source, 0, print)),
        executor(specs),
        seed=0,
        global_batch=options.batch,
        workers=options.workers,
    )
    with closing(loader.batches(0, 1 << 40)) as batches:
        yield from (None for _ in batches)


def rate(batches: Iterator[None], options: argparse.Namespace) -> float:
    """Source images a second once the loader has found its pace, and stop its workers."""
    with closing(batches):  # type: ignore[type-var]
        for _ in range(options.warm_up):
            next(batches)
        start, seen = time.perf_counter(), 0
        while time.perf_counter() - start < options.seconds:
            next(batches)
            seen += options.batch
        return seen / (time.perf_counter() - start)


def compare(root: Path, specs: tuple[ViewSpec, ...], options: argparse.Namespace) -> dict[str, float]:
    """Median rates of the loaders, which take turns."""
    loaders: dict[str, Callable[[], Iterator[None]]] = {
        "sslbench": lambda: own_batches(root, specs, options),
        "PIL, its blur": lambda: pil_batches(root, specs, "PIL", options),
        "PIL, torchvision's blur": lambda: pil_batches(root, specs, "torchvision", options),
    }
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(options.repeats):
        for name, start in loaders.items():
            rates[name].append(rate(start(), options))
    return {name: statistics.median(values) for name, values in rates.items()}


def split(root: Path, specs: tuple[ViewSpec, ...]) -> dict[str, float]:
    """Milliseconds of one core per source image, by what they are spent on."""
    source, views = FileSource(find_images(root), None), executor(specs)
    number = min(64, len(source))
    draws = Draws(0, 0, torch.arange(number))
    spent: dict[str, float] = {}

    def timed(name: str, work: Callable[[], object]) -> object:
        work()
        start = time.thread_time()
        result = work()
        spent[name] = (time.thread_time() - start) / number * 1e3
        return result

    images = [source.image(n) for n in range(number)]
    timed("decode", lambda: [source.image(n) for n in range(number)])
    sizes = torch.tensor([image.shape[-2:] for image in images])
    geometry = views.geometry(draws, sizes)
    timed("draw", lambda: (views.geometry(draws, sizes), [plan(s, draws, "") for s in views.specs]))
    rows = [[_row(where, row) for where in geometry] for row in range(number)]
    crops = [crop_image(image, views.specs, row) for image, row in zip(images, rows, strict=True)]
    timed("crop", lambda: [crop_image(i, views.specs, r) for i, r in zip(images, rows, strict=True)])
    room = [torch.empty(number, *crop.shape, dtype=torch.uint8) for crop in crops[0]]
    plans = [plan(spec, draws, f"view{v}") for v, spec in enumerate(views.specs)]

    def colors(blurred: bool) -> None:
        for row, image in enumerate(crops):
            for crop, spec, what, out in zip(image, views.specs, plans, room, strict=True):
                chosen = what[row] if blurred else what[row]._replace(sigma=None)
                retouch(crop, spec, chosen, out[row])

    timed("colours", lambda: colors(False))
    timed("colours and blur", lambda: colors(True))
    spent["blur"] = spent.pop("colours and blur") - spent["colours"]
    done = [True] * len(room)
    timed("normalise", lambda: views.finish(room, geometry, draws, sizes, done))
    return spent


def report(options: argparse.Namespace, root: Path) -> str:
    names = ["sslbench", "PIL, its blur", "PIL, torchvision's blur"]
    lines = [
        f"{machine()}; {options.workers} workers, batches of {options.batch}, median of {options.repeats} turns.",
        "",
        f"| photos | views | {' | '.join(names)} | ratio to PIL |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    costs = ["", "Milliseconds of one core per source image:", ""]
    for size, (width, height) in SIZES.items():
        make_photos(root / size, width, height, options.photos)
        for views, specs in VIEWS.items():
            rates = compare(root / size, specs, options)
            values = " | ".join(f"{rates[name]:.0f}" for name in names)
            lines.append(f"| {size} | {views} | {values} | {rates[names[0]] / rates[names[1]]:.2f} |")
            spent = ", ".join(f"{name} {value:.2f}" for name, value in split(root / size, specs).items())
            costs.append(f"- {size}, {views}: {spent}")
            print(lines[-1], costs[-1], sep="\n", flush=True)
    return "\n".join(lines + costs) + "\n"


def machine() -> str:
    named = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    versions = (
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, Pillow {PIL.__version__}, "
        f"Python {platform.python_version()}"
    )
    cpu = f"{named[0] if named else platform.processor()}, {len(os.sched_getaffinity(0))} cores"
    return f"{time.strftime('%Y-%m-%d')}: {cpu}; {versions}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="write the report here")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--photos", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each turn")
    parser.add_argument("--warm-up", type=int, default=4, help="batches before each turn")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = report(options, Path(folder))
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
