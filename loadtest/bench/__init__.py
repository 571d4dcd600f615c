"""`make bench`: what the gateway does beside an empty echo and a straightforward baseline."""
