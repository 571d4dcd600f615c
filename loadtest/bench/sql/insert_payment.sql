-- The intent: the payment.
INSERT INTO payments (
    merchant_id, payment_id, mode, state, currency, capture_method, requested_minor, connector,
    connector_account_id, version, merchant_order_id, allow_partial_approval, details, created_at,
    updated_at
)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, now(), now())
