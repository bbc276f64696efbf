"""The semantic IDs of new items, computed by the frozen feature encoders and tokenizer of a run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from cemg.artifacts import RunArtifacts
from cemg.errors import UserError
from cemg.features import PCA, FeatureCache, Features, encode_images, encode_texts
from cemg.features.text import TextEncoder
from cemg.tokenizer import CONTENT, Tokenizer, place_new
from cemg_kernels import Trie


class ItemEncoder:
    """Computes semantic IDs of items that are not in the catalog.

    Args:
        artifacts: The run.
    """

    def __init__(self, artifacts: RunArtifacts) -> None:
        self._artifacts = artifacts

    @cached_property
    def content(self) -> set[str]:
        """What the encoders read: "text", "image" or both."""
        widths = self._artifacts.load_tokenizer().model.widths
        return {name for name in CONTENT if name in widths and self._has_projection(name)}

    @cached_property
    def _text_encoder(self) -> TextEncoder:
        """Loaded once, since a service encodes items one by one."""
        config, device = self._artifacts.config.text, self._artifacts.device
        return TextEncoder(config, device=device, dtype=torch.float32)

    def codes(
        self, texts: Sequence[str | None], images: Sequence[Path | str | None], taken: Trie, *,
        cache: FeatureCache | None = None,
    ) -> Tensor:  # fmt: skip
        """Compute the semantic IDs of n new items. They differ from each other.

        Args:
            texts: Text of each new item, or None.
            images: Picture file of each new item, or None.
            taken: The semantic IDs that other items have.
            cache: Texts and images in it are not encoded again.

        Returns:
            Codes [n, levels] int64.

        Raises:
            UserError: An item has neither a text nor an image that the tokenizer uses.
        """
        if len(texts) != len(images):
            raise UserError(f"{len(texts)} texts for {len(images)} images")
        tokenizer = self._artifacts.load_tokenizer()
        items = tokenizer.features(*self._features(tokenizer, texts, images, cache))
        if not bool(items.present.any(1).all()):
            bare = torch.nonzero(~items.present.any(1)).flatten()[0].item()
            raise UserError(f"new item {bare} has neither a text nor an image that this run's tokenizer uses")
        codes, z = tokenizer.tokenize(items)
        books, method = tokenizer.model.codebooks.detach(), self._artifacts.config.tokenizer.unique
        return place_new(codes, z, books, taken=taken, method=method)

    def _features(
        self,
        tokenizer: Tokenizer,
        texts: Sequence[str | None],
        images: Sequence[Path | str | None],
        cache: FeatureCache | None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The projected features of each kind, and which items have them."""
        artifacts, widths = self._artifacts, tokenizer.model.widths
        config, device = artifacts.config, artifacts.device
        paths = [Path(p) if p else None for p in images]
        raw: dict[str, Features] = {}
        if any(texts):
            encoder = self._text_encoder if any(text and text.strip() for text in texts) else None
            raw["text"] = encode_texts(texts, config=config.text, device=device, cache=cache, encoder=encoder)
        if any(paths):
            raw["image"] = encode_images(paths, config=config.image, device=device, cache=cache)
        values = {k: torch.zeros(len(texts), w) for k, w in widths.items()}
        present = {k: torch.zeros(len(texts), dtype=torch.bool) for k in widths}
        for name in CONTENT:
            if name in raw and self._has_projection(name):
                pca = PCA.load(artifacts.file("features", f"pca_{name}.safetensors"))
                values[name] = pca.transform(raw[name].values, raw[name].present)
                present[name] = raw[name].present
        artifacts.check_unchanged()
        return values, present

    def _has_projection(self, name: str) -> bool:
        return self._artifacts.has_file("features", f"pca_{name}.safetensors")
