"""The item memory: transitions of training sequences and text similarity, as scores and distributions."""

from cemg.memory.build import build_memory
from cemg.memory.config import Constants, MemoryConfig
from cemg.memory.memory import Memory

__all__ = ["Constants", "Memory", "MemoryConfig", "build_memory"]
