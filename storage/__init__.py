"""Storage: everything that touches PostgreSQL and Redis."""
