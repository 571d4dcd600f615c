"""Braintree: card payments over its GraphQL API."""
