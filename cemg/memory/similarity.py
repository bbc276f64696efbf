"""Text similarity of items: cosine of binary words weighted by log(N / df), the most similar items of each.

N items, V words, df the number of items with a word.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse

from cemg.memory.rows import Rows, largest

MAX_SHARE = 0.2  # words in more than this share of the items are left out
BLOCK = 512  # items per block of the product


def text_vectors(texts: Sequence[str | None]) -> sparse.csr_matrix | None:
    """Return the word vectors of the items, rows of unit length, [N, V] float32; None without any text."""
    from sklearn.feature_extraction.text import CountVectorizer  # a slow import, needed only for building

    if not any(text and text.strip() for text in texts):
        return None
    vectorizer = CountVectorizer(
        binary=True, max_df=MAX_SHARE, token_pattern=r"(?u)\b\w+\b", dtype=np.float32
    )
    try:
        words = vectorizer.fit_transform([text or "" for text in texts])
    except ValueError:  # every word is in more than MAX_SHARE of the items
        return None
    df = np.bincount(words.indices, minlength=words.shape[1])
    words = words @ sparse.diags(np.log(len(texts) / df).astype(np.float32))
    norms = np.sqrt(np.asarray(words.multiply(words).sum(axis=1)).ravel())
    return sparse.csr_matrix(sparse.diags(1 / np.maximum(norms, 1e-12)) @ words, dtype=np.float32)


def most_similar(vectors: sparse.csr_matrix, top: int) -> Rows:
    """Return the ``top`` most similar other items of each item, most similar first."""
    transposed = vectors.T.tocsr()
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    for low in range(0, vectors.shape[0], BLOCK):
        block = (vectors[low : low + BLOCK] @ transposed).tocsr()
        for row in range(block.shape[0]):
            part = slice(block.indptr[row], block.indptr[row + 1])
            items, values = block.indices[part], block.data[part]
            other = items != low + row
            parts.append(best(items[other], values[other], top))
    return Rows.stacked(parts)


def best(items: np.ndarray, values: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ``top`` items with the largest values, best first; the lower item wins ties."""
    order = np.argsort(items, kind="stable")
    items, values = items[order], values[order]
    chosen = largest(values, top)
    return items[chosen], values[chosen]
