"""DeepCluster: whitening, clustering, pseudo-labels by sample number, and the baseline's garbled images."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from methods_kit import TinyBackbone, batch, make
from pydantic import ValidationError
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score
from sslbench_plugins.methods.deepcluster import (
    DeepCluster,
    DeepClusterConfig,
    Garble,
    class_weights,
    garble,
)
from torch import Tensor

from sslbench.config.schema import CoreOptions
from sslbench.data.loader import TrainLoader
from sslbench.data.sources import ArraySource
from sslbench.data.store import open_store
from sslbench.data.views import ViewExecutor
from sslbench.errors import ConfigError, DivergedError
from sslbench.nn.whitening import whiten
from sslbench.plugin.api import Batch, Build, ViewSpec

CPU = torch.device("cpu")
COUNT, KINDS = 120, 12
STILL = ViewSpec(size=16, crop="none", flip=0.0)


def source() -> ArraySource:
    """Noisy images of twelve patterns; which one changes from image to image."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 200, (KINDS, 3, 16, 16), generator=generator)
    kinds = torch.randint(0, KINDS, (COUNT,), generator=generator)
    pixels = patterns[kinds] + torch.randint(0, 5, (COUNT, 3, 16, 16), generator=generator)
    return ArraySource(pixels.to(torch.uint8), kinds)


def loader(rank: int = 0, world: int = 1, view: ViewSpec = STILL) -> TrainLoader:
    views = ViewExecutor([view], size=16, mean=(0.5,) * 3, std=(0.25,) * 3, device=CPU)
    store = open_store(source(), CoreOptions().data, CPU, lambda _line: None)
    return TrainLoader(source(), store, views, seed=3, global_batch=24, workers=0, rank=rank, world=world)


def method(seed: int = 0, **options: object) -> DeepCluster:
    torch.manual_seed(seed)
    cfg = DeepClusterConfig(**{"clusters": KINDS, "restarts": 2, **options})
    return DeepCluster(cfg, Build(TinyBackbone, 24, COUNT, 15, 5))


def cluster(made: DeepCluster, epoch: int = 0, world: tuple[int, int] = (0, 1)) -> Tensor:
    torch.manual_seed(7 + epoch)
    made.start_epoch(epoch, loader(*world).images)
    return made.labels.clone()


@pytest.mark.parametrize("features", ["clean", "augmented"])
def test_planted_clusters_are_found(features):
    labels = cluster(method(features=features))
    assert adjusted_rand_score(source().targets, labels) > 0.99


def test_augmented_features_change_with_the_epoch_and_clean_ones_do_not():
    images = loader(view=ViewSpec(size=16)).images
    clean, augmented = method(), method(features="augmented")
    with torch.no_grad():
        assert torch.equal(clean._features(0, images)[0], clean._features(1, images)[0])
        assert not torch.equal(augmented._features(0, images)[0], augmented._features(1, images)[0])


class Shuffled:
    """All images out of order."""

    def clean(self) -> Iterator[tuple[Tensor, Tensor]]:
        pairs = list(loader().images.clean())
        images, index = (torch.cat(column) for column in zip(*pairs, strict=True))
        order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(1))
        return zip(images[order].split(7), index[order].split(7), strict=True)

    def augmented(self, number: int) -> Iterator[Batch]:
        return loader().images.augmented(number)


def test_labels_follow_the_samples_numbers():
    in_order, shuffled = method(), method()
    expected = cluster(in_order)
    torch.manual_seed(7)
    shuffled.start_epoch(0, Shuffled())
    assert torch.equal(shuffled.labels, expected)


def test_the_same_random_state_gives_the_same_clusters_and_last_layer():
    first, again = method(), method()
    assert torch.equal(cluster(first), cluster(again))
    assert torch.equal(first.head[-1].weight, again.head[-1].weight)


def test_the_last_layer_starts_anew_and_the_optimiser_keeps_its_moments():
    made = method(clusters=20, hidden=128)
    optimizer = torch.optim.Adam(made.parameters())
    made(next(loader().batches(0, 1)))["loss"].backward()
    optimizer.step()
    last, hidden = made.head[-1], made.head[0].weight.clone()
    before, moments = last.weight.clone(), optimizer.state[last.weight]["exp_avg"].clone()
    cluster(made)
    assert not torch.equal(last.weight, before)
    assert last.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert (last.bias == 0).all()
    assert torch.equal(made.head[0].weight, hidden)
    assert moments.abs().sum() > 0
    assert torch.equal(optimizer.state[made.head[-1].weight]["exp_avg"], moments)


def test_looking_at_all_images_leaves_the_backbone_as_it_was():
    made = method()
    before = copy.deepcopy(made.backbone.state_dict())
    cluster(made)
    assert made.backbone.training
    assert all(torch.equal(value, before[key]) for key, value in made.backbone.state_dict().items())
    assert all(p.grad is None for p in made.parameters())


def test_whitening_is_that_of_principal_component_analysis():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 3
    for dims in (6, 3):
        found = whiten(rows, dims).flip(1)
        torch.testing.assert_close(found.T.cov(), torch.eye(dims), rtol=0, atol=1e-4)
        expected = torch.from_numpy(PCA(dims, whiten=True, svd_solver="full").fit_transform(rows.numpy()))
        torch.testing.assert_close(found.abs(), expected.abs(), rtol=1e-3, atol=1e-3)


def test_dead_features_do_not_blow_up():
    rows = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    dead = torch.cat([rows, torch.zeros(50, 1), rows[:, :1]], dim=1)
    found = whiten(dead, 6)
    assert torch.isfinite(found).all()
    assert int((found.var(dim=0) > 0.5).sum()) == 4
    assert (whiten(torch.ones(5, 3), 3) == 0).all()


def test_wide_features_lose_half_of_their_dimensions(monkeypatch):
    made = method()
    seen = []
    monkeypatch.setattr(
        "sslbench_plugins.methods.deepcluster.whiten", lambda rows, dims: seen.append(dims) or whiten(rows, dims)
    )
    generator = torch.Generator().manual_seed(0)
    for width in (511, 512):
        made._cluster(torch.randn(20, width, generator=generator), seed=0)
    assert seen == [511, 256]


def test_class_weights():
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    assert class_weights(labels, 4, "inverse").tolist() == pytest.approx([0.5, 1.5, 0.75, 1.5])
    assert class_weights(labels, 4, "complement").tolist() == pytest.approx([1 / 2, 5 / 6, 2 / 3, 1])
    assert class_weights(labels, 4, "none").tolist() == [1, 1, 1, 1]


def test_the_published_class_weights_hardly_weigh():
    labels = torch.arange(500) % 100
    assert class_weights(labels, 100, "complement").tolist() == pytest.approx([0.99] * 100)


def test_the_loss_is_the_weighted_cross_entropy_of_the_samples_clusters():
    made = method().eval()
    cluster(made)
    data = next(loader().batches(0, 1))
    logits = made.head(made.backbone(data.views[0].images).pooled)
    expected = F.cross_entropy(logits, made.labels[data.index], weight=made.class_weights)
    torch.testing.assert_close(made(data)["loss"], expected)


def train(made: DeepCluster, start: int, stop: int) -> list[float]:
    """Steps of an epoch of five; a stateless optimiser, so that weights and buffers are all there is."""
    losses = []
    for step, data in enumerate(loader().batches(start, stop), start):
        if step % 5 == 0:
            torch.manual_seed(100 + step)
            made.start_epoch(step // 5, loader().images)
        loss = made(data)["loss"]
        made.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter -= 0.1 * parameter.grad
        losses.append(float(loss.detach()))
    return losses


def test_a_run_resumes_in_the_middle_of_an_epoch_with_its_clusters():
    whole = method()
    train(whole, 0, 7)
    resumed = method(seed=5)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert train(whole, 7, 12) == train(resumed, 7, 12)


def test_the_loss_falls_within_an_epoch():
    made = method()
    cluster(made)
    optimizer = torch.optim.Adam(made.parameters(), lr=3e-3)
    losses = []
    for data in loader().batches(0, 30):
        optimizer.zero_grad()
        output = made(data)
        output["loss"].backward()
        optimizer.step()
        losses.append(float(output["loss"].detach()))
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_loss_is_fp32_under_autocast_and_reaches_every_parameter():
    made = make(DeepCluster, clusters=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = made(batch(views=1))["loss"]
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in made.parameters())


PLAIN = Garble(mean=(0.0,) * 3, std=(1 / 255,) * 3, padding=0.0)


def test_garbled_colours_wrap_around():
    data = batch(views=1)
    images = torch.full((8, 3, 2, 2), 0.5)
    images[0], images[1], images[2] = -1.0, 1.5, 1.0
    found = garble(images, PLAIN, data)
    assert found[:4, 0, 0, 0].round().tolist() == [1, 126, 255, 127]
    halved = garble(images, Garble(mean=(0.5,) * 3, std=(0.5,) * 3, padding=0.0), data)
    torch.testing.assert_close(halved, found / 255 * 2 - 1)


def test_garbled_images_are_cropped_and_mirrored_anew():
    pattern = (torch.arange(64.0).reshape(1, 1, 8, 8) + 1) / 255
    options = PLAIN.model_copy(update={"padding": 0.25})
    padded = F.pad(pattern * 255, [2] * 4)[0, 0]
    windows = padded.unfold(0, 8, 1).unfold(1, 8, 1).flatten(0, 1)
    possible = torch.cat([windows, windows.flip(-1)])
    data = batch(size=300, views=1)
    found = garble((pattern + 1e-4).expand(300, 3, 8, 8), options, data)[:, 0].round()
    which = [(possible == image).flatten(1).all(1).nonzero().flatten() for image in found]
    assert all(len(hits) == 1 for hits in which)
    assert len({int(hits) for hits in which}) > 40  # of 50 ways to crop and mirror


def test_training_uses_the_garbled_images():
    plain, garbled = (make(DeepCluster, clusters=5, **kwargs) for kwargs in ({}, {"garble": PLAIN.model_dump()}))
    assert plain(batch(views=1))["loss"] != garbled(batch(views=1))["loss"]


@pytest.mark.parametrize("options", [{"clusters": 1}, {"weights": "inverted"}, {"garble": {"mean": [0, 0, 0]}}])
def test_wrong_options_are_named(options):
    with pytest.raises(ValidationError, match=next(iter(options))):
        DeepClusterConfig(**options)


def test_more_clusters_than_images():
    with pytest.raises(ConfigError, match=r"method.clusters=121 exceeds the 120 training images"):
        method(clusters=121)


def test_features_that_are_not_finite_end_the_run_with_advice():
    made = method()
    with torch.no_grad():
        made.backbone.layers[3].bias.fill_(torch.nan)
    with pytest.raises(DivergedError, match="not finite"):
        cluster(made)


def test_importing_the_plugin_does_not_import_scikit_learn():
    code = "import sys, sslbench_plugins.methods.deepcluster; assert 'sklearn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    made = method(seed=0, clusters=7)
    # What a rank gathers that normalises its own rows only; all images must be seen with the same statistics.
    made.backbone.layers[1].running_mean.add_(3 * rank)
    cluster(made, world=(rank, 2))
    torch.save(made.state_dict(), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_find_the_clusters_of_one(tmp_path: Path):
    mp.spawn(run_rank, args=(str(tmp_path),), nprocs=2)
    made = method(seed=0, clusters=7)
    cluster(made)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        assert all(torch.equal(found[key], value) for key, value in made.state_dict().items())
