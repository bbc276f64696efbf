"""The item memory: transitions of training sequences and text similarity, as scores and distributions.

Building is in ``cemg.memory.build``, which inference does not import.
"""

from cemg.memory.config import Constants, MemoryConfig
from cemg.memory.memory import MEMORY_FILE, Memory

__all__ = ["MEMORY_FILE", "Constants", "Memory", "MemoryConfig"]
