"""A data set keeps its contract: facts that are true, the same images every time, splits that share none."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sslbench.errors import DataError
from sslbench.plugin.api import Dataset, Source
from sslbench.testing.dataset import DatasetSubject, contents, digest_of, image_digests
from sslbench.testing.dataset_files import FILE_RULES
from sslbench.testing.documented import check_options, options_of
from sslbench.testing.listings import backwards
from sslbench.testing.reference import PluginReference
from sslbench.testing.rules import BrokenRuleError, Checkup, NotTriedError, Rule, check_up
from sslbench.testing.worlds import in_worlds

TOLERATED = 0.01
"""Share of a split's images that may be in another split too: published data sets have some by accident."""
READERS = 4
TIMEOUT = 300.0


def check_dataset(
    dataset: type[Dataset] | str | Path | PluginReference,
    *,
    options: Mapping[str, Any] | None = None,
    images: int = 300,
    processes: bool = True,
) -> Checkup:
    """Try every promise of a data set's contract on its own files.

    Where the options name a folder of up to 2,000 files and 16 MiB, it is copied to a temporary one, and images
    and labels are changed and damaged there. So let them name a small folder of the same layout.

    Args:
        dataset: a class, the name of an installed plugin, or a file with one data set.
        options: of the data set, such as ``{"root": folder}``.
        images: how many of a split are read, if they are not in memory anyway.
        processes: also in other processes, whose start takes some seconds.

    Raises:
        ConfigError: the options are wrong.
        PluginError: there is no such plugin, or it cannot be imported.
    """
    reference = PluginReference.of("dataset", dataset)
    cls: type[Dataset] = reference.load()
    subject = DatasetSubject(reference, cls, options_of(cls, options), images)
    rules = [*RULES, *(PROCESS_RULES if processes else ()), *FILE_RULES]
    return check_up("dataset", reference.title, subject, rules, first=Rule("can be opened", _opens))


def _opens(subject: DatasetSubject) -> str:
    for split, source in subject.sources.items():
        if not isinstance(source, Source):
            raise BrokenRuleError(
                f"split('{split}') must return a Source, got a {type(source).__name__}",
                "return an object of a class that derives from sslbench.plugin.api.Source",
            )
    sizes = ", ".join(f"{len(source):,} {split}" for split, source in subject.sources.items())
    if not sizes or any(len(source) == 0 for source in subject.sources.values()):
        raise BrokenRuleError(
            f"a split has no images ({sizes or 'no splits'})", "list in info.splits what is there"
        )
    return sizes


def _facts(subject: DatasetSubject) -> str:
    info = subject.info
    if info.pretrain_split not in info.splits:
        raise BrokenRuleError(
            f"pretrain_split '{info.pretrain_split}' is not among the splits", "it is one of info.splits"
        )
    if len(set(info.classes)) < len(info.classes) or not all(isinstance(name, str) for name in info.classes):
        raise BrokenRuleError("class names are no strings, or not all different", "one name for each class number")
    _check_normalisation(info.mean, info.std)
    if subject.open().info != info:
        raise BrokenRuleError("another instance has other facts", "compute info from files, in a fixed order")
    _check_unknown_split(subject.dataset)
    return f"{len(info.classes)} classes, task {info.task}"


def _check_normalisation(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    hint = "three numbers each, of pixels in [0, 1]: divide those of bytes by 255"
    if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, (*mean, *std))):
        raise BrokenRuleError(f"mean {mean}, std {std}", hint)
    if not all(0 <= value <= 1 for value in mean) or not all(0 < value <= 1 for value in std):
        raise BrokenRuleError(f"mean {mean}, std {std} are not of pixels in [0, 1]", hint)


def _check_unknown_split(dataset: Dataset) -> None:
    try:
        dataset.split("no-such-split")
    except DataError:
        return
    except Exception as error:
        raise BrokenRuleError(
            f"an unknown split is {type(error).__name__}", "raise DataError naming the splits there are"
        ) from error
    raise BrokenRuleError("split('no-such-split') gives images", "raise DataError naming the splits there are")


def _images(subject: DatasetSubject) -> str:
    count = 0
    for split, source, numbers in subject.sampled():
        for number in numbers:
            _check_image(source.image(number), f"image {number} of {split}", subject.info.size)
        count += len(numbers)
    return f"{count:,} looked at"


def _check_image(image: Tensor, what: str, side: int | None) -> None:
    if not isinstance(image, Tensor) or image.dtype != torch.uint8:
        found = str(image.dtype).removeprefix("torch.") if isinstance(image, Tensor) else type(image).__name__
        raise BrokenRuleError(f"{what} is {found}", "image() returns a uint8 tensor [3,H,W], not normalised")
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise BrokenRuleError(
            f"{what} is {list(image.shape)}", "channels come first, and grey images have three equal ones"
        )
    if side is not None and image.shape[1:] != (side, side):
        raise BrokenRuleError(
            f"{what} is {list(image.shape)}, info.size is {side}", "info.size is None where sizes vary"
        )


def _sizes(subject: DatasetSubject) -> str:
    """``image_sizes``, ``common_size`` and ``pixels`` tell what ``image`` does."""
    for split, source, numbers in subject.sampled():
        sizes, shapes = source.image_sizes(), [tuple(source.image(number).shape[1:]) for number in numbers]
        if sizes.shape != (len(source), 2):
            raise BrokenRuleError(f"image_sizes() of {split} is {list(sizes.shape)}", "[N,2]: heights and widths")
        for number, shape in zip(numbers, shapes, strict=True):
            _equal_sizes(tuple(sizes[number].tolist()), shape, f"image_sizes() has for image {number} of {split}")
        common = source.common_size()
        if common is not None:
            _equal_sizes(tuple(common), shapes[0], f"common_size() of {split} is")
        _check_pixels(source, split, numbers)
    return "as decoded"


def _equal_sizes(told: tuple[int, ...], found: tuple[int, ...], what: str) -> None:
    if told != found:
        raise BrokenRuleError(
            f"{what} {told[0]}x{told[1]}, decoded it is {found[0]}x{found[1]}",
            "heights come first, and a rotation in the header counts only if decoding applies it",
        )


def _check_pixels(source: Source, split: str, numbers: list[int]) -> None:
    pixels = source.pixels()
    if pixels is not None and not all(torch.equal(pixels[number], source.image(number)) for number in numbers):
        raise BrokenRuleError(f"pixels() of {split} has other images than image()", "one of them is out of order")


def _targets(subject: DatasetSubject) -> str:
    info, labelled = subject.info, []
    for split, source in subject.sources.items():
        targets = source.targets
        if targets is not None:
            _check_targets(targets, split, len(source), len(info.classes), info.task)
            labelled.append(split)
    if info.task != "unlabelled" and "train" in info.splits and "train" not in labelled:
        raise BrokenRuleError(f"task is {info.task}, but train has no targets", "task='unlabelled'")
    if info.task == "unlabelled" and labelled:
        raise BrokenRuleError(
            f"task is unlabelled, but {', '.join(labelled)} has targets", "targets are None then"
        )
    return f"labelled: {', '.join(labelled) or 'none'}"


def _check_targets(targets: Tensor, split: str, images: int, classes: int, task: str) -> None:
    shape = (images, classes) if task == "multilabel" else (images,)
    if targets.dtype != torch.int64 or targets.shape != shape:
        kind = str(targets.dtype).removeprefix("torch.")
        raise BrokenRuleError(
            f"targets of {split} are {kind} {list(targets.shape)}, expected int64 {list(shape)}",
            "torch.tensor(labels, dtype=torch.int64), one for each image",
        )
    low, high = (-1, 1) if task == "multilabel" else (0, classes - 1)
    if int(targets.min()) < low or int(targets.max()) > high:
        raise BrokenRuleError(
            f"targets of {split} are in [{int(targets.min())}, {int(targets.max())}], expected [{low}, {high}]",
            "classes are numbered from 0; several labels are 1, 0 and -1 (not to be judged)",
        )


def _repeats(subject: DatasetSubject) -> str:
    for split, source, numbers in subject.sampled():
        once, twice = (image_digests(source, numbers) for _ in range(2))
        if once != twice:
            raise BrokenRuleError(f"an image of {split} differs when it is read again", _NO_CHANCE)
        if digest_of(source.targets) != digest_of(source.targets):
            raise BrokenRuleError(f"targets of {split} differ when they are asked for again", _NO_CHANCE)
    return "to the bit"


_NO_CHANCE = "image() decodes and nothing else: augmentation is what views are for, and chance is the method's"


def _instances(subject: DatasetSubject) -> str:
    expected = contents(subject.dataset, subject.images)
    _same_contents(expected, contents(subject.open(), subject.images), "in another instance")
    with backwards():
        _same_contents(
            expected, contents(subject.open(), subject.images), "where folders list their files backwards"
        )
    return "another instance, and another order of files on the disk"


def _same_contents(expected: dict[str, Any], found: dict[str, Any], when: str) -> None:
    for split, (targets, images) in expected.items():
        if found[split] == (targets, images):
            continue
        what = "has another order" if sorted(found[split][1]) == sorted(images) else "has other contents"
        raise BrokenRuleError(
            f"{split} {what} {when}",
            "sort what you list (sorted(folder.iterdir())), and choose splits by a hash or a fixed seed",
        )


def _disjoint(subject: DatasetSubject) -> str:
    digests = {split: _all_digests(source, numbers) for split, source, numbers in subject.sampled()}
    notes = [f"{sum(map(len, digests.values())):,} looked at"]
    for first, second in combinations(digests, 2):
        if {first, second} != {"train", "unlabeled"}:
            notes += _shared(digests, first, second)
    repeated = {split: len(found) - len(set(found)) for split, found in digests.items()}
    notes += [f"{count} repeated within {split}" for split, count in repeated.items() if count]
    return ", ".join(notes)


def _all_digests(source: Source, numbers: list[int]) -> list[str]:
    return image_digests(source, numbers if source.pixels() is None else list(range(len(source))))


def _shared(digests: dict[str, list[str]], first: str, second: str) -> list[str]:
    small, large = sorted((first, second), key=lambda split: len(digests[split]))
    known = set(digests[large])
    shared = sum(digest in known for digest in digests[small])
    if shared > TOLERATED * len(digests[small]):
        raise BrokenRuleError(
            f"{shared} of {len(digests[small])} images of {small} are in {large} too",
            "a model must not have seen what it is tested on: divide the images, once, by a fixed rule",
        )
    return [f"{shared} of {small} are in {large} too"] if shared else []


def _fingerprint(subject: DatasetSubject) -> str:
    found = subject.dataset.fingerprint()
    if not isinstance(found, str) or not found or set(found) - set("0123456789abcdef"):
        raise BrokenRuleError(f"it is {found!r}", "a hex digest, such as hashlib.blake2b(...).hexdigest()")
    if found != subject.dataset.fingerprint() or found != subject.open().fingerprint():
        raise BrokenRuleError(
            "another instance has another one", "no id(), hash(), times or random numbers; files in a fixed order"
        )
    return found[:12]


def _revisions(subject: DatasetSubject) -> str:
    again = subject.open()
    without = []
    for split, source in subject.sources.items():
        revision = source.revision()
        if revision != again.split(split).revision():
            raise BrokenRuleError(f"revision() of {split} differs in another instance", "dates and sizes of files")
        if revision is None and source.pixels() is None:
            without.append(split)
    return f"None for {', '.join(without)}: decoded images are not kept" if without else "the same"


def _names(subject: DatasetSubject) -> str:
    for split, source, numbers in subject.sampled():
        names = [source.describe(number) for number in numbers]
        if len(set(names)) < len(names) or not all(names):
            raise BrokenRuleError(f"describe() gives two images of {split} one name", "their paths, or numbers")
        blocks = source.blocks
        if blocks is not None and (blocks.dtype != torch.int64 or blocks.shape != (len(source),)):
            raise BrokenRuleError(f"blocks of {split} is {list(blocks.shape)}", "int64 [N]: each image's archive")
    return source.describe(0)


def _published(subject: DatasetSubject) -> str:
    told, info = subject.cls.published, subject.info
    if told is None:
        raise NotTriedError("it publishes no size")
    if told.same_size and info.size is not None and told.size != (info.size, info.size):
        raise BrokenRuleError(f"published size {told.size}, images have {info.size}", "Published(images, (H, W))")
    found = len(subject.sources[info.pretrain_split])
    if found < told.images:
        raise NotTriedError(f"{found:,} of {told.images:,} images are here")
    if found > told.images or (told.classes and told.classes != len(info.classes)):
        raise BrokenRuleError(
            f"published are {told.images:,} images of {told.classes} classes, here are {found:,} of "
            f"{len(info.classes)}",
            "count the images of pretrain_split",
        )
    return f"{found:,} images"


def _side_by_side(subject: DatasetSubject) -> str:
    """Copies by pickle and several threads read what one thread does."""
    for split, source, numbers in subject.sampled():
        few = numbers[:60]
        expected = image_digests(source, few)
        try:
            sent: Source = pickle.loads(pickle.dumps(source))
        except Exception as error:
            raise BrokenRuleError(
                f"{split} cannot be sent to another process: {error}",
                "keep paths, not open files, locks or lambdas; open files in image()",
            ) from error
        with ThreadPoolExecutor(READERS) as pool:
            threads = list(
                pool.map(lambda number, source=source: image_digests(source, [number])[0], few * READERS)
            )
        if image_digests(sent, few) != expected or threads != expected * READERS:
            raise BrokenRuleError(f"{split} gives other images to several readers", _NOTHING_SHARED)
    return "copies and threads"


_NOTHING_SHARED = "share no open file or buffer between calls of image(): threads and processes call it at once"


def _workers(subject: DatasetSubject) -> str:
    split, source, numbers = max(subject.sampled(), key=lambda found: len(found[2]))
    many = numbers[:60] * READERS
    if [found for (found,) in _loaded(source, many)] != image_digests(source, many):
        raise BrokenRuleError(f"{split} gives other images to worker processes", _NOTHING_SHARED)
    return f"{READERS} times {len(many) // READERS} images"


def _loaded(source: Source, numbers: list[int]) -> DataLoader[list[str]]:
    return DataLoader(
        _Digests(source),
        sampler=numbers,
        batch_size=None,
        num_workers=2,
        collate_fn=list,
        generator=torch.Generator(),
        multiprocessing_context="fork",
    )


class _Digests(torch.utils.data.Dataset[list[str]]):
    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, number: int) -> list[str]:
        return image_digests(self.source, [number])


def _in_another_process(subject: DatasetSubject) -> str:
    job = (subject.reference, subject.cfg.model_dump(), subject.images, subject.sources)
    _, (found,) = in_worlds(_read_anew, [job], 1, TIMEOUT)
    if found["fingerprint"] != subject.dataset.fingerprint():
        raise BrokenRuleError(
            "the fingerprint is another one in another process",
            "hash() of a string differs from process to process: use hashlib",
        )
    expected = {split: image_digests(source, numbers) for split, source, numbers in subject.sampled()}
    if found["anew"] != expected or found["sent"] != expected:
        raise BrokenRuleError("images are others in another process", "sort sets and listings")
    return "fingerprint and images"


def _read_anew(job: Any) -> dict[str, Any]:
    reference, options, images, sources = job
    cls: type[Dataset] = reference.load()
    subject = DatasetSubject(reference, cls, cls.Config.model_validate(options), images)
    read = {split: (source, numbers) for split, source, numbers in subject.sampled()}
    return {
        "fingerprint": subject.dataset.fingerprint(),
        "anew": {split: image_digests(source, numbers) for split, (source, numbers) in read.items()},
        "sent": {split: image_digests(sources[split], numbers) for split, (_, numbers) in read.items()},
    }


RULES: tuple[Rule[DatasetSubject], ...] = (
    Rule("options are documented and survive a round trip", lambda subject: check_options(subject.cfg)),
    Rule("its facts are consistent", _facts),
    Rule("images are uint8 [3,H,W] of the size it tells", _images),
    Rule("sizes are those of decoded images", _sizes),
    Rule("targets fit the task", _targets),
    Rule("same item, same bits", _repeats),
    Rule("same files, same order", _instances),
    Rule("splits share no images", _disjoint),
    Rule("fingerprint is stable", _fingerprint),
    Rule("revision is stable", _revisions),
    Rule("each image has a name", _names),
    Rule("published size is true", _published),
    Rule("several readers at once get the same", _side_by_side),
)
PROCESS_RULES: tuple[Rule[DatasetSubject], ...] = (
    Rule("forked workers read the same", _workers),
    Rule("another process reads the same", _in_another_process),
)
