# SPDX-License-Identifier: MIT
"""The command line of edgemoe; `edgemoe.cli.main.main` is its entry point.

stdout carries the result and stderr the talk. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""
