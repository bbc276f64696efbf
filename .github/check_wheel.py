"""Checks an installed wheel: cemg imports, and the native module builds a trie and searches it.

cibuildwheel runs this file after each build; see ``[tool.cibuildwheel]`` in pyproject.toml.
"""

from __future__ import annotations

import torch

import cemg
from cemg_kernels import Trie, backends

codes = torch.tensor([[0, 1], [0, 2], [3, 1]])
trie = Trie.from_codes(codes, 4)
leaves = trie.lookup(codes)
assert trie.items(leaves).tolist() == [0, 1, 2], trie.items(leaves)
assert trie.lookup(torch.tensor([[3, 2]])).tolist() == [-1]

trie_backend = backends()["trie"].backend
assert trie_backend == "native", trie_backend
print(f"cemg {cemg.__version__}: imported, and the native trie works")
