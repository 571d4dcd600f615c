"""The connector to acquirers' hosts that speak ISO 8583 over persistent connections."""
