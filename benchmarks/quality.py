# SPDX-License-Identifier: MIT
"""How far our kernels are from float arithmetic on the same quantized weights, and how far llama.cpp is.

Two parts. `layer`: a whole MoE layer, per format and instruction set, against float64 (kernel_benchmark --layer-nmse).
`model`: KL divergence of the next token's distribution from that of stock llama.cpp on a copy of the file whose experts
are dequantized to F32 by gguf-py; all else in the copy is the same, so what differs is the experts' arithmetic.

A gate as far as numbers repeat: they depend on seeds and not on time, so it runs on a busy machine as well.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import kernels, session
from benchmarks.session import Record
from edgemoe.converters.cross_entropy import log_softmax

LIMIT = 1.05
FORMATS = ("Q4_K", "Q6_K", "Q8_0", "Q4_0", "MXFP4", "IQ4_XS")
SMALL_BLOCKS = {"Q8_0", "Q4_0", "Q4_1", "MXFP4", "IQ4_NL", "BF16", "F16"}
MODELS = ("olmoe", "demo")
OLMOE_CUT = {"n_layers": 2, "n_experts": 32, "n_vocab": 8192}  # F32 experts: 1.6 GB
N_BOOTSTRAP = 2000
KL_ROWS = 64  # at once: 64 positions of 49152 tokens are 24 MiB of float64
Logits = npt.NDArray[np.float32]  # (positions, n_vocab)
Options = argparse.Namespace


def run_worker() -> None:
    """Write the logits of all positions of the sequences that stdin asks for to a file."""
    task = json.load(sys.stdin)
    n_tokens = len(task["sequences"][0])
    options = {"n_ctx": -(-n_tokens // 256) * 256, "n_batch": n_tokens, "n_ubatch": n_tokens, "logits_all": True}
    options |= dict.fromkeys(("n_threads", "n_threads_batch"), os.cpu_count())
    llm = session.load_engine(task["engine"], task["model"], **options)
    rows = []
    for tokens in task["sequences"]:
        llm.reset()
        llm.eval(tokens)
        rows.append(np.array(llm.scores[:n_tokens], np.float32))
    np.save(task["out"], np.concatenate(rows))
    print(json.dumps({"kernels": getattr(llm.stats(), "kernels", None) if hasattr(llm, "stats") else None}))


def logits_of(engine: str, model: Path, sequences: list[list[int]], folder: Path) -> tuple[Logits, Record]:
    """Logits of one engine, computed in a process of its own."""
    out = folder / f"{engine}.npy"
    task = {"engine": engine, "model": str(model), "sequences": sequences, "out": str(out)}
    command = [sys.executable, "-m", "benchmarks.quality", "--worker"]
    done = subprocess.run(
        command, cwd=session.REPO_ROOT, input=json.dumps(task), stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(f"quality: {engine} failed on {model} with exit code {done.returncode}")
    logits: Logits = np.load(out)
    out.unlink()
    return logits, json.loads(done.stdout.strip().splitlines()[-1])


def recast_experts(source: Path, target: Path, type_of: Callable[[int], str]) -> Path:
    """Copy a model with its experts in other types; `type_of` names it, given the width of a row.

    Values come from gguf-py's dequantization, which nobody here wrote; quantizing is ggml's own.
    """
    import gguf

    from benchmarks.synthetic_quant import _quantize

    def is_expert(tensor: Any) -> bool:
        return "_exps.weight" in tensor.name

    reader = gguf.GGUFReader(source)
    architecture = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(target, architecture)
    writer.data_alignment = reader.alignment
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":  # the writer's own
            item_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=item_type)
    types = {t.name: gguf.GGMLQuantizationType[type_of(int(t.shape[0]))] for t in reader.tensors if is_expert(t)}
    for tensor in reader.tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        if tensor.name in types:
            block, block_bytes = gguf.GGML_QUANT_SIZES[types[tensor.name]]
            n_bytes = int(np.prod(shape)) // block * block_bytes
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), n_bytes, raw_dtype=types[tensor.name])
        else:
            data = tensor.data
            writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        data = tensor.data
        if tensor.name in types:
            floats = gguf.dequantize(data, tensor.tensor_type).reshape(-1, int(tensor.shape[0]))
            floats = np.ascontiguousarray(floats, np.float32)
            data = floats if types[tensor.name].name == "F32" else _quantize(floats, types[tensor.name])
        writer.write_tensor_data(data)
    writer.close()
    return target


def kl_divergences(reference: Logits, found: Logits) -> npt.NDArray[np.float64]:
    """KL(reference || found) of each position, in nats."""
    parts = []
    for begin in range(0, len(reference), KL_ROWS):
        expected = log_softmax(reference[begin : begin + KL_ROWS])
        parts.append((np.exp(expected) * (expected - log_softmax(found[begin : begin + KL_ROWS]))).sum(axis=1))
    return np.concatenate(parts)


def bootstrap_interval(ours: npt.NDArray[np.float64], theirs: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The 5 % and 95 % quantiles of mean(ours) / mean(theirs) under resampling of the rows.

    Rows are sequences: positions of one sequence share what earlier ones left in the KV cache, so they are no
    independent samples.
    """
    picks = np.random.default_rng(0).integers(len(ours), size=(N_BOOTSTRAP, len(ours)))
    ratios = ours.mean(axis=1)[picks].mean(axis=1) / theirs.mean(axis=1)[picks].mean(axis=1)
    quantiles = np.quantile(ratios, [0.05, 0.95])
    return float(quantiles[0]), float(quantiles[1])


def compare_model(name: str, model: Path, sequences: list[list[int]], options: Options, folder: Path) -> Record:
    """Mean KL of every engine from the float experts, and ours over llama.cpp's."""
    reference_file = recast_experts(model, folder / "reference.gguf", lambda _: "F32")
    reference, _ = logits_of("stock-plain", reference_file, sequences, folder)
    reference_file.unlink()
    record: Record = {"model": name, "n_positions": len(reference), "kl_mean": {}, "kl_median": {}, "same_best": {}}
    divergences = {}
    for engine in options.engines:
        found, info = logits_of(engine, model, sequences, folder)
        divergences[engine] = kl = kl_divergences(reference, found)
        record["kl_mean"][engine], record["kl_median"][engine] = float(kl.mean()), float(np.median(kl))
        record["same_best"][engine] = float((reference.argmax(axis=1) == found.argmax(axis=1)).mean())
        if info["kernels"]:
            record.setdefault("kernels", {})[engine] = info["kernels"]
    if "ours" in divergences and "stock-plain" in divergences:
        ours, theirs = divergences["ours"], divergences["stock-plain"]
        record["ratio"] = float(ours.mean() / theirs.mean())
        shape = (len(sequences), -1)
        record["ratio_interval"] = bootstrap_interval(ours.reshape(shape), theirs.reshape(shape))
        record["ratio_of_medians"] = float(np.median(ours) / np.median(theirs))
    return record


def make_olmoe(quant: str, folder: Path, options: Options) -> tuple[Path, list[list[int]]]:
    """A synthetic model of OLMoE's width with few layers, and uniform tokens."""
    from benchmarks import synthetic

    changes = dict(OLMOE_CUT, n_experts=16) if options.quick else OLMOE_CUT
    model = synthetic.write_preset(folder / "model.gguf", "olmoe", quant=quant, **changes)
    n_vocab = int(changes["n_vocab"])
    return model, [synthetic.uniform_tokens(options.positions, n_vocab, seed) for seed in range(options.sequences)]


def make_demo(quant: str, folder: Path, options: Options) -> tuple[Path, list[list[int]]]:
    """The demo model with its experts quantized again, and English text.

    Its rows of 576 values (gate and up) are no whole blocks of 256: they get Q8_0 where `quant` has such blocks.
    """
    import edgemoe
    from edgemoe.converters.upcycle import default_calibration_text

    def type_of(width: int) -> str:
        return quant if width % 256 == 0 or quant in SMALL_BLOCKS else "Q8_0"

    source = edgemoe.demo_model()
    model = recast_experts(source, folder / "model.gguf", type_of)
    tokens = tokenize(source, default_calibration_text())
    n = options.positions
    if len(tokens) < n:
        sys.exit(f"quality: the calibration text has {len(tokens)} tokens, expected {n}; use fewer --positions")
    begins = np.linspace(0, len(tokens) - n, options.sequences).astype(int)
    return model, [tokens[begin : begin + n] for begin in begins]


def tokenize(model: Path, text: str) -> list[int]:
    """Tokens of a text by the model's own vocabulary."""
    import llama_cpp

    llm = llama_cpp.Llama(str(model), vocab_only=True, verbose=False)
    return list(llm.tokenize(text.encode()))


def measure_layers(options: Options) -> list[Record]:
    """NMSE of a whole layer per format and instruction set, as medians over seeds."""
    program = options.program or kernels.build()
    arguments = ["--layer-nmse", "--isa", options.isa, *(["--quick"] if options.quick else [])]
    results = kernels.run(program, *arguments)["results"]
    for one in results:
        readings = one["readings"]
        one["ratio"] = statistics.median(kernels.ratios(readings, "nmse_ours", "nmse_ggml"))
    return list(results)


def print_layers(layers: list[Record]) -> None:
    """NMSE of ours and of ggml's, per format and instruction set."""
    print(f"{'layer':8}{'isa':16}{'NMSE ours':>12}{'NMSE ggml':>12}{'ours / ggml':>13}")
    for one in layers:
        ours, ggml = (statistics.median(one["readings"][name]) for name in ("nmse_ours", "nmse_ggml"))
        print(f"{one['format'].upper():8}{one['isa']:16}{ours:12.3g}{ggml:12.3g}{one['ratio']:13.4f}")


def print_models(models: list[Record], engines: list[str]) -> None:
    """Mean KL of each engine, and ours over llama.cpp's with its 90 % interval."""
    print(f"\n{'model':16}{'positions':>10}" + "".join(f"{'KL ' + engine:>18}" for engine in engines), end="")
    print(f"{'ours / stock-plain':>26}{'medians':>9}  same best token as float")
    for one in models:
        line = f"{one['model']:16}{one['n_positions']:10}" + "".join(f"{one['kl_mean'][e]:18.3g}" for e in engines)
        if "ratio" in one:
            low, high = one["ratio_interval"]
            line += f"{one['ratio']:11.3f} [{low:.3f}-{high:.3f}]{one['ratio_of_medians']:9.3f}"
        print(line + "  " + ", ".join(f"{engine} {share:.1%}" for engine, share in one["same_best"].items()))


def parse_options(arguments: list[str] | None) -> Options:
    """Parse the command line; `--quick` overrides the sizes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=("layer", "model"), default=["layer", "model"])
    parser.add_argument("--isa", default="all", help="of the layers: a name, several with commas, or all")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), help="of the models' experts")
    parser.add_argument("--engines", nargs="+", choices=session.ENGINES, default=["ours", "stock-plain", "stock"])
    parser.add_argument("--positions", type=int, default=256, help="of one sequence")
    parser.add_argument("--sequences", type=int, default=8, help="those of the demo's text overlap from 10 on")
    parser.add_argument("--program", type=Path, help="the native benchmark; default: build it")
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "edgemoe-bench")
    parser.add_argument("--json", type=Path, help="also write the JSON line to this file")
    parser.add_argument("--quick", action="store_true", help="one seed, 64 positions, one format: a smoke test")
    options = parser.parse_args(arguments)
    if options.quick:
        options.positions, options.sequences, options.formats = 64, 1, options.formats[:1]
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run both parts; exit code 1 when a target is missed."""
    options = parse_options(arguments)
    options.work_dir.mkdir(parents=True, exist_ok=True)
    layers = measure_layers(options) if "layer" in options.parts else []
    models = []
    for name in options.models if "model" in options.parts else []:
        for quant in options.formats:
            with tempfile.TemporaryDirectory(prefix="quality-", dir=options.work_dir) as folder:
                make = make_demo if name == "demo" else make_olmoe
                model, sequences = make(quant, Path(folder), options)
                models.append(compare_model(f"{name} {quant}", model, sequences, options, Path(folder)))
                print(f"{models[-1]}", file=sys.stderr)
    print_layers(layers)
    print_models(models, options.engines)
    targets = [
        session.target(f"layer NMSE {one['format'].upper()} {one['isa']} / ggml's", one["ratio"], LIMIT, at_most=True)
        for one in layers
    ]
    targets += [
        session.target(f"KL {one['model']} / llama.cpp's", one.get("ratio"), LIMIT, at_most=True) for one in models
    ]
    print()
    session.print_targets(targets)
    session.finish("quality", options, targets=targets, layers=layers, models=models)
    return 0 if all(one["met"] for one in targets) else 1


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        run_worker()
    else:
        sys.exit(main())
