"""The files of a run: durable writes, checked reads, manifests and the folder itself."""
