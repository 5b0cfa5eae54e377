# SPDX-License-Identifier: MIT
"""What the scheduler's choices are worth: the default against plain LRU without prefetch, and each depth by itself.

Runs `benchmarks.larger_than_memory` with these engines; `benchmarks/README.md` says what is fair and why.
"""

from __future__ import annotations

import sys

from benchmarks import larger_than_memory

METHODS = ("ours", "ours:prefetch=off", "ours:prefetch=1", "ours:prefetch=2")
FRACTIONS = ("0.12", "0.25", "0.5")


def main(arguments: list[str]) -> int:
    """As `larger_than_memory.main`, with other defaults; options given by the caller come after them and win."""
    defaults = ["--engines", *METHODS, "--fractions", *FRACTIONS]
    return larger_than_memory.main([*defaults, *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
