"""A payment gateway: gRPC in front, PostgreSQL as the last word, PSPs behind one port."""

__version__ = "0.1.0"
