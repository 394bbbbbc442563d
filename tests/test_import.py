"""Weights of other programs load completely and give the source's features; all else is refused."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from conftest import Cli
from sslbench_plugins.backbones.conv4 import Conv4
from torch import Tensor, nn

from sslbench.config.options import Options
from sslbench.config.registry import find_registry, load_registry
from sslbench.config.validate import ConfigProblems
from sslbench.engine.checkpoint import read_meta
from sslbench.engine.console import Console
from sslbench.engine.foreign import LAYOUTS, load_into, read_weights
from sslbench.engine.importing import Imported, import_weights, plan_import
from sslbench.errors import CheckpointError, DataError
from sslbench.plugin.catalog import Catalog

Content = dict[str, Any]


def network(name: str = "resnet18") -> nn.Module:
    """A torchvision network whose normalisation has statistics that are not the initial ones."""
    torch.manual_seed(0)
    net = getattr(torchvision.models, name)()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.9, 1.1)
            module.weight.data.uniform_(0.9, 1.1)
    return net.eval()


def pooled(net: Any, images: Tensor) -> Tensor:
    x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
    return net.avgpool(net.layer4(net.layer3(net.layer2(net.layer1(x))))).flatten(1)


def trunk(net: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + key: value for key, value in net.state_dict().items() if not key.startswith("fc.")}


def head(prefix: str, *names: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": torch.ones(3) for name in names}


def swav(net: Any) -> Content:
    vectors = head("module.projection_head.", "0.bias", "1.weight", "1.running_mean", "3.bias")
    shapes = {"projection_head.0": (7, net.fc.in_features), "projection_head.3": (3, 7), "prototypes": (5, 3)}
    matrices = {f"module.{key}.weight": torch.ones(shape) for key, shape in shapes.items()}
    return {**trunk(net, "module."), **vectors, **matrices}


def deepcluster_v2(net: Any) -> Content:
    """As training writes it: three prototype heads, optimiser, epoch."""
    heads = {f"module.prototypes.prototypes{n}.weight": torch.ones(5 + n, 3) for n in range(3)}
    heads["module.projection_head.weight"] = torch.ones(3, net.fc.in_features)
    optimizer = {"state": {}, "param_groups": [{"lr": 4.8, "momentum": 0.9}]}
    return {"state_dict": {**trunk(net, "module."), **heads}, "epoch": 400, "optimizer": optimizer, "amp": {}}


def scrl(net: nn.Module) -> Content:
    children = list(net.children())[:-1]
    encoder = {f"encoder.{key}": value for key, value in nn.Sequential(*children).state_dict().items()}
    online = {**encoder, **head("projector.", "0.weight", "0.bias", "1.weight", "3.weight")}
    rest = {"max_eval_score": np.float64(68.27), "max_eval_epoch": 199, "xent_loss_state_dict": {}, "epoch": 200}
    return {"tag": 200, "online_network_state_dict": online, "predictor_state_dict": head("", "0.weight"), **rest}


def moco(net: nn.Module) -> Content:
    keys = trunk(net, "module.encoder_k.") | head("module.encoder_k.fc.", "0.weight", "0.bias")
    query = trunk(net, "module.encoder_q.") | head("module.encoder_q.fc.", "0.weight", "0.bias", "2.weight")
    queues = {"module.queue": torch.ones(2, 4), "module.queue_ptr": torch.zeros(1, dtype=torch.int64)}
    return {"epoch": 800, "arch": "resnet50", "state_dict": {**query, **keys, **queues}, "optimizer": {}}


def relational(net: nn.Module) -> Content:
    return {
        "backbone": trunk(net),
        "relation": head("", "0.weight"),
        "optimizer": {"args": argparse.Namespace(K=32)},
    }


def torchvision_file(net: nn.Module) -> Content:
    return dict(net.state_dict())


def plain(net: nn.Module) -> Content:
    return trunk(net)


WRITERS: list[tuple[Callable[[nn.Module], Content], str, dict[str, int], int | None]] = [
    (swav, "swav", {"projection_head": 6, "prototypes": 1}, None),
    (deepcluster_v2, "swav", {"projection_head": 1, "prototypes": 3}, 400),
    (scrl, "scrl", {"projector": 4}, 200),
    (moco, "moco", {"head": 3, "encoder_k": 122, "queues": 2}, 800),
    (relational, "relational", {}, None),
    (torchvision_file, "torchvision", {"fc": 2}, None),
    (plain, "plain", {}, None),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One MLflow store for all: setting it up takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture
def folder(workdir: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    return workdir


def bring_in(file: Path, *items: str, **options: Any) -> Imported:
    catalog = Catalog()
    plan = plan_import(catalog, load_registry(find_registry()), file, items, **options)
    return import_weights(plan, catalog, file.parent / "runs", Console(quiet=True))


def build(name: str, image_size: int = 224, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    cls = Catalog().load("backbone", name)
    return cls(cls.Config(), image_size).eval()


def saved(content: Any, folder: Path, **options: Any) -> Path:
    torch.save(content, folder / "weights.pth", **options)
    return folder / "weights.pth"


@pytest.mark.parametrize(
    ("write", "layout", "ignored", "epochs"), WRITERS, ids=lambda value: getattr(value, "__name__", "")
)
def test_every_layout_loads_completely_and_gives_the_same_features(
    write: Callable[[nn.Module], Content], layout: str, ignored: dict[str, int], epochs: int | None, tmp_path: Path
) -> None:
    net = network()
    file = saved(write(net), tmp_path)
    weights = read_weights(file)
    assert (weights.layout.name, weights.ignored, weights.epochs) == (layout, ignored, epochs)
    assert (len(weights.tensors), weights.unknown) == (120, ())
    backbone = build("resnet18")
    assert load_into(backbone, weights, file) == 0
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images).pooled, pooled(net, images), rtol=1e-5, atol=1e-6)


def test_resnet50_of_swav_is_complete(tmp_path: Path) -> None:
    net = network("resnet50")
    file = saved(swav(net), tmp_path)
    weights, backbone = read_weights(file), build("resnet50")
    load_into(backbone, weights, file)
    assert len(weights.tensors) == len(backbone.state_dict()) == 318
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images).pooled, pooled(net, images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["conv4", "resnet8"])
def test_small_networks_of_relational_reasoning(name: str, tmp_path: Path) -> None:
    """Their conv4 calls the blocks layers; their ResNets are named as ours."""
    source, backbone = build(name, 32, seed=1), build(name, 32)
    source.train()(torch.rand(8, 3, 32, 32))
    theirs = {key.replace("block", "layer"): value for key, value in source.state_dict().items()}
    file = saved({"backbone": theirs, "head": {}, "optimizer": {}}, tmp_path)
    load_into(backbone, read_weights(file), file)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(backbone(images).pooled, source.eval()(images).pooled)


def test_the_demonstration_of_relational_reasoning_saves_its_conv4_alone(tmp_path: Path) -> None:
    source, backbone = build("conv4", 32, seed=1), build("conv4", 32)
    theirs = {key.replace("block", "layer"): value for key, value in source.state_dict().items()}
    file = saved(theirs, tmp_path)
    weights = read_weights(file)
    assert weights.layout.name == "relational"
    load_into(backbone, weights, file)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(backbone(images).pooled, source(images).pooled)


@pytest.mark.parametrize("name", ["conv4", "resnet8", "resnet18"])
def test_our_own_networks_alone_are_plain(name: str, tmp_path: Path) -> None:
    file = saved(build(name, 32).state_dict(), tmp_path)
    assert read_weights(file).layout.name == "plain"
    with pytest.raises(CheckpointError, match="no weight file of layout relational"):
        read_weights(file, "relational")


def test_old_files_lack_batch_counters(tmp_path: Path) -> None:
    content = {key: value for key, value in plain(network()).items() if "num_batches" not in key}
    file = saved(content, tmp_path, _use_new_zipfile_serialization=False)
    assert load_into(build("resnet18"), read_weights(file), file) == 20


def test_the_run_says_where_the_weights_come_from(folder: Path) -> None:
    file = saved(swav(network()), folder)
    options = {"image_size": 160, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.2, 0.2), "uses_labels": True}
    outcome = bring_in(file, "backbone.name=resnet18", "run.name=theirs", **options)
    record = json.loads((outcome.run_dir / "run.json").read_text())
    assert (record["kind"], record["status"], record["name"]) == ("import", "FINISHED", "theirs")
    assert record["params"]["import.file"] == str(file)
    assert record["params"]["import.sha256"] == outcome.sha256
    assert record["tags"]["sslbench.method"] == "theirs"
    (path,) = outcome.run_dir.glob("checkpoints/step-*")
    meta = read_meta(path, verify=True)
    assert (meta.mean, meta.std, meta.backbone.image_size) == ((0.4, 0.5, 0.6), (0.2, 0.2, 0.2), 160)
    assert meta.uses_labels
    assert sorted(file.name for file in path.iterdir()) == ["backbone.pt", "meta.json"]
    same, other = (bring_in(file, "backbone.name=resnet18", image_size=side).run_dir for side in (160, 224))
    groups = [json.loads((d / "run.json").read_text())["tags"]["sslbench.group_hash"] for d in (same, other)]
    assert groups[0] == record["tags"]["sslbench.group_hash"] != groups[1]


def refused(content: Any, folder: Path, *items: str, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        bring_in(saved(content, folder), *(items or ("backbone.name=resnet18",)), **options)
    assert caught.value.hint
    assert not (folder / "runs").exists(), "a refused file leaves no run"
    return caught.value.message


def test_what_is_missing_or_unexpected_or_misshaped_is_listed(folder: Path) -> None:
    content = swav(network())
    del content["module.layer1.0.bn1.weight"]
    content["module.conv1.weight"] = torch.zeros(64, 3, 3, 3)
    content["module.decoder.weight"] = torch.zeros(1)
    message = refused(content, folder)
    assert "1 missing: layer1.0.bn1.weight" in message
    assert "1 unexpected: decoder.weight" in message
    assert "1 of another shape: conv1.weight [64, 3, 3, 3] instead of [64, 3, 7, 7]" in message


@pytest.mark.parametrize(
    ("key", "shape", "complaint"),
    [
        ("projection_head.0.weight", (7, 2048), "[7, 2048] instead of [7, 512]"),
        ("projection_head.3.weight", (3, 9), "[3, 9] instead of [3, 7]"),
        ("prototypes.weight", (5, 4), "[5, 4] instead of [5, 3]"),
    ],
)
def test_a_head_and_prototypes_that_do_not_follow_the_backbone_are_refused(
    key: str, shape: tuple[int, int], complaint: str, folder: Path
) -> None:
    content = swav(network())
    content[f"module.{key}"] = torch.ones(shape)
    assert f"1 of another shape: {key} {complaint}" in refused(content, folder)


def test_another_network_and_half_a_network_are_refused(folder: Path) -> None:
    message = refused(plain(network()), folder, "backbone.name=resnet34")
    assert "80 missing: layer1.2.conv1.weight" in message  # of eight blocks, batch counters aside
    assert "unexpected" not in message
    message = refused(plain(network()), folder, "backbone.name=conv4")
    assert "missing: block1.conv.weight" in message
    assert "unexpected: conv1.weight" in message
    moco_file = moco(network())
    moco_file["state_dict"]["module.decoder.weight"] = torch.zeros(1)
    assert "1 unexpected: decoder.weight" in refused(moco_file, folder)


def test_broken_numbers_are_refused(folder: Path) -> None:
    content = plain(network())
    content["bn1.weight"] = torch.full((64,), torch.nan)
    assert "1 with values that are no finite numbers: bn1.weight" in refused(content, folder)


def test_a_file_of_no_layout_or_of_another_one_is_refused(folder: Path) -> None:
    assert "it holds epoch, note" in refused({"epoch": 3, "note": "x"}, folder)
    assert "no weight file of layout moco" in refused(swav(network()), folder, layout="moco")
    assert "did you mean 'swav'" in refused(swav(network()), folder, layout="swaw")
    assert "holds a list" in refused([torch.zeros(1)], folder)
    with pytest.raises(CheckpointError, match="there is no file"):
        read_weights(folder / "none.pth")


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("modern", [True, False])
def test_code_in_a_file_is_refused_and_never_run(modern: bool, folder: Path) -> None:
    file = saved({"state_dict": plain(network()), "x": Hostile()}, folder, _use_new_zipfile_serialization=modern)
    with pytest.raises(CheckpointError, match="could run code"):
        read_weights(file)
    assert not (folder / "harmed").exists()


def test_wrong_options_come_in_one_report(folder: Path) -> None:
    file = saved(plain(network()), folder)
    with pytest.raises(ConfigProblems) as caught:
        bring_in(file, "backbone.name=resnet18", "backbone.stm=cifar", "optim.lr=1", "dataset.root=/x")
    assert {problem.key for problem in caught.value.problems} == {"backbone.stm", "optim", "dataset.name"}
    with pytest.raises(ConfigProblems, match="pass --backbone NAME"):
        bring_in(file)


def test_a_recipe_brings_backbone_and_evaluations(folder: Path) -> None:
    """The weights are those of the recipe, so its published result judges them."""
    torch.manual_seed(0)
    source = Conv4(Options(), 32)
    file = saved(source.state_dict(), folder)
    outcome = bring_in(file, "evals.linear.epochs=3", recipe="demo/simclr")
    record = json.loads((outcome.run_dir / "run.json").read_text())
    assert record["tags"]["sslbench.recipe"] == "demo/simclr"
    assert (record["params"]["backbone.name"], record["params"]["dataset.name"]) == ("conv4", "mnist5k")
    assert record["params"]["evals.linear.epochs"] == "3"
    assert outcome.image_size == 32  # the data set's


@pytest.mark.parametrize(("recipe", "labels"), [("demo/supervised", True), ("demo/simclr", False)])
def test_weights_of_a_supervised_recipe_are_an_upper_bound(recipe: str, labels: bool, folder: Path) -> None:
    file = saved(Conv4(Options(), 32).state_dict(), folder)
    outcome = bring_in(file, recipe=recipe)
    record = json.loads((outcome.run_dir / "run.json").read_text())
    assert record["tags"]["sslbench.uses_labels"] == str(labels).lower()
    (path,) = outcome.run_dir.glob("checkpoints/step-*")
    assert read_meta(path, verify=True).uses_labels is labels


@pytest.mark.parametrize(
    ("entry", "given", "warned"),
    [("optimizer_finetune", False, True), ("optimizer_finetune", True, False), ("optimizer", False, False)],
)
def test_files_that_labels_may_have_trained_ask_for_uses_labels(
    entry: str, given: bool, warned: bool, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = saved({"backbone": Conv4(Options(), 32).state_dict(), entry: {}}, folder)
    plan = plan_import(Catalog(), load_registry(find_registry()), file, ["backbone.name=conv4"], uses_labels=given)
    import_weights(plan, Catalog(), folder / "runs", Console())
    assert ("--uses-labels" in capsys.readouterr().err) is warned


def test_an_unlabelled_data_set_need_not_be_here(cli: Cli, folder: Path) -> None:
    """Nothing is evaluated on COCO; what asks for it all the same is told what is missing."""
    file, recipe = saved(plain(network()), folder), "moco/coco-r50-200ep"
    run_dir = bring_in(file, "backbone.name=resnet18", recipe=recipe).run_dir
    record = json.loads((run_dir / "run.json").read_text())
    assert (record["tags"]["sslbench.dataset"], record["params"]["dataset.name"]) == ("coco", "coco")
    (path,) = run_dir.glob("checkpoints/step-*")
    meta = read_meta(path, verify=True)
    assert (meta.dataset, meta.mean, meta.backbone.image_size) == ("coco", (0.485, 0.456, 0.406), 224)
    with pytest.raises(DataError, match="data set 'coco' is not under nowhere"):
        bring_in(file, "backbone.name=resnet18", "dataset.root=nowhere", recipe=recipe)
    assert "dataset.root   required" in cli("eval", "knn", "last", check=2).stderr


@pytest.mark.parametrize(
    ("recipe", "labelled"), [("swav/imagenet-r50-200ep", True), ("moco/coco-r50-200ep", False)]
)
def test_only_the_files_of_labelled_data_sets_are_needed(recipe: str, labelled: bool, folder: Path) -> None:
    plan = partial(plan_import, Catalog(), load_registry(find_registry()), folder / "weights.pth", recipe=recipe)
    if labelled:
        with pytest.raises(ConfigProblems, match=r"dataset\.root"):
            plan([])
    else:
        assert plan([]).dataset_key == "coco"
        with pytest.raises(ConfigProblems, match=r"dataset\.root"):
            plan(["dataset.images=unlabeled2017"])  # which is not called coco


def test_layouts_have_a_name_of_their_own() -> None:
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS)


@pytest.mark.slow
def test_an_imported_model_is_evaluated_compared_and_started_from(cli: Cli, folder: Path) -> None:
    torch.manual_seed(0)
    theirs = {key.replace("block", "layer"): value for key, value in Conv4(Options(), 16).state_dict().items()}
    saved({"backbone": theirs, "relation": {}}, folder)
    arguments = ("weights.pth", "--backbone", "conv4", "--dataset", "digits", "--image-size", "16")
    outcome = json.loads(cli("import", *arguments, "--json").stdout)
    assert outcome["method"] == "import:relational"
    cli("eval", "linear", "last", "epochs=3")
    cli("eval", "test")
    table = json.loads(cli("compare", "--json").stdout)
    assert [(row["method"], row["dataset"]) for row in table["rows"]] == [("import:relational", "digits")]
    assert "eval/test.v1/digits/top1" in [column["key"] for column in table["columns"]]
    start = (
        "pretrain",
        "--method",
        "simclr",
        "--dataset",
        "digits",
        "--init-from",
        outcome["name"],
        "--limit",
        "1",
    )
    cli(*start, "--no-evals", "probe.every=0", "optim.lr=1e-12", "optim.weight_decay=0", "run.name=next")
    after = torch.load(next(folder.glob("runs/next/checkpoints/step-*/backbone.pt")), weights_only=True)
    torch.testing.assert_close(after["block1.conv.weight"], theirs["layer1.conv.weight"], rtol=0, atol=1e-6)
    cli("import", "weights.pth", "--backbone", "conv4", "--name", "nameless")
    assert "--dataset NAME" in cli("eval", "knn", "nameless", check=2).stderr
    done = cli("pretrain", "--resume", outcome["name"], check=5)
    assert "holds imported weights" in done.stderr
    assert "--init-from" in done.stderr


def test_refusals_reach_the_shell(cli: Cli, folder: Path) -> None:
    saved(plain(network()), folder)
    assert "missing: block1.conv.weight" in cli("import", "weights.pth", "--backbone", "conv4", check=5).stderr
    assert "three numbers" in cli("import", "weights.pth", "--backbone", "conv4", "--mean", "1,2", check=2).stderr
