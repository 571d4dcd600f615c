-- The outcome: the payment, from the version that was read.
UPDATE payments
SET version = $3, state = $4, authorized_minor = $5, captured_minor = $6,
    connector_transaction_id = $7, auth_code = $8, network_transaction_id = $9,
    authorization_expires_at = $10, updated_at = $11
WHERE merchant_id = $1 AND payment_id = $2 AND version = $3 - 1
RETURNING version
