"""Backbones of timm: dimensions, layouts, keys, weights, and a run with one from start to comparison."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sslbench.engine.recompute import checkpoint_activations
from sslbench.errors import CheckpointError, ConfigError, MissingExtraError
from sslbench.nn.ema import EMA
from sslbench.plugin.api import Backbone
from sslbench.plugin.catalog import Catalog
from sslbench.testing.backbones import check_backbone

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

#: Model, side, and what is known of it: dimensions and stride.
QUICK = (
    ("test_resnet", 64, 96, 32),
    ("test_vit", 64, 64, 16),
    ("test_convnext", 64, 64, 32),
    ("mobilenetv3_small_050", 64, 288, 32),
    ("mixer_s32_224", 64, 512, 32),
)
SLOW = (
    ("xcit_nano_12_p16_224", 64, 128, 16),
    ("edgenext_xx_small", 64, 168, 32),
    ("resnet18", 32, 512, 32),
    ("resnet18d", 64, 512, 32),
    ("convnext_atto", 64, 320, 32),
    ("vit_tiny_patch16_224", 64, 192, 16),
    ("deit_tiny_distilled_patch16_224", 48, 192, 16),
    ("deit3_small_patch16_224", 32, 384, 16),
    ("eva02_tiny_patch14_224", 64, 192, 14),
    ("swin_tiny_patch4_window7_224", 64, 768, 32),
    ("efficientnet_lite0", 64, 1280, 32),
    ("regnetx_002", 64, 368, 32),
    ("levit_128s", 64, 384, 64),
    ("ghostnet_050", 64, 480, 32),
    ("mambaout_femto", 64, 288, 32),
    ("pvt_v2_b0", 64, 256, 32),
    ("maxvit_rmlp_pico_rw_256", 64, 256, 32),
)


def build(model: str, side: int = 64, **options: object) -> Backbone:
    cls = Catalog().load("backbone", "timm")
    torch.manual_seed(0)
    return cls(cls.Config(model=model, **options), side)


def images(count: int, height: int, width: int | None = None) -> Tensor:
    return torch.randn(count, 3, height, width or height, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("model", "side", "dim", "stride"),
    [*QUICK, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW)],
    ids=[row[0] for row in (*QUICK, *SLOW)],
)
def test_dimensions_and_stride_are_true_and_every_parameter_learns(
    model: str, side: int, dim: int, stride: int
) -> None:
    backbone = build(model, side)
    assert (backbone.dim, backbone.stride) == (dim, stride)
    found = backbone.train()(images(2, side))
    cells = -(-side // stride)
    assert found.pooled.shape == (2, dim)
    assert found.map.shape == (2, dim, cells, cells)
    (found.pooled.square().sum() + found.map.square().sum()).backward()
    assert [name for name, p in backbone.named_parameters() if p.requires_grad and p.grad is None] == []
    if backbone.input_sizes == "any":
        wide = backbone.eval()(images(1, side, 2 * side)).map
        assert wide.shape[2:] == (cells, -(-2 * side // stride))
    else:
        with pytest.raises(ConfigError, match=f"squares of {side} pixels"):
            backbone(images(1, side, 2 * side))


@pytest.mark.parametrize("model", ["test_resnet", "test_vit", "test_convnext"])
def test_features_and_keys_are_those_of_timm(model: str) -> None:
    backbone = build(model).eval()
    torch.manual_seed(0)
    sizes = {"img_size": 64} if "vit" in model else {}
    theirs = timm.create_model(model, num_classes=0, **sizes).eval()
    assert list(backbone.state_dict()) == list(theirs.state_dict())
    backbone.load_state_dict(theirs.state_dict())
    x = images(2, 64)
    with torch.no_grad():
        found, raw = backbone(x), theirs.forward_features(x)
        assert torch.equal(found.pooled, theirs(x))
        cells = raw[:, 1:].transpose(1, 2).flatten() if raw.ndim == 3 else raw.flatten()
        assert torch.equal(found.map.flatten(), cells)


@pytest.mark.slow
def test_layers_that_widen_pooled_features_are_left_out() -> None:
    backbone = build("mobilenetv3_small_050")
    assert backbone.mean_pooled
    theirs = timm.create_model("mobilenetv3_small_050", num_classes=0).state_dict()
    assert {key for key in theirs if key not in backbone.state_dict()} == {"conv_head.weight", "conv_head.bias"}


@pytest.mark.slow
def test_patches_of_a_channels_last_model_lie_where_they_should() -> None:
    backbone = build("mambaout_femto").eval()
    x = images(1, 64)
    x[..., 32:] = 0
    with torch.no_grad():
        left, both = backbone(x).map, backbone(images(1, 64)).map
    change = (left - both).abs().mean((0, 1))
    assert change.shape == (2, 2)
    assert (change[:, 1] > change[:, 0]).all()


def test_the_parts_stay_shared_by_copies_moves_and_modes() -> None:
    backbone = build("test_vit")
    twin = copy.deepcopy(backbone)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
        assert float(twin.eval()(images(1, 64)).map.abs().max()) == 0
        assert float(backbone.eval()(images(1, 64)).map.abs().max()) > 0
        assert twin.double()(images(1, 64).double()).pooled.dtype == torch.float64
    assert not twin._network.training
    assert twin.train()._network.training


@pytest.mark.parametrize("model", ["test_vit", pytest.param("eva02_tiny_patch14_224", marks=pytest.mark.slow)])
def test_recomputed_activations_give_the_same_gradient(model: str) -> None:
    plain, spared = build(model), build(model)
    checkpoint_activations(spared)
    for backbone in (plain, spared):
        backbone.train()(images(2, 64)).pooled.square().sum().backward()
    gradients = zip(plain.parameters(), spared.parameters(), strict=True)
    assert all(torch.allclose(a.grad, b.grad, atol=1e-6) for a, b in gradients if a.grad is not None)


@pytest.mark.slow
def test_drop_path_is_off_unless_asked_for() -> None:
    def rates(**options: object) -> list[float]:
        parts = build("swin_tiny_patch4_window7_224", **options).modules()
        return [part.drop_prob for part in parts if type(part).__name__ == "DropPath"]

    assert set(rates()) <= {0.0}
    assert max(rates(drop_path=0.2)) == pytest.approx(0.2)


def test_arguments_reach_the_constructor() -> None:
    assert build("test_vit", 32, arguments={"patch_size": 8}).stride == 8
    with pytest.raises(ConfigError, match="unexpected keyword argument 'patchsize'"):
        build("test_vit", 32, arguments={"patchsize": 8})
    with pytest.raises(ValueError, match="num_classes: set by other options"):
        build("test_vit", 32, arguments={"num_classes": 8})


def test_unknown_names_and_sizes_say_what_to_type() -> None:
    with pytest.raises(ValueError, match="timm has no model 'resnet81'; did you mean 'resnet"):
        build("resnet81")
    with pytest.raises(ValueError, match=r"'resnet18\.a9_in1k'; did you mean 'a\d_in1k'\?; known: .*\ba1_in1k"):
        build("resnet18.a9_in1k")
    with pytest.raises(ValueError, match="timm has no model 'hf-hub:some/model'"):
        build("hf-hub:some/model")
    with pytest.raises(ConfigError, match="does not take images of 16 pixels"):
        build("inception_v3", 16)


def test_weights_come_from_a_file_and_are_not_needed_again(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    theirs = timm.create_model("test_resnet", num_classes=10)
    safetensors.save_file(theirs.state_dict(), tmp_path / "a.safetensors")
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "a.pth")
    for name in ("a.safetensors", "a.pth"):
        backbone = build("test_resnet", weights=tmp_path / name)
        ours = backbone.state_dict()
        assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.items())
        assert backbone.cfg.weights is None  # what a checkpoint keeps
    with pytest.raises(CheckpointError, match="does not fit timm's test_convnext"):
        build("test_convnext", weights=tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="there is no file"):
        build("test_resnet", weights=tmp_path / "b.pth")


def test_weights_that_leave_a_part_to_chance_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = timm.create_model("test_vit").state_dict()
    torch.save({"foo": torch.zeros(3)}, tmp_path / "other.pth")
    part = {key: value for key, value in whole.items() if not key.startswith("blocks.0.norm1.")}
    torch.save(part, tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match=r"other\.pth lacks (\d+) of \1 entries of timm's test_vit"):
        build("test_vit", weights=tmp_path / "other.pth")
    with pytest.raises(
        CheckpointError, match=r"lacks 2 of \d+ .*\(blocks\.0\.norm1\.weight, blocks\.0\.norm1\.bias\)"
    ):
        build("test_vit", weights=tmp_path / "part.pth")
    torch.save(whole, tmp_path / "whole.pth")
    build("test_vit", weights=tmp_path / "whole.pth", arguments={"global_pool": "avg"})
    assert "the weights lack 2 of" in caplog.text, "of a norm that only this pooling has"


def test_the_weights_to_begin_with_are_identified_by_what_they_are(tmp_path: Path) -> None:
    cls = Catalog().load("backbone", "timm")

    def identity(**options: object) -> str | None:
        return cls.initial_weights(cls.Config(**{"model": "test_resnet", **options}))

    for name, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (identity(weights=tmp_path / name) for name in "abc")
    assert a == b != c
    assert identity() is None
    published = {identity(pretrained=True), identity(model="test_vit", pretrained=True), None, a}
    assert len(published) == 4
    assert identity(pretrained=True) == identity(model="test_resnet.r160_in1k", pretrained=True)
    with pytest.raises(CheckpointError, match="there is no file"):
        identity(weights=tmp_path / "d")
    with pytest.raises(ValueError, match=r"no weights 'test_resnet\.a9"):
        identity(model="test_resnet.a9", pretrained=True)


@pytest.mark.slow
def test_a_run_is_known_by_its_first_weights_and_needs_them_once(tmp_path: Path) -> None:
    def sslbench(*words: str) -> str:
        command = [sys.executable, "-m", "sslbench", "--runs", str(tmp_path / "runs"), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def trained(name: str) -> dict[str, str]:
        uri = f"run.tracking_uri=sqlite:///{tmp_path}/mlflow.db"
        quick = ["train.epochs=1", "train.limit=64", "train.batch_size=32", "probe.every=0", "run.evals=[]"]
        what = ["--method", "simclr", "--dataset", "digits", "--backbone", "timm:test_resnet", uri]
        mine = [f"run.name={name}", f"backbone.weights={tmp_path / name}.pth"]
        sslbench("pretrain", *what, "method.views.0.size=32", *quick, *mine)
        tags = json.loads(next((tmp_path / "runs").glob(f"{name}/run.json")).read_text())["tags"]
        return {key: tags[f"sslbench.{key}"] for key in ("start", "config_hash", "group_hash")}

    for file, seed in (("a.pth", 0), ("c.pth", 1)):
        torch.manual_seed(seed)
        torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / file)
    shutil.copy(tmp_path / "a.pth", tmp_path / "b.pth")
    a, b, c = (trained(name) for name in "abc")
    assert a == b
    assert a["group_hash"] != c["group_hash"]
    for file in tmp_path.glob("*.pth"):
        file.unlink()
    sslbench("pretrain", "--resume", "a")
    sslbench("eval", "knn", "a")


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "a.npz"])
@pytest.mark.parametrize("model", ["test_resnet", "test_vit"])
def test_no_file_of_weights_runs_code_whatever_timm_would_do(
    model: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("timm.models._builder.load_state_dict", partial(torch.load, weights_only=False))  # 1.0.9
    torch.save({"state_dict": Bomb(tmp_path / "ran")}, tmp_path / name)
    with pytest.raises(CheckpointError):
        build(model, weights=tmp_path / name)
    assert not (tmp_path / "ran").exists()


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_files_of_timms_own_training_are_read(tmp_path: Path) -> None:
    theirs = timm.create_model("test_resnet").state_dict()
    averaged = {f"module.{key}": value + 1 for key, value in theirs.items()}
    content = {"state_dict": theirs, "state_dict_ema": averaged, "args": Namespace(lr=0.1)}
    torch.save(content, tmp_path / "last.pth.tar")
    backbone = build("test_resnet", weights=tmp_path / "last.pth.tar")
    assert all(torch.equal(value, theirs[key] + 1) for key, value in backbone.state_dict().items())
    assert "state_dict" not in backbone._network.pretrained_cfg
    torch.save({"state_dict": {}}, tmp_path / "empty.pth")
    with pytest.raises(CheckpointError, match="holds no named tensors"):
        build("test_resnet", weights=tmp_path / "empty.pth")


def test_a_teacher_drops_no_units() -> None:
    teacher = EMA(build("test_resnet", arguments={"drop_rate": 0.5})).train()
    first, second = (teacher(images(2, 64)).pooled for _ in range(2))
    assert torch.equal(first, second)


def test_pretrained_weights_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="pretrained weights of timm's test_resnet") as caught:
        build("test_resnet", pretrained=True)
    assert "backbone.weights=FILE" in str(caught.value.hint)
    with pytest.raises(ValueError, match="exclude each other"):
        build("test_resnet", pretrained=True, weights=tmp_path)


def test_without_timm_only_its_use_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    cls = Catalog().load("backbone", "timm")
    with pytest.raises(MissingExtraError, match="needs the package 'timm'") as caught:
        cls(cls.Config(model="resnet18"), 32)
    assert caught.value.hint == "pip install 'sslbench[timm]'"


@pytest.mark.slow
def test_the_plugin_itself_does_not_import_timm() -> None:
    code = "import sys, sslbench_plugins.backbones.timm; sys.exit('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("model", ["test_vit", "test_convnext", "mobilenetv3_small_050"])
def test_the_conformance_kit_holds(model: str) -> None:
    check_backbone("timm", options={"model": model}, image_size=64, compiled=model == "test_vit").raise_if_broken()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["test_vit", "resnet18d", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_a_run_is_trained_evaluated_compared_and_resumed(model: str, tmp_path: Path) -> None:
    def sslbench(*words: str) -> str:
        command = [sys.executable, "-m", "sslbench", "--runs", str(tmp_path / "runs"), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    size = "method.views.0.size=32"
    uri = f"run.tracking_uri=sqlite:///{tmp_path}/mlflow.db"
    common = ["pretrain", "--method", "simclr", "--dataset", "digits", "--backbone", f"timm:{model}", size, uri]
    small = ["train.epochs=1", "probe.every=0", "run.evals=[knn]", "run.name=mine", "train.batch_size=512"]
    sslbench(*common, *small)
    assert f"timm:{model}" in sslbench("list", "runs")
    assert f"timm:{model}" in sslbench("compare")
    sslbench("eval", "linear", "mine", "epochs=1")
    sslbench("pretrain", "--resume", "mine", "--backbone", f"timm:{model}")
    meta = next((tmp_path / "runs").glob("mine/checkpoints/step-*/meta.json"))
    backbone = json.loads(meta.read_text())["backbone"]
    assert (backbone["name"], backbone["options"]["model"]) == ("timm", model)
