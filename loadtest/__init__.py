"""Load tests and benchmarks: what the gateway bears, and what it is compared with."""
