"""Image features: one vector per image, by a backbone of ``backbones`` without its head.

N items, F feature width, B images of a batch, S side length of the input.
"""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image
from torch import Tensor

from cemg.errors import UserError
from cemg.features.backbones import check_backbone, load_backbone
from cemg.features.cache import FeatureCache
from cemg.features.encoding import Batches, Features, content_key, encode_rows, hash_model

MAX_FILE_BYTES, MAX_PIXELS = 256 << 20, 80_000_000  # of an image, to limit the memory of decoding threads
FORMAT = 1  # of the computation; increased when the same image and weights give other values
Decoded = Tensor | str  # float32 [3, S, S], or why the image cannot be decoded


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """The image encoder."""

    backbone: str = "efficientnet-lite0"
    """Name of a torchvision model, timm:NAME, hed-vgg16, or efficientnet-lite0 (installed with CEMG)."""
    weights: str = "DEFAULT"
    """DEFAULT (the published weights), a checkpoint file, or random (for tests)."""
    batch_size: int = 32
    """Number of images encoded at once."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {self.batch_size}")

    @property
    def label(self) -> str:
        """Name of the backbone for reports, which mentions random weights."""
        return f"{self.backbone}, random weights" if self.weights == "random" else self.backbone


def encode_images(
    paths: Sequence[str | Path | None],
    *,
    config: ImageConfig,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    cache: FeatureCache | None = None,
    progress: bool = True,
    scratch: Path | None = None,
) -> Features:
    """Encode the images of items. One warning counts the files that are missing or broken.

    Args:
        paths: N image files; None for an item without an image.
        config: The encoder.
        device: Device to compute on.
        dtype: Precision to compute in.
        cache: Images in it are not encoded again.
        progress: Whether a progress bar is shown.
        scratch: A folder for the features, see `scratch_tensor`. None keeps them in memory.

    Returns:
        The features, [N, F]. Files that are missing or broken are masked, with the reason in ``reasons``.

    Raises:
        UserError: The backbone or its weights cannot be loaded.
    """
    encoder = ImageEncoder(config, device=device, dtype=dtype)
    reasons: dict[int, str] = {}
    keys = encoder.keys(paths, reasons)
    features = encode_rows(
        keys,
        lambda rows: encoder.batches([(row, Path(paths[row] or "")) for row in rows], reasons),
        width=encoder.width,
        shelf=cache.shelf(encoder.identity) if cache else None,
        label=f"image features ({config.label})",
        progress=progress,
        scratch=scratch,
    )
    _spread_reasons(keys, features, reasons)
    _warn_of_broken(paths, reasons)
    return replace(features, reasons=reasons)


def check_image_model(config: ImageConfig) -> None:
    """Raise UserError if the backbone, its package or its weight file does not exist."""
    check_backbone(config.backbone, config.weights)


class ImageEncoder:
    """A loaded backbone.

    Attributes:
        width: F, the width of a vector.
        identity: Hash of everything that determines the vector of an image.
    """

    def __init__(self, config: ImageConfig, *, device: str | torch.device, dtype: torch.dtype) -> None:
        self.config, self.device, self.dtype = config, torch.device(device), dtype
        backbone = load_backbone(config.backbone, config.weights)
        description = repr(("image", FORMAT, config.label, backbone.preparation, str(dtype)))
        self.transform = backbone.transform
        self.identity = hash_model(backbone.network, description=description)
        network = backbone.network.to(self.device, dtype).eval()
        self.network = network.to(memory_format=torch.channels_last)  # twice as fast on a CPU (measured)
        self.width = self._encode([self.transform(Image.new("RGB", (256, 256)))]).shape[1]

    def keys(self, paths: Sequence[str | Path | None], reasons: dict[int, str]) -> list[bytes | None]:
        """Return the cache key of each file. Adds files that cannot be read to ``reasons``."""
        return [_key(path, self.identity, row, reasons) for row, path in enumerate(paths)]

    def batches(self, files: list[tuple[int, Path]], reasons: dict[int, str]) -> Batches:
        """Encode files in batches; yield rows and vectors [B, F]. Adds undecodable files to ``reasons``."""
        for batch in self._decoded(files):
            reasons.update({row: image for row, image in batch if isinstance(image, str)})
            images = [(row, image) for row, image in batch if not isinstance(image, str)]
            if images:
                yield [row for row, _ in images], self._encode([image for _, image in images])

    def _decoded(self, files: list[tuple[int, Path]]) -> Iterator[list[tuple[int, Decoded]]]:
        """Yield batches of decoded files, while threads decode the next batch."""
        size = self.config.batch_size
        batches = [files[start : start + size] for start in range(0, len(files), size)]
        if not batches:
            return
        with warnings.catch_warnings(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `_decode` has its own limit
            pending = [pool.submit(self._decode, path) for _, path in batches[0]]
            for batch, next_batch in zip(batches, [*batches[1:], []], strict=True):
                current, pending = pending, [pool.submit(self._decode, path) for _, path in next_batch]
                yield [(row, future.result()) for (row, _), future in zip(batch, current, strict=True)]

    def _decode(self, path: Path) -> Decoded:
        try:
            return self.transform(open_image(path))
        except Exception as error:  # decoders raise almost anything for malformed files
            return _reason(error)

    @torch.inference_mode()
    def _encode(self, images: list[Tensor]) -> Tensor:
        """Encode prepared images [3, S, S]; return float32 [B, F] on the CPU."""
        batch = torch.stack(images).to(
            self.device, self.dtype, memory_format=torch.channels_last
        )  # [B, 3, S, S]
        output: Tensor = self.network(batch)
        return output.flatten(1).float().cpu()


def _key(path: str | Path | None, identity: str, row: int, reasons: dict[int, str]) -> bytes | None:
    """Return the cache key of an image file; None, with an entry in ``reasons``, if it cannot be read."""
    if path is None:
        return None
    try:
        return content_key(identity, read_image_file(Path(path)))
    except (OSError, UserError) as error:
        reasons[row] = _reason(error)
        return None


def open_image(file: Path | BinaryIO) -> Image.Image:
    """Decode an image file to RGB.

    Raises:
        UserError: The file is EPS, or has more than MAX_PIXELS.
        Exception: Whatever the decoder raises for a malformed file.
    """
    with Image.open(file) as image:
        if image.format == "EPS":
            raise UserError("EPS files are programs for Ghostscript, which is not run")
        if image.width * image.height > MAX_PIXELS:
            raise UserError(
                f"{image.width} x {image.height} pixels; the limit is {MAX_PIXELS:,} pixels in total"
            )
        return image.convert("RGB")


def read_image_file(path: Path) -> bytes:
    """Read the bytes of an image file.

    Raises:
        OSError: The file cannot be read.
        UserError: It is a device or a pipe, which may never end, or has more than MAX_FILE_BYTES.
    """
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise UserError("not a regular file")
    if about.st_size > MAX_FILE_BYTES:
        raise UserError(f"{about.st_size:,} bytes; the limit is {MAX_FILE_BYTES:,}")
    return path.read_bytes()


def _reason(error: Exception) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return " ".join(text.split())[:200]


def _spread_reasons(keys: Sequence[bytes | None], features: Features, reasons: dict[int, str]) -> None:
    """Copy the reason of a broken file to all equal files, which were not decoded again."""
    known = {key: reasons[row] for row, key in enumerate(keys) if key is not None and row in reasons}
    for row, key in enumerate(keys):
        if key is not None and not features.present[row]:
            reasons.setdefault(row, known[key])


def _warn_of_broken(paths: Sequence[str | Path | None], reasons: dict[int, str]) -> None:
    if reasons:
        examples = "; ".join(f"{paths[row]}: {reasons[row]}" for row in sorted(reasons)[:3])
        more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        warnings.warn(
            f"{len(reasons)} of {len(paths)} images cannot be read and are masked: {examples}{more}",
            stacklevel=3,
        )
