-- What people look at: doubts, discrepancies, decisions. Of the merchants that are named, or of all.

-- :name list_discrepancies
-- The oldest first.
SELECT
    discrepancy.merchant_id, discrepancy.discrepancy_id::text AS discrepancy_id,
    discrepancy.payment_id, discrepancy.operation_id, discrepancy.kind, discrepancy.expected,
    discrepancy.reported, discrepancy.created_at
FROM discrepancies AS discrepancy
CROSS JOIN LATERAL (
    SELECT mode FROM payments
    WHERE merchant_id = discrepancy.merchant_id AND payment_id = discrepancy.payment_id
    OFFSET 0  -- Not to be joined the other way round, from all payments.
) AS payment
WHERE (:all_merchants::bool OR discrepancy.merchant_id = ANY (:merchant_ids::text[]))
    AND (:mode::int2 IS NULL OR payment.mode = :mode::int2)
    AND (discrepancy.created_at, discrepancy.discrepancy_id::text)
        > (coalesce(:after_created_at::timestamptz, '-infinity'), :after_discrepancy_id::text)
ORDER BY discrepancy.created_at, discrepancy.discrepancy_id::text
-- One more, to know whether there is one more.
LIMIT :page_size::int4 + 1;

-- :name find_resolution
SELECT
    attempt_number, outcome, connector_transaction_id, amount_reported_minor, reason, resolved_by,
    request_id, resolved_at, state_before, state_after, payment_state_before, payment_state_after,
    payment_version
FROM resolutions
WHERE merchant_id = :merchant_id::text
    AND operation_id = :operation_id::text
    AND attempt_number = :attempt_number::int4;
