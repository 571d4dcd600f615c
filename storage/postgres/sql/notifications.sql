-- What PSPs tell: kept once each, applied by whoever leases it.

-- :name keep
-- The PSP repeats what it has no answer to, also to two gateways at once: who comes second waits for
-- the first one's commit and finds the row. Rows go in by their key, so that two batches never wait
-- for each other.
WITH input AS MATERIALIZED (
    SELECT *
    FROM unnest(:notifications::received_notification[])
    ORDER BY merchant_id COLLATE "C", connector_account_id COLLATE "C", event_id COLLATE "C"
),
kept AS (
    INSERT INTO notifications (
        merchant_id, connector_account_id, event_id, connector, event_type, kind, event,
        occurred_at, subject, content
    )
    SELECT
        merchant_id, connector_account_id, event_id, connector, event_type, kind, event,
        occurred_at, subject, content
    FROM input
    ORDER BY merchant_id COLLATE "C", connector_account_id COLLATE "C", event_id COLLATE "C"
    ON CONFLICT DO NOTHING
    RETURNING merchant_id, connector_account_id, event_id
)
INSERT INTO pending_notifications (merchant_id, connector_account_id, event_id)
SELECT merchant_id, connector_account_id, event_id
FROM kept
RETURNING merchant_id, connector_account_id, event_id;

-- :name lease
-- Those longest due first; what another gateway is leasing at this moment is passed over, and what
-- the caller is at work on. No account gets beyond its share, of which busy_accounts names each
-- that is at work: first those of at_work, in its order.
WITH due AS MATERIALIZED (
    SELECT merchant_id, connector_account_id, event_id, apply_at
    FROM pending_notifications
    WHERE apply_at <= now() AND (lease_until IS NULL OR lease_until <= now())
        AND NOT EXISTS (
            SELECT FROM unnest(:at_work::text[], :busy_accounts::text[]) AS busy (event_id, account_id)
            WHERE busy.event_id = pending_notifications.event_id
                AND busy.account_id = pending_notifications.connector_account_id
        )
        AND connector_account_id <> ALL (:full_accounts::text[])
    ORDER BY apply_at
    LIMIT :limit::int4
    FOR UPDATE SKIP LOCKED
),
numbered AS (
    SELECT
        merchant_id, connector_account_id, event_id,
        row_number() OVER (PARTITION BY connector_account_id ORDER BY apply_at)
            + cardinality(array_positions(:busy_accounts::text[], connector_account_id)) AS number
    FROM due
),
leased AS (
    UPDATE pending_notifications AS pending
    SET lease_until = now() + :lease_s::float8 * interval '1 second', tries = pending.tries + 1
    FROM numbered AS due
    WHERE pending.merchant_id = due.merchant_id
        AND pending.connector_account_id = due.connector_account_id
        AND pending.event_id = due.event_id
        AND due.number <= :account_max::int4
    RETURNING
        pending.merchant_id, pending.connector_account_id, pending.event_id,
        pending.tries - 1 AS tries
)
SELECT
    notification.merchant_id, notification.connector_account_id, notification.event_id,
    notification.content::text AS content, tries
FROM leased
JOIN notifications AS notification USING (merchant_id, connector_account_id, event_id)
ORDER BY notification.occurred_at NULLS LAST, notification.event_id;

-- :name finish
WITH gone AS (
    DELETE FROM pending_notifications
    WHERE merchant_id = :merchant_id::text
        AND connector_account_id = :connector_account_id::text
        AND event_id = :event_id::text
)
UPDATE notifications
SET result = :result::int2,
    payment_id = :payment_id::text,
    operation_id = :operation_id::text,
    applied_at = now()
WHERE merchant_id = :merchant_id::text
    AND connector_account_id = :connector_account_id::text
    AND event_id = :event_id::text
    AND result IS NULL;

-- :name put_off
UPDATE pending_notifications
SET apply_at = now() + :apply_after_s::float8 * interval '1 second', lease_until = NULL
WHERE merchant_id = :merchant_id::text
    AND connector_account_id = :connector_account_id::text
    AND event_id = :event_id::text;

-- :name is_outdated
-- Whether the PSP told something else of the same thing that happened later; of what happened at
-- the same time, the worse counts: approvals have the lowest number. An approved authorization is
-- ended by a void as well, also by one of the same time: nothing is approved once it is over.
-- With a transaction_id, the same thing has that id at the PSP, too.
SELECT EXISTS (
    SELECT FROM notifications AS other
    WHERE other.merchant_id = :merchant_id::text
        AND other.subject = :subject::text
        AND other.subject <> ''
        AND other.connector_account_id = :connector_account_id::text
        AND (
            (
                other.kind = :kind::int2
                AND other.event <> :event::int2
                AND other.event = ANY (:definite::int2[])
                AND (
                    :transaction_id::text IS NULL
                    OR coalesce(other.content #>> '{answer,connector_transaction_id}', '')
                        = :transaction_id::text
                )
                AND (other.occurred_at, other.event) > (:occurred_at::timestamptz, :event::int2)
            )
            OR (
                other.kind = :ends_by::int2
                AND other.event = ANY (:ends::int2[])
                AND other.occurred_at >= :occurred_at::timestamptz
            )
        )
) AS is_outdated;

-- :name count_pending
SELECT
    count(*) AS pending,
    extract(epoch FROM now() - min(since))::float8 AS oldest_age_s
FROM pending_notifications;

-- :name list
SELECT {{listed}}
FROM notifications AS notification
WHERE merchant_id = :merchant_id::text
    AND received_at >= coalesce(:received_from::timestamptz, '-infinity')
    AND received_at < coalesce(:received_before::timestamptz, 'infinity')
    AND (:result::int2 IS NULL OR result = :result::int2)
ORDER BY received_at DESC, event_id
LIMIT :limit::int4;

-- :name part_of_list
-- Where a part of the list begins that has about so many rows and ends before received_before.
SELECT received_at
FROM notifications
WHERE merchant_id = :merchant_id::text
    AND received_at < coalesce(:received_before::timestamptz, 'infinity')
ORDER BY received_at DESC
OFFSET :rows::int8 - 1
LIMIT 1;

-- :name list_pending
-- Those are few among many: what was applied is not looked at.
SELECT {{listed}}
FROM (
    SELECT merchant_id, connector_account_id, event_id
    FROM pending_notifications
    WHERE merchant_id = :merchant_id::text
) AS pending
CROSS JOIN LATERAL (
    SELECT * FROM notifications
    WHERE merchant_id = pending.merchant_id
        AND connector_account_id = pending.connector_account_id
        AND event_id = pending.event_id
) AS notification
ORDER BY received_at DESC, event_id
LIMIT :limit::int4;

-- :name find
WITH RECURSIVE {{account}}
SELECT {{listed}}
FROM account
CROSS JOIN LATERAL (
    SELECT * FROM notifications
    WHERE merchant_id = :merchant_id::text
        AND connector_account_id = account.connector_account_id
        AND event_id = :event_id::text
) AS notification
ORDER BY notification.connector_account_id;

-- :name apply_again
-- One that was applied too: applying it twice has one effect.
WITH RECURSIVE {{account}},
again AS (
    UPDATE notifications AS notification
    SET result = NULL, applied_at = NULL
    FROM account
    WHERE notification.merchant_id = :merchant_id::text
        AND notification.connector_account_id = account.connector_account_id
        AND notification.event_id = :event_id::text
    RETURNING
        notification.merchant_id, notification.connector_account_id, notification.event_id
)
INSERT INTO pending_notifications (merchant_id, connector_account_id, event_id)
SELECT merchant_id, connector_account_id, event_id
FROM again
ON CONFLICT (merchant_id, connector_account_id, event_id) DO UPDATE
SET apply_at = now(), lease_until = NULL, tries = 0
RETURNING event_id;

-- :fragment account
-- The merchant's accounts that were told something, each by one step along the primary key.
account AS (
    (
        SELECT connector_account_id FROM notifications
        WHERE merchant_id = :merchant_id::text AND connector_account_id >= ''
        ORDER BY connector_account_id
        LIMIT 1
    )
    UNION ALL
    SELECT next.connector_account_id
    FROM account
    CROSS JOIN LATERAL (
        SELECT connector_account_id FROM notifications
        WHERE merchant_id = :merchant_id::text
            AND connector_account_id > account.connector_account_id
        ORDER BY connector_account_id
        LIMIT 1
    ) AS next
)

-- :fragment listed
notification.merchant_id, notification.connector_account_id, notification.event_id, connector,
event_type, kind, occurred_at, received_at, subject, content::text AS content, result, applied_at, payment_id, operation_id
