"""Benchmarks: ours, the C yardstick and the peers, side by side in one run.

Start at `python -m bench`. Absolute times mean little on a shared machine, ratios of paired
runs do: `bench.pairing` says how they are made.
"""
