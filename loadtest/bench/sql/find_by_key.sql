-- What became of a key.
SELECT fingerprint, request_id, payment_id, response
FROM operations
WHERE idempotency_key = $2 AND merchant_id = $1
