"""Results that papers print, for comparison in tables. None of them was measured by this program.

HR@10 and NDCG@10 over the whole catalog. The splits are not published, so the rows have no fingerprint.

Source: CEMG, table 2, https://arxiv.org/abs/2512.21543; TIGER, https://arxiv.org/abs/2305.05065; LETTER,
https://arxiv.org/abs/2405.07314
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PrintedRow:
    """The result of a model as ``source`` prints it."""

    model: str
    source: str
    hr10: float
    ndcg10: float


_DATASETS = ("beauty", "sports", "yelp")
# Users and items of the sets of the papers; on other sets of the same name, their results say nothing.
_SIZES = ((22_363, 12_101), (35_598, 18_357), (30_431, 20_033))

# (HR@10, NDCG@10) on beauty, sports and yelp. The last row is the cold-start study of the CEMG paper.
_PAPER: dict[str, tuple[tuple[float, float], ...]] = {
    "GRU4Rec": ((0.0385, 0.0116), (0.0201, 0.0045), (0.0288, 0.0095)),
    "SASRec": ((0.0434, 0.0147), (0.0232, 0.0061), (0.0329, 0.0121)),
    "MMSRec": ((0.0577, 0.0287), (0.0305, 0.0118), (0.0387, 0.0163)),
    "MISSRec": ((0.0581, 0.0292), (0.0311, 0.0124), (0.0395, 0.0171)),
    "LlamaRec": ((0.0492, 0.0198), (0.0256, 0.0083), (0.0341, 0.0134)),
    "LLM-ESR": ((0.0515, 0.0214), (0.0269, 0.0091), (0.0353, 0.0140)),
    "TIGER": ((0.0533, 0.0251), (0.0281, 0.0103), (0.0368, 0.0151)),
    "LETTER": ((0.0552, 0.0268), (0.0295, 0.0111), (0.0377, 0.0159)),
    "MMGRec": ((0.0571, 0.0281), (0.0302, 0.0119), (0.0389, 0.0166)),
    "CEMG": ((0.0665, 0.0348), (0.0363, 0.0157), (0.0458, 0.0212)),
    "CEMG, cold items": ((0.0305, 0.0153), (0.0183, 0.0094), (0.0231, 0.0125)),
}

_OWN: dict[str, dict[str, tuple[float, float]]] = {  # what a model's own paper prints
    "TIGER": {"beauty": (0.0648, 0.0384), "sports": (0.0400, 0.0225)},
    "LETTER": {"beauty": (0.0672, 0.0364), "yelp": (0.0426, 0.0231)},
}


def printed_rows(dataset: str, users: int | None = None, items: int | None = None) -> list[PrintedRow]:
    """Return the printed results on a data set, whose name may be in any case; empty if there are none.

    With ``users`` and ``items``, the set must have as many as that of the papers.
    """
    name = dataset.lower()
    if name not in _DATASETS:
        return []
    column = _DATASETS.index(name)
    if users is not None and items is not None and (users, items) != _SIZES[column]:
        return []
    rows = [PrintedRow(model, "CEMG paper", *values[column]) for model, values in _PAPER.items()]
    own = [
        PrintedRow(model, f"{model} paper", *values[name]) for model, values in _OWN.items() if name in values
    ]
    return rows + own
