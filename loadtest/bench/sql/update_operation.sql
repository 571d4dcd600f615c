-- The outcome: the operation with its stored response, if it is still the one that was begun.
UPDATE operations
SET state = $3, reason = $4, delivery = $5, connector_transaction_id = $6, outcome = $7,
    processing_ms = $8, response = $9, updated_at = $10
WHERE merchant_id = $1 AND operation_id = $2 AND epoch = $11 AND state = $12
RETURNING epoch
