-- The outbox as a stream, and how far its consumers have come.
--
-- Transactions commit in another order than they begin in, and whoever follows a number that is given
-- at the insert passes over what commits late. So a reader sees only rows of transactions below the
-- oldest one that still runs (pg_snapshot_xmin): nothing can appear there any more. Their order is that
-- of transactions, and within one that of the primary key. A payment's versions come in their order: who
-- writes a version has seen the one before, so its transaction began later.
--
-- A transaction that runs for hours, whatever it writes and in whatever database of the server, keeps
-- events back for hours; held_back tells.

-- :name read
-- What follows a position, of the merchants looked for. At most so many rows are looked at, whoever they
-- belong to: the last of them comes along, without its payload where it is another's, as the position to
-- go on from. The page ends before that where the payloads wanted have reached so many bytes: the event that
-- reaches them is the last one. Lengths are known without reading payloads that are stored apart. What is
-- told must survive a failover: where there are standbys, the transaction logs something, so that its commit
-- waits for them to have all that was logged before.
--
-- The first row is the position's own event, unless that is the beginning. A database that does not have it
-- was set back, and what follows it by number is not what was told after it: the numbers of what was lost
-- are given out again. In one statement with the rest, so that no reconnect can come between.
SELECT
    xact_id, merchant_id, payment_id, payment_version, seq, event_id, is_position, is_wanted,
    payload,
    looked_at >= :rows_max::int4 OR bytes_until >= :bytes_max::int8 AS is_full,
    {{confirmed}}
FROM (
    SELECT *, NOT is_position AND lead(true) OVER (ORDER BY {{key}}) IS NULL AS is_last
    FROM (
        SELECT
            *,
            count(*) FILTER (WHERE NOT is_position) OVER so_far AS looked_at,
            coalesce(sum(length(payload)) OVER so_far, 0) AS bytes_until
        FROM (
            SELECT
                {{key}}, event_id, is_position, is_wanted,
                -- Here already: others' would be carried through all that follows.
                CASE WHEN is_wanted THEN payload END AS payload
            FROM (
                SELECT
                    *,
                    NOT is_position AND (
                        :merchant_ids::text[] IS NULL
                        OR merchant_id COLLATE "default" = ANY (:merchant_ids::text[])
                    ) AS is_wanted
                FROM (
                    SELECT {{key}}, event_id, payload, {{is_position}} AS is_position
                    FROM outbox
                    WHERE {{from_position}}
                        AND xact_id < pg_snapshot_xmin(pg_current_snapshot())
                    ORDER BY {{key}}
                    LIMIT :rows_max::int4 + CASE WHEN :event_id::text = '' THEN 0 ELSE 1 END
                ) AS scanned
            ) AS reached
        ) AS wanted
        WINDOW so_far AS (ORDER BY {{key}} ROWS UNBOUNDED PRECEDING)
    ) AS measured
    WHERE bytes_until - coalesce(length(payload), 0) < :bytes_max::int8
) AS marked
WHERE is_wanted OR is_last OR is_position
ORDER BY {{key}};

-- :name latest
-- The last event that may be read now.
SELECT {{key}}, event_id, {{confirmed}}
FROM (
    SELECT {{key}}, event_id, true AS is_last
    FROM outbox
    WHERE xact_id < pg_snapshot_xmin(pg_current_snapshot())
    ORDER BY
        xact_id DESC, merchant_id DESC, payment_id DESC, payment_version DESC, seq DESC
    LIMIT 1
) AS latest;

-- :name find
-- The event that a cursor names, if this database has it.
SELECT {{key}}, event_id
FROM outbox
WHERE xact_id = :xact_id::xid8
    AND substr(sha256(convert_to(event_id, 'UTF8')), 1, :digest_bytes::int4) = :digest::bytea;

-- :name add_consumer
-- No row where it exists, or where there are too many. Two at once may exceed the limit by one.
INSERT INTO event_consumers (
    organisation_id, mode, name, merchant_ids,
    at_xact_id, at_merchant_id, at_payment_id, at_payment_version, at_seq, at_event_id
)
SELECT
    :organisation_id::text, :mode::int2, :name::text, :merchant_ids::text[],
    :xact_id::xid8, :merchant_id::text, :payment_id::text, :payment_version::int8, :seq::int2,
    :event_id::text
WHERE (
    SELECT count(*) FROM event_consumers
    WHERE organisation_id = :organisation_id::text AND mode = :mode::int2
) < :consumers_max::int8
ON CONFLICT DO NOTHING
RETURNING name;

-- :name find_consumer
SELECT {{consumer_fields}}, {{reached}} AS is_reached
FROM event_consumers AS consumer
WHERE {{of_name}};

-- :name acknowledge
-- Forward; back too with a reset, which is recorded: by the trigger, at the end of the statement.
UPDATE event_consumers AS consumer
SET merchant_ids = :merchant_ids::text[],
    at_xact_id = :xact_id::xid8,
    at_merchant_id = :merchant_id::text,
    at_payment_id = :payment_id::text,
    at_payment_version = :payment_version::int8,
    at_seq = :seq::int2,
    at_event_id = :event_id::text,
    acknowledged_at = now(),
    reset_at = CASE WHEN :reset_reason::text <> '' THEN now() ELSE reset_at END,
    reset_by = CASE WHEN :reset_reason::text <> '' THEN :reset_by::text ELSE reset_by END,
    reset_reason = CASE WHEN :reset_reason::text <> '' THEN :reset_reason::text ELSE reset_reason END
WHERE {{of_name}}
    AND {{reached}}
    AND (
        :reset_reason::text <> ''
        OR (at_xact_id, at_merchant_id, at_payment_id, at_payment_version, at_seq) < (
            :xact_id::xid8, :merchant_id::text, :payment_id::text, :payment_version::int8,
            :seq::int2
        )
    )
RETURNING
    name,
    CASE
        WHEN :reset_reason::text <> '' THEN set_config('gateway.author', :reset_by::text, true)
    END;

-- :name delete_consumer
-- The trigger that records it runs at the end of the statement.
DELETE FROM event_consumers AS consumer
WHERE {{of_name}} AND {{reached}}
RETURNING name, set_config('gateway.author', :deleted_by::text, true);

-- :name consumers
-- With what they have not acknowledged, running transactions' events included, as far as is looked. The
-- age is that of the oldest one; where all that was looked at is other merchants', it is at most that of
-- the last.
SELECT
    {{consumer_fields}}, {{reached}} AS is_reached, events_behind,
    greatest(0, coalesce(
        extract(epoch FROM now() - oldest_at),
        CASE WHEN looked_at >= :rows_max::int4 THEN extract(epoch FROM now() - looked_until) END,
        0
    ))::float8 AS seconds_behind
FROM (
    SELECT *
    FROM event_consumers
    WHERE :organisation_id::text IS NULL
        OR (organisation_id = :organisation_id::text AND mode = :mode::int2)
    ORDER BY acknowledged_at
    LIMIT :consumers_max::int4
) AS consumer
CROSS JOIN LATERAL (
    SELECT
        count(*) AS looked_at,
        max(created_at) AS looked_until,
        count(*) FILTER (WHERE is_wanted) AS events_behind,
        min(created_at) FILTER (WHERE is_wanted) AS oldest_at
    FROM (
        SELECT
            created_at,
            CASE
                WHEN consumer.merchant_ids IS NULL
                    OR merchant_id COLLATE "default" = ANY (consumer.merchant_ids)
                THEN (
                    SELECT payments.mode = consumer.mode
                    FROM payments
                    WHERE payments.merchant_id = outbox.merchant_id
                        AND payments.payment_id = outbox.payment_id
                )
            END AS is_wanted
        FROM outbox
        WHERE xact_id >= consumer.at_xact_id
            AND (xact_id, merchant_id, payment_id, payment_version, seq) > (
                consumer.at_xact_id, consumer.at_merchant_id, consumer.at_payment_id,
                consumer.at_payment_version, consumer.at_seq
            )
        ORDER BY xact_id
        LIMIT :rows_max::int4
    ) AS looked
) AS behind
ORDER BY organisation_id, mode, name;

-- :name held_back
-- The age of the oldest event that waits for a transaction that still runs.
SELECT coalesce(greatest(0, extract(epoch FROM now() - min(created_at))), 0)::float8 AS age_s
FROM (
    SELECT created_at
    FROM outbox
    WHERE xact_id >= pg_snapshot_xmin(pg_current_snapshot())
    ORDER BY xact_id
    LIMIT :rows_max::int4
) AS held;

-- :fragment key
xact_id, merchant_id, payment_id, payment_version, seq

-- :fragment from_position
-- The first condition is the index's.
xact_id >= :xact_id::xid8
            AND (xact_id, merchant_id, payment_id, payment_version, seq) >= (
                :xact_id::xid8, :merchant_id::text, :payment_id::text, :payment_version::int8,
                :seq::int2
            )

-- :fragment is_position
-- A number alone may name anybody's event.
(xact_id, merchant_id, payment_id, payment_version, seq, event_id) = (
                :xact_id::xid8, :merchant_id::text, :payment_id::text, :payment_version::int8,
                :seq::int2, :event_id::text
            )

-- :fragment confirmed
CASE
        WHEN is_last AND current_setting('synchronous_standby_names') <> ''
        THEN pg_logical_emit_message(true, 'gateway', '')
    END AS logged_at

-- :fragment of_name
organisation_id = :organisation_id::text AND mode = :mode::int2 AND name = :name::text

-- :fragment reached
-- A credential that reaches fewer merchants must not move the position of one that reaches more.
(
        :merchant_ids::text[] IS NULL
        OR coalesce(consumer.merchant_ids <@ :merchant_ids::text[], false)
    )

-- :fragment consumer_fields
consumer.organisation_id, consumer.mode, consumer.name, consumer.merchant_ids,
    consumer.at_xact_id AS xact_id, consumer.at_merchant_id AS merchant_id,
    consumer.at_payment_id AS payment_id, consumer.at_payment_version AS payment_version,
    consumer.at_seq AS seq, consumer.at_event_id AS event_id, consumer.created_at,
    consumer.acknowledged_at, consumer.reset_at, consumer.reset_by, consumer.reset_reason
