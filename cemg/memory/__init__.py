"""The item memory: transitions of training sequences and text similarity, as scores and distributions.

Building is in ``cemg.memory.build``, which inference does not import.
"""

from cemg.memory.config import Constants, MemoryConfig
from cemg.memory.memory import MEMORY_FILE, Memory
from cemg.memory.similarity import TEXTS_FILE

__all__ = ["MEMORY_FILE", "TEXTS_FILE", "Constants", "Memory", "MemoryConfig"]
