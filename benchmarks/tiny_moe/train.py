# SPDX-License-Identifier: MIT
"""Trains the tiny model, on one core of a CPU, in parts: a part goes on where the one before ended.

    python -m benchmarks.tiny_moe.train prepare --sources FOLDER --work WORK
    python -m benchmarks.tiny_moe.train run --work WORK --steps 900 --minutes 3     # until it says that it is done
    python -m benchmarks.tiny_moe.train save --work WORK --out CHECKPOINT
    edgemoe convert gguf CHECKPOINT tiny_moe.gguf --quant Q8_0 --pre-tokenizer qwen2

Batches and initial weights depend on the seed only; parts may end anywhere. Products of matrices are in bfloat16, so
another CPU gives another model of about the same loss.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.tiny_moe import tokens as tokens_module
from benchmarks.tiny_moe.corpus import DOMAINS, read_corpus
from benchmarks.tiny_moe.muon import Muon

STEP_TOKENS = 4096
PLATEAU_CONTEXT, CONTEXT_TOKENS = 256, 512
"""Tokens of a sequence while the learning rates are constant (attention is then an eighth of the time, not a quarter),
and afterwards."""
SEED = 6

CONFIG: dict[str, Any] = {
    "vocab_size": tokens_module.VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 256,  # of layers without experts, of which there are none
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "num_experts": 36,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
"""Of `Qwen3MoeConfig`. Each token uses 4 of 36 experts, so an eighth of them in memory is more than a token cycle."""

BALANCE = ((0, 0.003), (148, 0.01))
"""(step, weight of the load-balancing loss from there on); raised when experts of some layers were hardly used any
more (a loss of 1.7). It counts whole batches: experts may well be used in one domain only."""

ADAM_RATE, MUON_RATE = 3e-3, 0.02
WARMUP_STEPS = 40
COOLDOWN_SHARE = 0.2
"""Of the steps, during which the rates fall to zero; constant before, so that `--steps` may grow until then."""


def build_model() -> Any:
    """The model with its initial weights."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(SEED)
    config = Qwen3MoeConfig(**CONFIG)
    config._experts_implementation = "sorted"
    register_experts()
    model = Qwen3MoeForCausalLM(config)
    return model.train()


def register_experts() -> None:
    """Teach transformers a way to compute experts that is fast on a CPU: rows sorted by expert, one product each."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register("sorted", _sorted_experts)


def _sorted_experts(self: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """hidden: [token, d], ids and weights: [token, k]."""
    n_used = ids.shape[1]
    order = ids.flatten().argsort(stable=True)
    counts = torch.bincount(ids.flatten(), minlength=self.num_experts).tolist()
    token = order // n_used
    rows = hidden[token].to(torch.bfloat16).split(counts)
    gate_up, down = self.gate_up_proj.to(torch.bfloat16).unbind(), self.down_proj.to(torch.bfloat16).unbind()
    gate_up_rows = torch.cat([row @ w.T for row, w in zip(rows, gate_up, strict=True)])
    gate, up = gate_up_rows.chunk(2, dim=-1)
    acts = (torch.nn.functional.silu(gate) * up * weights.flatten()[order, None].to(gate.dtype)).split(counts)
    out = torch.cat([row @ w.T for row, w in zip(acts, down, strict=True)])
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    return out[back].view(*ids.shape, -1).sum(dim=1, dtype=torch.float32).to(hidden.dtype)


def batch_of(ids: dict[str, npt.NDArray[np.uint16]], step: int, n_steps: int) -> torch.Tensor:
    """Token ids [sequence, context + 1] of one step; each sequence is of one domain, in the order of DOMAINS."""
    rng = np.random.default_rng([SEED, step])
    context = PLATEAU_CONTEXT if step < n_steps * (1 - COOLDOWN_SHARE) else CONTEXT_TOKENS
    rows = []
    for domain in DOMAINS:
        text = ids[domain]
        for start in rng.integers(0, len(text) - context - 1, STEP_TOKENS // context // len(DOMAINS)):
            rows.append(text[start : start + context + 1])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def balance_loss(router_logits: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Switch Transformer's (Fedus et al., 2021, equations 4-6), for each layer by itself; 1 when balanced."""
    n_experts, n_used = CONFIG["num_experts"], CONFIG["num_experts_per_tok"]
    losses = []
    for logits in router_logits:
        probabilities = logits.float().softmax(dim=-1)
        chosen = probabilities.topk(n_used, dim=-1).indices.flatten()
        uses = torch.bincount(chosen, minlength=n_experts).float() / len(chosen)
        losses.append(n_experts * (uses * probabilities.mean(dim=0)).sum())
    return torch.stack(losses).mean()


def rate_of(step: int, n_steps: int) -> float:
    """Share of the full learning rate: a ramp, a plateau, and a line to zero."""
    left = (n_steps - step) / max(1.0, COOLDOWN_SHARE * n_steps)
    return min(1.0, (step + 1) / WARMUP_STEPS, left)


class Trainer:
    """Model, optimizers and step, which a file keeps between parts."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.step = 0
        self.seconds = 0.0
        self.model = build_model()
        matrices, others = [], []
        for name, parameter in self.model.named_parameters():
            is_matrix = parameter.ndim > 1 and "embed" not in name and "mlp.gate." not in name
            (matrices if is_matrix else others).append(parameter)
        self.optimizers: tuple[Any, ...] = (
            Muon(matrices, rate=MUON_RATE),
            torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0),
        )
        self.full_rates = (MUON_RATE, ADAM_RATE)
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            self.step, self.seconds = state["step"], state["seconds"]
            self.model.load_state_dict(state["model"])
            for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(kept)

    @property
    def path(self) -> Path:
        return self.work / "state.pt"

    def save(self) -> None:
        """Keep everything; a part that is killed while it writes leaves the state before."""
        partial = self.path.with_suffix(".partial")
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        torch.save(state, partial)
        os.replace(partial, self.path)

    def train_step(self, batch: torch.Tensor, n_steps: int) -> tuple[list[float], float]:
        """(cross-entropy in nats of each domain, balance loss) before the step."""
        rate = rate_of(self.step, n_steps)
        for optimizer, full in zip(self.optimizers, self.full_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = full * rate
        with torch.autocast("cpu", torch.bfloat16):
            out = self.model(input_ids=batch[:, :-1], output_router_logits=True, use_cache=False)
        losses = token_losses(out.logits, batch[:, 1:])
        balance = balance_loss(out.router_logits)
        weight = [weight for begin, weight in BALANCE if begin <= self.step][-1]
        (losses.mean() + weight * balance).backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return losses.detach().view(len(DOMAINS), -1).mean(dim=1).tolist(), float(balance.detach())


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats, [sequence, token]; 256 rows at a time, which caches hold: 2 MiB."""
    rows = zip(logits.flatten(0, 1).split(256), targets.flatten().split(256), strict=True)
    losses = [torch.nn.functional.cross_entropy(part.float(), ids, reduction="none") for part, ids in rows]
    return torch.cat(losses).view(targets.shape)


@torch.no_grad()
def held_out_losses(model: Any, ids: dict[str, npt.NDArray[np.uint16]], n_sequences: int) -> list[float]:
    """Mean cross-entropy in nats of each domain over evenly spaced held-out sequences of CONTEXT_TOKENS."""
    losses = []
    for domain in DOMAINS:
        text = ids[f"{domain}/held-out"]
        starts = np.linspace(0, len(text) - CONTEXT_TOKENS - 2, n_sequences).astype(int)
        batch = torch.from_numpy(np.stack([text[s : s + CONTEXT_TOKENS + 1] for s in starts]).astype(np.int64))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        losses.append(float(token_losses(logits, batch[:, 1:]).mean()))
    return losses


def run(work: Path, n_steps: int, minutes: float) -> None:
    """Train until the steps or the minutes are over, and keep the state."""
    begin = time.monotonic()
    ids = dict(np.load(work / "tokens.npz"))
    trainer = Trainer(work)
    log = work / "loss.csv"
    rows: list[list[Any]] = []
    mark = begin
    while trainer.step < n_steps and time.monotonic() - begin < minutes * 60:
        losses, balance = trainer.train_step(batch_of(ids, trainer.step, n_steps), n_steps)
        if not math.isfinite(sum(losses)):
            raise SystemExit(f"training diverged at step {trainer.step}: losses {losses}")
        held_out: list[Any] = [""] * len(DOMAINS)
        if trainer.step % 100 == 0 or trainer.step == n_steps:
            held_out = [f"{loss:.4f}" for loss in held_out_losses(trainer.model, ids, 4)]
        now = time.monotonic()
        trainer.seconds += now - mark
        mark = now
        measured = [f"{value:.4f}" for value in (*losses, balance)]
        rows.append([trainer.step, f"{trainer.seconds:.1f}", *measured, *held_out])
        if trainer.step % 20 == 0:
            print(*rows[-1], flush=True)
    trainer.save()
    is_new = not log.exists()
    with open(log, "a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(["step", "seconds", *DOMAINS, "balance", *(f"{domain} held out" for domain in DOMAINS)])
        writer.writerows(rows)
    print("done" if trainer.step >= n_steps else "to be continued", "at step", trainer.step, flush=True)


def save_checkpoint(work: Path, out: Path) -> None:
    """Write a checkpoint as Hugging Face's are, for the converter."""
    trainer = Trainer(work)
    trainer.model.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((work / name).read_bytes())


def main() -> None:
    """The commands at the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("prepare", "run", "save"):
        command = commands.add_parser(name)
        command.add_argument("--work", type=Path, required=True, help="where tokens, state and losses are kept")
        if name == "prepare":
            command.add_argument("--sources", type=Path, required=True, help="the folder with corpus.py's sources")
        elif name == "run":
            command.add_argument("--steps", type=int, required=True)
            command.add_argument("--minutes", type=float, default=3.0)
        else:
            command.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.command == "prepare":
        documents = read_corpus(arguments.sources)
        tokens_module.train_tokenizer(documents, arguments.work)
        ids = tokens_module.encode(documents, arguments.work)
        np.savez(arguments.work / "tokens.npz", **ids)
        print(*(f"{key}: {len(value)} tokens" for key, value in ids.items()), sep="\n")
    elif arguments.command == "run":
        run(arguments.work, arguments.steps, arguments.minutes)
    else:
        save_checkpoint(arguments.work, arguments.out)


if __name__ == "__main__":
    main()
