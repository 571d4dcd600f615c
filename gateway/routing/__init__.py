"""Where a payment goes: pure decisions over what this process knows; no I/O."""
