"""Operations constrained by the trie: softmax over the valid continuations, and one step of beam search."""
