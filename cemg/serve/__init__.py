"""``cemg-serve``: recommendations over HTTP, from a catalog and a memory that change while it serves."""
