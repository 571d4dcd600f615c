-- The outcome: its event.
INSERT INTO outbox (merchant_id, payment_id, payment_version, event_id, event_type, payload)
VALUES ($1, $2, $3, $4, $5, $6)
