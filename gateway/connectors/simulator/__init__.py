"""A PSP in its own process for tests, demos and load, and the connector that talks to it."""
