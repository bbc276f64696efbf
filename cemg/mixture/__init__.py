"""The mixture of a generator with other experts: their weights for a history, and the prior of a search.

P(item | history) = sum over experts e of w_e P_e. The generator is one expert. The others, the *sources*,
give sparse distributions over items; averaged by their weights they are the item prior of the search.
"""

from cemg.mixture.config import GateConfig
from cemg.mixture.gate import GATE_FILE, Experts, Gate, Mixed
from cemg.mixture.sources import DENSE, MEMORY, SOFTMAX, DenseSource, Masses, MemorySource, Source

__all__ = [
    "DENSE",
    "GATE_FILE",
    "MEMORY",
    "SOFTMAX",
    "DenseSource",
    "Experts",
    "Gate",
    "GateConfig",
    "Masses",
    "MemorySource",
    "Mixed",
    "Source",
]
