# SPDX-License-Identifier: MIT
"""`edgemoe.converters.onnx.export` of blocks that nobody here wrote: transformers' own, exported as modules."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for package in ("torch", "transformers", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed (the extra edgemoe[dev])")
    import torch
    from transformers import GptOssConfig, Qwen2MoeConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from edgemoe.converters.onnx import MoeBlock, export
from edgemoe.onnx import InferenceSession
from tests.converters.onnx_checkpoints import on_grid, relative_error

HIDDEN, INTER = 64, 96
TOLERANCE = 1e-5

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's exporter warns of its own dependencies


def _qwen2(block: Any) -> MoeBlock:
    def route(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = torch.nn.functional.linear(x, block.gate.weight)
        return logits, logits.softmax(-1)

    def finish(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return y + block.shared_expert_gate(x).sigmoid() * block.shared_expert(x)

    experts = block.experts
    return MoeBlock(
        w1=experts.gate_up_proj,
        w2=experts.down_proj,
        k=block.gate.top_k,
        route=route,
        activation="swiglu",
        normalizes=block.gate.norm_topk_prob,
        finish=finish,
    )


def _gpt_oss(block: Any) -> MoeBlock:
    experts = block.experts
    return MoeBlock(
        w1=experts.gate_up_proj.transpose(1, 2),
        b1=experts.gate_up_proj_bias,
        w2=experts.down_proj.transpose(1, 2),
        b2=experts.down_proj_bias,
        k=block.router.top_k,
        route=lambda x: torch.nn.functional.linear(x, block.router.weight, block.router.bias),
        activation="swiglu",
        is_interleaved=True,
        swiglu_alpha=experts.alpha,
        swiglu_beta=1.0,
        swiglu_limit=experts.limit,
        finish=lambda y, x: (y, block.router(x.reshape(-1, HIDDEN))[1]),
    )


def _qwen2_block(norm_topk_prob: bool) -> Any:
    config = Qwen2MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=INTER,
        shared_expert_intermediate_size=48,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=norm_topk_prob,
    )
    return Qwen2MoeSparseMoeBlock(config)


def _gpt_oss_block() -> Any:
    config = GptOssConfig(hidden_size=HIDDEN, intermediate_size=INTER, num_local_experts=8, num_experts_per_tok=3)
    return GptOssMLP(config)


@pytest.mark.parametrize(
    "make, describe",
    [(lambda: _qwen2_block(False), _qwen2), (lambda: _qwen2_block(True), _qwen2), (_gpt_oss_block, _gpt_oss)],
    ids=["qwen2", "qwen2-normalized", "gpt-oss"],
)
def test_blocks_of_transformers_compute_the_same(tmp_path: Path, make: Any, describe: Any) -> None:
    """Guards against: a `MoeBlock` that can only say what our own examples do."""
    torch.manual_seed(0)
    block = make().eval()
    for name, parameter in block.named_parameters():
        values = torch.randn(parameter.shape) * 0.3
        if name.startswith("experts.") and values.dim() == 3:  # gpt-oss has its columns in axis 1
            values = on_grid(values.mT, 4).mT if describe is _gpt_oss else on_grid(values, 4)
        parameter.data = values.contiguous()
    done = export(
        block,
        (torch.randn(2, 4, HIDDEN),),
        tmp_path / "out",
        moe={type(block): describe},
        dynamic={"hidden_states": {0: "batch", 1: "tokens"}},
    )
    x = torch.randn(3, 7, HIDDEN)
    with torch.no_grad():
        output = block(x)
    expected = output if isinstance(output, tuple) else (output,)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    ours = InferenceSession(done.path, memory="16GiB")
    assert ours.stats().n_streamed_nodes == 1
    for session in (onnxruntime.InferenceSession(done.path, options), ours):
        found = session.run(None, {"hidden_states": x.numpy()})
        for one, other in zip(found, expected, strict=True):
            assert relative_error(one, other.numpy()) <= TOLERANCE
