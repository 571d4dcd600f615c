-- The reads of a payment's data. Each one names the merchant: another's ids find nothing. Where it is
-- named with another collation, an index other than the primary key is meant (the first migration says
-- why). A read of what is promised waits for the standbys as a commit does.

-- :name find_by_key
WITH {{confirmed}}
SELECT input.number, {{operation_columns}}, {{payment_columns}}
FROM unnest(:merchant_id::text[], :idempotency_key::text[]) WITH ORDINALITY
    AS input (merchant_id, idempotency_key, number)
JOIN operations AS operation
    ON operation.merchant_id COLLATE "POSIX" = input.merchant_id
    AND operation.idempotency_key = input.idempotency_key
JOIN payments AS payment
    ON payment.merchant_id = operation.merchant_id AND payment.payment_id = operation.payment_id
CROSS JOIN confirmed;

-- :name find_operation
WITH {{confirmed}}
SELECT input.number, {{operation_columns}}, {{payment_columns}}
FROM unnest(:merchant_id::text[], :operation_id::text[]) WITH ORDINALITY
    AS input (merchant_id, operation_id, number)
JOIN operations AS operation
    ON operation.merchant_id = input.merchant_id
    AND operation.operation_id = input.operation_id
JOIN payments AS payment
    ON payment.merchant_id = operation.merchant_id AND payment.payment_id = operation.payment_id
CROSS JOIN confirmed;

-- :name load
-- One statement, so one snapshot: the operations are those of the payment's version.
WITH {{confirmed}}
SELECT input.number, {{operation_columns}}, {{payment_columns}}
FROM unnest(:merchant_id::text[], :payment_id::text[]) WITH ORDINALITY
    AS input (merchant_id, payment_id, number)
JOIN payments AS payment
    ON payment.merchant_id = input.merchant_id AND payment.payment_id = input.payment_id
JOIN operations AS operation
    ON operation.merchant_id COLLATE "default" = payment.merchant_id
    AND operation.payment_id = payment.payment_id
CROSS JOIN confirmed
ORDER BY input.number, operation.created_at, operation.operation_id;

-- :name list_payments
-- The newest first by the database's clock. "scanned" is bounded by scan_max, so that a filter that
-- matches little costs little; the page then ends early and the next one begins where it ended.
WITH scanned AS MATERIALIZED (
    (
        SELECT payment_id, created_at, mode, state
        FROM payments
        WHERE :merchant_order_id::text = ''
            AND merchant_id = :merchant_id::text
            AND (created_at, payment_id)
                < (coalesce(:after_created_at::timestamptz, 'infinity'), :after_payment_id::text)
            AND created_at >= coalesce(:created_from::timestamptz, '-infinity')
            AND created_at < coalesce(:created_before::timestamptz, 'infinity')
        ORDER BY created_at DESC, payment_id DESC
        LIMIT :scan_max::int4
    )
    UNION ALL
    (
        SELECT payment_id, created_at, mode, state
        FROM payments
        WHERE :merchant_order_id::text <> ''
            AND merchant_id = :merchant_id::text
            AND merchant_order_id = :merchant_order_id::text
            AND merchant_order_id <> ''
            AND (created_at, payment_id)
                < (coalesce(:after_created_at::timestamptz, 'infinity'), :after_payment_id::text)
            AND created_at >= coalesce(:created_from::timestamptz, '-infinity')
            AND created_at < coalesce(:created_before::timestamptz, 'infinity')
        ORDER BY created_at DESC, payment_id DESC
        LIMIT :scan_max::int4
    )
),
page AS (
    SELECT payment_id, created_at
    FROM scanned
    WHERE mode = :mode::int2
        AND (:states::int2[] = '{}' OR state = ANY (:states::int2[]))
    ORDER BY created_at DESC, payment_id DESC
    -- One more, to know whether there is one more.
    LIMIT :page_size::int4 + 1
)
SELECT
    (SELECT count(*) FROM scanned) AS scanned,
    last_scanned.created_at AS last_created_at,
    last_scanned.payment_id AS last_payment_id,
    last_scanned.mode = :mode::int2 AS last_is_told,
    {{payment_columns}}
FROM (VALUES (true)) AS always
LEFT JOIN LATERAL (
    SELECT created_at, payment_id, mode FROM scanned ORDER BY created_at, payment_id LIMIT 1
) AS last_scanned ON true
LEFT JOIN (
    page CROSS JOIN LATERAL (
        SELECT *
        FROM payments
        WHERE merchant_id = :merchant_id::text AND payment_id = page.payment_id
        LIMIT 1
    ) AS payment
) ON true
ORDER BY page.created_at DESC, page.payment_id DESC;

-- :name list_doubts
-- The oldest first, along their index.
SELECT
    doubt.since, doubt.tries, doubt.check_at, doubt.lease_until, doubt.needs_person, doubt.cause,
    payment.mode, payment.state AS payment_state,
    {{operation_columns}}
FROM doubts AS doubt
CROSS JOIN LATERAL (
    SELECT * FROM operations
    WHERE merchant_id = doubt.merchant_id AND operation_id = doubt.operation_id
) AS operation
CROSS JOIN LATERAL (
    SELECT mode, state FROM payments
    WHERE merchant_id = doubt.merchant_id AND payment_id = doubt.payment_id
) AS payment
WHERE (:all_merchants::bool OR doubt.merchant_id = ANY (:merchant_ids::text[]))
    AND (:mode::int2 IS NULL OR payment.mode = :mode::int2)
    AND (
        operation.state = ANY (:states::int2[])
        OR (operation.state = :accepted::int2 AND doubt.needs_person)
    )
    AND (doubt.needs_person OR NOT :needs_person_only::bool)
    AND (doubt.since, doubt.operation_id)
        > (coalesce(:after_since::timestamptz, '-infinity'), :after_operation_id::text)
ORDER BY doubt.since, doubt.operation_id
-- One more, to know whether there is one more.
LIMIT :page_size::int4 + 1;

-- :fragment confirmed
-- What is read was committed, but perhaps without waiting for the standbys (a wait that was cancelled,
-- a server that came back). A transaction that logs something, be it an empty message, has a commit
-- that waits until the standbys have all that was logged before. Without standbys nothing is logged.
confirmed AS MATERIALIZED (
    SELECT CASE
        WHEN current_setting('synchronous_standby_names') <> ''
        THEN pg_logical_emit_message(true, 'gateway', '')
    END AS logged_at
)

-- :fragment operation_columns
operation.merchant_id, operation.operation_id, operation.payment_id, operation.kind,
operation.origin, operation.state, operation.amount_minor, operation.currency, operation.epoch,
operation.parent_operation_id, operation.final, operation.idempotency_key, operation.fingerprint,
operation.request_id, operation.merchant_transaction_id, operation.note, operation.reason,
operation.next_action_url, operation.allocations, operation.attempt_number, operation.connector,
operation.connector_account_id, operation.delivery, operation.connector_transaction_id,
operation.outcome, operation.processing_ms, operation.response, operation.created_at,
operation.updated_at,
CASE WHEN operation.attempt_number > 1 THEN (
    SELECT jsonb_agg(to_jsonb(attempt) ORDER BY attempt.number)
    FROM superseded_attempts AS attempt
    WHERE attempt.merchant_id = operation.merchant_id
        AND attempt.operation_id = operation.operation_id
) END AS superseded_attempts

-- :fragment payment_columns
payment.merchant_id AS payment_merchant_id, payment.payment_id AS payment_payment_id,
payment.mode, payment.state AS payment_state, payment.currency AS payment_currency,
payment.capture_method, payment.requested_minor, payment.connector AS payment_connector,
payment.connector_account_id AS payment_connector_account_id,
payment.version AS payment_version, payment.authorized_minor, payment.capture_pending_minor,
payment.captured_minor, payment.refund_pending_minor, payment.refunded_minor,
payment.voided_minor, payment.increment_pending_minor, payment.authorized_reported_minor,
payment.captured_reported_minor, payment.refunded_reported_minor, payment.capture_closed,
payment.cancel_requested, payment.connector_transaction_id AS payment_connector_transaction_id,
payment.auth_code, payment.network_transaction_id, payment.authorization_expires_at,
payment.merchant_order_id, payment.allow_partial_approval, payment.details,
payment.created_at AS payment_created_at,
payment.updated_at AS payment_updated_at
