-- The intent: the operation, whose idempotency key decides between duplicates.
INSERT INTO operations (
    merchant_id, operation_id, payment_id, kind, origin, state, amount_minor, currency, epoch, final,
    idempotency_key, fingerprint, request_id, merchant_transaction_id, attempt_number, connector,
    connector_account_id, delivery, recover_after, created_at, updated_at
)
VALUES (
    $1, $2, $3, $4, $5, $6, $7, $8, $9, $10,
    $11, $12, $13, $14, $15, $16,
    $17, $18, now() + $19::float8 * interval '1 second', now(), now()
)
ON CONFLICT (idempotency_key, merchant_id) DO NOTHING
RETURNING created_at
