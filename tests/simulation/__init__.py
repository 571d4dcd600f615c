"""A deterministic simulation: the real application over simulated time, network and servers.

`python -m tests.simulation` runs histories from seeds; the campaign's oracle judges each of them.
"""
