# SPDX-License-Identifier: MIT
"""Text from folders that `convert onnx` wrote, by onnxruntime-genai with our provider: genai's own tokens, budgeted."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for package in ("torch", "transformers", "safetensors.torch", "tokenizers", "onnx"):
        pytest.importorskip(package, reason=f"{package} is not installed (the extra edgemoe[verify])")
pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed (the extra edgemoe[genai])")

import onnxruntime_genai as og

from benchmarks.cgroup import CgroupError, MemoryCgroup
from edgemoe import host
from edgemoe.budget import MemoryBudget
from edgemoe.converters.onnx.checkpoint import Recipe, export_checkpoint, plan_export
from edgemoe.errors import BackendError, BudgetError, ExpertReadError
from edgemoe.genai import GenaiModel
from tests.converters import checkpoints
from tests.integration.support import await_preloads, said

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
TEXT = "The first of the experts answers what the second one asks, and then the others do as well."


def _export(root: Path, family: str, **changes: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint = checkpoints.write_checkpoint(root / f"{family}-checkpoint", family, **changes)
    export_checkpoint(plan_export(checkpoint.path, Recipe()), root / family)
    return root / family


def _stock(folder: Path, tokens: list[int], n_new: int) -> list[int]:
    """Greedy tokens of genai as it is."""
    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=256, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(tokens)
    found: list[int] = []
    while not generator.is_done() and len(found) < n_new:
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    return found


@pytest.mark.parametrize("family", ["olmoe", "lfm2moe"])
def test_tokens_are_those_of_stock_genai(family: str, our_folders: dict[str, Path]) -> None:
    """Guards against: another model than the one in the folder: a prompt cut into pieces wrongly, options of sampling
    that are not those asked for, experts mixed up."""
    with GenaiModel(our_folders[family], memory="4GiB", n_ctx=256) as model:
        tokens = model.text_tokens(TEXT)
        assert tokens == [int(t) for t in og.Tokenizer(og.Model(str(our_folders[family]))).encode(TEXT)]
        expected = _stock(our_folders[family], tokens, 40)
        assert list(model.generate(tokens, temp=0))[: len(expected)] == expected
        assert model.stats().completion_tokens >= len(expected) - 1 and model.stats().expert_misses > 0
        object.__setattr__(model.folder, "vocab_size", 3 << 20)  # so many logits that a piece has 2 tokens
        assert model.folder.n_piece_tokens == 2
        assert list(model.generate(tokens, temp=0))[: len(expected)] == expected
        model.set_seed(7)
        sampled = [list(model.generate(tokens, temp=1.0))[:20] for _ in range(2)]
        assert sampled[0] == sampled[1] != expected[:20]


def test_scheduling_reaches_the_provider(
    our_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against: keywords that do not arrive; predictions that change tokens; experts left out that are still
    used; hot experts forgotten when the model is closed."""
    monkeypatch.setenv("EDGEMOE_WARM_DIR", str(tmp_path / "warm"))
    folder = our_folders["olmoe"]

    def greedy(**keywords: Any) -> tuple[list[int], Any]:
        with GenaiModel(folder, memory="4GiB", n_ctx=256, **keywords) as model:
            await_preloads(model)
            return list(model.generate(model.text_tokens(TEXT), temp=0))[:48], model.stats()

    expected, off = greedy(prefetch="off", warm_start=False)
    assert off.prefetch_used_bytes + off.prefetch_late_bytes + off.prefetch_wasted_bytes == 0
    assert not (tmp_path / "warm").exists()
    for prefetch in ("auto", "1", "2"):
        assert greedy(prefetch=prefetch, warm_start=False)[0] == expected
    assert greedy()[0] == expected
    assert list((tmp_path / "warm").iterdir())
    tokens, warm = greedy(prefetch="off")
    assert tokens == expected and warm.expert_misses < off.expert_misses
    tokens, fewer = greedy(expert_top_k=1)
    assert tokens != expected and fewer.gate_mass_moved > 0


def _edgemoe(*arguments: object, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgemoe", *map(str, arguments)]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False, cwd=ROOT)


def test_the_command_line_writes_text(our_folders: dict[str, Path]) -> None:
    """Guards against: options that do not arrive, text that is not that of the tokens, a chat without its template."""
    folder = our_folders["olmoe"]
    arguments = ("generate", folder, "-p", TEXT, "--temperature", 0, "-n", 12, "--threads", 2, "--memory", "1GiB")
    done = _edgemoe(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    tokenizer = og.Tokenizer(og.Model(str(folder)))
    prompt = [int(t) for t in tokenizer.encode(TEXT)]
    assert said["tokens"] == _stock(folder, prompt, 12)
    assert said["prompt_tokens"] == len(prompt) and said["budget_bytes"] == 1 << 30
    plain = _edgemoe(*arguments)
    assert plain.stdout == said["text"] + "\n" and "cut at the limit" in plain.stderr
    message = json.dumps([{"role": "user", "content": "hi"}])
    turn = [int(t) for t in tokenizer.encode(tokenizer.apply_chat_template(message, add_generation_prompt=True))]
    stream = tokenizer.create_stream()
    expected = "".join(stream.decode(token) for token in _stock(folder, turn, 8))
    options = ("--temperature", 0, "-n", 8, "--memory", "1GiB")
    chat = _edgemoe("chat", folder, *options, text="hi\n/memory 700MiB\n/stats\n/memory 20MiB\n/reset\nhi\n")
    assert chat.returncode == 0, chat.stderr
    assert chat.stdout.split("\n")[0] == expected.split("\n")[0] and chat.stdout.count(expected) >= 1
    assert "700 MiB" in chat.stderr and "is below the floor" in chat.stderr
    chat = _edgemoe("chat", folder, *options, text="hi\nhello\n/stats\n")
    reused = re.search(r"^reused_tokens +(\d+)$", chat.stderr, re.MULTILINE)
    assert reused is not None and int(reused[1]) >= len(turn)


def test_the_floor_of_the_plan_generates(our_folders: dict[str, Path]) -> None:
    """Guards against: `plan` promising a budget that `generate` refuses, and a refusal without the numbers."""
    folder = our_folders["olmoe"]
    plan = json.loads(_edgemoe("plan", folder, "--ctx", 512, "--json").stdout)
    generate = ("generate", folder, "-p", TEXT, "-n", 4, "--ctx", 512)
    done = _edgemoe(*generate, "--memory", plan["floor_bytes"], "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["peak_rss_bytes"] <= said["budget_bytes"] == plan["floor_bytes"]
    refused = _edgemoe(*generate, "--memory", plan["floor_bytes"] - 16 * MIB)
    assert refused.returncode == 1
    assert "is below the floor of" in refused.stderr and "give at least" in refused.stderr


CHILD = """
import json, sys
from edgemoe import host
from edgemoe.genai import GenaiModel
with GenaiModel(sys.argv[1], memory=int(sys.argv[2]), n_ctx=256, n_threads=2) as model:
    tokens = model.text_tokens(sys.argv[3])
    found = list(model.generate(tokens, temp=0))
    for _ in range(2):  # what the cache has of a full context is forgotten from the middle on
        found += model.generate((tokens + found)[:120] + tokens, temp=0)
    assert model.stats().reused_tokens >= 2 * len(tokens)
    print(json.dumps([found, model.stats().to_dict(), model.plan.to_dict()]))
"""


def _run(folder: Path, memory: int, group: MemoryCgroup | None = None) -> Any:
    return said(CHILD, folder, memory, TEXT, group=group)


def test_the_budget_holds_under_genai(tmp_path: Path) -> None:
    """Guards against: slots that are fitted before genai has taken its memory; a cache or logits nobody counted."""
    changes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3, "max_position_embeddings": 1024}
    folder = _export(tmp_path, "olmoe", **changes)
    tokens, _, plan = _run(folder, 4 << 30)
    assert plan["expert_bank_bytes"] > 40 * MIB
    budget = plan["floor_bytes"] + plan["expert_bank_bytes"] // 4
    try:
        group = MemoryCgroup(f"edgemoe-test-{os.getpid()}", budget)
    except CgroupError as error:
        pytest.skip(str(error))
    with group:
        found, stats, _ = _run(folder, budget, group)
    assert found == tokens
    assert stats["peak_rss_bytes"] <= budget
    assert plan["token_cycle_bytes"] < stats["slots_bytes"] < 2 * plan["expert_bank_bytes"] // 3
    assert stats["expert_bytes_read"] > plan["expert_bank_bytes"]


def test_a_budget_is_shared_with_other_models(our_folders: dict[str, Path]) -> None:
    """Guards against: genai's sessions outside of the shared budget, or in it for good."""
    budget = MemoryBudget(host.process_rss_bytes() + 400 * MIB)
    with GenaiModel(our_folders["olmoe"], memory=budget, n_ctx=256) as first:
        with GenaiModel(our_folders["lfm2moe"], memory=budget, n_ctx=256) as second:
            for model in (first, second):
                assert len(list(model.generate(model.text_tokens(TEXT), temp=0))) > 0
                with pytest.raises(BudgetError, match="call set_memory of that object"):
                    model.set_memory("1GiB")
            assert [m["name"] for m in budget.stats()["models"]] == ["olmoe", "lfm2moe"]
        assert [m["name"] for m in budget.stats()["models"]] == ["olmoe"]
    assert budget.stats()["models"] == []
    with pytest.raises(BackendError, match="it is closed"):
        first.text_tokens("a")


def test_a_read_that_fails_is_an_error_of_the_generation(tmp_path: Path) -> None:
    """Guards against: tokens of zeros, or a crash, where an expert cannot be read."""
    folder = _export(tmp_path, "olmoe")
    with GenaiModel(folder, memory="4GiB", n_ctx=256) as model:
        tokens = model.text_tokens(TEXT)
        os.truncate(folder / "experts.bin", 4096)
        with pytest.raises(ExpertReadError, match="expert"):
            list(model.generate(tokens, temp=0))
