"""A lock for threads that build or load models of transformers.

While transformers loads a checkpoint, it replaces functions of torch and of its own for the whole process. A
model that another thread builds meanwhile would have wrong weights, such as untied ones.
"""

from __future__ import annotations

import threading

MODELS = threading.RLock()
