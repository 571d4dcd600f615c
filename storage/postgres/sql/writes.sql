-- The batched writes: one statement, and so one transaction, for all rows of a batch.
--
-- The order of locks, everywhere: first the payments' rows, ascending; then, by their holder alone,
-- the rows of their operations and doubts; last the idempotency keys, ascending. A cycle needs
-- somebody who goes the other way, so deadlocks cannot be.
--
-- "input" is sorted, and CROSS JOIN LATERAL visits it in its order, so that rows are locked in that
-- order; a sorted array joined by hash would not do. Whoever waited for a lock sees the row as it
-- is then: PostgreSQL evaluates the conditions again (READ COMMITTED). What one WITH part wrote,
-- others know from its RETURNING only. "(… IN (SELECT …)) IS TRUE" is looked up in a hash table;
-- as a plain condition it would be a join, and the sessions of the lanes have only nested loops.

-- :name authorize_intent
-- New operations with new payments. Rows that lose have an idempotency key that is taken; the keys
-- go into the index in ascending order, so that two batches never wait for each other.
WITH input AS MATERIALIZED (
    SELECT *
    FROM unnest(:intents::authorize_intent[])
    ORDER BY merchant_id COLLATE "C", idempotency_key COLLATE "C"
),
inserted AS (
    INSERT INTO operations ({{operation_fields}}, recover_after, created_at, updated_at)
    SELECT {{operation_fields}}, now() + recover_after_s * interval '1 second', now(), now()
    FROM input
    ORDER BY merchant_id COLLATE "C", idempotency_key COLLATE "C"
    ON CONFLICT (idempotency_key, merchant_id) DO NOTHING
    RETURNING merchant_id, operation_id
),
paid AS (
    INSERT INTO payments (
        merchant_id, payment_id, mode, state, currency, capture_method, requested_minor, connector,
        connector_account_id, version, merchant_order_id, allow_partial_approval, details,
        created_at, updated_at
    )
    SELECT
        merchant_id, payment_id, mode, payment_state, currency, capture_method, requested_minor,
        connector, connector_account_id, version, merchant_order_id, allow_partial_approval,
        details, now(), now()
    FROM input
    WHERE ((merchant_id, operation_id) IN (SELECT merchant_id, operation_id FROM inserted)) IS TRUE
)
SELECT now() AS at, array(SELECT operation_id FROM inserted) AS inserted;

-- :name followup_intent
-- New operations of payments that exist, and the reservation in the payment, from a known version.
-- INSERT takes its rows from a sort, which has seen (and locked) all of "locked" before the first
-- key is written.
WITH input AS MATERIALIZED (
    SELECT *
    FROM unnest(:intents::followup_intent[])
    ORDER BY merchant_id COLLATE "C", payment_id COLLATE "C"
),
locked AS MATERIALIZED (
    SELECT input.*
    FROM input
    CROSS JOIN LATERAL (
        SELECT FROM payments AS payment
        WHERE payment.merchant_id = input.merchant_id
            AND payment.payment_id = input.payment_id
            AND payment.version = input.expected_version
        FOR NO KEY UPDATE
    ) AS payment
),
inserted AS (
    INSERT INTO operations ({{operation_fields}}, recover_after, created_at, updated_at)
    SELECT {{operation_fields}}, now() + recover_after_s * interval '1 second', now(), now()
    FROM locked
    ORDER BY merchant_id COLLATE "C", idempotency_key COLLATE "C"
    ON CONFLICT (idempotency_key, merchant_id) DO NOTHING
    RETURNING merchant_id, operation_id
),
paid AS (
    UPDATE payments AS payment
    SET {{payment_set}}, updated_at = now()
    FROM locked AS source
    WHERE payment.merchant_id = source.merchant_id
        AND payment.payment_id = source.payment_id
        AND ((source.merchant_id, source.operation_id)
            IN (SELECT merchant_id, operation_id FROM inserted)) IS TRUE
)
SELECT
    now() AS at,
    array(SELECT operation_id FROM inserted) AS inserted,
    array(SELECT operation_id FROM locked) AS locked;

-- :name written_intents
-- Which of these operations exist: after a COMMIT whose answer was lost. Their ids are new, so one
-- that exists was written by this very intent.
WITH {{confirmed}}
SELECT operation.operation_id, operation.created_at
FROM unnest(:merchant_id::text[], :operation_id::text[]) AS input (merchant_id, operation_id)
CROSS JOIN LATERAL (
    SELECT operation_id, created_at
    FROM operations
    WHERE merchant_id = input.merchant_id AND operation_id = input.operation_id
) AS operation
CROSS JOIN confirmed;

-- :name change
-- Compare and set, for changes that are nothing but an operation, its payment and an event.
{{changed}}
SELECT array(SELECT operation_id FROM changed) AS changed;

-- :name change_with_more
-- The same with all that a change can bring along. Its rows name the change by its operation.
{{changed}},
begun AS MATERIALIZED (
    SELECT *
    FROM unnest(:companions::companion_operation[])
    WHERE ((merchant_id, changed_by) IN (SELECT merchant_id, operation_id FROM changed)) IS TRUE
    ORDER BY merchant_id COLLATE "C", idempotency_key COLLATE "C", operation_id COLLATE "C"
),
companions AS (
    INSERT INTO operations ({{operation_fields}}, recover_after, created_at, updated_at)
    -- created_at is the database's time whatever the caller says: recovery's watermark counts on it.
    SELECT {{operation_fields}}, now(), now(), now()
    FROM begun
),
companions_told AS (
    INSERT INTO outbox (
        merchant_id, payment_id, payment_version, seq, event_id, event_type, payload
    )
    SELECT merchant_id, payment_id, payment_version, seq, event_id, event_type, event
    FROM begun
),
superseded AS (
    INSERT INTO superseded_attempts (
        merchant_id, operation_id, number, connector, connector_account_id, delivery,
        connector_transaction_id, outcome, processing_ms
    )
    SELECT
        merchant_id, operation_id, number, connector, connector_account_id, delivery,
        connector_transaction_id, outcome, processing_ms
    FROM unnest(:superseded::superseded_attempt[])
    WHERE ((merchant_id, operation_id) IN (SELECT merchant_id, operation_id FROM changed)) IS TRUE
    ORDER BY merchant_id, operation_id, number
    ON CONFLICT DO NOTHING
),
differing AS (
    INSERT INTO discrepancies (merchant_id, payment_id, operation_id, kind, expected, reported)
    SELECT merchant_id, payment_id, operation_id, kind, expected, reported
    FROM unnest(:discrepancies::reported_discrepancy[]) AS input
    WHERE ((merchant_id, changed_by) IN (SELECT merchant_id, operation_id FROM changed)) IS TRUE
        -- A PSP tells the same again and again. What another change of the payment has recorded is
        -- seen here: this change compared the payment's version with one that includes it.
        AND NOT EXISTS (
            SELECT FROM discrepancies AS known
            WHERE known.merchant_id = input.merchant_id AND known.payment_id = input.payment_id
                AND known.operation_id = input.operation_id AND known.kind = input.kind
                AND known.expected = input.expected AND known.reported = input.reported
        )
),
resolved AS (
    INSERT INTO resolutions (
        merchant_id, operation_id, attempt_number, payment_id, resolved_by, outcome,
        connector_transaction_id, amount_reported_minor, reason, request_id, state_before,
        state_after, payment_state_before, payment_state_after, payment_version
    )
    SELECT
        merchant_id, operation_id, attempt_number, payment_id, resolved_by, outcome,
        connector_transaction_id, amount_reported_minor, reason, request_id, state_before,
        state_after, payment_state_before, payment_state_after, payment_version
    FROM unnest(:resolutions::doubt_resolution[])
    WHERE ((merchant_id, operation_id) IN (SELECT merchant_id, operation_id FROM changed)) IS TRUE
),
doubted AS (
    INSERT INTO doubts AS doubt (
        merchant_id, operation_id, payment_id, connector_account_id, check_at
    )
    SELECT
        merchant_id, operation_id, payment_id, connector_account_id,
        now() + check_after_s * interval '1 second'
    FROM changed
    WHERE check_after_s IS NOT NULL
    ORDER BY merchant_id COLLATE "C", operation_id COLLATE "C"
    ON CONFLICT (merchant_id, operation_id) DO UPDATE
    -- What recovery has tried and begun to cancel is an attempt. It is here that the next one begins, on
    -- the row as it is by now, whoever changed it last.
    SET (check_at, tries, cancel_begun, needs_person, cause) = (
            SELECT
                CASE
                    -- Evidence that no recoverer has seen yet does not wait, but for a new attempt,
                    -- whose sender keeps its time: it is of an earlier one.
                    WHEN doubt.evidence IS NOT NULL AND NOT doubt.evidence_leased
                        AND changed.recover_after_s IS NULL
                    THEN now()
                    ELSE excluded.check_at
                END,
                CASE WHEN changed.epoch = changed.expected_epoch THEN doubt.tries ELSE 0 END,
                doubt.cancel_begun AND changed.epoch = changed.expected_epoch,
                doubt.needs_person AND changed.epoch = changed.expected_epoch,
                CASE WHEN changed.epoch = changed.expected_epoch THEN doubt.cause ELSE 0 END
            FROM changed
            WHERE changed.merchant_id = excluded.merchant_id
                AND changed.operation_id = excluded.operation_id
        ),
        connector_account_id = excluded.connector_account_id,
        lease_until = NULL
),
forgotten AS (
    -- A recoverer that has seen the evidence of an earlier attempt may have died before it acted on it.
    DELETE FROM doubts AS doubt
    USING changed
    WHERE doubt.merchant_id = changed.merchant_id
        AND doubt.operation_id = changed.operation_id
        AND changed.check_after_s IS NULL
        AND (
            doubt.evidence IS NULL
            OR (
                doubt.evidence_leased
                AND coalesce(
                    (doubt.evidence ->> 'attempt_number')::int4, changed.attempt_number
                ) = changed.attempt_number
            )
        )
)
SELECT array(SELECT operation_id FROM changed) AS changed;

-- :name written_changes
-- Which of these changes were written by an earlier try whose answer was lost. The proof is the event
-- of this very change, by its id, at the version that it made. What the operation and the payment
-- hold proves nothing: somebody else may have decided on the very same.
WITH {{confirmed}}
SELECT input.operation_id
FROM unnest(
    :merchant_id::text[], :payment_id::text[], :operation_id::text[], :payment_version::int8[],
    :event_id::text[]
) AS input (merchant_id, payment_id, operation_id, payment_version, event_id)
CROSS JOIN confirmed
WHERE EXISTS (
    SELECT FROM outbox
    WHERE outbox.merchant_id = input.merchant_id
        AND outbox.payment_id = input.payment_id
        AND outbox.payment_version = input.payment_version
        AND outbox.event_id = input.event_id
);

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

-- :fragment changed
WITH input AS MATERIALIZED (
    SELECT *
    FROM unnest(:changes::payment_change[])
    ORDER BY merchant_id COLLATE "C", payment_id COLLATE "C"
),
locked AS MATERIALIZED (
    SELECT input.*
    FROM input
    CROSS JOIN LATERAL (
        SELECT FROM payments AS payment
        WHERE payment.merchant_id = input.merchant_id
            AND payment.payment_id = input.payment_id
            AND payment.version = input.expected_version
        FOR NO KEY UPDATE
    ) AS payment
),
changed AS (
    UPDATE operations AS operation
    SET {{operation_set}},
        epoch = source.epoch,
        -- A new attempt of a refund may be of other captures: its parent is the first of them.
        parent_operation_id = CASE
            WHEN source.epoch <> source.expected_epoch
            THEN coalesce(source.allocations #>> '{0,0}', operation.parent_operation_id)
            ELSE operation.parent_operation_id
        END,
        recover_after = coalesce(
            now() + source.recover_after_s * interval '1 second', operation.recover_after
        )
    FROM locked AS source
    WHERE operation.merchant_id = source.merchant_id
        AND operation.operation_id = source.operation_id
        AND operation.epoch = source.expected_epoch
        AND operation.state = source.expected_state
    RETURNING source.*
),
paid AS (
    UPDATE payments AS payment
    SET {{payment_set}}, updated_at = coalesce(source.payment_updated_at, source.updated_at, now())
    FROM changed AS source
    WHERE payment.merchant_id = source.merchant_id AND payment.payment_id = source.payment_id
),
told AS (
    INSERT INTO outbox (merchant_id, payment_id, payment_version, event_id, event_type, payload)
    SELECT merchant_id, payment_id, payment_version, event_id, event_type, event
    FROM changed
)

-- :fragment operation_fields
-- Of a new operation, without its times.
merchant_id, operation_id, payment_id, kind, origin, state, amount_minor, currency, epoch,
parent_operation_id, final, idempotency_key, fingerprint, request_id, merchant_transaction_id,
note, reason, next_action_url, allocations, attempt_number, connector, connector_account_id,
delivery, connector_transaction_id, outcome, processing_ms, response

-- :fragment operation_set
state = source.state,
amount_minor = source.amount_minor,
final = source.final,
request_id = source.request_id,
note = source.note,
reason = source.reason,
next_action_url = source.next_action_url,
allocations = source.allocations,
attempt_number = source.attempt_number,
connector = source.connector,
connector_account_id = source.connector_account_id,
delivery = source.delivery,
connector_transaction_id = source.connector_transaction_id,
outcome = source.outcome,
processing_ms = source.processing_ms,
response = source.response,
updated_at = coalesce(source.updated_at, now())

-- :fragment payment_set
version = source.payment_version,
state = source.payment_state,
requested_minor = source.requested_minor,
authorized_minor = source.authorized_minor,
capture_pending_minor = source.capture_pending_minor,
captured_minor = source.captured_minor,
refund_pending_minor = source.refund_pending_minor,
refunded_minor = source.refunded_minor,
voided_minor = source.voided_minor,
increment_pending_minor = source.increment_pending_minor,
authorized_reported_minor = source.authorized_reported_minor,
captured_reported_minor = source.captured_reported_minor,
refunded_reported_minor = source.refunded_reported_minor,
capture_closed = source.capture_closed,
cancel_requested = source.cancel_requested,
connector = source.payment_connector,
connector_account_id = source.payment_connector_account_id,
connector_transaction_id = source.payment_connector_transaction_id,
auth_code = source.auth_code,
network_transaction_id = source.network_transaction_id,
authorization_expires_at = source.authorization_expires_at
