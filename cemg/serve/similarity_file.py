"""The text similarities of added items in a file of the run, so that a start does not compute them again.

The file may be older than the store: items that it does not have are compared at the start, and so are texts
that have changed since. A file that is damaged or of another run is ignored, and written anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import sparse

from cemg.errors import UserError
from cemg.memory.rows import Rows
from cemg.memory.similarity import AddedRows
from cemg.storage import files
from cemg.storage.read import read_tensor_file

FORMAT = 1
TEXT_DIGEST = 16  # bytes of the digest of a text

log = logging.getLogger("cemg.serve")


@dataclass(frozen=True, slots=True)
class SavedSimilarity:
    """The content of the file.

    Attributes:
        texts: A digest of the text of each added item, by id, in the order of their rows: see `digest_of`.
        rows: The rows of the text similarity.
    """

    texts: dict[str, bytes]
    rows: AddedRows


class SimilarityFile:
    """The file of a run and a store.

    Args:
        run: The folder of the run.
        model_version: Identifies the run's state.
        store: Identifies the store.
    """

    def __init__(self, run: Path, *, model_version: str, store: str) -> None:
        name = hashlib.sha256(store.encode()).hexdigest()[:12]
        self.path = run / "serve" / f"similarity-{name}.safetensors"
        self._about = {"format": FORMAT, "model": model_version}

    def read(self) -> SavedSimilarity | None:
        """Read the file; None if it is missing, damaged, or of another state of the run."""
        if not self.path.is_file():
            return None
        try:
            tensors, metadata = read_tensor_file(self.path, finite=False)
            arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
            about = json.loads(metadata["similarity"])
            if {name: about.get(name) for name in self._about} != self._about:
                return None
            if about["sha256"] != _digest(arrays):
                raise ValueError("its sha256 does not match its content")
        except (UserError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s is damaged and not read, the similarities are computed: %s", self.path, error)
            return None
        ids, digests = json.loads(arrays["ids"].tobytes()), arrays["texts"]
        texts = {name: digests[row].tobytes() for row, name in enumerate(ids)}
        vectors = sparse.csr_matrix(
            (arrays["vector_values"], arrays["vector_words"], arrays["vector_starts"]),
            shape=(len(ids), about["words"]),
        )
        rows = Rows(arrays["starts"], arrays["items"], arrays["values"])
        return SavedSimilarity(texts, AddedRows(arrays["numbers"], rows, vectors))

    def write(self, saved: SavedSimilarity) -> None:
        """Replace the file, completely or not at all.

        Raises:
            StorageError: The disk is full, or the folder of the run cannot be written.
        """
        rows, vectors = saved.rows.rows, saved.rows.vectors
        arrays = {
            "ids": np.frombuffer(json.dumps([*saved.texts]).encode(), dtype=np.uint8),
            "texts": np.frombuffer(b"".join(saved.texts.values()), np.uint8).reshape(-1, TEXT_DIGEST),
            "numbers": saved.rows.numbers, "starts": rows.starts, "items": rows.items,
            "values": rows.values, "vector_starts": vectors.indptr.astype(np.int64),
            "vector_words": vectors.indices.astype(np.int32), "vector_values": vectors.data,
        }  # fmt: skip
        about = {**self._about, "words": vectors.shape[1], "sha256": _digest(arrays)}
        if self.path.parent.is_dir():
            files.sweep(self.path.parent, shared=True)  # of a process that was killed
        files.save_tensors(
            {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}, self.path,
            metadata={"similarity": json.dumps(about)},
        )  # fmt: skip


def digest_of(text: str | None) -> bytes:
    """A digest of the text of an item."""
    return hashlib.sha256(json.dumps(text).encode()).digest()[:TEXT_DIGEST]


def _digest(arrays: dict[str, np.ndarray]) -> str:
    whole = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        whole.update(f"{name} {array.dtype} {array.shape}".encode())
        whole.update(np.ascontiguousarray(array).data)
    return whole.hexdigest()
