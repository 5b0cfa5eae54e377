# SPDX-License-Identifier: MIT
"""Converts a checkpoint that is larger than memory inside a memory cgroup, and compares its pace with the disk's.

The checkpoint has the shapes of Qwen3-30B-A3B (128 experts of 768, hidden size 2048, vocabulary 151936) in BF16 and
as many layers as asked for: 1.25 GB each and 1.24 GB for the embeddings. Its weights are random, written shard by
shard from one buffer. The command runs as a user runs it; the cgroup counts the page cache and forbids swap, so the
kernel ends it when it needs more. Needs root for the cgroup and to empty the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks import session
from benchmarks.cgroup import drop_caches, run_cold

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}
BUFFER_ELEMENTS = 32 << 20
PROBE_BYTES = 1 << 30
CHUNK_BYTES = 16 << 20
# VmHWM and not ru_maxrss, which a child inherits from the process that started it.
COMMAND = """
import atexit, pathlib, sys
def say_peak():
    status = pathlib.Path("/proc/self/status").read_text()
    print("peak_rss_kib", status.split("VmHWM:")[1].split()[0], file=sys.stderr)
atexit.register(say_peak)
from edgemoe.cli.main import main
main()
"""
Shapes = dict[str, tuple[int, ...]]


def layer_shapes(layer: int) -> Shapes:
    """Tensors of one layer, under their published names."""
    hidden, ffn, head = 2048, 768, 128
    prefix = f"model.layers.{layer}"
    shapes: Shapes = {
        f"{prefix}.input_layernorm.weight": (hidden,),
        f"{prefix}.post_attention_layernorm.weight": (hidden,),
        f"{prefix}.self_attn.q_norm.weight": (head,),
        f"{prefix}.self_attn.k_norm.weight": (head,),
        f"{prefix}.self_attn.q_proj.weight": (32 * head, hidden),
        f"{prefix}.self_attn.k_proj.weight": (4 * head, hidden),
        f"{prefix}.self_attn.v_proj.weight": (4 * head, hidden),
        f"{prefix}.self_attn.o_proj.weight": (hidden, 32 * head),
        f"{prefix}.mlp.gate.weight": (128, hidden),
    }
    for expert in range(128):
        shapes[f"{prefix}.mlp.experts.{expert}.gate_proj.weight"] = (ffn, hidden)
        shapes[f"{prefix}.mlp.experts.{expert}.up_proj.weight"] = (ffn, hidden)
        shapes[f"{prefix}.mlp.experts.{expert}.down_proj.weight"] = (hidden, ffn)
    return shapes


def write_checkpoint(folder: Path, n_layers: int) -> int:
    """Write the checkpoint; returns the bytes of its weights."""
    rest: Shapes = {
        "lm_head.weight": (151936, 2048),
        "model.embed_tokens.weight": (151936, 2048),
        "model.norm.weight": (2048,),
    }
    shards = [rest, *(layer_shapes(layer) for layer in range(n_layers))]
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(BUFFER_ELEMENTS, np.float32)
    normal *= 0.02
    noise = (normal.view(np.uint32) >> 16).astype(np.uint16)  # bfloat16, cut
    del normal
    weight_map = {}
    n_total = 0
    for i, shapes in enumerate(shards):
        path = folder / f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        header, n_bytes = {}, 0
        for name, shape in shapes.items():
            size = 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [n_bytes, n_bytes + size]}
            n_bytes += size
            weight_map[name] = path.name
        text = json.dumps(header).encode()
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for part in _noise(noise, n_bytes // 2, rng):
                file.write(part.data)
            file.flush()
            os.fsync(file.fileno())
        n_total += n_bytes
    index = {"metadata": {"total_size": n_total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": n_layers}))
    # A vocabulary of bytes and one merge; the other ids are unused, as the ones beyond every published vocabulary are.
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters += [256 + i for i in range(256 - len(letters))]
    vocabulary = {**{chr(letter): i for i, letter in enumerate(letters)}, "ab": 256}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"]]}
    parts = {"pre_tokenizer": byte_level, "decoder": byte_level, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], **parts}))
    (folder / "tokenizer_config.json").write_text("{}")
    return n_total


def _noise(buffer: np.ndarray, n_elements: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """`n_elements` of the buffer, each round of it from another place."""
    while n_elements > 0:
        first = int(rng.integers(0, len(buffer) // 2))
        part = buffer[first : first + n_elements]
        yield part
        n_elements -= len(part)


def probe_disk(folder: Path, source: Path) -> dict[str, float]:
    """MB/s of the folder's disk: one file read cold, and the same bytes written and forced out."""
    drop_caches()
    n_bytes = min(PROBE_BYTES, source.stat().st_size)
    start_s = time.monotonic()
    with source.open("rb") as file:
        chunks = [file.read(CHUNK_BYTES) for _ in range(n_bytes // CHUNK_BYTES)]
    read_s = time.monotonic() - start_s
    start_s = time.monotonic()
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        write_s = time.monotonic() - start_s
    n_mb = n_bytes // CHUNK_BYTES * CHUNK_BYTES / 1e6
    return {"read_mb_per_s": n_mb / read_s, "write_mb_per_s": n_mb / write_s}


def main(arguments: list[str] | None = None) -> int:
    """Write a checkpoint, convert it with each type, report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convert", description=__doc__)
    parser.add_argument("--layers", type=int, default=12, help="12 make 16 GB")
    parser.add_argument("--quant", nargs="+", default=["BF16", "Q8_0", "Q4_K_M"])
    parser.add_argument("--cgroup-mib", type=int, default=2048)
    parser.add_argument("--memory", default="1GiB", help="what the command is told to stay within")
    parser.add_argument("--folder", type=Path, help="where to write; default: the folder for temporary files")
    parser.add_argument("--timeout-s", type=float, default=3600.0)
    parser.add_argument("--idle-wait-s", type=float, default=60.0)
    parser.add_argument("--json", type=Path, help="also write the JSON line to this file")
    options = parser.parse_args(arguments)
    results = []
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="edgemoe-convert-") as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        checkpoint.mkdir()
        n_bytes = write_checkpoint(checkpoint, options.layers)
        disk = probe_disk(Path(scratch), max(checkpoint.glob("*.safetensors"), key=lambda path: path.stat().st_size))
        print(
            f"checkpoint {n_bytes / 1e9:.1f} GB, cgroup {options.cgroup_mib} MiB; disk reads "
            f"{disk['read_mb_per_s']:.0f} MB/s, writes {disk['write_mb_per_s']:.0f} MB/s"
        )
        for quant in options.quant:
            out = Path(scratch) / "out.gguf"
            command = [sys.executable, "-c", COMMAND, "convert", "gguf", str(checkpoint), str(out)]
            command += ["--quant", quant, "--pre-tokenizer", "qwen2", "--memory", options.memory]
            run = run_cold(command, "", options.cgroup_mib << 20, options.timeout_s, options.idle_wait_s)
            if run.exit_code:
                killed = f"{run.usage.oom_kills} killed for memory"
                print(f"{quant}: failed with {run.exit_code}, {killed}\n{run.stderr_tail}")
                return 1
            n_out = out.stat().st_size
            peak_rss_bytes = int(run.stderr_tail.split("peak_rss_kib ")[-1]) << 10
            # The weights are read twice: for the SHA-256 in the metadata, and to be converted.
            floor_s = 2 * n_bytes / 1e6 / disk["read_mb_per_s"] + n_out / 1e6 / disk["write_mb_per_s"]
            results.append(
                {
                    "quant": quant,
                    "in_bytes": n_bytes,
                    "out_bytes": n_out,
                    "mb_per_s": n_bytes / 1e6 / run.wall_s,
                    "disk_floor_s": floor_s,
                    "peak_rss_bytes": peak_rss_bytes,
                    **disk,
                    **run.to_dict(),
                }
            )
            print(
                f"{quant:8} {n_bytes / 1e6 / run.wall_s:7.1f} MB/s of the checkpoint, {run.wall_s:6.1f} s, the disk "
                f"alone {floor_s:6.1f} s; peak of the cgroup {run.usage.peak_bytes >> 20} MiB, of the process "
                f"{peak_rss_bytes >> 20} MiB{' DISTURBED' * run.disturbed}"
            )
            out.unlink()
    session.finish("convert", options, results=results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
