# SPDX-License-Identifier: MIT
"""What drafts of n-grams gain on text that repeats its prompt and cost on other text: `draft="ngram"` against `off`.

    python -m benchmarks.drafts --json results.json                  # all cells; run it again to go on after a cut
    python -m benchmarks.drafts --mib-per-s 0 --minutes 3.5 --json results.json       # some cells; a part at a time

One process with one model, loaded with `draft="ngram"`; `off` is the same model without a chooser of lengths, so that
graphs, threads and files are the same. What drafts take (`DraftMemory`: logits and index) the slots of `ngram` give up
when it is taken, as in a process of its own: a budget that leaves `off` that share of the experts. Each window begins
with empty slots (not where all experts are resident) and a chooser that has learned nothing, reads the prompt, and is
timed from the first token on. A pair is every setting once, in a drawn order: `off` twice, so that the noise shows.
With another `--mib-per-s` than 0 the kernel limits this process's reads (root, a cgroup v1 `blkio` controller): the
disk of a user whose model is many times larger than this one.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import cgroup, loopdev, session
from benchmarks.draft_texts import NEW, REPEATING, TEXTS
from benchmarks.larger_than_memory import clean_pairs, describe_model, measure_sizes, spread
from benchmarks.replay_accuracy import limited_reads

MIB = 1 << 20
OFF, OFF_AGAIN, NGRAM = "off", "off-again", "ngram"
SETTINGS = (OFF, OFF_AGAIN, NGRAM)
N_CTX = 1024
LEAST_RATIO, LEAST_GAIN = 0.95, 1.1
N_RESAMPLES, INTERVAL = 1000, 0.9
# What may differ between the parts of one table: they say which windows are run, and not how.
_NO_SETTINGS = ("json", "pairs", "minutes", "texts", "fractions", "mib_per_s")
Cell = tuple[str, float, float]  # text, share of the experts, MiB/s (0: no limit)
Record = dict[str, Any]


# ---------------------------------------------------------------- one window


class Bench:
    """The model, and how a window of a setting is run on it."""

    def __init__(self, model: Path, n_threads: int, n_tokens: int) -> None:
        import edgemoe
        from edgemoe import runtime

        self._llm = edgemoe.Llama(model, n_ctx=N_CTX, n_threads=n_threads, draft="ngram", warm_start=False)
        sizes = runtime.slot_sizes(self._llm._gguf, 0)
        self._bank_bytes, self._cycle_bytes = int(sizes.bank_slot_bytes), int(sizes.cycle_slot_bytes)
        if self._llm.plan.slots_bytes < self._bank_bytes:
            raise SystemExit(f"cannot measure drafts: {model} does not fit into memory as a whole")
        self._footprint, self._fixed_bytes = self._llm._footprint, self._llm._fixed_bytes
        self._n_tokens = n_tokens

    def close(self) -> None:
        """Free the model."""
        self._llm.close()

    def set_share(self, share: float) -> None:
        """A budget with memory for that share of the experts, as if the model had just been loaded; 1.0 is for all."""
        from edgemoe import _native, host
        from edgemoe.draft import DraftMemory

        llm = self._llm
        if share < 1.0:
            _native.set_slots_bytes(llm._runtime, self._cycle_bytes)  # nothing of the window before is left
        llm._draft_memory = DraftMemory(llm._n_vocab, N_CTX)
        llm._footprint, llm._fixed_bytes = self._footprint, self._fixed_bytes
        drafts_bytes = self._footprint.draft_buffers_bytes if share >= 1.0 else 0
        slots_bytes = max(self._cycle_bytes, int(share * self._bank_bytes)) + drafts_bytes
        llm.set_memory(host.with_slack(self._fixed_bytes + slots_bytes))

    def window(self, text: str, share: float, setting: str) -> Record:
        """Let one setting write; tokens and what they took, without the prompt and the first token."""
        from edgemoe.draft_length import DraftLengthChooser

        llm, n_steps = self._llm, 0
        model = llm._gguf
        prompt = llm.tokenize(TEXTS[text].prompt.encode(), add_bos=False, special=True)
        self.set_share(share)
        llm._chooser = DraftLengthChooser(model.n_experts, model.n_experts_used) if setting == NGRAM else None
        llm.reset()
        with contextlib.closing(llm.generate(prompt, temp=0.0)) as generated:
            tokens = [next(generated)]
            before, watch, begin_cpu_s = llm.stats(), session.Watch(), time.process_time()
            begin_s = time.perf_counter()
            tokens += [next(generated) for _ in range(self._n_tokens)]
            seconds = time.perf_counter() - begin_s
            others = watch.shares(time.process_time() - begin_cpu_s)
            after = llm.stats()
        n_steps = self._n_tokens - (after.accepted_tokens - before.accepted_tokens)
        return {
            "tokens_sha256": hashlib.sha256(json.dumps(tokens).encode()).hexdigest(),
            "tokens_per_s": self._n_tokens / seconds,
            "read_bytes_per_token": (after.expert_bytes_read - before.expert_bytes_read) / self._n_tokens,
            "stall_s_per_token": (after.stall_s - before.stall_s) / self._n_tokens,
            "drafted_tokens": after.drafted_tokens - before.drafted_tokens,
            "accepted_tokens": after.accepted_tokens - before.accepted_tokens,
            "n_steps": n_steps,
            "slots_bytes": after.slots_bytes,
            **others,
        }


# ---------------------------------------------------------------- the table


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """Everything resident is not run with a limited disk: nothing is read."""
    return [
        (text, share, rate)
        for rate in options.mib_per_s
        for share in options.fractions
        for text in options.texts
        if share < 1.0 or rate == 0
    ]


def run_pair(window: Callable[[str, float, str], Record], cell: Cell, pair: int, seed: int) -> list[Record]:
    """Every setting once, in an order drawn for this pair."""
    text, share, rate = cell
    order = list(SETTINGS)
    random.Random(f"{seed}/{cell}/{pair}").shuffle(order)
    where = {"text": text, "kind": TEXTS[text].kind, "fraction": share, "mib_per_s": rate, "pair": pair}
    return [{**where, "setting": setting, "order": order, **window(text, share, setting)} for setting in order]


def run_table(
    options: argparse.Namespace,
    window: Callable[[str, float, str], Record],
    runs: list[Record],
    limited: Callable[[float | None], contextlib.AbstractContextManager[None]],
    save: Callable[[], None],
) -> bool:
    """Run the pairs that `runs` lacks, pair by pair of all cells, and add them; False if the time was up before."""
    done = {(_cell(one), one["pair"]) for one in runs}
    end_s = math.inf if options.minutes is None else time.monotonic() + 60 * options.minutes
    for pair in range(options.pairs):
        for (share, rate), cells in _groups(cells_of(options)):
            wanted = [cell for cell in cells if (cell, pair) not in done]
            if not wanted:
                continue
            if time.monotonic() >= end_s:
                return False
            with limited(rate or None):
                if share >= 1.0:
                    window(wanted[0][0], share, OFF)  # reads the experts, which then stay
                for cell in wanted:
                    if time.monotonic() >= end_s:
                        return False
                    runs += run_pair(window, cell, pair, options.seed)
                    print_pair(runs[-len(SETTINGS) :])
                    save()
    return True


def _cell(one: Record) -> Cell:
    return one["text"], one["fraction"], one["mib_per_s"]


def _groups(cells: Iterable[Cell]) -> Iterator[tuple[tuple[float, float], list[Cell]]]:
    keys = list(dict.fromkeys(cell[1:] for cell in cells))
    yield from ((key, [cell for cell in cells if cell[1:] == key]) for key in keys)


def find_faults(runs: Sequence[Record]) -> list[str]:
    """Texts that were written in more than one way: neither drafts nor budgets may change a token."""
    faults = []
    for text in dict.fromkeys(one["text"] for one in runs):
        found = {one["tokens_sha256"]: one for one in runs if one["text"] == text}
        if len(found) > 1:
            cases = ", ".join(f"{one['setting']} at {one['fraction']:.0%}" for one in found.values())
            faults.append(f"tokens of {text} differ: found {len(found)} sequences ({cases}), expected 1")
    return faults


# ---------------------------------------------------------------- what follows from it


def ratios(runs: Sequence[Record], setting: str) -> list[float]:
    """Speed within each pair: of `ngram` over the geometric mean of both `off`, of `off-again` over `off`."""
    found = []
    for key in dict.fromkeys((_cell(one), one["pair"]) for one in runs):
        speed = {one["setting"]: one["tokens_per_s"] for one in runs if (_cell(one), one["pair"]) == key}
        base = speed[OFF] if setting == OFF_AGAIN else math.sqrt(speed[OFF] * speed[OFF_AGAIN])
        found.append(speed[setting] / base)
    return found


def mean_ratio(values: Sequence[float]) -> float:
    """The geometric mean: twice as fast once and half as fast once is no gain."""
    return math.exp(statistics.fmean(map(math.log, values)))


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Where 90 % of the geometric means of resampled pairs lie (bootstrap)."""
    rng = random.Random(seed)
    means = sorted(mean_ratio(rng.choices(values, k=len(values))) for _ in range(N_RESAMPLES))
    tail = (1 - INTERVAL) / 2
    return means[int(tail * N_RESAMPLES)], means[int((1 - tail) * N_RESAMPLES) - 1]


def undisturbed(runs: Sequence[Record]) -> list[Record]:
    """The runs of one cell without the pairs that others disturbed, if enough are left.

    What the kernel computes for reads is not charged to this process, so "others" are what goes beyond the quietest
    window of the cell.
    """
    least = min(one["other_cpu_share"] for one in runs)
    limits = cgroup.DISTURBED_STEAL_SHARE, least + cgroup.DISTURBED_OTHER_CPU_SHARE
    marked = [
        {**one, "disturbed": one["steal_share"] > limits[0] or one["other_cpu_share"] > limits[1]} for one in runs
    ]
    return clean_pairs(marked)


def print_pair(runs: Sequence[Record]) -> None:
    """One line while it runs."""
    speeds = ", ".join(f"{one['setting']} {one['tokens_per_s']:.1f}" for one in runs)
    one, others = runs[0], max(one["other_cpu_share"] for one in runs)
    where = f"{one['fraction']:.0%} {one['mib_per_s']:g} MiB/s {one['text']} pair {one['pair']}"
    print(f"{where}: {speeds} tok/s, others up to {others:.0%} of the CPU", file=sys.stderr, flush=True)


def _ratio_text(values: Sequence[float]) -> str:
    low, high = interval(values)
    return f"{mean_ratio(values):.2f} ({low:.2f}-{high:.2f})"


def report(runs: Sequence[Record]) -> list[Record]:
    """Print the table; returns the targets."""
    targets = []
    print(
        "| experts | disk MiB/s | text | pairs | off tok/s | ngram tok/s | MiB/token off, ngram | stall ms/token off, "
        "ngram | drafted, accepted | tokens/step | ngram / off (90 %) | off / off |\n" + "|---" * 12 + "|"
    )
    for text, share, rate in dict.fromkeys(_cell(one) for one in runs):
        of_cell = undisturbed([one for one in runs if _cell(one) == (text, share, rate)])
        off, ngram = ([one for one in of_cell if one["setting"] == setting] for setting in (OFF, NGRAM))

        def median(records: Sequence[Record], key: str, scale: float = 1.0) -> float:
            return scale * statistics.median(one[key] for one in records)

        speeds = [spread((one["tokens_per_s"] for one in records), 1, 1) for records in (off, ngram)]
        read = [f"{median(records, 'read_bytes_per_token', 1 / MIB):.1f}" for records in (off, ngram)]
        stall = [f"{median(records, 'stall_s_per_token', 1e3):.1f}" for records in (off, ngram)]
        counts = [f"{median(ngram, key):.0f}" for key in ("drafted_tokens", "accepted_tokens")]
        per_step = statistics.median((one["n_steps"] + one["accepted_tokens"]) / one["n_steps"] for one in ngram)
        gains, noise = ratios(of_cell, NGRAM), ratios(of_cell, OFF_AGAIN)
        columns = (
            *(f"{share:.0%}", f"{rate:g}" if rate else "no limit", text, str(len(ngram)), *speeds),
            *(", ".join(read), ", ".join(stall), ", ".join(counts), f"{per_step:.2f}"),
            *(_ratio_text(gains), _ratio_text(noise)),
        )
        print("| " + " | ".join(columns) + " |")
        where = f"{share:.0%}, {f'{rate:g} MiB/s' if rate else 'disk not limited'}, {text}"
        low, high = interval(gains)
        what = f"ngram / off, {where}; 90 % within {low:.2f} to {high:.2f}"
        one = session.target(what, mean_ratio(gains), LEAST_RATIO if TEXTS[text].kind == NEW else LEAST_GAIN)
        targets.append({**one, "interval": [low, high], "off_interval": list(interval(noise))})
    for kind in (REPEATING, NEW):
        of_kind = [one for one in runs if one["kind"] == kind]
        for share, rate in dict.fromkeys((one["fraction"], one["mib_per_s"]) for one in of_kind):
            group = [one for one in of_kind if (one["fraction"], one["mib_per_s"]) == (share, rate)]
            by_cell = [undisturbed([one for one in group if one["text"] == text]) for text in _texts(group)]
            gains = [ratio for part in by_cell for ratio in ratios(part, NGRAM)]
            noise = [ratio for part in by_cell for ratio in ratios(part, OFF_AGAIN)]
            print(
                f"{kind} texts, {share:.0%}, {f'{rate:g} MiB/s' if rate else 'disk not limited'}: "
                f"ngram / off {_ratio_text(gains)}, off / off {_ratio_text(noise)}, {len(gains)} pairs"
            )
    n_kept = sum(
        len(undisturbed([one for one in runs if _cell(one) == cell])) for cell in dict.fromkeys(map(_cell, runs))
    )
    n_left_out, n_pairs = (len(runs) - n_kept) // len(SETTINGS), len(runs) // len(SETTINGS)
    print(f"pairs left out as others disturbed them: {n_left_out} of {n_pairs}")
    return targets


def _texts(runs: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(one["text"] for one in runs))


# ---------------------------------------------------------------- the command


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drafts", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="GGUF file; default: the demo")
    parser.add_argument("--texts", nargs="+", choices=list(TEXTS), default=list(TEXTS))
    parser.add_argument("--fractions", nargs="+", type=float, default=[1.0, 0.58, 0.3], help="share of expert bytes")
    parser.add_argument("--mib-per-s", nargs="+", type=float, default=[0, 400], help="of the disk; 0: no limit")
    parser.add_argument("--tokens", type=int, default=96, help="timed in each window")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--minutes", type=float, help="begin no pair after that time; default: no end")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the JSON line to this file, and go on with what it has")
    return parser.parse_args(arguments)


def earlier_runs(options: argparse.Namespace, model: Record) -> list[Record]:
    """The runs that `options.json` has already.

    Raises:
        ValueError: it is of another model or other settings, or not of this benchmark.
    """
    if options.json is None or not options.json.exists():
        return []
    try:
        table = json.loads(options.json.read_text())
        found, runs = {**table["settings"], "model": table["model"]}, list(table["runs"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cannot go on with {options.json}: expected a table of this benchmark ({error})") from error
    expected = {**session.settings(options), "model": model}
    changed = [k for k in expected if k not in _NO_SETTINGS and found.get(k) != expected[k]]
    if changed:
        raise ValueError(f"cannot go on with {options.json}: found other {', '.join(changed)}; name another file")
    return runs


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 done, 1 a setting wrote other tokens, 2 it cannot run here."""
    options = parse_options(arguments)
    from edgemoe.demo import demo_model

    path = (options.model or demo_model()).resolve()
    model = describe_model(path)
    try:
        runs = earlier_runs(options, model)
    except ValueError as error:
        print(f"drafts: {error}", file=sys.stderr)
        return 2
    disk = [loopdev.random_read_bytes_per_s(path, measure_sizes(path).expert_slice_bytes)]

    def save() -> None:
        session.save("drafts", options, model=model, disk_bytes_per_s=disk, runs=runs)

    try:
        with contextlib.closing(Bench(path, options.threads, options.tokens)) as bench:
            is_whole = run_table(options, bench.window, runs, functools.partial(limited_reads, path), save)
    except OSError as error:
        print(f"drafts cannot limit reads here: {error}", file=sys.stderr)
        return 2
    if not is_whole:
        print("time is up: run it again to go on", file=sys.stderr)
    targets = report(runs)
    session.print_targets(targets)
    faults = find_faults(runs)
    print("".join(f"FAULT {fault}\n" for fault in faults), end="", file=sys.stderr)
    session.finish("drafts", options, model=model, disk_bytes_per_s=disk, runs=runs, targets=targets, faults=faults)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
