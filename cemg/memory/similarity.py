"""Text similarity of items: cosine of binary words weighted by log(N / df), the most similar items of each.

N items, V words, df the number of items with a word. Words and weights are frozen when the index is built, so
a later item is compared by the words that it shares with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import sparse

from cemg.errors import DamagedError
from cemg.memory.rows import Row, Rows, largest
from cemg.storage import files
from cemg.storage.read import RESTORE, read_tensors

TEXTS_FILE = "texts.safetensors"

MAX_SHARE = 0.2  # words in more than this share of the items are left out
BLOCK = 512  # items per block of the product
MAX_PRODUCTS = 4_000_000_000  # of an exact search; beyond it, common words find no neighbors
CANDIDATES = 300  # per item of an inexact search, compared exactly
TOKENS = r"(?u)\b\w+\b"


@dataclass(frozen=True, slots=True)
class TextIndex:
    """Word vectors of the items.

    Attributes:
        words: V words.
        weights: log(N / df) of each, [V] float32.
        vectors: [N, V] float32, rows of unit length, or zero without words.
    """

    words: list[str]
    weights: np.ndarray
    vectors: sparse.csr_matrix

    @classmethod
    def fit(cls, texts: Sequence[str | None]) -> TextIndex | None:
        """Build the index; None if no item has a text, or no word is rare enough to tell items apart."""
        from sklearn.feature_extraction.text import CountVectorizer  # a slow import, needed only for building

        if not any(text and text.strip() for text in texts):
            return None
        vectorizer = CountVectorizer(binary=True, max_df=MAX_SHARE, token_pattern=TOKENS, dtype=np.float32)
        try:
            counts = vectorizer.fit_transform([text or "" for text in texts])
        except ValueError:  # every word is in more than MAX_SHARE of the items
            return None
        df = np.bincount(counts.indices, minlength=counts.shape[1])
        weights = np.log(len(texts) / df).astype(np.float32)
        return cls(vectorizer.get_feature_names_out().tolist(), weights, _unit(counts, weights))

    def vectors_of(self, texts: Sequence[str | None]) -> sparse.csr_matrix:
        """Return the vectors of further texts, [B, V]."""
        from sklearn.feature_extraction.text import CountVectorizer

        vectorizer = CountVectorizer(
            binary=True, vocabulary=self.words, token_pattern=TOKENS, dtype=np.float32
        )
        return _unit(vectorizer.transform([text or "" for text in texts]), self.weights)

    def most_similar(self, top: int) -> Rows:
        """Return the ``top`` most similar other items of each item, most similar first.

        Above MAX_PRODUCTS multiplications, the most common words do not find neighbors: the CANDIDATES items
        that share the heaviest rarer words are compared by all words.
        """
        finding, is_exact = self._finding()
        transposed = finding.T.tocsr()
        num_items = self.vectors.shape[0]
        size = num_items * min(top, num_items)
        # pages beyond the end stay unused
        columns, cosines = np.empty(size, np.int32), np.empty(size, np.float32)
        ends = np.zeros(num_items + 1, dtype=np.int64)
        for low in range(0, num_items, BLOCK):
            block = (finding[low : low + BLOCK] @ transposed).tocsr()
            for row in range(block.shape[0]):
                part = slice(block.indptr[row], block.indptr[row + 1])
                items, values = block.indices[part], block.data[part]
                other = items != low + row
                items, values = items[other], values[other]
                if not is_exact:
                    items, _ = best(items, values, CANDIDATES)
                    values = (self.vectors[items] @ self.vectors[low + row].T).toarray().ravel()
                items, values = best(items, values, top)
                begin, end = ends[low + row], ends[low + row] + len(items)
                columns[begin:end], cosines[begin:end] = items, values
                ends[low + row + 1] = end
        return Rows(ends, columns[: ends[-1]], cosines[: ends[-1]])

    def first(self, count: int) -> TextIndex:
        """Return the index of the first ``count`` items. Words and weights do not depend on later ones."""
        if count == self.vectors.shape[0]:
            return self
        return TextIndex(self.words, self.weights, self.vectors[:count])

    def save(self, folder: Path) -> None:
        """Write the index to ``folder``."""
        tensors = {
            "words": np.frombuffer("\n".join(self.words).encode(), dtype=np.uint8).copy(),
            "weights": self.weights, "starts": self.vectors.indptr.astype(np.int64),
            "items": self.vectors.indices.astype(np.int32), "values": self.vectors.data,
        }  # fmt: skip
        files.save_tensors({k: torch.from_numpy(v) for k, v in tensors.items()}, folder / TEXTS_FILE)

    @classmethod
    def load(cls, folder: Path, num_items: int, *, fix: str = RESTORE) -> TextIndex:
        """Read the index of the first ``num_items`` items from what `save` wrote.

        The file may have more: `Memory.save` writes it first, so a process that was killed there has added
        items to this file alone.

        Raises:
            DamagedError: The file is missing or damaged, or has fewer items.
        """
        spec: dict[str, tuple[torch.dtype, tuple[int | str, ...]]] = {
            "words": (torch.uint8, ("letters",)), "weights": (torch.float32, ("words",)),
            "starts": (torch.int64, ("rows",)), "items": (torch.int32, ("entries",)),
            "values": (torch.float32, ("entries",)),
        }  # fmt: skip
        found = {k: v.numpy() for k, v in read_tensors(folder / TEXTS_FILE, spec, fix=fix).items()}
        shape = (len(found["starts"]) - 1, len(found["weights"]))
        if shape[0] < num_items:
            cause = f"it has the texts of {shape[0]} items; the memory has {num_items}"
            raise DamagedError(f"{folder / TEXTS_FILE} is damaged", cause=cause, fix=fix)
        starts, items, letters = found["starts"], found["items"], found["words"].tobytes()
        words = letters.decode(errors="replace").split("\n")
        problem = None
        if "\n".join(words).encode() != letters:
            problem = "its words are not UTF-8"
        elif len(words) != shape[1] or len(set(words)) != shape[1]:
            problem = f"it has {len(set(words))} different words and {shape[1]} weights"
        elif starts[0] != 0 or starts[-1] != len(items) or bool((np.diff(starts) < 0).any()):
            problem = "its rows are not consecutive"
        elif len(items) and not (items.min() >= 0 and items.max() < shape[1]):
            problem = f"a text has a word that does not exist (there are {shape[1]})"
        if problem is not None:
            raise DamagedError(f"{folder / TEXTS_FILE} is damaged", cause=problem, fix=fix)
        vectors = sparse.csr_matrix((found["values"], items, starts), shape=shape)
        return cls(words, found["weights"], vectors).first(num_items)

    def _finding(self) -> tuple[sparse.csr_matrix, bool]:
        """The vectors, without the most common words if the product with all of them is too large."""
        df = np.sort(np.bincount(self.vectors.indices, minlength=len(self.words)))
        products = np.cumsum(df.astype(np.float64) ** 2)
        if products[-1] <= MAX_PRODUCTS:
            return self.vectors, True
        limit = df[np.searchsorted(products, MAX_PRODUCTS)]
        counts = np.bincount(self.vectors.indices, minlength=len(self.words))
        kept = sparse.diags((counts < limit).astype(np.float32))
        finding = sparse.csr_matrix(self.vectors @ kept)
        finding.eliminate_zeros()
        return finding, False


class Similarity:
    """C as it was built, and the items since then.

    Args:
        base: C at the time of building, most similar first.
        top: Number of entries of a full row.
        index: The index of the texts, or a function that reads it, called when it is needed.
    """

    def __init__(self, base: Rows, *, top: int, index: TextIndex | Callable[[], TextIndex]) -> None:
        self.base, self.top = base, top
        self._index = index
        self._rows: dict[int, Row] = {}  # rows that differ from those of ``base``
        self.num_items = len(base)

    @property
    def index(self) -> TextIndex:
        """The index of the texts."""
        if not isinstance(self._index, TextIndex):
            self._index = self._index()
        return self._index

    @property
    def changed(self) -> bool:
        """Whether a row differs from that of ``base``."""
        return bool(self._rows)

    def row(self, item: int, top: int) -> Row:
        """Return the ``top`` most similar items of an item."""
        if self._rows and item in self._rows:
            items, values = self._rows[item]
            return items[:top], values[:top]
        return self.base.row(item, top)

    def extend(self, texts: Sequence[str | None]) -> None:
        """Append an item per text: its own row, and an entry in the rows of its neighbors."""
        new = self.index.vectors_of(texts)
        known = sparse.csr_matrix(sparse.vstack((self.index.vectors, new), format="csr"))
        lowest = np.concatenate((self._lowest_values(), np.full(len(texts), -np.inf)))
        for low in range(0, len(texts), BLOCK):
            block = (known @ new[low : low + BLOCK].T).tocsc()
            for column in range(block.shape[1]):
                part = slice(block.indptr[column], block.indptr[column + 1])
                items, values = block.indices[part], block.data[part]
                row = self.num_items
                older = items < row
                items, values = items[older], values[older]
                self._rows[row] = best(items, values, self.top)
                lowest[row] = self._lowest(row)
                enters = values > lowest[items]
                for other, value in zip(items[enters].tolist(), values[enters].tolist(), strict=True):
                    self._insert(other, row, value)
                    lowest[other] = self._lowest(other)
                self.num_items += 1
        self._index = TextIndex(self.index.words, self.index.weights, known)

    def first(self, count: int) -> Similarity:
        """Return C of the first ``count`` items, as it was before later ones were added."""
        index = self._index
        return Similarity(
            self.merged().first(count), top=self.top,
            index=lambda: (index if isinstance(index, TextIndex) else index()).first(count),
        )  # fmt: skip

    def _insert(self, row: int, item: int, value: float) -> None:
        """Add an entry to a row. Entries beyond the best ``top`` stay, for `first`."""
        items, values = self._rows.get(row) or self.base.row(row)
        items, values = np.append(items, np.int32(item)), np.append(values, np.float32(value))
        self._rows[row] = best(items, values, len(items))

    def _lowest(self, row: int) -> float:
        """The value that an entry must exceed to be among the best ``top`` of a row."""
        values = self._rows[row][1]
        return float(values[self.top - 1]) if len(values) >= self.top else float("-inf")

    def _lowest_values(self) -> np.ndarray:
        """`_lowest` of all rows, [N] float64."""
        lowest = np.full(self.num_items, -np.inf)
        full = np.flatnonzero(np.diff(self.base.starts) >= self.top)
        lowest[full] = self.base.values[self.base.starts[full] + self.top - 1]
        for row in self._rows:
            lowest[row] = self._lowest(row)
        return lowest

    def merged(self) -> Rows:
        """Return C with all items, sorted as ``base``. A row may have more than ``top`` entries."""
        if not self._rows:
            return self.base
        return Rows.stacked([self._rows.get(item) or self.base.row(item) for item in range(self.num_items)])


def _unit(counts: sparse.csr_matrix, weights: np.ndarray) -> sparse.csr_matrix:
    """Weight the words and scale each row to unit length, float32."""
    words = sparse.csr_matrix(counts @ sparse.diags(weights))
    norms = np.sqrt(np.asarray(words.multiply(words).sum(axis=1)).ravel())
    scaled = sparse.csr_matrix(sparse.diags((1 / np.maximum(norms, 1e-12)).astype(np.float32)) @ words)
    scaled.sort_indices()
    return scaled


def best(items: np.ndarray, values: np.ndarray, top: int) -> Row:
    """Return the ``top`` items with the largest values, best first; the lower item wins ties."""
    order = np.argsort(items, kind="stable")
    items, values = items[order], values[order]
    chosen = largest(values, top)
    return items[chosen].astype(np.int32), values[chosen].astype(np.float32)
