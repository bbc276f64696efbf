"""The trie constraint in other engines: ``generate()`` of transformers, and vLLM."""
