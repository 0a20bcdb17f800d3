"""What is mutated, and what has to notice."""

from __future__ import annotations

ROOMS = ("surgery/axes", "surgery/rules", "surgery/edit", "surgery/operations")
"""Folders whose functions are changed."""
TESTS = ("tests/axes", "tests/rules", "tests/edit", "tests/operations", "tests/layers", "tests/test_switched_off.py")
"""Where the tests are that are asked. A mutant that they let live may still be killed by the other tests."""
