"""The frozen features of items: the vectors that cemg-train gives to its tokenizer, before PCA.

N items, F width of a vector.
"""

from __future__ import annotations

from cemg.baselines.registry import Job
from cemg.errors import UserError
from cemg.features import FeatureCache, Features, ImageConfig, TextConfig, encode_images, encode_texts


def item_features(job: Job) -> dict[str, Features]:
    """Encode the texts and images of the items with the default encoders.

    Args:
        job: What the model is trained on. With ``job.cache``, encoded items are read from there.

    Returns:
        "text" and "image", each float32 [N, F] with the rows that are present. A modality that no item has is
        left out.

    Raises:
        UserError: The items have neither texts nor images, or an encoder is not installed.
    """
    data, cache = job.data, None if job.cache is None else FeatureCache(job.cache)
    found: dict[str, Features] = {}
    if any(data.texts):
        found["text"] = encode_texts(data.texts, config=TextConfig(), device=job.device, cache=cache)
    if any(data.images):
        found["image"] = encode_images(data.images, config=ImageConfig(), device=job.device, cache=cache)
    found = {name: features for name, features in found.items() if bool(features.present.any())}
    if not found:
        raise UserError(
            f"{data.name}: no item has a text or an image",
            fix="a model without item features, such as sasrec",
        )
    return found
