"""plugin-template: the last feature map of any timm model, as in `--backbone plugin-template:resnet18`.

Replace it by your own network, or keep it for timm's. The first line above is what `sslbench list backbones` shows.
"""

from __future__ import annotations

from typing import Any

from sslbench.errors import ConfigError, MissingExtraError, did_you_mean
from sslbench.plugin.api import Backbone, Features, Options
from sslbench.plugin.hooks import hookimpl
from torch import Tensor, nn

API_VERSION = "1.0"


class PluginTemplateOptions(Options):
    """Options of `plugin-template`; the text below each is shown by `sslbench info`."""

    model: str = "resnet18"
    """A model of timm without weights; `python -c "import timm; print(timm.list_models('*vit*'))"` lists some."""
    stage: int = -1
    """Which of its stages gives the map: -1 is the last one, mostly of stride 32; -2 suits images of 32 pixels."""


class PluginTemplate(Backbone):
    """One vector per image is the mean of its map.

    Models of a fixed input size, such as vision transformers, are built for the largest view and take no other.
    """

    name = "plugin-template"
    Config = PluginTemplateOptions
    selector = "model"
    mean_pooled = True
    cfg: PluginTemplateOptions

    def __init__(self, cfg: PluginTemplateOptions, image_size: int) -> None:
        super().__init__(cfg, image_size)
        fixed = _has_fixed_size(cfg.model)
        self.input_sizes = "one" if fixed else "any"
        self.network = _build(cfg, {"img_size": image_size} if fixed else {})
        stage: Any = self.network.feature_info
        self.dim = stage.channels()[-1]
        self.stride = stage.reduction()[-1]

    def forward(self, images: Tensor) -> Features:
        """``[B,3,H,W]`` to features of :attr:`dim` channels."""
        (last,) = self.network(images)
        if getattr(self.network, "output_fmt", "NCHW") == "NHWC":
            last = last.permute(0, 3, 1, 2)
        return Features(pooled=last.mean((2, 3)), map=last)


def _has_fixed_size(model: str) -> bool:
    """
    Raises:
        MissingExtraError: timm is not installed.
        ConfigError: timm has no such model.
    """
    try:
        import timm  # here, so that listing and checking options need no timm
    except ImportError as error:
        raise MissingExtraError("backbone 'plugin-template'", "timm") from error
    if not timm.is_model(model):
        guess = did_you_mean(model, timm.list_models())
        raise ConfigError(f"backbone.model: timm has no '{model}'{guess}", hint="timm.list_models() names all")
    return bool(getattr(timm.get_pretrained_cfg(model), "fixed_input_size", False))


def _build(cfg: PluginTemplateOptions, size: dict[str, Any]) -> nn.Module:
    """
    Raises:
        ConfigError: the model has no such stage, or does not fit the size.
    """
    import timm

    try:
        built: nn.Module = timm.create_model(cfg.model, features_only=True, out_indices=(cfg.stage,), **size)
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"backbone: timm cannot build stage {cfg.stage} of '{cfg.model}' {size or ''}: {error}",
            hint="another backbone.stage, backbone.model or size of the views",
        ) from error
    return built


@hookimpl
def sslbench_backbones() -> list[type[Backbone]]:
    return [PluginTemplate]
