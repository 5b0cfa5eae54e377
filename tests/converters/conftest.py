# SPDX-License-Identifier: MIT
"""Checkpoints and their conversions that several tests share, each made once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

N_SEQUENCES, N_TOKENS = 2, 96
# A random model whose output's matrix is its embedding answers with the last token for ever.
GENAI_CHANGES: dict[str, dict[str, Any]] = {"lfm2moe": {"tie_embedding": False}}


class Workshop:
    """Makes checkpoints, what transformers says of them, and their conversions; equal arguments give the same thing."""

    def __init__(self, folder: Path) -> None:
        # What these import warns of is for them to mend; the tests' own warnings stay errors.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for package in ("torch", "transformers", "safetensors", "tokenizers", "sentencepiece"):
                reason = f"{package} is not installed (the extra edgemoe[verify]): no reference to compare with"
                pytest.importorskip(package, reason=reason)
        from tests.converters import checkpoints

        self._folder = folder
        self._checkpoints = checkpoints
        self._made: dict[tuple[Any, ...], Any] = {}

    def checkpoint(self, family: str) -> Any:
        return self._once(
            ("checkpoint", family), lambda: self._checkpoints.write_checkpoint(self._folder / family, family)
        )

    def changed(self, family: str, changes: dict[str, Any]) -> Any:
        """The checkpoint with other fields of its `config.json`."""
        key = ("changed", family, *changes.items())
        folder = self._folder / f"{family}-{len(self._made)}"
        return self._once(key, lambda: self._checkpoints.write_checkpoint(folder, family, **changes))

    def sequences(self) -> list[list[int]]:
        """Token ids [sequence, position]."""
        return self._checkpoints.random_tokens(N_SEQUENCES, N_TOKENS)

    def reference(self, family: str, *, is_as_published: bool = False) -> npt.NDArray[np.float32]:
        """Logits [sequence, position, vocabulary] of transformers; see `checkpoints.load`."""
        return self._once(
            ("reference", family, is_as_published),
            lambda: self._checkpoints.reference_logits(
                self.checkpoint(family), self.sequences(), is_as_published=is_as_published
            ),
        )

    def deepseek_v2_with_groups(self, routing: dict[str, Any]) -> tuple[Any, npt.NDArray[np.float32]]:
        """A checkpoint in the layout of DeepSeek-V2, the large one, with its numbers of experts, and its logits."""
        config = {
            "num_hidden_layers": 3,
            "q_lora_rank": 48,
            "n_routed_experts": 160,
            "n_group": 8,
            "num_experts_per_tok": 6,
            "routed_scaling_factor": 16.0,
            **routing,
        }

        def make() -> tuple[Any, npt.NDArray[np.float32]]:
            folder = self._folder / f"deepseek-v2-{routing['topk_method']}-{routing['topk_group']}"
            checkpoint = self._checkpoints.write_checkpoint(folder, "deepseek-v2-lite", **config)
            return checkpoint, self._checkpoints.reference_logits(checkpoint, self.sequences(), is_as_published=True)

        return self._once(("deepseek-v2", tuple(routing.items())), make)

    def gguf(self, family: str, preset: str) -> Path:
        """The checkpoint, converted."""

        def make() -> Path:
            from edgemoe.converters import to_gguf

            checkpoint = self.checkpoint(family)
            recipe = to_gguf.Recipe(preset=preset, pre_tokenizer=checkpoint.family.pre_tokenizer)
            path = self._folder / f"{family}-{preset}.gguf"
            to_gguf.convert(to_gguf.plan_conversion(checkpoint.path, recipe), path)
            return path

        return self._once(("gguf", family, preset), make)

    def _once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if key not in self._made:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._made[key] = make()
        return self._made[key]


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def genai() -> Any:
    """onnxruntime-genai with our provider, which a process can register once."""
    module = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed (edgemoe[dev])")
    from edgemoe import _native

    _native.register_ort_plugin(module.register_execution_provider_library)
    return module


@pytest.fixture(scope="session")
def our_folders(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models that `convert onnx` wrote: with a cache of keys and values, and with one of convolutions beside."""
    from edgemoe.converters.onnx.checkpoint import Recipe, export_checkpoint, plan_export

    root = tmp_path_factory.mktemp("exported")
    for family in ("olmoe", "lfm2moe"):
        checkpoint = workshop.changed(family, GENAI_CHANGES.get(family, {}))
        export_checkpoint(plan_export(checkpoint.path, Recipe()), root / family)
    return {folder.name: folder for folder in root.iterdir()}


@pytest.fixture(scope="session")
def builder_folders(workshop: Workshop, genai: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders that genai's own builder makes, by family."""
    pytest.importorskip("onnx_ir", reason="onnx_ir, which genai's builder needs, is not installed (edgemoe[dev])")
    root = tmp_path_factory.mktemp("built")
    for family in ("gpt-oss", "lfm2moe"):
        checkpoint = root / f"{family}-checkpoint"
        shutil.copytree(workshop.changed(family, GENAI_CHANGES.get(family, {})).path, checkpoint)
        # The builder decodes experts in MXFP4 itself, but loads the model in transformers, which then wants a GPU's
        # kernels. Without this entry the model is loaded without experts.
        config = json.loads((checkpoint / "config.json").read_text())
        config.pop("quantization_config", None)
        (checkpoint / "config.json").write_text(json.dumps(config))
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
        command += ["-i", str(checkpoint), "-o", str(root / family), "-c", str(root / "cache")]
        result = subprocess.run(
            [*command, "--extra_options", "qmoe_block_size=32"],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-2000:]
    return {family: root / family for family in ("gpt-oss", "lfm2moe")}
