"""The tables of speed and memory use in the documentation, from bench/results/; `generate.py` writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "bench" / "results"
Row = dict[str, Any]
Cells = dict[tuple[str, str], Row]  # rows of a latency file by case and peer


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


CASES = {  # case in the files of bench/latency.py: model, users, beams
    "tiger B1 W50": "T5 at TIGER's size, 1, 50",
    "tiger B8 W50": "T5 at TIGER's size, 8, 50",
    "t5-small B1 W50": "T5-small, 1, 50",
    "t5-small B8 W50": "T5-small, 8, 50",
    "decoder-4 B1 W50": "4-layer Llama, 1, 50",
    "decoder-4 B8 W50": "4-layer Llama, 8, 50",
    "smollm2-135m B1 W10": "SmolLM2-135M's shape, 1, 10",
}
README_CASES = {
    case: name.removesuffix(", 50").replace(", 1", ", 1 user").replace(", 8", ", 8 users")
    for case, name in list(CASES.items())[:5]
}
DICT_TRIE = "transformers + dict trie"
CTRANSLATE2 = ("CTranslate2 fp32, unconstrained", "CTranslate2 int8, unconstrained")
PEERS = (DICT_TRIE, *CTRANSLATE2)


def readme_speed() -> str:
    """Medians of whole recommendations on the CPU and on the GPU, in milliseconds."""
    cpu, gpu = latency("latency-cpu"), latency("latency-h200")
    rows = []
    for case, model in README_CASES.items():
        on_gpu = [gpu[case, DICT_TRIE][key] for key in ("p50_ms", "peer_p50_ms")]
        rows.append((model, *fastest_bold(medians(cpu, case, PEERS)), *fastest_bold(on_gpu)))
    peers = ("transformers + dict trie", "CTranslate2 fp32\\*", "CTranslate2 int8\\*")
    return table(("model", "CEMG", *peers, "CEMG, GPU", "transformers + dict trie, GPU"), rows)


def vocab_speed() -> str:
    peers = (DICT_TRIE, "transformers + our processor", *CTRANSLATE2)
    head = (DICT_TRIE, "transformers + our processor", "CTranslate2 fp32", "CTranslate2 int8")
    cells = latency("latency-cpu")
    memory = [f"{cells[case, DICT_TRIE]['peak_mib']:,.0f} MiB" for case in CASES]
    rows = [(*row, mib) for row, mib in zip(speed_rows(cells, peers), memory, strict=True)]
    return table(("model, users, beams", "CEMG", *head, "floor", "memory of CEMG"), rows)


def valid_speed() -> str:
    head = (DICT_TRIE, "CTranslate2 fp32", "CTranslate2 int8")
    rows = speed_rows(latency("latency-valid-cpu"), PEERS)
    return table(("model, users, beams", "CEMG", *head, "floor"), rows)


def speed_rows(cells: Cells, peers: Sequence[str]) -> list[tuple[str, ...]]:
    """Per case: CEMG and its peers, the fastest in bold, and the floor."""
    return [
        (name, *fastest_bold(medians(cells, case, peers)), milliseconds(cells[case, DICT_TRIE]["floor_ms"]))
        for case, name in CASES.items()
    ]


def parts_of_a_search() -> str:
    """The share of each part of the search."""
    cells = latency("latency-cpu")
    rows = []
    for case, name in CASES.items():
        row = cells[case, DICT_TRIE]
        times = [f"{milliseconds(row[key])} ms" for key in ("p50_ms", "floor_ms")]
        rows.append((name, *times, *(f"{share:.0%}".replace("%", " %") for share in row["parts"].values())))
    return table(("model, users, beams", "CEMG", "floor", *cells["tiger B1 W50", DICT_TRIE]["parts"]), rows)


def gpu_speed() -> str:
    cells = latency("latency-h200")
    rows = []
    for case, name in list(CASES.items())[:6]:
        row = cells[case, DICT_TRIE]
        pair = fastest_bold([row["p50_ms"], row["peer_p50_ms"]])
        rows.append((name, *pair, f"{row['ratio']:.0f}", f"{row['floor_ms']:.2g}"))
    return table(("model, users, beams", "CEMG", DICT_TRIE, "times as fast", "floor"), rows)


MEMORY_CASES = {  # case in the file of bench/latency.py --memory: users, items
    "tiger B1 W50": "1 user, 12,101 items",
    "tiger B8 W50": "8 users, 12,101 items",
    **{f"tiger B1 W50 N1e+0{power}": f"1 user, 1e{power} items" for power in (4, 5, 6, 7)},
}


def memory_cost() -> str:
    """Searches with and without an item memory."""
    cells = latency("latency-memory-cpu")
    rows = []
    for case, name in MEMORY_CASES.items():
        row = cells[case, "search"]
        times = (row[key] for key in ("peer_p50_ms", "p50_ms", "query_ms", "tensors_ms"))
        cost = f"{100 * row['cost']:+.1f} %"
        rows.append((name, *(f"{time:.2f}" for time in times), cost, f"{row['entries']:,.0f}"))
    head = (
        "users, items",
        "search",
        "with the memory",
        "query",
        "sorting and sums",
        "cost",
        "items with mass",
    )
    return table(head, rows)


def memory_use() -> str:
    """Memory use and times of the item memory by number of items."""
    rows = []
    facts = {row["case"]: row for row in rows_of("memory-cpu")}
    for case, items in (("N1e+04", 12_000), ("N1e+06", 1_000_000)):
        query, event = (facts[f"{case} {name}"] for name in ("query", "event"))
        build = query["build_peak_mib"] - query["build_input_mib"]
        mebibytes = (f"{mib:,.0f} MiB" for mib in (query["file_mib"], query["loaded_mib"], build))
        times = (f"{1000 * row['p50_ms']:.0f} µs" for row in (query, event))
        rows.append((f"{items:,}", *mebibytes, f"{query['build_seconds']:,.0f} s", *times))
    return table(
        ("items", "file", "in use after queries", "peak of a build", "build", "query", "event"), rows
    )


DTYPES = ("float32", "bfloat16")


def training_step() -> str:
    """A training step of the generator, by length of the history."""
    cells = {(row["case"], row["backend"], row["peer"]): row for row in rows_of("generator-step-cpu")}
    rows = []
    for history in (4, 7, 14):
        case = f"B64 T{history}"
        ours = [cells[case, dtype, "module, float32"]["p50_ms"] for dtype in DTYPES]
        theirs = [cells[case, "float32", f"module, {dtype}"]["peer_p50_ms"] for dtype in DTYPES]
        rows.append((str(history), *(f"{time:.0f}" for time in (*ours, *theirs))))
    head = ("items in the history", "float32", "bfloat16", "module, float32", "module, bfloat16")
    return table(head, rows)


def medians(cells: Cells, case: str, peers: Sequence[str]) -> list[float]:
    return [cells[case, peers[0]]["p50_ms"], *(cells[case, peer]["peer_p50_ms"] for peer in peers)]


SIZES = (10**6, 10**7, 10**8, 10**9)  # items, and as many users with ten interactions each
BEAUTY = RESULTS.parents[1] / "results" / "experiments" / "beauty" / "tasks" / "beauty-cemg-seed0"  # one core


def scale_costs() -> str:
    """Seconds and bytes of each stage by number of items: measured at sizes in bold, else in proportion."""
    run, took = (
        json.loads((BEAUTY / f"{name}.json").read_text(encoding="utf-8")) for name in ("result", "took")
    )
    config, items, users = run["config"], run["split"]["items"], run["split"]["users"]
    seconds, trained = (
        config["stage_seconds"],
        took["interactions"] - 2 * users,
    )  # two of each user are held out
    steps = trained / config["graph"]["batch_size"]
    per_edge = seconds["graph"] / config["graph"]["epochs"] / steps / (2 * trained)
    vectors = config["tokenizer"]["dim"] * 4
    query = next(row for row in rows_of("memory-cpu") if row["case"] == "N1e+06 query")
    tries = {row["case"]: row for row in rows_of("trie-build-cpu")}
    search = {row["case"]: row for row in rows_of("latency-memory-cpu")}

    def graph(n: int) -> float:  # one epoch in batches of 16,384 interactions
        return (10 * n / 16_384) * (20 * n) * per_edge

    def trie(n: int) -> str:
        row = tries.get(f"N {n:.0e} K 256, sorting included")
        if row is None:
            row = tries["N 1e+08 K 256, sorting included"]
            row = {name: row[name] * n / 10**8 for name in ("p50_ms", "bytes")}
            return cost(row["p50_ms"] / 1000, row["bytes"])
        return bold(cost(row["p50_ms"] / 1000, row["bytes"]))

    def memory(n: int) -> str:
        at = n / 10**6
        text = cost(query["build_seconds"] * at, query["loaded_mib"] * 2**20 * at)
        return bold(text) if at == 1 else text

    def one_search(n: int) -> str:
        row = search.get(f"tiger B1 W50 N{n:.0e}")
        return "" if row is None else bold(f"{row['p50_ms']:.1f} ms")

    rows: list[tuple[str, Callable[[int], str]]] = [
        ("texts through MiniLM", lambda n: cost(seconds["features"] / items * n, 384 * 4 * n)),
        ("LightGCN, one epoch", lambda n: cost(graph(n), 3 * 4 * config["graph"]["dim"] * 2 * n)),
        ("RQ-VAE, ten epochs",
         lambda n: cost(10 * seconds["tokenizer"] / config["tokenizer"]["epochs"] / items * n, vectors * n)),
        ("trie", trie),
        ("item memory", memory),
        ("generator, one epoch",
         lambda n: cost(seconds["generator"] / config["generator"]["epochs"] / users * n,
                        3 * 4 * config["backbone"]["dim"] * n)),
        ("one search, 50 beams, with the memory", one_search),
        ("lists for all users, in batches of 8",
         lambda n: cost(search["tiger B8 W50"]["p50_ms"] / 8e3 * n, 0)),
    ]  # fmt: skip
    cells = [(name, *(cell(size) for size in SIZES)) for name, cell in rows]
    return table(("stage", *(f"{size:.0e}".replace("e+0", "e") for size in SIZES)), cells)


SERVED = {  # file of bench/serve.py: run
    "serve-tiger-cpu": "Beauty, T5 at TIGER's size, 12,101 items",
    "serve-llama-cpu": "Beauty, 4-layer Llama of width 128, 12,101 items",
    "serve-million-cpu": "synthetic, 6-layer Llama of width 256, 1e6 items",
    "serve-demo-cpu": "demo, 1 thread, 400 items",
}


def service_latency() -> str:
    """Latency by offered rate, of a search alone at that pace and of each server."""
    rows = []
    for name, run in SERVED.items():
        found = rows_of(name)
        alone = {
            (row["server"].removeprefix("search alone, "), row["offered_per_s"]): row
            for row in found
            if row["server"].startswith("search alone")
        }
        for row in found:
            if "requests" not in row:
                continue
            rate = row["offered_per_s"]
            engine = {"cemg-serve": "cemg", "FastAPI + generate()": "transformers"}.get(row["server"])
            search = alone.get((engine or "", rate))
            rows.append((
                run, row["server"], f"{rate:g}", "" if search is None else milliseconds(search["p50_ms"]),
                *(milliseconds(row[f"{which}_ms"]) for which in ("p50", "p95", "p99")),
            ))  # fmt: skip
    return table(("run", "server", "requests per second", "search alone, p50", "p50", "p95", "p99"), rows)


def service_limits() -> str:
    """The highest rate within a p99, the start, and additions, by server."""
    rows = []
    for name, run in SERVED.items():
        servers: dict[str, Row] = {}
        for row in rows_of(name):
            if not row["server"].startswith("search alone") and "requests" not in row:
                added = {"added_ms": row["p50_ms"]} if "additions" in row else {}
                servers.setdefault(row["server"], {}).update(row | added)
        for server, row in servers.items():
            limit = f"{row['p99_limit_ms']:g} ms: {row['highest_rate']:.3g}" if "highest_rate" in row else ""
            added = f"{milliseconds(row['added_ms'])} ms" if "added_ms" in row else ""
            rows.append((run, server, limit, f"{row['start_s']:.1f} s", added))
    head = ("run", "server", "requests per second within a p99", "start", "item with a title, until active")
    return table(head, rows)


def bold(text: str) -> str:
    return f"**{text}**"


def cost(seconds: float, size: float) -> str:
    """``3.2 h, 14 GB``; a size of 0 is left out."""
    for name, unit in (("days", 86_400), ("h", 3_600), ("min", 60), ("s", 1), ("ms", 1e-3)):
        if seconds >= unit or name == "ms":
            break
    text = f"{significant(seconds / unit)} {name}"
    if not size:
        return text
    for name, unit in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= unit or name == "MB":
            break
    return f"{text}, {significant(size / unit)} {name}"


def significant(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def latency(name: str) -> Cells:
    """The rows of a result file of ``bench/latency.py`` by case and peer."""
    return {(row["case"], row["peer"]): row for row in rows_of(name)}


def rows_of(name: str) -> list[Row]:
    """The rows of a result file of a benchmark."""
    rows: list[Row] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    return rows


def fastest_bold(medians: Sequence[float]) -> list[str]:
    return [f"**{milliseconds(m)}**" if m == min(medians) else milliseconds(m) for m in medians]


def milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}"
