# SPDX-License-Identifier: MIT
"""What a prompt costs: hits of the tokens after a long one and a short one, and its own time beside its bound.

*Hits.* The same text twice: all tokens but the last `n` one by one, those as one prompt, then 32 more. What the long
prompt lowers is what reading those tokens as a prompt does to the experts that decode finds. Without prefetch, whose
reads come in time or late by chance; so these are counted, not timed.

*Bound of a prompt.* The longer of computing and reading: seconds of the same prompt with every expert resident, and the
bytes that any cache of this size must read (of the experts that the prompt uses, those beyond the slots) over the
disk's speed, measured before and after by random O_DIRECT reads as large as an expert's matrix.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import larger_than_memory, loopdev, session, synthetic

MIB = 1 << 20
N_AFTER = 32  # tokens whose hits are compared
N_SHORT, N_LONG = 16, 270
N_BEFORE = 64
N_CTX = 1024
HITS_TARGET_POINTS, BOUND_TARGET, BOUND_FRACTION = 3.0, 0.8, 0.25
Record = dict[str, Any]


def hits_after(llm: Any, tokens: Sequence[int], n_prompt: int) -> float:
    """Hit rate of the last `N_AFTER` of `tokens`, the `n_prompt` before them read as one prompt."""
    first = len(tokens) - N_AFTER - n_prompt
    llm.reset()
    llm.eval(tokens[:N_BEFORE])
    for token in tokens[N_BEFORE:first]:
        llm.eval([token])
    llm.eval(tokens[first : first + n_prompt])
    llm.reset_stats()
    for token in tokens[first + n_prompt :]:
        llm.eval([token])
    rate: float = llm.stats().expert_hit_rate
    return rate


def compare_hits(llm: Any, options: argparse.Namespace, n_vocab: int, routing: str) -> list[Record]:
    """For each text: hit rates after a short and a long prompt, in an order drawn by the seed."""
    make_tokens = synthetic.ROUTINGS[routing]
    found = []
    for text in range(options.texts):
        tokens = make_tokens(N_BEFORE + N_LONG + N_AFTER, n_vocab, options.seed + text)
        order = [N_SHORT, N_LONG]
        random.Random(f"{options.seed}/{text}").shuffle(order)
        rates = {n: hits_after(llm, tokens, n) for n in order}
        found.append({"routing": routing, "text": text, "short": rates[N_SHORT], "long": rates[N_LONG]})
    return found


def prompt_seconds(llm: Any, tokens: Sequence[int]) -> tuple[float, Any]:
    """Seconds of one prompt in an empty context, and the counters of it."""
    llm.reset()
    llm.reset_stats()
    begin_s = time.perf_counter()
    llm.eval(tokens)
    return time.perf_counter() - begin_s, llm.stats()


def measure_prompts(
    llm: Any, options: argparse.Namespace, n_vocab: int, routing: str, slice_bytes: int
) -> list[Record]:
    """For each text: a prompt with everything resident, then at each fraction, after two others there."""
    from edgemoe import _native, runtime

    make_tokens = synthetic.ROUTINGS[routing]
    bank_bytes = int(runtime.slot_sizes(llm._gguf, 0).bank_slot_bytes)
    found = []
    for text in range(options.texts):
        tokens = make_tokens(3 * options.prompt_tokens, n_vocab, options.seed + text)
        prompts = [tokens[i * options.prompt_tokens :][: options.prompt_tokens] for i in range(3)]
        _native.set_slots_bytes(llm._runtime, bank_bytes)
        prompt_seconds(llm, prompts[2])  # reads
        passes = [prompt_seconds(llm, prompts[2]) for _ in range(2)]
        compute_s, resident = min(one[0] for one in passes), passes[-1][1]
        if resident.expert_misses:
            raise SystemExit(f"cannot measure computing: {options.model} does not fit into memory as a whole")
        n_experts_used = resident.expert_hits
        for fraction in options.fractions:
            slots_bytes = int(fraction * bank_bytes)
            _native.set_slots_bytes(llm._runtime, slots_bytes)
            for other in prompts[:2]:
                prompt_seconds(llm, other)
            disk = [loopdev.random_read_bytes_per_s(options.model, slice_bytes)]
            watch, begin_cpu_s = session.Watch(), time.process_time()
            prompt_s, stats = prompt_seconds(llm, prompts[2])
            others = watch.shares(time.process_time() - begin_cpu_s)
            disk.append(loopdev.random_read_bytes_per_s(options.model, slice_bytes))
            n_all = sum(t.shape[2] for t in llm._gguf.expert_tensors if "_down_" in t.name)
            must_read_bytes = max(0.0, bank_bytes * n_experts_used / n_all - slots_bytes)
            bounds = {"compute_s": compute_s, "read_s": must_read_bytes / max(disk)}
            record = {"routing": routing, "text": text, "fraction": fraction, "prompt_s": prompt_s, **bounds}
            record |= {"must_read_bytes": must_read_bytes, "read_bytes": stats.expert_bytes_read}
            record |= {"stall_s": stats.stall_s, "disk_bytes_per_s": disk, **others}
            found.append({**record, "bound_share": max(bounds.values()) / prompt_s})
    return found


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prompts", description=__doc__)
    parser.add_argument("--model", type=Path, help="GGUF file; default: the synthetic OLMoE")
    parser.add_argument("--parts", nargs="+", choices=("hits", "bound"), default=["hits", "bound"])
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.25, 0.5], help="share of expert bytes")
    parser.add_argument("--routing", nargs="+", choices=("local", "uniform"), default=["local", "uniform"])
    parser.add_argument("--texts", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=512, help="of the bound")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "edgemoe-bench")
    parser.add_argument("--json", type=Path, help="also write the JSON line to this file")
    options = parser.parse_args(arguments)
    if options.prompt_tokens > larger_than_memory.N_BATCH:
        parser.error(f"--prompt-tokens: at most {larger_than_memory.N_BATCH}, as the bound is of one micro-batch")
    return options


def report(hits: Sequence[Record], prompts: Sequence[Record]) -> list[Record]:
    """Print both tables; returns the targets."""
    targets = []
    if hits:
        print(f"| experts | routing | hit % after {N_SHORT} | after {N_LONG} | lower by, points |\n" + "|---" * 5 + "|")
    for fraction, routing in sorted({(one["fraction"], one["routing"]) for one in hits}):
        cell = [one for one in hits if (one["fraction"], one["routing"]) == (fraction, routing)]
        lower = [100 * (one["short"] - one["long"]) for one in cell]
        rates = [larger_than_memory.spread((one[key] for one in cell), 100, 1) for key in ("short", "long")]
        print(f"| {fraction:.0%} | {routing} | {rates[0]} | {rates[1]} | {larger_than_memory.spread(lower, 1, 1)} |")
        what = f"points of hits lost to a prompt of {N_LONG}, {fraction:.0%} {routing}"
        targets.append(session.target(what, statistics.median(lower), HITS_TARGET_POINTS, at_most=True))
    if prompts:
        print(f"prompts that others disturbed: {sum(one['disturbed'] for one in prompts)}; left out unless all are")
        print("| experts | routing | prompt s | computing s | reading s, bound | MiB read | must | bound / prompt |")
        print("|---" * 8 + "|")
    for fraction, routing in sorted({(one["fraction"], one["routing"]) for one in prompts}):
        cell = [one for one in prompts if (one["fraction"], one["routing"]) == (fraction, routing)]
        cell = [one for one in cell if not one["disturbed"]] or cell
        columns = (
            *(("prompt_s", 1.0, 2), ("compute_s", 1.0, 2), ("read_s", 1.0, 2)),
            *(("read_bytes", 1 / MIB, 0), ("must_read_bytes", 1 / MIB, 0), ("bound_share", 1.0, 2)),
        )
        values = [larger_than_memory.spread((one[key] for one in cell), scale, n) for key, scale, n in columns]
        print(f"| {fraction:.0%} | {routing} | " + " | ".join(values) + " |")
        if fraction == BOUND_FRACTION:
            share = statistics.median(one["bound_share"] for one in cell)
            targets.append(session.target(f"bound / prompt, {fraction:.0%} {routing}", share, BOUND_TARGET))
    return targets


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 done."""
    options = parse_options(arguments)
    options.model = session.find_model(options).resolve()
    import edgemoe
    from edgemoe import _native, runtime

    sizes = larger_than_memory.measure_sizes(options.model)
    hits: list[Record] = []
    prompts: list[Record] = []
    load = {"n_ctx": N_CTX, "n_threads": options.threads, "warm_start": False}
    if "bound" in options.parts:
        with edgemoe.Llama(options.model, **load) as llm:
            for routing in options.routing:
                prompts += measure_prompts(llm, options, sizes.n_vocab, routing, sizes.expert_slice_bytes)
    if "hits" in options.parts:
        with edgemoe.Llama(options.model, prefetch="off", **load) as llm:
            bank_bytes = int(runtime.slot_sizes(llm._gguf, 0).bank_slot_bytes)
            for routing, fraction in itertools.product(options.routing, options.fractions):
                _native.set_slots_bytes(llm._runtime, int(fraction * bank_bytes))
                hits += [{"fraction": fraction, **one} for one in compare_hits(llm, options, sizes.n_vocab, routing)]
    targets = report(hits, prompts)
    session.print_targets(targets)
    session.finish("prompts", options, hits=hits, prompts=prompts, targets=targets)
    return 0


if __name__ == "__main__":
    sys.exit(main())
