"""The item memory: transitions of training sequences and text similarity, as scores and distributions.

Building is in ``cemg.memory.build``, which inference does not import.
"""

from cemg.memory.config import Constants, MemoryConfig
from cemg.memory.memory import Memory
from cemg.memory.memory_file import MEMORY_FILE
from cemg.memory.similarity import TEXTS_FILE

__all__ = ["MEMORY_FILE", "TEXTS_FILE", "Constants", "Memory", "MemoryConfig"]
