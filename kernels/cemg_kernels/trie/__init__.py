"""The trie of semantic IDs: arrays, construction, files, lookups and filters."""
