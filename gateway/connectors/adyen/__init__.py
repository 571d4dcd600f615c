"""The connector to Adyen."""
