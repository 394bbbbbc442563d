"""The key figures of published runs, against what each recipe composes to: a slip in the registry fails here."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import pytest

from sslbench.config.compose import Composed, Layer, compose
from sslbench.config.registry import Recipe, Registry, find_registry, load_registry
from sslbench.engine.schedule import learning_rate, peak_lr
from sslbench.plugin.catalog import Catalog

CATALOG = Catalog()
EMBEDDED = ("digits", "mnist5k")


@cache
def registry() -> Registry:
    return load_registry(find_registry())


@cache
def composed(name: str) -> Composed:
    shipped = registry()
    named = [part.config.get("dataset", {}).get("name") for _, part in shipped.recipe_chain(name)]
    dataset = next((known for known in reversed(named) if known), shipped.defaults["dataset"]["name"])
    layer = Layer("test", {} if dataset in EMBEDDED else {"dataset": {"root": "/data"}})
    return compose(CATALOG, shipped, recipe=name, layers=[layer])


def views(name: str) -> list[tuple[int, int | None, tuple[float, float]]]:
    """Count, size and area of the views of each kind."""
    return [(v.count, v.size, v.scale) for v in composed(name).method.cfg.views]  # type: ignore[attr-defined]


def options(name: str) -> Any:
    return composed(name).method.cfg


@pytest.mark.parametrize("name", registry().recipes)
def test_every_recipe_composes(name: str) -> None:
    recipe: Recipe = registry().recipes[name]
    assert recipe.summary
    assert recipe.source
    assert name.split("/")[0] in (composed(name).method.name, "demo")


def test_every_reference_names_a_recipe_and_what_it_measures() -> None:
    for reference in registry().references:
        assert reference.recipe in registry().recipes, reference
        if reference.measurable:
            _, protocol, dataset, metric = reference.metric.split("/")
            name, version = protocol.split(".v")
            cls = CATALOG.load("eval", name)
            assert int(version) == cls.version, "measured by another version: check what changed"
            assert metric in cls.metrics
            assert dataset in CATALOG.names("dataset")


def test_recalled_values_are_marked() -> None:
    for reference in registry().references:
        assert ("recalled" in reference.source) != reference.verified, reference


def test_every_published_recipe_that_can_be_judged_is_evaluated_on_the_test_split() -> None:
    for reference in registry().references:
        if reference.metric.startswith("eval/test."):
            assert composed(reference.recipe).core.run.evals[-1] == "test", reference.recipe


def test_linear_and_test_show_images_alike() -> None:
    """Protocol test takes the head of linear, which fits one size of images only."""
    for name in registry().recipes:
        linear, test = (composed(name).evals.get(protocol) for protocol in ("linear", "test"))
        if linear and test:
            shown = [(cfg.size, cfg.center or 0.875) for cfg in (linear, test)]  # type: ignore[attr-defined]
            assert shown[0] == shown[1], name


class Row(NamedTuple):
    """A line of the table of scripts in SwAV's repository."""

    recipe: str
    batch: int
    epochs: int
    crops: list[tuple[int, int, tuple[float, float]]]
    lr: float
    final: float
    warmup: tuple[float, float]
    """Epochs and first rate."""
    queue: tuple[int, int]
    """Length and first epoch."""
    freeze: int
    backbone: str = "resnet50"
    hidden: int = 2048


BIG, SMALL = (2, 224, (0.14, 1.0)), (6, 96, (0.05, 0.14))
TWO, FOUR = (2, 224, (0.08, 1.0)), (4, 96, (0.05, 0.14))
LARGE_BATCH = (4.8, 0.0048, (10, 0.3))
SMALL_BATCH = (0.6, 0.0006, (0, 0.0))
SWAV = [
    Row("swav/imagenet-r50-100ep", 4096, 100, [BIG, SMALL], *LARGE_BATCH, (0, 15), 313),
    Row("swav/imagenet-r50-200ep", 4096, 200, [BIG, SMALL], *LARGE_BATCH, (0, 15), 313),
    Row("swav/imagenet-r50-400ep", 4096, 400, [BIG, SMALL], *LARGE_BATCH, (0, 15), 313),
    Row("swav/imagenet-r50-800ep", 4096, 800, [BIG, SMALL], *LARGE_BATCH, (0, 15), 313),
    Row("swav/imagenet-r50-400ep-2x224", 4096, 400, [TWO], *LARGE_BATCH, (0, 15), 313),
    Row("swav/imagenet-r50-200ep-bs256", 256, 200, [BIG, SMALL], *SMALL_BATCH, (3840, 15), 5005),
    Row("swav/imagenet-r50-400ep-bs256", 256, 400, [BIG, SMALL], *SMALL_BATCH, (3840, 15), 5005),
    Row("swav/imagenet-r50w2-400ep", 4096, 400, [BIG, FOUR], *LARGE_BATCH, (0, 15), 313, "resnet50w2", 8192),
    Row(
        "swav/imagenet-r50w4-400ep", 2560, 400, [TWO, (4, 96, (0.08, 0.14))], *LARGE_BATCH, (2560, 0), 313,
        "resnet50w4", 8192,
    ),
    Row(
        "swav/imagenet-r50w5-400ep", 1536, 400, [BIG, FOUR], *LARGE_BATCH, (1536, 0), 313, "resnet50w5", 10240
    ),
]  # fmt: skip
CLUSTERING = [
    Row(
        "deepcluster_v2/imagenet-r50-400ep", 4096, 400, [(2, 160, (0.08, 1.0)), FOUR], *LARGE_BATCH, (0, 0), 300000
    ),
    Row("deepcluster_v2/imagenet-r50-400ep-2x224", 4096, 400, [TWO], *LARGE_BATCH, (0, 0), 300000),
    Row("deepcluster_v2/imagenet-r50-800ep", 4096, 800, [BIG, SMALL], *LARGE_BATCH, (0, 0), 300000),
    Row("sela_v2/imagenet-r50-400ep", 4096, 400, [(2, 160, (0.08, 1.0)), FOUR], *LARGE_BATCH, (0, 0), 0),
    Row("sela_v2/imagenet-r50-400ep-2x224", 4096, 400, [TWO], *LARGE_BATCH, (0, 0), 0),
]


@pytest.mark.parametrize("row", [*SWAV, *CLUSTERING], ids=lambda row: row.recipe)
def test_scripts_of_swav(row: Row) -> None:
    run = composed(row.recipe)
    optim, train, method = run.core.optim, run.core.train, options(row.recipe)
    assert (train.batch_size, train.epochs, train.sync_bn) == (row.batch, row.epochs, True)
    assert views(row.recipe) == row.crops
    peak = peak_lr(optim, train.batch_size)
    assert (peak, optim.warmup_epochs) == (row.lr, row.warmup[0])
    assert peak * optim.final_lr == pytest.approx(row.final)
    assert peak * optim.warmup_from == pytest.approx(row.warmup[1])
    assert (optim.name, optim.exclude, optim.lars_norm, optim.trust) == ("lars", "none", "separate", 1e-3)
    assert (optim.momentum, optim.weight_decay, optim.advance, optim.schedule) == (0.9, 1e-6, "elapsed", "cosine")
    assert (run.backbone.name, method.hidden, method.out_dim) == (row.backbone, row.hidden, 128)
    assert (method.freeze_steps, method.temperature, method.assign) == (row.freeze, 0.1, (0, 1))
    assert run.dataset.cfg.std == (0.228, 0.224, 0.225)  # type: ignore[attr-defined]
    for view in method.views:
        kernel = int(view.blur.kernel * view.size) // 2
        assert (kernel, view.blur.p, view.blur.sigma, view.gray) == (11, 0.5, (0.1, 2.0), 0.2)
        jitter = view.jitter
        assert (jitter.p, jitter.brightness, jitter.contrast, jitter.saturation) == (0.8, 0.8, 0.8, 0.8)
        assert (jitter.hue, view.flip, view.interpolation, view.solarize) == (0.2, 0.5, "bilinear", 0)


@pytest.mark.parametrize("row", SWAV, ids=lambda row: row.recipe)
def test_codes_and_queue_of_swav(row: Row) -> None:
    method = options(row.recipe)
    assert (method.prototypes, method.epsilon, method.sinkhorn_iterations) == (3000, 0.05, 3)
    assert (method.queue, method.queue_from_epoch) == row.queue
    assert method.head_norm == (row.backbone != "resnet50w5")


@pytest.mark.parametrize("row", CLUSTERING, ids=lambda row: row.recipe)
def test_heads_of_the_clustering_methods(row: Row) -> None:
    assert options(row.recipe).prototypes == (3000, 3000, 3000)
    assert composed(row.recipe).core.train.precision == "fp32"


def test_labels_of_sela_are_the_methods_choice() -> None:
    """Nobody published them, so recipe and method must not drift apart."""
    chosen, default = options("sela_v2/imagenet-r50-400ep"), CATALOG.load("method", "sela_v2").Config()
    names = ("epsilon", "sinkhorn_iterations", "sinkhorn_tolerance", "normalize_prototypes", "freeze_steps")
    assert [getattr(chosen, name) for name in names] == [getattr(default, name) for name in names]


@pytest.mark.parametrize("row", [*SWAV, *CLUSTERING], ids=lambda row: row.recipe)
def test_linear_evaluation_of_swav(row: Row) -> None:
    linear: Any = composed(row.recipe).evals["linear"]
    assert (linear.optimizer, linear.lrs, linear.lr_per, linear.train_batch) == ("sgd", (0.3,), 256, 256)
    assert (linear.momentum, linear.weight_decay, linear.nesterov, linear.epochs) == (0.9, 1e-6, False, 100)
    assert (linear.schedule, linear.advance, linear.warmup_epochs, linear.init) == ("cosine", "epoch", 0, "normal")
    assert (linear.augment, linear.normalize, linear.size, linear.center) == ("crop-flip", "none", 224, 0.875)
    assert linear.interpolation == composed(row.recipe).evals["test"].interpolation == "bilinear"


MOCO = [  # recipe, epochs, key momentum, warm-up, weight of the neighbours, order
    ("moco/coco-r50-200ep", 200, 0.999, 0, 0.0, "after"),
    ("moco/coco-r50-800ep", 800, 0.999, 0, 0.0, "after"),
    ("moco/coco-r50-200ep-ours", 200, 0.995, 0, 0.4, "after"),
    ("moco/coco-r50-800ep-ours", 800, 0.995, 0, 0.4, "after"),
    ("moco/coco-r50-200ep-ours-shipped", 200, 0.995, 0, 0.4, "before-neighbours"),
    ("moco/coco-r50-800ep-ours-shipped", 800, 0.995, 0, 0.4, "before-neighbours"),
    ("moco/coco-r50-200ep-ours-warmup", 200, 0.995, 5, 0.4, "after"),
    ("moco/coco-r50-800ep-ours-warmup", 800, 0.995, 20, 0.4, "after"),
]


@pytest.mark.parametrize(("name", "epochs", "momentum", "warmup", "weight", "order"), MOCO)
def test_scripts_of_moco_on_coco(
    name: str, epochs: int, momentum: float, warmup: int, weight: float, order: str
) -> None:
    run, method = composed(name), options(name)
    optim, train = run.core.optim, run.core.train
    assert (train.epochs, train.batch_size, train.sync_bn, train.precision) == (epochs, 256, False, "fp32")
    assert (optim.name, peak_lr(optim, 256), optim.momentum, optim.weight_decay) == ("sgd", 0.3, 0.9, 1e-4)
    assert (optim.exclude, optim.schedule, optim.advance, optim.warmup_epochs) == ("none", "cosine", "epoch", 0)
    assert (method.momentum, method.temperature, method.queue, method.out_dim) == (momentum, 0.2, 65536, 128)
    assert (method.hidden, method.bn_groups, method.shuffle_bn) == (2048, 2, True)
    assert (method.knn_weight, method.knn_topk, method.knn_warmup_epochs) == (weight, 20, warmup)
    assert (method.enqueue, run.dataset.name, run.backbone.name) == (order, "coco", "resnet50")
    jitter = method.views[0].jitter
    assert (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) == (0.4, 0.4, 0.4, 0.1)


def test_crops_of_moco_on_coco() -> None:
    assert views("moco/coco-r50-200ep") == [(1, 224, (0.2, 1.0))] * 2
    ours = "moco/coco-r50-800ep-ours"
    assert views(ours) == [(1, 160, (0.2, 1.0)), (1, 160, (0.2, 1.0)), (4, 96, (0.05, 0.14))]
    query, key, small = options(ours).views
    assert [view.autoaugment for view in (query, key, small)] == [0.5, 0.0, 0.5]
    assert (small.near, small.overlap, query.near, key.near) == (1, 0.1, None, None)


def test_moco_with_one_change_at_a_time() -> None:
    plain = options("moco/coco-r50-200ep")
    crops, augmented, neighbours = (options(f"moco/coco-r50-200ep-{n}") for n in ("crops", "autoaugment", "knn"))
    assert [(v.size, v.near, v.autoaugment) for v in crops.views] == [(160, None, 0), (160, None, 0), (96, 1, 0)]
    assert [(v.size, v.autoaugment) for v in augmented.views] == [(224, 0.5), (224, 0)]
    assert neighbours.model_copy(update={"knn_weight": 0.0}) == plain
    assert (
        crops.model_copy(update={"views": plain.views})
        == plain
        == augmented.model_copy(update={"views": plain.views})
    )


RELATIONAL = ("relationnet", "simclr", "rotationnet", "deepinfomax", "deepcluster", "supervised")
OF_RELATIONAL = [
    name
    for name in registry().recipes
    if name.split("/")[0] in (*RELATIONAL, "random") and "/imagenet-" not in name
]
SETTINGS = [  # data set, its name in recipes, backbone, epochs
    ("cifar10", "cifar10", "conv4", 200),
    ("cifar10", "cifar10", "resnet32", 200),
    ("cifar100", "cifar100", "conv4", 200),
    ("cifar100", "cifar100", "resnet32", 200),
    ("tiny-imagenet", "tiny-imagenet", "conv4", 200),
    ("tiny-imagenet", "tiny-imagenet", "resnet32", 200),
    ("stl10", "stl10", "resnet34", 300),
]


@pytest.mark.parametrize("method", RELATIONAL)
@pytest.mark.parametrize(("dataset", "word", "backbone", "epochs"), SETTINGS)
def test_relational_reasoning_and_its_baselines(
    method: str, dataset: str, word: str, backbone: str, epochs: int
) -> None:
    run = composed(f"{method}/{word}-{backbone}-{epochs}ep")
    train, optim = run.core.train, run.core.optim
    assert (run.method.name, run.dataset.name, run.backbone.name) == (method, dataset, backbone)
    assert (train.epochs, train.batch_size) == (epochs, 64 if method == "relationnet" else 128)
    lr = {"deepinfomax": 1e-4, "supervised": 0.1}.get(method, 1e-3)
    assert (peak_lr(optim, train.batch_size), optim.weight_decay, optim.warmup_epochs) == (lr, 0, 0)
    kind = ("sgd", "step") if method == "supervised" else ("adam", "constant")
    assert (optim.name, optim.schedule) == kind
    assert getattr(run.backbone.cfg, "stem", None) == ("imagenet" if backbone == "resnet34" else None)


@pytest.mark.parametrize(
    "name", [n for n in OF_RELATIONAL if not n.startswith("random/") and not n.endswith("notebook")]
)
def test_relational_reasoning_keeps_each_quarter(name: str) -> None:
    core = composed(name).core
    assert core.checkpoint.keep_epochs == core.train.epochs // 4


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_mean_of_logarithms_differs_in_the_loss_alone(name: str) -> None:
    one, other = (composed(f"simclr/{name}-resnet32-200ep{end}") for end in ("", "-meanlog"))
    ours, theirs = one.essence(), other.essence()
    assert {key for key in ours if ours[key] != theirs[key]} == {"method.loss"}
    assert (ours["method.loss"], theirs["method.loss"]) == ("log-mean", "mean-log")


def test_the_supervised_control_falls_at_epochs_30_60_and_80() -> None:
    optim = composed("supervised/imagenet-r50-90ep").core.optim
    clock = {"steps": 900, "steps_per_epoch": 10}
    rates = [learning_rate(optim, peak=0.1, step=10 * epoch, **clock) for epoch in range(90)]
    assert [epoch for epoch in range(1, 90) if rates[epoch] < rates[epoch - 1]] == [30, 60, 80]
    assert rates[-1] == pytest.approx(1e-4)


@pytest.mark.parametrize("name", OF_RELATIONAL)
def test_linear_evaluation_of_relational_reasoning(name: str) -> None:
    linear: Any = composed(name).evals["linear"]
    epochs = 10 if name.endswith("notebook") else 100
    assert (linear.optimizer, linear.lrs, linear.lr_per) == ("adam", (1e-3,), None)
    assert (linear.epochs, linear.train_batch) == (epochs, 128)
    assert (linear.schedule, linear.weight_decay) == ("constant", 0)
    assert (linear.augment, linear.normalize, linear.init) == ("none", "none", "uniform")


@pytest.mark.parametrize(
    ("name", "count", "loss", "epochs"),
    [
        ("cifar10-conv4-200ep", 32, "focal", 200),
        ("cifar100-resnet32-200ep", 32, "focal", 200),
        ("tiny-imagenet-resnet32-200ep", 16, "focal", 200),
        ("stl10-resnet34-300ep", 16, "focal", 300),
        ("slimagenet64-resnet34-300ep", 16, "focal", 300),
        ("cifar10-resnet56-500ep", 32, "focal", 500),
        ("cifar100-resnet56-500ep", 32, "focal", 500),
        ("cifar10-conv4-notebook", 4, "bce", 10),
    ],
)
def test_pairs_of_relational_reasoning(name: str, count: int, loss: str, epochs: int) -> None:
    run, method = composed(f"relationnet/{name}"), options(f"relationnet/{name}")
    assert (method.views[0].count, method.loss, method.aggregation, method.hidden) == (count, loss, "cat", 256)
    assert (run.core.train.epochs, run.core.train.batch_size) == (epochs, 64)
    assert (method.views[0].scale, method.views[0].blur, method.views[0].jitter.hue) == ((0.08, 1.0), None, 0.2)


@pytest.mark.parametrize(
    ("dataset", "backbone", "clusters"),
    [
        ("cifar10", "conv4", 100),
        ("cifar10", "resnet32", 100),
        ("cifar100", "conv4", 1000),
        ("cifar100", "resnet32", 1000),
        ("tiny-imagenet", "conv4", 2000),
        ("tiny-imagenet", "resnet32", 2000),
        ("stl10", "resnet34", 100),
    ],
)
def test_deepcluster_has_ten_clusters_per_class_and_a_faithful_twin(
    dataset: str, backbone: str, clusters: int
) -> None:
    name = f"deepcluster/{dataset}-{backbone}-{300 if dataset == 'stl10' else 200}ep"
    mended, shipped = options(name), options(f"{name}-shipped")
    assert (mended.clusters, mended.features, mended.garble) == (clusters, "clean", None)
    assert (shipped.clusters, shipped.features, shipped.weights) == (clusters, "augmented", "complement")
    cls = CATALOG.load("dataset", composed(name).dataset.name)
    if dataset.startswith("cifar"):  # the others know their statistics only with their files
        assert (shipped.garble.mean, shipped.garble.std) == (cls.mean, cls.std)
    assert (mended.hidden, mended.restarts, mended.iterations) == (256, 5, 30)


@pytest.mark.parametrize(("dataset", "padding"), [("cifar10", 4), ("tiny-imagenet", 8), ("stl10", 12)])
def test_weak_views_of_the_baselines(dataset: str, padding: int) -> None:
    """Zero padding, a random crop and a flip; for Deep InfoMax the flip alone."""
    run = "resnet34-300ep" if dataset == "stl10" else "resnet32-200ep"
    side = {"cifar10": 32, "tiny-imagenet": 64, "stl10": 96}[dataset]
    for method in ("rotationnet", "deepcluster", "supervised"):
        (view,) = options(f"{method}/{dataset}-{run}").views
        assert (view.crop, view.padding * side, view.flip) == ("padded", padding, 0.5)
        assert (view.jitter, view.gray) == (None, 0)
    (view,) = options(f"deepinfomax/{dataset}-{run}").views
    assert (view.crop, view.flip, view.jitter, view.gray) == ("none", 0.5, None, 0)


def test_head_and_loss_of_the_simclr_baseline() -> None:
    method = options("simclr/cifar10-resnet32-200ep")
    assert (method.hidden, method.out_dim, method.activation) == (256, 64, "leaky-relu")
    assert (method.temperature, method.loss) == (0.5, "log-mean")
    assert views("simclr/cifar10-resnet32-200ep") == [(2, None, (0.08, 1.0))]


def test_schedule_of_the_supervised_bound() -> None:
    optim = composed("supervised/stl10-resnet34-300ep").core.optim
    assert (optim.momentum, optim.milestones, optim.gamma, optim.advance) == (0.9, (0.5, 0.75), 0.1, "epoch")


def test_deep_infomax_sees_all_cells() -> None:
    method = options("deepinfomax/cifar10-conv4-200ep")
    assert (method.global_weight, method.local_weight, method.prior_weight, method.cells) == (0, 1, 0.1, None)


SCRL = [  # recipe, effective rate, weight decay, EMA, rate of the linear evaluation per 256
    ("byol/imagenet-r50-200ep", 14.4, 1e-6, 0.97, 0.05),
    ("byol/imagenet-r50-1000ep", 6.4, 1.5e-6, 0.996, 0.05),
    ("scrl/imagenet-r50-200ep", 14.4, 1e-6, 0.97, 0.2),
    ("scrl/imagenet-r50-1000ep", 6.4, 1.5e-6, 0.996, 0.2),
]


@pytest.mark.parametrize(("name", "rate", "decay", "momentum", "linear_rate"), SCRL)
@pytest.mark.parametrize("suffix", ["", "-shipped"])
def test_configurations_of_scrl(
    name: str, rate: float, decay: float, momentum: float, linear_rate: float, suffix: str
) -> None:
    run, method = composed(name + suffix), options(name + suffix)
    optim = run.core.optim
    assert peak_lr(optim, run.core.train.batch_size) == pytest.approx(rate)
    assert (optim.weight_decay, method.momentum, optim.warmup_epochs) == (decay, momentum, 10)
    assert (optim.excluded_lr == "lr-squared") == bool(suffix)
    linear: Any = run.evals["linear"]
    assert (linear.lrs, linear.optimizer, linear.epochs, linear.warmup_epochs) == ((linear_rate,), "lars", 80, 5)
    assert run.dataset.name == "imagenet"
    assert (linear.train_batch, linear.momentum, linear.weight_decay, linear.nesterov) == (4096, 0.9, 0, True)
    assert linear.lrs[0] * 4096 / 256 == pytest.approx(0.8 if name.startswith("byol") else 3.2)


@pytest.mark.parametrize("name", [row[0] for row in SCRL])
@pytest.mark.parametrize("suffix", ["", "-shipped"])
def test_views_and_mistakes_of_scrl(name: str, suffix: str) -> None:
    run, method = composed(name + suffix), options(name + suffix)
    assert views(name) == [(1, 224, (0.2, 1.0))] * 2
    assert [(view.blur.p, view.solarize) for view in method.views] == [(1.0, 0.0), (0.1, 0.2)]
    for view in method.views:
        jitter, blur = view.jitter, view.blur
        strengths = (jitter.p, jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        assert strengths == (0.8, 0.4, 0.4, 0.2, 0.1)
        assert (blur.kind, blur.factors) == ("resize", (1.1, 1.2, 1.5))
        assert (view.interpolation, view.flip, view.gray) == ("bicubic", 0.5, 0.2)
    assert (run.core.train.batch_size, run.core.optim.momentum, run.core.optim.nesterov) == (8192, 0.9, False)
    assert (run.core.optim.lars_norm, run.core.optim.trust) == ("separate", 1e-3)
    assert run.core.optim.exclude == ("bn-bias-names" if suffix else "1d")
    assert (method.hidden, method.out_dim, method.target_init) == (4096, 256, "independent")
    if name.startswith("scrl"):
        boxes = method.boxes
        assert (boxes.per_image, boxes.mode, boxes.min_size, boxes.tries) == (10, "grid", 32, 50)
        assert (boxes.iou_threshold, boxes.jitter, method.aligned) == (0.5, 0, not suffix)


JOINT = {  # widths of hidden layers and embeddings, batch, epochs, rate, decay; warm-up, last rate over the peak
    "barlow/imagenet-r50-1000ep": (8192, 8192, 2048, 1000, 1.6, 1.5e-6, 10, 1e-3),
    "vicreg/imagenet-r50-1000ep": (8192, 8192, 2048, 1000, 1.6, 1e-6, 10, 1e-3),
    "vicreg/imagenet-r50-100ep": (8192, 8192, 512, 100, 0.6, 1e-6, 10, 1e-3),
    "simsiam/imagenet-r50-100ep": (2048, 2048, 512, 100, 0.1, 1e-4, 0, 0),
    "simsiam/imagenet-r50-800ep": (2048, 2048, 256, 800, 0.05, 1e-4, 0, 0),
    "nnclr/imagenet-r50-1000ep": (2048, 256, 4096, 1000, 4.8, 1e-6, 10, 0),
    "barlow/cifar10-resnet18-1000ep": (2048, 2048, 256, 1000, 0.3, 1e-4, 10, 0),
    "vicreg/cifar100-resnet18-1000ep": (2048, 2048, 256, 1000, 0.3, 1e-4, 10, 0),
    "simsiam/cifar10-resnet18-1000ep": (2048, 2048, 256, 1000, 0.5, 1e-5, 10, 0),
    "nnclr/cifar100-resnet18-1000ep": (2048, 256, 256, 1000, 0.4, 1e-5, 10, 0),
}


@pytest.mark.parametrize("name", JOINT)
def test_joint_embedding_methods(name: str) -> None:
    run, method = composed(name), options(name)
    train, optim = run.core.train, run.core.optim
    rate = peak_lr(optim, train.batch_size)
    found = (method.hidden, method.out_dim, train.batch_size, train.epochs, rate, optim.weight_decay)
    assert (*found, optim.warmup_epochs, optim.final_lr) == pytest.approx(JOINT[name])
    small = "cifar" in name
    kind = ("sgd", "none", 1e-3) if run.method.name == "simsiam" else ("lars", "1d", 0.02 if small else 1e-3)
    assert (optim.name, optim.exclude, optim.trust) == kind
    assert optim.lars_clip == (small and optim.name == "lars")
    assert run.backbone.cfg.stem == ("cifar" if small else "imagenet")  # type: ignore[attr-defined]


def test_losses_of_the_joint_embedding_methods() -> None:
    barlow, shipped = (options(f"barlow/imagenet-r50-1000ep{suffix}") for suffix in ("", "-shipped"))
    assert (barlow.redundancy, barlow.scale, shipped.scale) == (0.0051, 0.024, 0.024 / 16)
    assert 0.2 * barlow.scale == pytest.approx(0.0048)  # the rate of biases in the paper
    vicreg = options("vicreg/imagenet-r50-1000ep")
    assert (vicreg.invariance, vicreg.variance, vicreg.covariance) == (25, 25, 1)
    simsiam = options("simsiam/imagenet-r50-100ep")
    assert (simsiam.bottleneck, simsiam.projector_layers, simsiam.constant_predictor_lr) == (512, 3, True)
    nnclr = options("nnclr/imagenet-r50-1000ep")
    assert (nnclr.predictor_hidden, nnclr.temperature, nnclr.queue) == (4096, 0.1, 98304)


def test_views_of_the_joint_embedding_methods() -> None:
    first, second = options("barlow/imagenet-r50-1000ep").views
    assert [(v.scale, v.blur.p, v.solarize) for v in (first, second)] == [
        ((0.08, 1.0), 1.0, 0),
        ((0.08, 1.0), 0.1, 0.2),
    ]
    (vicreg,) = options("vicreg/imagenet-r50-1000ep").views
    assert (vicreg.count, vicreg.scale, vicreg.blur.p, vicreg.solarize) == (2, (0.08, 1.0), 0.5, 0.1)
    (simsiam,) = options("simsiam/imagenet-r50-100ep").views
    assert simsiam.model_copy(update={"count": 1}) == options("moco/coco-r50-200ep").views[0]
    first, second = options("nnclr/cifar10-resnet18-1000ep").views
    assert (first.blur, first.solarize, second.blur, second.solarize) == (None, 0, None, 0.2)
