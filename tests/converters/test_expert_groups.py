# SPDX-License-Identifier: MIT
"""Groups of experts in a checkpoint's configuration, and what llama.cpp can be told of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gguf import Keys

from edgemoe.converters.hf.family import _expert_groups
from edgemoe.errors import ConversionError

COUNT, USED = Keys.LLM.EXPERT_GROUP_COUNT, Keys.LLM.EXPERT_GROUP_USED_COUNT


def groups(n_groups: Any, n_used: Any, n_experts: int = 8) -> dict[str, Any]:
    hparams: Any = SimpleNamespace(n_experts=n_experts, path=Path("config.json"))
    return dict(_expert_groups({COUNT: n_groups, USED: n_used}, hparams))


@pytest.mark.parametrize("n_groups, n_used", [(3, 2), (4, 5), (4, 0), (16, 2), ("4", 2), (4, None)])
def test_groups_that_divide_nothing_are_refused(n_groups: Any, n_used: Any) -> None:
    """Guards against a file at which llama.cpp's loader stops the process."""
    with pytest.raises(ConversionError, match=r"8 experts in \S+ groups of which \S+ are used, expected groups of one"):
        groups(n_groups, n_used)


def test_groups_of_one_expert_are_refused() -> None:
    """Guards against the same: llama.cpp ranks a group by its two best experts."""
    with pytest.raises(ConversionError, match=r"each of 8 experts is a group.*config\.json"):
        groups(8, 2)


def test_groups_that_leave_none_out_are_none() -> None:
    """Guards against the same, and against groups lost where some are left out."""
    assert groups(4, 4) == {COUNT: 1, USED: 1}
    assert groups(4, 2) == {}
