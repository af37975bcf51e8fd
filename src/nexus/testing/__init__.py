"""Fakes, rigs, strategies made from protocols, and the suites every kernel has to pass.

Only tests, fuzz and proof import this package.
"""
