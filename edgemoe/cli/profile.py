# SPDX-License-Identifier: MIT
"""`--profile`: where the time of each token went, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from edgemoe.profile import Profile, Split

PART_TITLES = {
    "router": "router",
    "select": "select",
    "wait": "wait for storage",
    "experts": "experts",
    "dense": "dense part",
    "sampling": "sampling",
    "overhead": "overhead",
}

profile_option = click.option(
    "--profile", "with_profile", is_flag=True, help="Show where the time of each token went; costs some speed."
)


def profile_table(profile: Profile) -> str:
    """A profile as lines of text: the parts of the prompt's time and of a token's, then what experts were asked for."""
    prefill, decode = profile.prefill, profile.decode
    n_tokens, n_prompt = decode.n_tokens, prefill.n_tokens
    lines = [f"  {'':<18}{f'prompt, {n_prompt} tokens':>24}{f'each of {n_tokens} tokens':>26}"]
    for name, title in PART_TITLES.items():
        lines.append(f"  {title:<18}{_cell(prefill, name, 1):>24}{_cell(decode, name, n_tokens):>26}")
    total = sum(prefill.parts().values()), sum(decode.parts().values())
    lines.append(f"  {'sum':<18}{f'{total[0] * 1e3:.1f} ms      ':>24}{f'{_per(total[1], n_tokens):.2f} ms      ':>26}")
    walls = f"{prefill.wall_s * 1e3:.1f} ms      ", f"{_per(decode.wall_s, n_tokens):.2f} ms      "
    lines.append(f"  {'by the wall clock':<18}{walls[0]:>24}{walls[1]:>26}")
    if n_tokens:
        lines += [f"  {line}" for line in _expert_lines(profile)]
    if profile.trace_problem is not None:
        lines.append(f"  no figures of the router: {profile.trace_problem}")
    return "\n".join(lines)


def _per(seconds: float, n_tokens: int) -> float:
    return 1e3 * seconds / n_tokens if n_tokens else 0.0


def _cell(split: Split, part: str, n_tokens: int) -> str:
    seconds = split.parts()[part]
    share = seconds / split.wall_s if split.wall_s else 0.0
    digits = 1 if n_tokens == 1 else 2
    return f"{_per(seconds, n_tokens):.{digits}f} ms{share:6.1%}"


def _expert_lines(profile: Profile) -> list[str]:
    """What the decoded tokens asked of experts and storage."""
    decode, n_bytes = profile.decode, profile.bytes_per_token or 0.0
    read_bytes_per_s = n_bytes * decode.n_tokens / decode.wall_s if decode.wall_s else 0.0
    found = "-" if profile.hit_rate is None else f"{profile.hit_rate:.1%}"
    lines = [
        f"experts found in memory: {found}; {n_bytes / 2**20:.2f} MiB read per token, "
        f"{read_bytes_per_s / 2**20:.0f} MiB/s",
        f"balance: {decode.storage_share:.0%} waiting for storage, {decode.compute_share:.0%} computing",
    ]
    if profile.n_traced_tokens:
        chosen = []
        if profile.expert_overlap is not None:
            chosen.append(f"{profile.expert_overlap:.1%} of its experts were the token's before")
        if profile.router_entropy_bits is not None:
            chosen.append(f"entropy of the weights {profile.router_entropy_bits:.2f} bits")
        if profile.load_imbalance is not None and profile.load_imbalance_max is not None:
            chosen.append(
                f"the busiest expert has {profile.load_imbalance:.1f} x the mean load (at most "
                f"{profile.load_imbalance_max:.1f} x)"
            )
        lines.append(f"router, {profile.n_traced_tokens} tokens: {'; '.join(chosen)}")
    return lines
