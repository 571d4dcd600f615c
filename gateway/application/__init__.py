"""The use cases: what happens to a payment between a call and its answer."""
