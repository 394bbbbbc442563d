"""Any model of timm that gives a feature map or tokens: `--backbone timm:NAME`.

Needs `pip install 'sslbench[timm]'`. timm itself (Wightman, "PyTorch image models") is Apache-2.0; pretrained
weights have licences of their own.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import product
from math import isqrt
from pathlib import Path
from types import ModuleType
from typing import Any, Self, cast

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from sslbench.config.options import cosmetic
from sslbench.engine.checkpoint import load_tensors, sha256_of
from sslbench.errors import CheckpointError, ConfigError, MissingExtraError, PluginError, did_you_mean
from sslbench.nn.gaps import noting_gaps
from sslbench.plugin.api import Backbone, Features, Options
from sslbench.plugin.hooks import hookimpl

logger = logging.getLogger(__name__)
_TAKEN = frozenset({
    "model_name", "num_classes", "in_chans", "img_size", "drop_path_rate", "features_only", "pretrained",
    "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "device", "dtype",
})  # fmt: skip
_IMPORT = "sslbench import FILE --backbone timm:NAME   reads files of other programs"
_ENTRIES = ("state_dict_ema", "model_ema", "state_dict", "model")


class TimmOptions(Options):
    """Options of `timm`."""

    model: str
    """timm's name of the model, such as `convnext_atto` or `vit_small_patch16_224`; with its tag
    (`resnet18.a1_in1k`) to choose among pretrained weights. `timm:NAME` sets it."""
    pretrained: bool = False
    """Start from the weights timm publishes: from the Hugging Face cache, else from the network. Most of them saw
    ImageNet labels, which tables do not know of."""
    weights: Path | None = cosmetic(None)
    """Start from a file of weights of this model (safetensors, or tensors saved by torch); no code in it is ever
    executed, and a classifier in it is left out. Runs are told apart by its contents, wherever it lies."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Stochastic depth (Huang et al., 2016), with timm's schedule over the depth. Also models whose default in
    timm is another have none unless this is set. What is dropped depends on the number of processes."""
    arguments: dict[str, Any] = {}  # noqa: RUF012
    """Further arguments of timm's constructor, such as `{patch_size: 4}` for a vision transformer on small
    images or `{global_pool: avg}`."""

    @field_validator("model")
    @classmethod
    def _is_timms(cls, value: str) -> str:
        try:
            wrong = _misnomer(_timm(), value)
        except MissingExtraError:  # building the backbone says what to install
            return value
        if wrong:
            raise ValueError(wrong)
        return value

    @field_validator("arguments")
    @classmethod
    def _leaves_ours_alone(cls, value: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(_TAKEN & set(value))
        if taken:
            raise ValueError(f"{', '.join(taken)}: set by other options, or by sslbench itself")
        return value

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.pretrained and self.weights:
            raise ValueError("pretrained and weights exclude each other")
        return self


class Timm(Backbone):
    """A model of timm without its classifier.

    ``map`` is what timm's ``forward_features`` gives, tokens of patches as their grid; ``pooled`` is what timm's
    own pooling makes of it (class token, mean, norm after it). Where timm widens pooled features by further layers
    before the classifier (MobileNetV3, GhostNet, VGG), these are left out, and ``pooled`` is the mean of ``map``.
    State-dict keys are timm's, without those of the classifier and of such layers.
    """

    name = "timm"
    Config = TimmOptions
    selector = "model"
    _network: Any
    _channels_last: bool
    _prefix: int
    """Tokens before those of the patches."""

    def __init__(self, cfg: TimmOptions, image_size: int) -> None:
        super().__init__(cfg, image_size)
        network, self.input_sizes = _create(cfg, image_size)
        # Where weights came from is past when a checkpoint of this backbone is loaded.
        self.cfg = self.without_weights(cfg)
        self._share_parts(network)
        self._look(image_size)

    @classmethod
    def initial_weights(cls, cfg: Options) -> str | None:
        """Of the bytes of the file, or of where timm gets its own weights from."""
        options = cast(TimmOptions, cfg)
        if options.weights is not None:
            return sha256_of(_file(options.weights))
        return _published(options.model) if options.pretrained else None

    @classmethod
    def without_weights(cls, cfg: Options) -> Options:
        return cfg.model_copy(update={"pretrained": False, "weights": None})

    def _share_parts(self, network: Any) -> None:
        """Take over timm's modules under timm's names, which a submodule would put a prefix before.

        Both objects hold the same tables: what is moved, copied, sharded or replaced in one is so in the other.
        """
        for table in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            setattr(self, table, getattr(network, table))
        object.__setattr__(self, "_network", network)  # not a submodule

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self._network.training = mode
        return self

    def forward(self, images: Tensor) -> Features:
        """``[B,3,H,W]`` to features of :attr:`dim` channels."""
        if self.input_sizes == "one" and images.shape[-2:] != (self.image_size, self.image_size):
            raise ConfigError(
                f"timm's {self._model} is built for squares of {self.image_size} pixels and takes no others, "
                f"got {images.shape[-2]}x{images.shape[-1]}",
                hint="give all views one size (method.views.0.size=N), or take another model",
            )
        if self._network.training != self.training:  # set by name on each module, as an EMA does
            self._network.training = self.training
        raw = self._network.forward_features(images)
        cells = self._as_map(raw, images)
        pooled = cells.mean((2, 3)) if self.mean_pooled else self._network.forward_head(raw, pre_logits=True)
        return Features(pooled=pooled, map=cells)

    @property
    def _model(self) -> str:
        return cast(TimmOptions, self.cfg).model

    def _as_map(self, raw: Tensor, images: Tensor) -> Tensor:
        """timm's features as ``[B,D,h,w]``."""
        if raw.ndim == 4:
            return raw.permute(0, 3, 1, 2) if self._channels_last else raw
        count = raw.shape[1] - self._prefix
        rows, columns = _grid(count, images.shape[-2], images.shape[-1], self.stride)
        return raw[:, self._prefix :].transpose(1, 2).reshape(len(raw), -1, rows, columns)

    def _look(self, side: int) -> None:
        """Find out dimensions, stride and layout from a look at what the network gives."""
        was_training = self.training
        self.eval()
        calls, hooks = _counted(self)
        try:
            with torch.no_grad():
                raw = self._network.forward_features(next(self.parameters()).new_zeros(1, 3, side, side))
                own = Counter(calls)
                pooled = self._network.forward_head(raw, pre_logits=True)
        except (RuntimeError, AssertionError, ValueError, IndexError) as error:
            raise _too_small(self._model, side, error) from error
        finally:
            for hook in hooks:
                hook.remove()
        self._read(raw, side)
        self._called_once = frozenset(name for name, count in own.items() if count == 1)
        self.mean_pooled = pooled.shape != (1, self.dim)
        if self.mean_pooled:
            _drop_unused(self, own)
        self.train(was_training)

    def _read(self, raw: Any, side: int) -> None:
        network = self._network
        if not (isinstance(raw, Tensor) and raw.ndim in (3, 4)):
            raise PluginError(
                f"timm's {self._model} gives no feature map and no tokens",
                hint="another model: timm.list_models()",
            )
        self._channels_last = raw.ndim == 4 and raw.shape[1] != network.num_features
        self._prefix = _prefix_tokens(network, raw) if raw.ndim == 3 else 0
        self.dim = raw.shape[1] if raw.ndim == 4 and not self._channels_last else raw.shape[-1]
        cells = isqrt(raw.shape[1] - self._prefix) if raw.ndim == 3 else raw.shape[2]
        self.stride = _stride(network, side, cells)

    def segments(self) -> list[nn.Module]:
        """Blocks or stages; in models that hold these in no list, the model's own parts."""
        names = {module: name for name, module in self.named_modules()}
        parts = [child for child in self.children() if next(child.children(), None) is not None]
        listed = [part for part in super().segments() or parts if names[part] in self._called_once]
        owners = Counter(module for part in listed for module in part.modules())
        return [part for part in listed if all(owners[module] == 1 for module in part.modules())]


def _counted(network: nn.Module) -> tuple[Counter[str], list[Any]]:
    """How often each module is called from now on, and the hooks that count."""
    calls: Counter[str] = Counter()

    def counting(name: str) -> Any:
        return lambda *_: calls.update([name])

    return calls, [module.register_forward_pre_hook(counting(name)) for name, module in network.named_modules()]


def _drop_unused(network: nn.Module, calls: Mapping[str, int]) -> None:
    """Take away layers that features do not come through: they would never get a gradient."""
    used = {name.partition(".")[0] for name in calls}
    for name, child in network.named_children():
        if name not in used and next(child.parameters(), None) is not None:
            setattr(network, name, nn.Identity())


def _create(cfg: TimmOptions, side: int) -> tuple[Any, Any]:
    """The network, and whether it takes images of ``any`` size or of ``one``."""
    timm = _timm()
    given: dict[str, Any] = {"num_classes": 0, **cfg.arguments, **_start(cfg)}
    if cfg.drop_path:
        given["drop_path_rate"] = cfg.drop_path
    refused: TypeError | None = None
    for sizes, takes in _size_arguments(timm, cfg.model, side):
        try:
            with noting_gaps() as missing:
                network = timm.create_model(cfg.model, **sizes, **given)
        except TypeError as error:  # a constructor without such an argument
            refused = error
        except (OSError, RuntimeError, ValueError, AssertionError, LookupError, AttributeError) as error:
            raise _failure(cfg, side, error) from error
        else:
            _check_complete(cfg, missing, network)
            for source in (network.pretrained_cfg, network.default_cfg):
                source.pop("state_dict", None)  # copies of the network would copy it
            _without_drop_path(timm, network, cfg)
            return network, takes
    raise ConfigError(
        f"timm cannot build {cfg.model}: {refused}", hint="mend backbone.arguments and backbone.drop_path"
    )


def _timm() -> ModuleType:
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise MissingExtraError("backbone 'timm'", "timm", "sslbench[timm]") from error
    return timm


def _misnomer(timm: ModuleType, model: str) -> str | None:
    """Why a name is none of timm's."""
    name, _, tag = model.partition(".")
    if not timm.is_model(name):
        return f"timm has no model '{model}'{did_you_mean(name, timm.list_models())}"
    tags = [known.partition(".")[2] for known in timm.list_models(f"{name}.*", pretrained=True)]
    if tag and tag not in tags:
        return f"timm has no weights '{model}'{did_you_mean(tag, tags)}; known: {', '.join(tags) or 'none'}"
    return None


def _start(cfg: TimmOptions) -> dict[str, Any]:
    if cfg.weights is None:
        return {"pretrained": cfg.pretrained}
    path = _file(cfg.weights)
    # Arrays of the models' authors, which numpy reads without running anything; timm's reader of other files may.
    arrays = path.suffix == ".npz"
    overlay = {"file": str(path)} if arrays else {"state_dict": _tensors(path)}
    return {"pretrained": True, "pretrained_cfg_overlay": {**overlay, "custom_load": arrays}}


def _file(weights: Path) -> Path:
    path = weights.expanduser()
    if not path.is_file():
        raise CheckpointError(f"backbone.weights: there is no file {path}", hint="backbone.weights=FILE")
    return path


def _published(model: str) -> str | None:
    """Identifies the weights that timm publishes for a model; those of a name without tag are its choice."""
    known = _timm().models.get_pretrained_cfg(model)
    if known is None:
        return None  # building it says so
    places = (model.partition(".")[0], known.tag, known.hf_hub_id, known.hf_hub_filename, known.url)
    return sha256(repr(places).encode()).hexdigest()


def _tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of a file, averaged ones before others, as timm chooses among them."""
    content: Any = _safetensors(path) if path.suffix == ".safetensors" else _saved_by_torch(path)
    entries = (content.get(name) for name in _ENTRIES) if isinstance(content, Mapping) else ()
    found = next((entry for entry in entries if isinstance(entry, Mapping)), content)
    tensors = found if isinstance(found, Mapping) else {}
    if not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(
            f"{path} holds no named tensors", hint="save a state dict: torch.save(model.state_dict(), FILE)"
        )
    return dict(_timm().models.clean_state_dict(dict(tensors)))


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _saved_by_torch(path: Path) -> Any:
    with torch.serialization.safe_globals([Namespace]):  # plain data that timm's own training saves along
        return load_tensors(path)


def _size_arguments(timm: ModuleType, model: str, side: int) -> Iterator[tuple[dict[str, Any], str]]:
    """Ways to tell a constructor the size of images, those that allow other sizes as well first."""
    known = timm.models.get_pretrained_cfg(model)
    fixed = bool(known and known.fixed_input_size)
    yield {"img_size": side, "dynamic_img_size": True, "dynamic_img_pad": True}, "any"
    yield {"img_size": side, "strict_img_size": False}, "any"
    yield {"img_size": side}, "one" if fixed else "any"
    yield {}, "one" if fixed else "any"


def _without_drop_path(timm: ModuleType, network: nn.Module, cfg: TimmOptions) -> None:
    """Some models drop paths by default."""
    for module in network.modules():
        if isinstance(module, timm.layers.DropPath) and not cfg.drop_path:
            module.drop_prob = 0.0


def _check_complete(cfg: TimmOptions, missing: Sequence[str], network: nn.Module) -> None:
    """timm loads what fits. A network of other arguments may have parts that no weights know, and no other."""
    if not missing:
        return
    names = f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
    lack = f"{len(missing)} of {len(network.state_dict())} entries of timm's {cfg.model} ({names})"
    if cfg.weights and not cfg.arguments:
        raise CheckpointError(f"{cfg.weights} lacks {lack}", hint=_IMPORT)
    logger.warning("the weights lack %s: these start at random", lack)


def _failure(cfg: TimmOptions, side: int, error: Exception) -> Exception:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if cfg.weights:
        return CheckpointError(
            f"{cfg.weights} does not fit timm's {cfg.model}: {reason}",
            hint=_IMPORT,
        )
    if cfg.pretrained:
        return CheckpointError(
            f"the pretrained weights of timm's {cfg.model} are not to be had: {reason}",
            hint="connect to the network once, or download the file elsewhere: backbone.pretrained=false "
            "backbone.weights=FILE",
        )
    return _too_small(cfg.model, side, error)


def _too_small(model: str, side: int, error: Exception) -> ConfigError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ConfigError(
        f"timm's {model} does not take images of {side} pixels: {reason}",
        hint="larger views (method.views.0.size=N), or another model",
    )


def _prefix_tokens(network: Any, raw: Tensor) -> int:
    """How many tokens stand before those of the patches; not every model says so."""
    told: int | None = getattr(network, "num_prefix_tokens", None)
    return raw.shape[1] - isqrt(raw.shape[1]) ** 2 if told is None else told


def _stride(network: Any, side: int, cells: int) -> int:
    """As timm states it; where that contradicts what comes out, by what comes out."""
    try:
        stated = int(network.feature_info[-1]["reduction"])
    except (AttributeError, IndexError, KeyError, TypeError):
        stated = 0
    fits = stated > 0 and cells in (side // stated, -(-side // stated))
    return stated if fits else max(1, round(side / cells))


def _grid(count: int, height: int, width: int, stride: int) -> tuple[int, int]:
    """Rows and columns of so many patches: a border that does not fill one is padded or left out."""
    rows, columns = ((side // stride, -(-side // stride)) for side in (height, width))
    for grid in product(rows, columns):
        if grid[0] * grid[1] == count:
            return grid
    raise PluginError(f"{count} tokens of an image of {height}x{width} pixels are no grid of stride {stride}")


@hookimpl
def sslbench_backbones() -> list[type[Backbone]]:
    return [Timm]
