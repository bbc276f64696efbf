"""LightGCN propagation over the user–item graph."""
