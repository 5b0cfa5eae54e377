# SPDX-License-Identifier: MIT
"""One run of `edgemoe bench`, in a process of its own: a task on stdin, one JSON line on stdout.

Both engines read the same text: sampling runs as always, and then the text's next token is taken whatever was sampled.
So both do the same work, and what each would have said is compared position by position.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
import time
from typing import Any

from edgemoe import bench_text, host


@dataclasses.dataclass(frozen=True)
class Task:
    """What one run does.

    Attributes:
        engine: `edgemoe` or `stock`.
        model: path of the GGUF file.
        options: keywords of `edgemoe.Llama`; of these, `stock` takes the context and the threads.
        prompt_tokens, decode_tokens: how many to evaluate at once, and then one by one.
        first_token: where in the text to begin.
        text: what to read; None for the built-in one.
        repack: let llama.cpp keep a second, repacked copy of weights, as it does by default; `stock` only.
        trace: where to leave a trace; the run is profiled then. `edgemoe` only.
    """

    engine: str
    model: str
    options: dict[str, Any]
    prompt_tokens: int
    decode_tokens: int
    first_token: int
    text: str | None = None
    repack: bool = True
    trace: str | None = None


def run(task: Task) -> dict[str, Any]:
    """Load, read the prompt, and go on token by token."""
    begin_s, begin_read = time.perf_counter(), host.storage_bytes_read()
    with contextlib.closing(_load(task)) as llm:
        record: dict[str, Any] = {
            "load_s": time.perf_counter() - begin_s,
            "load_read_bytes": host.storage_bytes_read() - begin_read,
        }
        tokens = _tokens(llm, task)
        with contextlib.ExitStack() as stack:
            profiler = None
            if task.trace is not None:
                stack.enter_context(llm.record_trace(task.trace))
                profiler = stack.enter_context(llm.profile())
            record |= _measure(llm, task, tokens)
        if profiler is not None:
            record["profile"] = profiler.result().to_dict()
        record["peak_rss_bytes"] = host.peak_rss_bytes()
        if task.engine == "edgemoe":
            stats = llm.stats()
            record |= {
                **{name: getattr(stats, name) for name in ("kernels", "slots_bytes", "budget_bytes")},
                "reuse_choice": None if llm.reuse_choice is None else llm.reuse_choice.text,
                "expert_bank_bytes": llm.plan.expert_bank_bytes,
                "n_threads": llm.n_threads,
            }
    return record


def _load(task: Task) -> Any:
    if task.engine == "edgemoe":
        import edgemoe  # before llama_cpp: it may set what OpenMP reads once

        return edgemoe.Llama(task.model, verbose=False, **task.options)
    import llama_cpp

    make = llama_cpp.Llama if task.repack else stock_without_repacking()
    kept = ("n_ctx", "n_threads", "n_threads_batch")
    options = {name: task.options[name] for name in kept if task.options.get(name) is not None}
    return make(task.model, verbose=False, **options)


def stock_without_repacking() -> Any:
    """`llama_cpp.Llama`, from now on in this process without weight repacking: repacked experts are a second, anonymous
    copy, and no mmap baseline would be left."""
    import llama_cpp

    low_level = llama_cpp.llama_cpp
    low_level.llama_model_default_params = functools.partial(_without_repacking, low_level.llama_model_default_params)
    return llama_cpp.Llama


def _without_repacking(defaults: Any) -> Any:
    params = defaults()
    params.use_extra_bufts = False
    return params


def _tokens(llm: Any, task: Task) -> list[int]:
    """The prompt, what follows it, and one token more, which is sampled last."""
    text = bench_text.TEXT if task.text is None else task.text
    all_tokens: list[int] = llm.tokenize(text.encode(), add_bos=False, special=False)
    if not all_tokens:
        raise ValueError("the text has no tokens: found 0, expected at least 1; give another text")
    n_tokens = task.prompt_tokens + task.decode_tokens + 1
    tokens = [all_tokens[(task.first_token + i) % len(all_tokens)] for i in range(n_tokens)]
    bos = llm.token_bos()
    return [bos, *tokens[: n_tokens - 1]] if bos >= 0 else tokens


def _measure(llm: Any, task: Task, tokens: list[int]) -> dict[str, Any]:
    sampled: list[int] = []
    sample = llm.sample

    def forced(*args: Any, idx: int | None = None, **kwargs: Any) -> int:
        sampled.append(int(sample(*args, idx=idx, **kwargs)))
        return tokens[(llm.n_tokens - 1 if idx is None else idx) + 1]

    llm.sample = forced
    before = _counters(llm)
    begin_s, begin_read = time.perf_counter(), host.storage_bytes_read()
    with contextlib.closing(llm.generate(tokens[: task.prompt_tokens], temp=0.0)) as generated:
        next(generated)
        ttft_s, middle, middle_read = time.perf_counter() - begin_s, _counters(llm), host.storage_bytes_read()
        begin_s = time.perf_counter()
        for _ in range(task.decode_tokens):
            next(generated)
        decode_s, after, after_read = time.perf_counter() - begin_s, _counters(llm), host.storage_bytes_read()
    del llm.sample
    record = {
        "ttft_s": ttft_s,
        "prefill_tokens_per_s": task.prompt_tokens / ttft_s,
        "decode_tokens_per_s": task.decode_tokens / decode_s,
        "prefill_read_bytes": middle_read - begin_read,
        "read_bytes_per_token": (after_read - middle_read) / task.decode_tokens,
        "sampled": sampled,
    }
    if after:
        spent = {name: value - middle[name] for name, value in after.items()}
        asked = spent["expert_hits"] + spent["expert_misses"] + spent["expert_late_hits"]
        record |= {
            "prefill_stall_share": (middle["stall_s"] - before["stall_s"]) / ttft_s,
            "stall_share": spent["stall_s"] / decode_s,
            "hit_rate": spent["expert_hits"] / asked if asked else None,
            "expert_bytes_per_token": spent["expert_bytes_read"] / task.decode_tokens,
        }
    return record


def _counters(llm: Any) -> dict[str, float]:
    if not hasattr(llm, "stats"):
        return {}
    stats = llm.stats()
    names = ("expert_hits", "expert_misses", "expert_late_hits", "expert_bytes_read", "stall_s")
    return {name: getattr(stats, name) for name in names}


def main() -> int:
    """Run the task on stdin; on failure the last line of stderr says why."""
    from edgemoe.errors import EdgeMoeError

    try:
        # llama.cpp may print to stdout, whose last line is ours.
        record = run(Task(**json.load(sys.stdin)))
    except (EdgeMoeError, ValueError, RuntimeError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    sys.stdout.write("\n" + json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
