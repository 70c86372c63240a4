# SPDX-License-Identifier: Apache-2.0
"""Suites of runs: jobs make rows, rows make tables, figures and a page."""
