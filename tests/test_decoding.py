"""Workers decode, crop and colour: the same pixels whoever makes them, and those of the operations on batches."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from reference import photo_tiles
from torch import Tensor
from torchvision import io as torchvision_io

from sslbench.data import imagefile
from sslbench.data.decoding import Chunk, Decoder, _cut, decode
from sslbench.data.loader import TrainLoader
from sslbench.data.photometric import augment_colors
from sslbench.data.retouch import Retouch, plan, retouch
from sslbench.data.sources import ArraySource
from sslbench.data.store import DecodedStore, ResidentStore, Unreadable
from sslbench.data.views import ViewExecutor
from sslbench.plugin.api import Batch, Source
from sslbench.plugin.viewspec import Blur, Jitter, ViewSpec
from sslbench.rng import Draws

CPU = torch.device("cpu")
MEAN, STD = (0.4, 0.5, 0.6), (0.25, 0.25, 0.25)
STRONG = Jitter(p=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)
FULL = ViewSpec(size=96, jitter=STRONG, gray=0.2, blur=Blur(p=0.5), solarize=0.2)


class PhotoSource(Source):
    """Photographs of several sizes."""

    def __init__(self, total: int) -> None:
        self.tiles = photo_tiles(60, 70)[:total]

    def __len__(self) -> int:
        return len(self.tiles)

    def image(self, index: int) -> Tensor:
        return self.tiles[index, :, : 50 + index % 10]

    @property
    def targets(self) -> None:
        return None

    def image_sizes(self) -> Tensor:
        return torch.tensor([self.image(index).shape[1:] for index in range(len(self))])


def executor(*specs: ViewSpec, device: str = "cpu") -> ViewExecutor:
    views = ViewExecutor(specs, size=96, mean=MEAN, std=STD, device=CPU)
    views.device = torch.device(device)
    return views


def loader(source: Source, views: ViewExecutor, **kwargs) -> TrainLoader:
    store = DecodedStore(Unreadable(source, 0, print))
    return TrainLoader(source, store, views, **({"seed": 5, "global_batch": 20, "workers": 0} | kwargs))


def pixels(batch: Batch) -> Tensor:
    return torch.cat([view.images.flatten(1) for view in batch.views], dim=1)


SPECS = {
    "jitter": ViewSpec(jitter=STRONG),
    "largest hue": ViewSpec(jitter=Jitter(p=1, brightness=0, contrast=0, saturation=0, hue=0.5)),
    "gray": ViewSpec(gray=0.5),
    "blur": ViewSpec(blur=Blur(p=1)),
    "a wide blur": ViewSpec(blur=Blur(p=1, kernel=0.9, sigma=(3.0, 9.0))),
    "blur by resizing": ViewSpec(blur=Blur(kind="resize", p=1)),
    "autoaugment": ViewSpec(autoaugment=1),
    "autoaugment or jitter": ViewSpec(autoaugment=0.5, jitter=STRONG, gray=0.3),
    "nothing": ViewSpec(),
}


@pytest.mark.parametrize("side", [33, 96])
@pytest.mark.parametrize("name", SPECS)
def test_retouching_is_the_batched_operations_rounded_to_8_bits(name, side):
    spec, images = SPECS[name], photo_tiles(side, side)[:48]
    draws, made = Draws(2, 7, torch.arange(48)), torch.empty_like(images)
    for image, what, out in zip(images, plan(spec, draws, "view1"), made, strict=True):
        retouch(image, spec, what, out)
    expected = augment_colors(images / 255, spec, draws, "view1") * 255
    assert (made - expected).abs().max() < 0.51
    assert abs((made - expected).mean()) < 0.05, "rounding must not shift the mean"


def test_solarising_inverts_from_128_on():
    levels = torch.arange(256, dtype=torch.uint8).repeat(3, 1).reshape(3, 16, 16)
    out = torch.empty_like(levels)
    retouch(levels, ViewSpec(), Retouch(None, (), False, None, None, True), out)
    assert torch.equal(out, torch.where(levels >= 128, 255 - levels, levels))


def test_retouching_leaves_its_input_alone():
    image = photo_tiles(96, 96)[0]
    kept, out = image.clone(), torch.empty_like(image)
    for what in plan(FULL, Draws(0, 0, torch.arange(20)), "view0"):
        retouch(image, FULL, what, out)
    assert torch.equal(image, kept)


def test_any_number_of_workers_gives_the_same_pixels():
    """Over more tasks than there are slots of shared memory."""
    source, views = PhotoSource(60), executor(FULL, FULL.model_copy(update={"size": 48}))
    runs = [[pixels(b) for b in loader(source, views, workers=n).batches(0, 12)] for n in (0, 1, 2)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_a_large_view_does_not_depend_on_the_rest_of_its_batch():
    source, views = PhotoSource(60), executor(FULL)
    whole = pixels(next(loader(source, views).batches(3, 4)))
    shares = [pixels(next(loader(source, views, rank=r, world=3).batches(3, 4))) for r in range(3)]
    assert torch.equal(torch.cat(shares), whole)


@pytest.mark.parametrize("size", [48, 96])
def test_decoded_and_resident_images_get_the_same_colours(size):
    tiles = photo_tiles(64, 64)[:40]
    source = ArraySource(tiles, None)
    views = executor(FULL.model_copy(update={"size": size, "solarize": 0.0, "jitter": Jitter()}))
    store = ResidentStore(tiles, CPU, Unreadable(source, 0, print))
    resident = TrainLoader(source, store, views, seed=5, global_batch=20, workers=0)
    for a, b in zip(resident.batches(0, 2), loader(source, views).batches(0, 2), strict=True):
        difference = (pixels(a) - pixels(b)).abs() * STD[0] * 255
        # An 8-bit crop and 8-bit colours: jitter may amplify the first rounding.
        assert difference.mean() < 0.7
        assert difference.max() < 8


def test_accelerators_and_fused_colours_leave_them_to_the_training_process():
    decoder = Decoder(PhotoSource(8), torch.arange(8), executor(FULL, device="meta"), seed=0)
    assert decoder.colored == [False]
    fused = ViewExecutor([FULL], size=96, mean=MEAN, std=STD, device=CPU, colors="fused")
    assert Decoder(PhotoSource(8), torch.arange(8), fused, seed=0).colored == [False]
    assert Decoder(PhotoSource(8), torch.arange(8), executor(FULL, ViewSpec(), FULL), 0).colored == [
        True,
        False,
        True,
    ]


@pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")
def test_the_fast_decoder_is_torchvisions(tmp_path):
    """Its library is loaded without the package, by a path and a name that are torchvision's own affair."""
    file = tmp_path / "photo.jpg"
    Image.fromarray(photo_tiles(60, 70)[0].permute(1, 2, 0).numpy()).save(file, quality=90)
    decoder = imagefile._torchvision_decoder()
    assert decoder is not None
    theirs = torchvision_io.decode_image(str(file), torchvision_io.ImageReadMode.RGB)
    assert torch.equal(decoder(torch.from_numpy(imagefile.read_bytes(file))), theirs)
    assert torch.equal(imagefile.decode_image(imagefile.read_bytes(file), "photo.jpg"), theirs)


def test_no_batch_no_worker():
    decoder = Decoder(PhotoSource(8), torch.arange(8), executor(FULL), seed=0)
    assert list(decode(decoder, [], workers=2)) == []


def test_tasks_cover_batches_of_any_size_and_take_turns_with_the_slots():
    chunks = [
        Chunk(step, torch.arange(total), torch.arange(total) + step) for step, total in enumerate((20, 7, 21))
    ]
    tasks = list(_cut(chunks, rows=8, slots=3))
    assert [(t.step, t.start, len(t.samples), t.total) for t in tasks] == [
        (0, 0, 8, 20), (0, 8, 8, 20), (0, 16, 4, 20), (1, 0, 7, 7), (2, 0, 8, 21), (2, 8, 8, 21), (2, 16, 5, 21)
    ]  # fmt: skip
    assert [t.slot for t in tasks] == [0, 1, 2, 0, 1, 2, 0]
