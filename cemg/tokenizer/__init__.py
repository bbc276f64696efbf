"""From features to semantic IDs: fusion, RQ-VAE, unique codes, the catalog (docs/method.md)."""

from cemg.tokenizer.catalog import Catalog
from cemg.tokenizer.collisions import Uniqueness, make_unique, place_new
from cemg.tokenizer.fusion import CONTENT, MODALITIES, Fusion, ItemFeatures, Scaling
from cemg.tokenizer.rqvae import RQVAE, Losses, TokenizerConfig
from cemg.tokenizer.shared import SharedFilter
from cemg.tokenizer.tokenizer import Tokenizer, read_items
from cemg.tokenizer.tokens import CodeTokens, TokenMap, symbol

__all__ = [
    "CONTENT", "MODALITIES", "RQVAE", "Catalog", "CodeTokens", "Fusion", "ItemFeatures", "Losses", "Scaling",
    "SharedFilter", "TokenMap", "Tokenizer", "TokenizerConfig", "Uniqueness", "make_unique", "place_new",
    "read_items", "symbol",
]  # fmt: skip
