"""Adapters of payment service providers (PSPs) behind the port `gateway.application.ports`."""
