"""Old names of options, plugins, functions and hook parameters work, and say what they are called now."""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import installed_kit
import pluggy
import pytest
from pydantic import Field

from sslbench import API_VERSION
from sslbench.config.compose import Composed, Layer, compose, differences_from_saved
from sslbench.config.options import Options
from sslbench.config.registry import Recipe, Registry
from sslbench.config.renaming import with_current_keys
from sslbench.config.schema import TrainOptions
from sslbench.config.tree import parse_overrides
from sslbench.config.validate import validate_section
from sslbench.deprecation import Renamed, former_names, former_parameters, tell_user
from sslbench.engine.importing import plan_import
from sslbench.errors import ConfigError, PluginError
from sslbench.plugin.catalog import Catalog

SOURCE = '''"""A method that has had other names."""
from sslbench.deprecation import Renamed
from sslbench.plugin.api import Method, MethodConfig
from sslbench.plugin.hooks import hookimpl

class Config(MethodConfig):
    temperature: float = 0.5
    renamed = {"tau": Renamed("temperature", "ssl-mine 3.0")}

class Mine(Method):
    name = "mine"
    Config = Config
    renamed = {"mine_v1": Renamed("mine", "ssl-mine 2.0")}
    def forward(self, batch):
        return {}

@hookimpl
def sslbench_methods():
    return [Mine]
'''
NOTICE = "the option 'method.tau' is now 'method.temperature'; the old name will be gone in ssl-mine 3.0"
BASE = {"method": {"name": "mine"}, "dataset": {"name": "digits"}, "backbone": {"name": "conv4"}}


@pytest.fixture(autouse=True)
def _told_anew() -> Iterator[None]:
    """A warning is given once in a process."""
    tell_user.cache_clear()
    yield
    tell_user.cache_clear()


def install(site: Path, source: str, points: str, module: str) -> None:
    """Lay down a distribution as pip would. Where a module lies is looked up once: give each another name."""
    (site / f"{module}.py").write_text(source)
    info = site / "ssl_mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ssl-mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)
    importlib.invalidate_caches()


@pytest.fixture
def _mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    points = "[sslbench.methods]\nmine = mine_renamed\n[sslbench.methods.renamed]\nmine_v1 = mine_renamed\n"
    install(tmp_path, SOURCE, points, "mine_renamed")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("mine_renamed", None)


def composed(*items: str, recipe: dict[str, object] | None = None) -> Composed:
    recipes = {"r": Recipe(summary="s", source="s", config=recipe)} if recipe else {}
    layer = Layer("command line", parse_overrides(items))
    return compose(
        Catalog(),
        Registry(version=1, defaults=BASE, recipes=recipes),
        recipe="r" if recipe else None,
        layers=[layer],
    )


@pytest.mark.usefixtures("_mine")
def test_an_old_key_is_accepted_and_its_layer_named(caplog: pytest.LogCaptureFixture) -> None:
    result = composed(recipe={"method": {"tau": 0.25}})
    assert result.method.cfg.temperature == 0.25  # type: ignore[attr-defined]
    assert result.origins["method.temperature"] == "recipe r"
    assert result.hash() == composed("method.temperature=0.25").hash()
    assert [record.message for record in caplog.records] == [f"{NOTICE}   [recipe r]"]


@pytest.mark.usefixtures("_mine")
def test_layers_override_each_other_under_either_name() -> None:
    assert composed("method.temperature=1", recipe={"method": {"tau": 2}}).tree["method"]["temperature"] == 1
    assert composed("method.tau=1", recipe={"method": {"temperature": 2}}).tree["method"]["temperature"] == 1
    with pytest.raises(
        ConfigError, match=r"'method\.tau' and 'method\.temperature' are one option   \[command line\]"
    ):
        composed("method.tau=1", "method.temperature=2")


@pytest.mark.usefixtures("_mine")
def test_an_old_key_is_checked_like_the_new_one() -> None:
    with pytest.raises(ConfigError, match=r"method\.temperature   .*got 'warm'   \[command line\]"):
        composed("method.tau=warm")


@pytest.mark.usefixtures("_mine")
def test_a_run_from_before_the_new_names_can_be_resumed(tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    saved.write_text("method: {name: mine_v1, tau: 0.25}\ndataset: {name: digits}\nbackbone: {name: conv4}\n")
    assert differences_from_saved(composed("method.temperature=0.25"), saved) == []
    assert differences_from_saved(composed(), saved) == ["method.temperature: 0.25 -> 0.5"]


def test_options_of_the_core_and_of_evaluations_can_be_renamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainOptions, "renamed", {"passes": Renamed("epochs", "sslbench 0.9")})
    knn = Catalog().load("eval", "knn").Config
    monkeypatch.setattr(knn, "renamed", {"neighbours": Renamed(next(iter(knn.model_fields)), "sslbench 0.9")})
    key = next(iter(knn.model_fields))
    result = composed("method.name=simclr", "train.passes=3", "evals.knn.neighbours=7")
    assert result.core.train.epochs == 3
    assert getattr(result.evals["knn"], key) == 7


class Part(Options):
    side: int = 1
    renamed = {"size": Renamed("side", "sslbench 0.9")}  # noqa: RUF012 - as the documentation has it


class Whole(Options):
    parts: tuple[Part, ...] = Field(())
    single: Part | None = None


def test_nested_options_can_be_renamed() -> None:
    given = {"parts": [{"size": 2}, {"side": 3}], "single": {"size": 4}}
    assert validate_section(Whole, given, "w", "here") == Whole(
        parts=(Part(side=2), Part(side=3)), single=Part(side=4)
    )
    assert with_current_keys(Whole, {"parts": {"1": {"size": 5}}}, "w", "here") == {"parts": {"1": {"side": 5}}}


@pytest.mark.usefixtures("_mine")
def test_an_old_plugin_name_finds_the_new_plugin_and_is_not_listed(caplog: pytest.LogCaptureFixture) -> None:
    catalog = Catalog()
    assert "mine_v1" not in catalog.names("method")
    assert catalog.find("method", "mine_v1").name == "mine"
    assert composed("method.name=mine_v1").tree["method"]["name"] == "mine"
    assert {record.message for record in caplog.records} == {
        "the method 'mine_v1' is now 'mine'; the old name will be gone in ssl-mine 2.0"
    }


BACKBONE = '''"""A backbone that has had another name, and sizes."""
from torch import nn

from sslbench.deprecation import Renamed
from sslbench.plugin.api import Backbone, Features, Options
from sslbench.plugin.hooks import hookimpl

class Config(Options):
    size: str = "a"
    width: int = 4
    renamed = {"wide": Renamed("width", "ssl-nets 2.0")}

class Net(Backbone):
    name = "newb"
    Config = Config
    selector = "size"
    stride = 1
    renamed = {"oldb": Renamed("newb", "ssl-nets 2.0")}

    def __init__(self, cfg, image_size):
        super().__init__(cfg, image_size)
        self.dim = cfg.width
        self.layer = nn.Conv2d(3, cfg.width, 1)

    def forward(self, images):
        x = self.layer(images)
        return Features(pooled=x.mean((2, 3)), map=x)

@hookimpl
def sslbench_backbones():
    return [Net]
'''


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package whose backbone had another name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    points = {"backbones": {"newb": "ssl_nets"}, "backbones.renamed": {"oldb": "ssl_nets"}}
    installed_kit.install(tmp_path, "ssl-nets", {"ssl_nets.py": BACKBONE}, points)
    yield tmp_path
    sys.modules.pop("ssl_nets", None)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("oldb", "newb"),
        ("oldb:b", "newb:b"),
        ("ssl-nets:oldb", "ssl-nets:newb"),
        ("ssl-nets:oldb:b", "ssl-nets:newb:b"),
        ("newb:oldb", "newb:oldb"),
        ("conv4", "conv4"),
        ("none:oldb", "none:oldb"),
    ],
)
@pytest.mark.usefixtures("nets")
def test_an_old_plugin_name_may_have_an_address_and_a_value(old: str, new: str) -> None:
    assert Catalog().current_name("backbone", old) == new


@pytest.mark.usefixtures("nets")
def test_a_value_behind_an_old_name_reaches_the_plugin() -> None:
    assert Catalog().choose("backbone", "oldb:b") == ("newb", {"size": "b"})
    tree = composed("method.name=simclr", "backbone.name=ssl-nets:oldb:b").tree
    assert tree["backbone"] == {"name": "ssl-nets:newb", "size": "b", "width": 4}


@pytest.mark.usefixtures("nets")
def test_an_import_knows_old_names_of_plugins_and_options(caplog: pytest.LogCaptureFixture) -> None:
    config = {"backbone": {"name": "newb", "width": 8}, "dataset": {"name": "digits"}}
    registry = Registry(version=1, recipes={"r": Recipe(summary="s", source="s", config=config)})
    for items, recipe, width, size in [
        (("backbone.name=newb", "backbone.wide=6"), None, 6, "a"),
        (("backbone.name=oldb:b", "backbone.wide=6"), None, 6, "b"),
        (("backbone.name=oldb",), "r", 8, "a"),
        (("backbone.wide=6",), "r", 6, "a"),
    ]:
        plan = plan_import(Catalog(), registry, Path("w.pth"), items, recipe=recipe)
        assert plan.backbone_name == "newb"
        assert plan.sections["backbone"] == {"name": "newb", "size": size, "width": width}
    told = "the option 'backbone.wide' is now 'backbone.width'; the old name will be gone in ssl-nets 2.0"
    assert f"{told}   [command line]" in caplog.messages
    with pytest.raises(ConfigError, match=r"'backbone\.wide' and 'backbone\.width' are one option"):
        plan_import(
            Catalog(), registry, Path("w.pth"), ("backbone.name=newb", "backbone.wide=6", "backbone.width=6")
        )


def test_an_old_name_takes_none_from_a_plugin_that_has_it(nets: Path) -> None:
    points = {"methods.renamed": {"simclr": "ssl_evil"}, "backbones.renamed": {"newb": "ssl_evil"}}
    installed_kit.install(nets, "ssl-evil", {"ssl_evil.py": "raise SystemExit('imported')\n"}, points)
    assert Catalog().find("method", "simclr").distribution == "sslbench"
    assert Catalog().choose("backbone", "newb:b") == ("newb", {"size": "b"})
    blocked = Catalog(blocked=frozenset({"sslbench:simclr"}))
    with pytest.raises(PluginError, match="is blocked by -p no:sslbench:simclr"):
        blocked.find("method", "simclr")


def test_several_plugins_with_one_old_name_are_named(nets: Path) -> None:
    installed_kit.install(nets, "ssl-other", {"ssl_other.py": ""}, {"backbones.renamed": {"oldb": "ssl_other"}})
    with pytest.raises(PluginError, match=r"had the backbone name 'oldb': ssl-.* and ssl-") as caught:
        Catalog().current_name("backbone", "oldb:b")
    assert "ssl-nets:oldb" in str(caught.value.hint)
    assert Catalog().current_name("backbone", "ssl-nets:oldb") == "ssl-nets:newb"
    assert Catalog(blocked=frozenset({"ssl-other"})).current_name("backbone", "oldb") == "newb"


@pytest.mark.usefixtures("_mine")
def test_warnings_come_from_the_first_rank_alone(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    Catalog().find("method", "mine_v1")
    assert caplog.records == []


def test_an_old_function_is_the_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("moved_here")
    module.new = lambda: "new"  # type: ignore[attr-defined]
    renamed = {"old": Renamed("new", "x 2.0"), "mlp": Renamed("sslbench.nn.heads.mlp", "x 2.0")}
    module.__getattr__ = former_names("moved_here", renamed)  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "moved_here", module)
    with pytest.warns(
        DeprecationWarning, match=r"the name 'moved_here\.old' is now 'moved_here\.new'.*x 2\.0"
    ) as told:
        assert module.old() == "new"
    assert told[0].filename == __file__
    with pytest.warns(DeprecationWarning, match=r"is now 'sslbench\.nn\.heads\.mlp'"):
        from moved_here import mlp  # type: ignore[import-not-found]
    assert mlp(2, 3)[0].out_features == 3
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = module.other


def test_an_old_hook_parameter_is_still_passed() -> None:
    spec, impl = pluggy.HookspecMarker("test"), pluggy.HookimplMarker("test")

    class Specs:
        @spec(warn_on_impl_args=former_parameters(folder=Renamed("run_dir", "sslbench 0.9")))
        def started(self, folder: str, run_dir: str) -> None: ...

    class Old:
        @impl
        def started(self, folder: str) -> str:
            return folder

    class New:
        @impl
        def started(self, run_dir: str) -> str:
            return run_dir

    manager = pluggy.PluginManager("test")
    manager.add_hookspecs(Specs)
    with pytest.warns(DeprecationWarning, match="the hook parameter 'folder' is now 'run_dir'"):
        manager.register(Old())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        manager.register(New())
    assert manager.hook.started(folder="a", run_dir="b") == ["b", "a"]


@pytest.mark.parametrize(
    ("stated", "upgraded"), [("1.99", "sslbench"), ("2.0", "sslbench"), ("0.9", "ssl-mine")], ids=str
)
def test_a_plugin_for_another_version_is_told_from_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stated: str, upgraded: str
) -> None:
    """Even one that cannot be imported, for want of what the version it needs would have."""
    source = f'API_VERSION = "{stated}"\nfrom sslbench.plugin.api import NewerThanThis\n'
    module = f"mine_{stated.replace('.', '_')}"
    install(tmp_path, source, f"[sslbench.methods]\nmine = {module}\n", module)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        PluginError, match=rf"written for plugin API {stated}; this sslbench has {API_VERSION}"
    ) as told:
        Catalog().load("method", "mine")
    assert told.value.hint == f"pip install --upgrade {upgraded}"


def test_a_version_that_is_none_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, SOURCE + '\nAPI_VERSION = "one"\n', "[sslbench.methods]\nmine = mine_one\n", "mine_one")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PluginError, match=r"API_VERSION = 'one', which is not MAJOR\.MINOR"):
        Catalog().load("method", "mine")


@pytest.mark.slow
def test_the_person_at_the_command_line_is_told_on_stderr(cli: Callable[..., Any], workdir: Path) -> None:
    (workdir / "mine.py").write_text(SOURCE)
    done = cli("-p", "mine.py", "config", "--method", "mine", "method.tau=0.25")
    assert "temperature: 0.25" in done.stdout
    assert done.stderr.splitlines() == [f"{NOTICE}   [command line]"]
