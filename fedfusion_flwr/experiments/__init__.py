# SPDX-License-Identifier: Apache-2.0
"""Comparisons: suites of runs, the command that runs them, and the tables made of their rows."""
