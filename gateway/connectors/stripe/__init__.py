"""Stripe: card payments by PaymentIntents."""
