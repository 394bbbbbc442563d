"""MoCo: published check values, the order of queue and key encoder, neighbours, normalisation in groups."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from methods_kit import TinyBackbone, batch, build, make
from pydantic import ValidationError
from sslbench_plugins.methods import moco
from torch import Tensor, nn

from sslbench.errors import ConfigError
from sslbench.nn.contrast import QueueContrast, nearest
from sslbench.nn.shuffle import encode_shuffled
from sslbench.nn.split_norm import SplitBatchNorm, check_statistics, split_batch_norm
from sslbench.plugin.api import Batch, Build, Method, Progress

TWO = [{"count": 2}]
SMALL = [{"count": 2}, {"count": 4, "size": 16}]
QUERIES = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
QUEUE = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.8, 0.6]])
KEYS = torch.tensor([[0.8, 0.6], [0.0, 1.0]])
SIMILARITY = torch.tensor([[0.1, 0.9, 0.8, 0.2], [0.7, 0.3, 0.6, 0.1]])


def moco_method(seed: int = 0, norm: bool = True, **options: object) -> moco.MoCo:
    chosen = {"queue": 32, "bn_groups": 2, "knn_topk": 4, "temperature": 0.2, **options}
    method = make(moco.MoCo, seed, norm, **chosen)
    assert isinstance(method, moco.MoCo)
    return method


def crops(seed: int = 0, step: int = 0, views: int = 6) -> Batch:
    """A batch whose views from the third on are of half the size."""
    made = batch(views=views, seed=seed, step=step)
    small = tuple(view._replace(images=F.avg_pool2d(view.images, 2)) for view in made.views[2:])
    return replace(made, views=made.views[:2] + small)


def repeating(step: int) -> Batch:
    return crops(seed=step % 3, step=step)


def coloured(step: int) -> Batch:
    """New images at every step; all views of one have its colour."""
    data = crops(seed=step, step=step)
    colours = torch.randn(8, 3, 1, 1, generator=torch.Generator().manual_seed(1000 + step))
    return replace(data, views=tuple(v._replace(images=0.3 * (v.images + colours)) for v in data.views))


def train(
    method: Method, steps: int, start: int = 0, lr: float = 3e-3, data: Callable[[int], Batch] = repeating
) -> list[float]:
    """Adam steps; the losses."""
    optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=lr)
    losses = []
    for step in range(start, start + steps):
        loss = method(data(step))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(Progress(step, 50, 10))
        losses.append(float(loss.detach()))
    return losses


# ------------------------------------------------------------------------------------------------ losses


def test_info_nce_check_value() -> None:
    assert float(QueueContrast(QUERIES, QUEUE, 0.2).info_nce(KEYS).mean()) == pytest.approx(1.540084, abs=1e-6)


def test_neighbour_loss_check_value() -> None:
    slots = nearest(SIMILARITY, torch.eye(4), 2)
    assert slots.tolist() == [[1, 2], [0, 2]]
    loss = QueueContrast(QUERIES, QUEUE, 0.2).neighbour_loss(slots).mean()
    assert float(loss) == pytest.approx(6.548783, abs=1e-6)


def test_losses_and_gradients_equal_cross_entropy_over_explicit_logits() -> None:
    torch.manual_seed(0)
    queue, keys = F.normalize(torch.randn(64, 8), dim=1), F.normalize(torch.randn(6, 8), dim=1)
    slots = torch.stack([torch.randperm(64)[:5] for _ in range(6)])
    rows = F.normalize(torch.randn(6, 8), dim=1)

    def shared(queries: Tensor) -> tuple[Tensor, Tensor]:
        contrast = QueueContrast(queries, queue, 0.1)
        return contrast.info_nce(keys), contrast.neighbour_loss(slots)

    def explicit(queries: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ queue.T], dim=1) / 0.1
        first = F.cross_entropy(logits, torch.zeros(6, dtype=torch.int64), reduction="none")
        return first, -logits[:, 1:].log_softmax(dim=1).gather(1, slots).mean(dim=1)

    results = []
    for losses in (shared, explicit):
        queries = rows.clone().requires_grad_()
        nce, neighbours = losses(queries)
        (nce.sum() + 0.4 * neighbours.sum()).backward()
        results.append((nce.detach(), neighbours.detach(), queries.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_found_counts_keys_nearer_than_the_whole_queue() -> None:
    contrast = QueueContrast(QUERIES, QUEUE, 0.2)
    assert contrast.found(KEYS).tolist() == [False, False]
    assert contrast.found(QUERIES).tolist() == [False, True]


def test_nearest_ignores_the_length_of_rows_and_takes_no_gradient() -> None:
    queue = F.normalize(torch.randn(32, 6), dim=1)
    rows = torch.randn(5, 6, requires_grad=True)
    slots = nearest(rows, queue, 3)
    assert torch.equal(slots, nearest(7 * rows, queue, 3))
    cosine = F.cosine_similarity(rows[:, None], queue[None], dim=2)
    assert torch.equal(slots, cosine.topk(3, dim=1).indices)


# ------------------------------------------------------------------------------------------------ the method


@pytest.mark.parametrize("options", [{}, {"knn_weight": 0.4}, {"knn_weight": 0.4, "enqueue": "before-neighbours"}])
def test_gradient_reaches_the_query_encoder_only(options) -> None:
    method = moco_method(views=SMALL, **options)
    loss = method(crops())["loss"]
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    loss.backward()
    for name, parameter in method.named_parameters():
        if name.startswith("key_"):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


def test_loss_is_fp32_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = moco_method(views=SMALL, knn_weight=0.4)(crops())["loss"]
    assert loss.dtype == torch.float32
    loss.backward()


def test_loss_against_one_image_at_a_time() -> None:
    """Without normalisation every image stands alone, with five queries and one key."""
    method = moco_method(norm=False, views=SMALL, knn_weight=0.4)
    train(method, 2)
    data = crops(seed=5)
    keys, pooled = method.queue["projected"], method.queue["pooled"]

    def encode(image: Tensor, backbone: nn.Module, head: nn.Module) -> tuple[Tensor, Tensor]:
        features = backbone(image[None]).pooled
        return F.normalize(head(features), dim=1)[0], features[0]

    expected = []
    for number in range(len(data)):
        images = [view.images[number] for view in data.views]
        key, _ = encode(images[1], method.key_backbone, method.key_projector)
        for image in [images[0], *images[2:]]:
            query, features = encode(image, method.backbone, method.projector)
            logits = torch.cat([query @ key[None].T, query @ keys.T]) / 0.2
            near = (pooled @ features).topk(4).indices
            among = -logits[1:].log_softmax(0)[near].mean()
            expected.append(-logits.log_softmax(0)[0] + 0.4 * among)
    torch.testing.assert_close(method(data)["loss"], torch.stack(expected).mean())


def test_queries_are_image_major() -> None:
    method, data = moco_method(norm=False, views=SMALL), crops()
    queries = method._encode_queries([data.views[0], *data.views[2:]])
    for number, view in ((0, 0), (0, 1), (3, 0), (3, 4)):
        images = data.views[0 if view == 0 else view + 1].images[number][None]
        alone = F.normalize(method.projector(method.backbone(images).pooled), dim=1)
        torch.testing.assert_close(queries.projected[5 * number + view], alone[0])


def test_large_and_small_crops_pass_separately() -> None:
    """The running mean moves once per size, from statistics of that size alone."""
    method, data = moco_method(views=SMALL, bn_groups=1), crops()
    norm = nn.BatchNorm2d(8)
    stem = method.backbone.layers[0]
    norm(stem(data.views[0].images))
    norm(stem(torch.cat([view.images for view in data.views[2:]])))
    method(data)
    torch.testing.assert_close(method.backbone.layers[1].running_mean, norm.running_mean)
    assert int(method.backbone.layers[1].num_batches_tracked) == 2
    assert int(method.key_backbone.module.layers[1].num_batches_tracked) == 1


def test_after_the_step_the_queue_holds_this_steps_keys_in_both_sets() -> None:
    method, data = moco_method(norm=False, knn_weight=0.4), batch()
    expected = method.key_backbone(data.views[1].images).pooled
    projected = method.key_projector(expected)
    before = method.queue["projected"].clone()
    method(data)["loss"].backward()
    assert torch.equal(method.queue["projected"], before)
    method.after_step(Progress(0, 50, 10))
    torch.testing.assert_close(method.queue["projected"][:8], F.normalize(projected, dim=1))
    torch.testing.assert_close(method.queue["pooled"][:8], F.normalize(expected, dim=1))
    assert torch.equal(method.queue["projected"][8:], before[8:])


def test_moving_after_the_step_is_moving_before_the_keys() -> None:
    """The published order (key encoder moves, keys, loss, step, enqueue), written out for four steps."""
    options = {"norm": False, "views": TWO, "momentum": 0.8, "queue": 16}
    ours, theirs = moco_method(**options), moco_method(**options)
    query = nn.ModuleList([theirs.backbone, theirs.projector])
    key = nn.ModuleList([theirs.key_backbone.module, theirs.key_projector.module])
    queue, position = theirs.queue["projected"].clone(), 0
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (ours, query)]
    for step in range(4):
        data = batch(seed=step, step=step)
        with torch.no_grad():
            for slow, fast in zip(key.parameters(), query.parameters(), strict=True):
                slow.copy_(0.8 * slow + 0.2 * fast)
            keys = F.normalize(key[1](key[0](data.views[1].images).pooled), dim=1)
        rows = F.normalize(query[1](query[0](data.views[0].images).pooled), dim=1)
        logits = torch.cat([(rows * keys).sum(1, keepdim=True), rows @ queue.clone().T], dim=1) / 0.2
        expected = F.cross_entropy(logits, torch.zeros(8, dtype=torch.int64))
        loss = ours(data)["loss"]
        torch.testing.assert_close(loss, expected)
        for optimizer, value in zip(optimizers, (loss, expected), strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        ours.after_step(Progress(step, 50, 10))
        queue[position : position + 8], position = keys, (position + 8) % 16
    torch.testing.assert_close(ours.queue["projected"], queue)


def own_slots_among_neighbours(enqueue: str) -> float:
    """How often a slot about to be overwritten by the batch is a neighbour of a query of that batch."""
    method = moco_method(norm=False, knn_weight=0.4, enqueue=enqueue, momentum=0)
    train(method, 3)
    data = batch(seed=9)
    data.views = (data.views[0], data.views[0])  # an image's own key is its nearest
    method(data)
    slots = method.queue.slots(8)
    found = method._neighbours(method._encode_queries(data.views[:1]).pooled)
    return float((found == slots[:, None]).any(dim=1).float().mean())


def test_neighbours_come_from_earlier_steps_unless_the_published_order_is_asked_for() -> None:
    assert own_slots_among_neighbours("before-neighbours") == 1
    assert own_slots_among_neighbours("after") < 1


def test_neighbours_do_not_see_this_steps_keys() -> None:
    aligned, shipped = (moco_method(knn_weight=0.4, enqueue=order) for order in ("after", "before-neighbours"))
    for method in (aligned, shipped):
        pooled = method._encode_queries(crops().views[:1]).pooled
        method(crops())
        same = torch.equal(method._neighbours(pooled), nearest(pooled, method.queue["pooled"], 4))
        assert same is (method is aligned)


@pytest.mark.parametrize(("step", "weight"), [(0, 0.0), (19, 0.0), (20, 0.4), (49, 0.4)])
def test_neighbours_count_from_the_epoch_after_the_warm_up(step, weight) -> None:
    method = moco_method(knn_weight=0.4, knn_warmup_epochs=2, views=SMALL)
    out = method(crops(step=step))
    torch.testing.assert_close(out["loss"].detach(), out["info_nce"] + weight * out["neighbours"])
    out["loss"].backward()


def test_without_neighbours_there_is_no_second_queue() -> None:
    assert moco_method().queue.names == ("projected",)
    assert moco_method(knn_weight=0.1).queue.names == ("projected", "pooled")


def test_state_dict_round_trip_continues_identically() -> None:
    options = {"views": SMALL, "knn_weight": 0.4}
    first, second = moco_method(**options), moco_method(seed=5, **options)
    train(first, 5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert train(first, 3, start=5) == train(second, 3, start=5)
    assert torch.equal(first.queue["pooled"], second.queue["pooled"])


@pytest.mark.parametrize("options", [{"views": TWO}, {"views": SMALL, "knn_weight": 0.4}])
def test_queries_learn_to_find_their_keys(options) -> None:
    method = moco_method(momentum=0.9, bn_groups=1, **options)
    untrained = train(method, 6, lr=0, data=coloured)[4:]  # by then keys have replaced the random rows
    trained = train(method, 40, start=6, data=coloured)[-10:]
    assert sum(trained) / 10 < 0.7 * sum(untrained) / 2


# ------------------------------------------------------------------------------------------------ normalisation


def normalised(groups: int, images: Tensor, train: bool = True) -> tuple[Tensor, nn.Sequential]:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5), nn.BatchNorm1d(5)
    )
    split_batch_norm(network, groups)
    return network.train(train)(images), network


def test_split_norm_is_one_norm_per_group_with_the_statistics_of_the_first() -> None:
    images = torch.randn(12, 3, 8, 8)
    split, network = normalised(3, images)
    for part, rows in zip(split.chunk(3), images.chunk(3), strict=True):
        torch.testing.assert_close(part, normalised(1, rows)[0])
    alone = normalised(1, images[:4])[1]
    torch.testing.assert_close(dict(network.state_dict()), dict(alone.state_dict()))
    assert not torch.allclose(split, normalised(1, images)[0])


def test_split_norm_in_eval_mode_is_an_ordinary_one() -> None:
    images = torch.randn(12, 3, 8, 8)
    assert torch.equal(normalised(3, images, train=False)[0], normalised(1, images, train=False)[0])


def test_split_norm_keeps_parameters_and_layout() -> None:
    norm = nn.BatchNorm2d(4, eps=1e-3, momentum=0.2)
    network = nn.Sequential(norm)
    split_batch_norm(network, 2)
    assert isinstance(network[0], SplitBatchNorm)
    assert (network[0].weight is norm.weight, network[0].eps, network[0].momentum) == (True, 1e-3, 0.2)
    images = torch.randn(4, 4, 6, 6).to(memory_format=torch.channels_last)
    assert network(images).is_contiguous(memory_format=torch.channels_last)


def test_the_exported_backbone_loads_into_an_ordinary_one() -> None:
    method = moco_method(bn_groups=4)
    train(method, 2)
    plain = TinyBackbone()
    plain.load_state_dict(method.export().state_dict())
    images = torch.randn(5, 3, 32, 32)
    assert torch.equal(plain.eval()(images).pooled, method.export().eval()(images).pooled)


def test_shuffling_returns_rows_to_their_images() -> None:
    images, numbers = torch.randn(8, 3, 4, 4), torch.rand(8)
    seen = []

    def encode(rows: Tensor) -> Tensor:
        seen.append(rows)
        return rows.flatten(1)

    assert torch.equal(encode_shuffled(encode, images, numbers), images.flatten(1))
    assert torch.equal(seen[0], images[numbers.argsort()])


def test_shuffling_changes_the_company_of_a_key_with_the_step() -> None:
    data = batch()
    shuffled, plain = moco_method(), moco_method(shuffle_bn=False)
    images = data.views[1].images
    numbers = {step: batch(step=step).uniform() for step in (0, 1)}
    keys = {step: shuffled._encode_keys(images, numbers[step])["projected"] for step in numbers}
    assert not torch.allclose(keys[0], keys[1], atol=1e-4)
    unshuffled = plain._encode_keys(images, data.uniform())["projected"]
    assert not torch.allclose(keys[0], unshuffled, atol=1e-4)
    together = moco_method(bn_groups=1)._encode_keys(images, data.uniform())["projected"]
    assert not torch.allclose(keys[0], together, atol=1e-4)


def test_groups_of_queries_hold_whole_images() -> None:
    """Half of the batch in one process is normalised as the other half in a process of its own."""
    whole, part = moco_method(views=SMALL, bn_groups=2), moco_method(views=SMALL, bn_groups=1)
    data = crops()
    half = [view._replace(images=view.images[4:]) for view in data.views]
    queries = whole._encode_queries([data.views[0], *data.views[2:]]).projected
    torch.testing.assert_close(queries[20:], part._encode_queries([half[0], *half[2:]]).projected)


# ------------------------------------------------------------------------------------------------ options


def test_default_queue_is_a_quarter_of_the_images_in_whole_batches() -> None:
    def length(images: int, size: int) -> int:
        made = replace(build(), num_images=images, global_batch=size)
        return moco.MoCo(moco.MoCoConfig(), made).queue.length

    assert [length(50_000, 128), length(50_000, 256), length(1437, 128), length(100, 64)] == [4096, 4096, 256, 64]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queue": 30}, r"method\.queue=30 is not a multiple of train\.batch_size=8"),
        ({"bn_groups": 3}, r"method\.bn_groups=3 .* divide train\.batch_size=8"),
        ({"knn_weight": 0.4, "knn_topk": 33}, r"method\.knn_topk=33 is more than the queue of 32"),
    ],
)
def test_wrong_options_are_refused(options, message) -> None:
    with pytest.raises(ConfigError, match=message) as info:
        moco_method(**options)
    assert info.value.hint


@pytest.mark.parametrize("views", [[], [{}]])
def test_a_query_and_a_key_are_needed(views) -> None:
    with pytest.raises(ValidationError, match="a query and a key"):
        moco.MoCoConfig(views=views)


def test_statistics_over_all_gpus_exclude_groups() -> None:
    network = nn.SyncBatchNorm.convert_sync_batchnorm(moco_method())
    with pytest.raises(ConfigError, match=r"train\.sync_bn .* method\.bn_groups=2"):
        check_statistics(network, 2)
    check_statistics(network, 1)
    check_statistics(moco_method(), 1)
    assert moco.MoCo.defaults["train"] == {"sync_bn": False}


def test_parameter_counts_of_the_published_model() -> None:
    from sslbench_plugins.backbones.resnet import ResNet50

    with torch.device("meta"):
        backbone = ResNet50(ResNet50.Config(), 224)
    made = Build(lambda: backbone, 256, 118_287, 100, 10)
    method = moco.MoCo(moco.MoCoConfig(queue=512, bn_groups=2), made)

    def count(*modules: nn.Module) -> int:
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    assert count(method.projector) == 4_458_624
    assert count(method.backbone, method.projector) == 27_966_656
    assert count(method.key_backbone, method.key_projector) == 27_966_656


@pytest.mark.parametrize(("knn_weight", "gathered"), [(0.0, {"projected"}), (0.4, {"projected", "pooled"})])
def test_ranks_exchange_only_what_the_queue_keeps(knn_weight, gathered) -> None:
    keys = moco_method(knn_weight=knn_weight, knn_topk=3)._encode_keys(batch().views[1].images, torch.rand(8))
    assert set(keys) == gathered
