"""Text similarity of items: cosine of binary words weighted by log(N / df), the most similar items of each.

N items, V words, df the number of items with a word. Words and weights are frozen when the index is built, so
a later item is compared by the words that it shares with them.
"""

from __future__ import annotations

import copy
import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse

from cemg.errors import DamagedError
from cemg.memory.rows import Row, Rows, RowsWriter, largest
from cemg.storage import files
from cemg.storage.read import RESTORE, read_tensors

TEXTS_FILE = "texts.safetensors"

MAX_SHARE = 0.2  # words in more than this share of the items are left out
BLOCK = 512  # items per block of the product
COMPARED = 64  # added items per block of the product
MAX_PRODUCTS = 4_000_000_000  # of the search in a small catalog
LARGE_BLOCK = 16_384  # items per block of the search in a large catalog: it clears 8 bytes per item of N
PART = 2**19  # items that such a block is compared with at once: the sums of a row stay in the caches
PRODUCTS_PER_ITEM = 25_000  # of the search in a large catalog; beyond it, common words find no neighbors
CANDIDATES = 300  # per item of a large catalog, compared by all words
TOKENS = r"(?u)\b\w+\b"


@dataclass(frozen=True)  # without slots, for the cached vectorizer
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
        return _unit(self._vectorizer.transform([text or "" for text in texts]), self.weights)

    @cached_property
    def _vectorizer(self) -> Any:
        from sklearn.feature_extraction.text import CountVectorizer

        known = {word: number for number, word in enumerate(self.words)}
        return CountVectorizer(binary=True, vocabulary=known, token_pattern=TOKENS, dtype=np.float32)

    @cached_property
    def by_word(self) -> sparse.csr_matrix:
        """The vectors by word, [V, N]: the product with a vector reads only the items that share a word."""
        return sparse.csr_matrix(self.vectors.T)

    def most_similar(self, top: int, *, scratch: Path | None = None) -> Rows:
        """Return the ``top`` most similar other items of each item, most similar first.

        Up to MAX_PRODUCTS multiplications, items are compared by all their words, and the lower item wins
        ties. Above, sparse_dot_topn finds the CANDIDATES items that share the heaviest words, which are then
        compared by all words. Above PRODUCTS_PER_ITEM multiplications per item, the most common words do not
        find candidates.

        Args:
            top: Number of items per row.
            scratch: A folder for the entries, see `RowsWriter`.

        Raises:
            StorageError: The disk of ``scratch`` is full.
        """
        df = np.bincount(self.vectors.indices, minlength=len(self.words)).astype(np.float64)
        is_small = float(np.square(df).sum()) <= MAX_PRODUCTS
        rows = RowsWriter(self.vectors.shape[0], scratch)
        for block in self._compared(top) if is_small else self._found(top, df):
            rows.append(*block)
        return rows.finish()

    def _compared(self, top: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Blocks of rows of `most_similar`: lengths, items and cosines, from the product of all words."""
        transposed = self.vectors.T.tocsr()
        for low in range(0, self.vectors.shape[0], BLOCK):
            block = (self.vectors[low : low + BLOCK] @ transposed).tocsr()
            rows = []
            for row in range(block.shape[0]):
                part = slice(block.indptr[row], block.indptr[row + 1])
                items, values = block.indices[part], block.data[part]
                other = items != low + row
                rows.append(best(items[other], values[other], top))
            items, cosines = (np.concatenate(column) for column in zip(*rows, strict=True))
            yield np.array([len(each) for each, _ in rows]), items, cosines

    def _found(self, top: int, df: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Blocks of rows of `most_similar` in a large catalog; ``df`` [V] is the number of items per word."""
        from sparse_dot_topn import sp_matmul_topn, zip_sp_matmul_topn  # needed only for building

        finding = self._without_common_words(df)
        parts = [finding[i : i + PART].T.tocsr() for i in range(0, finding.shape[0], PART)]
        count, threads = max(CANDIDATES, top) + 1, torch.get_num_threads()  # the item itself is one of them
        for start in range(0, finding.shape[0], LARGE_BLOCK):
            block = finding[start : start + LARGE_BLOCK]
            partial = [sp_matmul_topn(block, part, top_n=count, n_threads=threads) for part in parts]
            found = partial[0] if len(parts) == 1 else zip_sp_matmul_topn(count, partial)
            for low in range(0, found.shape[0], BLOCK):
                yield self._ranked(found[low : low + BLOCK], start + low, top)

    def _ranked(
        self, found: sparse.csr_matrix, first: int, top: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Compare candidates by all words: lengths, items and cosines of the rows from item ``first`` on."""
        rows = np.repeat(np.arange(found.shape[0]), np.diff(found.indptr))
        other = found.indices != rows + first
        rows, items = rows[other], found.indices[other]
        products = self.vectors[rows + first].multiply(self.vectors[items])
        cosines = np.asarray(products.sum(axis=1)).ravel()
        order = np.lexsort((items, -cosines, rows))
        lengths = np.bincount(rows, minlength=found.shape[0])
        rank = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        kept = order[rank < top]
        return np.minimum(lengths, top), items[kept], cosines[kept]

    def _without_common_words(self, df: np.ndarray) -> sparse.csr_matrix:
        """The vectors with the rarest words only, within PRODUCTS_PER_ITEM."""
        limit = max(MAX_PRODUCTS, PRODUCTS_PER_ITEM * self.vectors.shape[0])
        ordered = np.sort(df)
        last = np.searchsorted(np.cumsum(np.square(ordered)), limit, side="right")
        if last == len(ordered):
            return self.vectors
        kept = sparse.csr_matrix(self.vectors @ sparse.diags((df < ordered[last]).astype(np.float32)))
        kept.eliminate_zeros()
        return kept

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


@dataclass(frozen=True, slots=True)
class AddedRows:
    """The changes of C by items that were added, as arrays.

    Attributes:
        numbers: Rows that differ from those of the base, [R] int64 ascending; among them those of the A added
            items.
        rows: Their entries, R rows.
        vectors: Word vectors of the added items, [A, V] float32.
    """

    numbers: np.ndarray
    rows: Rows
    vectors: sparse.csr_matrix

    def get(self, row: int) -> Row | None:
        """Return a row; None if it is that of the base."""
        place = int(np.searchsorted(self.numbers, row))
        if place == len(self.numbers) or self.numbers[place] != row:
            return None
        return self.rows.row(place)


class Similarity:
    """C as it was built, and the items since then.

    Args:
        base: C at the time of building, most similar first.
        top: Number of entries of a full row.
        index: The index of the texts, or a function that reads it, called when it is needed.
    """

    def __init__(self, base: Rows, *, top: int, index: TextIndex | Callable[[], TextIndex]) -> None:
        self.base, self.top = base, top
        self._base_index = index
        self._rows: dict[int, Row] = {}  # rows that differ from those of ``base`` and ``_stored``
        self._stored: AddedRows | None = None  # rows that differ from those of ``base``
        self._vectors: sparse.csr_matrix | None = None  # of the added items, [A, V]
        self._lowest: np.ndarray | None = None  # `_lowest_of` each row, [N] float32, once it is needed
        self.num_items = len(base)

    @property
    def index(self) -> TextIndex:
        """The index of all texts."""
        base = self.base_index
        if self._vectors is None:
            return base
        vectors = sparse.csr_matrix(sparse.vstack((base.vectors, self._vectors), format="csr"))
        return TextIndex(base.words, base.weights, vectors)

    @property
    def base_index(self) -> TextIndex:
        """The index of the texts of the items in ``base``."""
        if not isinstance(self._base_index, TextIndex):
            self._base_index = self._base_index()
        return self._base_index

    @property
    def changed(self) -> bool:
        """Whether a row differs from that of ``base``."""
        return bool(self._rows) or self._stored is not None

    def prepare(self) -> None:
        """Read the texts and index them by word for the first `extend`, which takes long for many items."""
        _ = self.base_index.by_word
        self.base_index.vectors_of([None])

    def row(self, item: int, top: int) -> Row:
        """Return the ``top`` most similar items of an item."""
        if not self.changed:
            return self.base.row(item, top)
        items, values = self._whole_row(item)
        return items[:top], values[:top]

    def extend(self, texts: Sequence[str | None]) -> None:
        """Append an item per text: its own row, and an entry in the rows of its neighbors."""
        new = self.base_index.vectors_of(texts)
        lowest = np.append(self._lowest_values(), np.full(len(texts), -np.inf, np.float32))
        self._lowest = lowest
        vectors = new if self._vectors is None else sparse.vstack((self._vectors, new), format="csr")
        self._vectors = sparse.csr_matrix(vectors)
        for row, (items, values) in enumerate(self._compared(new), start=self.num_items):
            older = items < row
            items, values = items[older], values[older]
            self._set_row(row, best(items, values, self.top))
            enters = values > lowest[items]
            for other, value in zip(items[enters].tolist(), values[enters], strict=True):
                self._insert(other, row, value)
        self.num_items += len(texts)

    def change(self, item: int, text: str | None) -> None:
        """Replace the text of an added item. The rows are those of an item that was added with this text.

        Raises:
            IndexError: The item was not added.
        """
        place = item - len(self.base)
        if self._vectors is None or not 0 <= place < self._vectors.shape[0]:
            raise IndexError(f"item {item} was not added")
        before, after = self._vectors[place], self.base_index.vectors_of([text])
        if (before != after).nnz == 0:
            return
        self._lowest_values()
        (known,) = self._compared(before)
        holders = [row for row in known[0].tolist() if row != item and self._has(row, item)]
        parts = (self._vectors[:place], after, self._vectors[place + 1 :])
        self._vectors = sparse.csr_matrix(sparse.vstack(parts, format="csr"))
        changed = [*holders, item]
        for row, (items, values) in zip(changed, self._compared(self._vectors_of(changed)), strict=True):
            self._set_row(row, self._row_of(row, items, values))
        ((items, values),) = self._compared(after)
        may_enter = (values >= self._lowest_of_base(items)) & ~np.isin(items, changed)
        for other, value in zip(items[may_enter].tolist(), values[may_enter], strict=True):
            if self._enters(other, item, value):
                self._insert(other, item, value)

    def first(self, count: int) -> Similarity:
        """Return C of the first ``count`` items, as it was before later ones were added."""
        index = self._base_index if self._vectors is None else self.index
        return Similarity(
            self.merged().first(count), top=self.top,
            index=lambda: (index if isinstance(index, TextIndex) else index()).first(count),
        )  # fmt: skip

    # ---- the rows as arrays

    def frozen(self) -> Similarity:
        """Return a copy for `added_rows`, which may run while another thread changes this object."""
        other = copy.copy(self)
        other._rows = dict(self._rows)
        return other

    def added_rows(self) -> AddedRows | None:
        """Return the changes by added items; None if there are none."""
        if self._vectors is None:
            return None
        stored = [] if self._stored is None else self._stored.numbers.tolist()
        numbers = sorted({*stored, *self._rows})
        rows = Rows.stacked([self._whole_row(row) for row in numbers])
        return AddedRows(np.array(numbers, dtype=np.int64), rows, self._vectors)

    def replace_rows(self, added: AddedRows, source: Similarity) -> None:
        """Read rows that have not changed since from arrays, which take less memory.

        Args:
            added: The `added_rows` of ``source``.
            source: The copy, from `frozen`.
        """
        self._stored = added
        self._rows = {n: row for n, row in self._rows.items() if source._rows.get(n) is not row}

    def restore(self, added: AddedRows) -> None:
        """Append the items of `added_rows`, which was called on an object with the same base."""
        if self.num_items != len(self.base):
            raise ValueError("items were added already; restore the rows before that")
        self._stored, self._vectors, self._lowest = added, added.vectors, None
        self.num_items += added.vectors.shape[0]

    # ---- inner functions

    def _vectors_of(self, rows: Sequence[int]) -> sparse.csr_matrix:
        """The word vectors of items, [n, V]."""
        begin, base, added = len(self.base), self.base_index.vectors, self._vectors
        assert added is not None
        vectors = [base[row] if row < begin else added[row - begin] for row in rows]
        return sparse.csr_matrix(sparse.vstack(vectors, format="csr"))

    def _compared(self, vectors: sparse.csr_matrix) -> Iterator[Row]:
        """The items that share words with each of some vectors, and their cosines."""
        assert self._vectors is not None
        begin, added = len(self.base), sparse.csr_matrix(self._vectors.T)
        for low in range(0, vectors.shape[0], COMPARED):
            block = vectors[low : low + COMPARED]
            old, new = (block @ self.base_index.by_word).tocsr(), (block @ added).tocsr()
            for row in range(block.shape[0]):
                one = slice(old.indptr[row], old.indptr[row + 1])
                other = slice(new.indptr[row], new.indptr[row + 1])
                items = np.concatenate((old.indices[one], new.indices[other] + begin))
                yield items, np.concatenate((old.data[one], new.data[other]))

    def _row_of(self, row: int, items: np.ndarray, values: np.ndarray) -> Row:
        """A row as `extend` makes it, from the cosines with all items."""
        begin = len(self.base)
        if row < begin:
            kept_items, kept_values = self.base.row(row)
            later = items >= begin
        else:
            older, later = items < row, items > row
            kept_items, kept_values = best(items[older], values[older], self.top)
        items, values = items[later], values[later]
        order = np.argsort(items)
        lowest = [float(value) for value in kept_values[: self.top]]
        heapq.heapify(lowest)
        chosen = []
        for place, value in zip(order.tolist(), values[order].tolist(), strict=True):
            if len(lowest) < self.top:
                heapq.heappush(lowest, value)
            elif value > lowest[0]:
                heapq.heapreplace(lowest, value)
            else:
                continue
            chosen.append(place)
        items = np.concatenate((kept_items, items[chosen].astype(np.int32)))
        return best(items, np.concatenate((kept_values, values[chosen])), len(items))

    def _whole_row(self, row: int) -> Row:
        found = self._changed_row(row)
        return self.base.row(row) if found is None else found

    def _changed_row(self, row: int) -> Row | None:
        """A row that differs from that of the base."""
        found = self._rows.get(row)
        return self._stored.get(row) if found is None and self._stored is not None else found

    def _has(self, row: int, added: int) -> bool:
        """Whether an added item is in a row."""
        found = self._changed_row(row)
        return found is not None and bool((found[0] == added).any())

    def _enters(self, row: int, item: int, value: np.float32) -> bool:
        """Whether an added item was among the best ``top`` of a row when the later of both was added."""
        items, values = self._whole_row(row)
        earlier = np.flatnonzero(items < max(row, item))
        if len(earlier) < self.top:
            return True
        last = earlier[self.top - 1]
        return bool(value > values[last] or (value == values[last] and item < items[last]))

    def _lowest_of_base(self, rows: np.ndarray) -> np.ndarray:
        """The value of the last of the best ``top`` of each row in ``base``, [n]; -inf if there are fewer."""
        lowest = np.full(len(rows), -np.inf, np.float32)
        old = np.flatnonzero(rows < len(self.base))
        ends = self.base.starts[rows[old]] + self.top
        full = ends <= self.base.starts[rows[old] + 1]
        lowest[old[full]] = self.base.values[ends[full] - 1]
        return lowest

    def _set_row(self, row: int, entries: Row) -> None:
        self._rows[row] = entries
        assert self._lowest is not None
        self._lowest[row] = entries[1][self.top - 1] if len(entries[1]) >= self.top else -np.inf

    def _insert(self, row: int, item: int, value: np.float32) -> None:
        """Add an entry to a row. Entries beyond the best ``top`` stay, for `first`."""
        items, values = self._whole_row(row)
        low, high = (len(values) - np.searchsorted(values[::-1], value, side) for side in ("right", "left"))
        place = low + int(np.searchsorted(items[low:high], item))  # the lower item wins ties
        self._set_row(row, (np.insert(items, place, item), np.insert(values, place, value)))

    def _lowest_values(self) -> np.ndarray:
        """The value that an entry must exceed to be among the best ``top`` of each row, [N] float32."""
        if self._lowest is None:
            self._lowest = np.full(self.num_items, -np.inf, np.float32)
            self._set_lowest(np.arange(len(self.base)), self.base)
            if self._stored is not None:
                self._set_lowest(self._stored.numbers, self._stored.rows)
            for row, entries in self._rows.items():
                self._set_row(row, entries)
        return self._lowest

    def _set_lowest(self, numbers: np.ndarray, rows: Rows) -> None:
        assert self._lowest is not None
        full = np.flatnonzero(np.diff(rows.starts) >= self.top)
        self._lowest[numbers] = -np.inf
        self._lowest[numbers[full]] = rows.values[rows.starts[full] + self.top - 1]

    def merged(self) -> Rows:
        """Return C with all items, sorted as ``base``. A row may have more than ``top`` entries."""
        if not self.changed:
            return self.base
        return Rows.stacked([self._whole_row(item) for item in range(self.num_items)])


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
