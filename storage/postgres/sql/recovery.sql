-- Which operations recovery looks at, and who does.
--
-- The order of locks is that of writes.sql: a payment's holder alone writes its operations and
-- doubts. Recovery never waits for a payment: what is locked is being changed right now.

-- :name read_watermark
-- Locked for the transaction: one gateway at a time looks for dead senders.
-- What is_safe says holds for every later statement too: it takes a newer snapshot.
SELECT
    -- As a time that can be reckoned with.
    greatest(created_before, '0001-01-01 00:00:00+00') AS created_before,
    greatest(proposed_before, '0001-01-01 00:00:00+00') AS proposed_before,
    pg_snapshot_xmin(pg_current_snapshot()) >= proposed_xid AS is_safe,
    now() AS at,
    now() - :horizon_s::float8 * interval '1 second' AS horizon
FROM recovery_watermark
WHERE partition = 0
FOR UPDATE SKIP LOCKED;

-- :name put_expired
-- Operations of a slice of time that are still PROCESSING after recover_after become doubts that are
-- due. Of more than rows_max operations in the slice no more are read, and nothing is proved of it.
WITH read AS MATERIALIZED (
    SELECT
        count(*) AS operations,
        array_agg(merchant_id) FILTER (WHERE state = :processing::int2) AS merchant_ids,
        array_agg(operation_id) FILTER (WHERE state = :processing::int2) AS operation_ids,
        array_agg(payment_id) FILTER (WHERE state = :processing::int2) AS payment_ids,
        array_agg(connector_account_id) FILTER (WHERE state = :processing::int2) AS account_ids,
        array_agg(created_at) FILTER (WHERE state = :processing::int2) AS created_ats,
        array_agg(recover_after) FILTER (WHERE state = :processing::int2) AS recover_afters
    FROM (
        SELECT
            merchant_id, operation_id, payment_id, connector_account_id, created_at, recover_after,
            state
        FROM operations
        WHERE created_at >= :created_from::timestamptz AND created_at < :created_until::timestamptz
        LIMIT :rows_max::int8
    ) AS operation
),
unfinished AS MATERIALIZED (
    SELECT
        operation.merchant_id COLLATE "C" AS merchant_id,
        operation.operation_id COLLATE "C" AS operation_id,
        operation.payment_id COLLATE "C" AS payment_id,
        operation.connector_account_id, operation.created_at, operation.recover_after
    FROM read
    CROSS JOIN LATERAL unnest(
        read.merchant_ids, read.operation_ids, read.payment_ids, read.account_ids,
        read.created_ats, read.recover_afters
    ) AS operation (
        merchant_id, operation_id, payment_id, connector_account_id, created_at, recover_after
    )
    WHERE NOT EXISTS (
        SELECT FROM doubts AS doubt
        WHERE doubt.merchant_id = operation.merchant_id
            AND doubt.operation_id = operation.operation_id
    )
),
due AS MATERIALIZED (
    SELECT
        oldest.merchant_id, oldest.operation_id, oldest.payment_id, oldest.connector_account_id
    FROM (
        SELECT *
        FROM (
            SELECT * FROM unfinished
            WHERE recover_after < now()
            ORDER BY recover_after
            LIMIT :limit::int4
        ) AS oldest
        ORDER BY merchant_id, payment_id, operation_id
    ) AS oldest
    CROSS JOIN LATERAL (
        SELECT FROM payments AS payment
        WHERE payment.merchant_id = oldest.merchant_id AND payment.payment_id = oldest.payment_id
        FOR NO KEY UPDATE SKIP LOCKED
    ) AS payment
),
put AS (
    INSERT INTO doubts (merchant_id, operation_id, payment_id, connector_account_id, check_at)
    SELECT merchant_id, operation_id, payment_id, connector_account_id, now() FROM due
    ORDER BY merchant_id, operation_id
    ON CONFLICT DO NOTHING
    RETURNING merchant_id, operation_id
)
SELECT
    (SELECT operations FROM read) AS operations,
    (SELECT count(*) FROM put) AS put,
    (
        -- What is left as it was: not due, or more than the limit, or being changed right now.
        SELECT min(created_at)
        FROM unfinished
        WHERE ((merchant_id, operation_id) IN (SELECT merchant_id, operation_id FROM put))
            IS NOT TRUE
    ) AS oldest_left;

-- :name move_watermark
-- In the transaction of read_watermark, after put_expired has looked up to created_before.
--
-- No row can be missed. created_at is now() of the inserting transaction, so a row appears in
-- put_expired once it is committed, and the watermark must not pass an operation that is neither
-- finished nor a doubt, nor one that will yet be committed:
-- 1. It stays at the oldest PROCESSING operation without a doubt, if there is one.
-- 2. It advances, by slices, up to a time that an earlier look proposed: that look's now() less
--    horizon_s. Who began before that time got a transaction id below that look's own
--    (proposed_xid), for an insert takes its id within statement_timeout, which is less than
--    horizon_s. And a slice counts only when every transaction with an id below proposed_xid had
--    ended before it was read. So it does not matter how long a COMMIT waits for the disk or for a
--    standby. The next time is proposed when the watermark has come to the one before.
-- 3. Where the clock was set back behind the watermark, the watermark follows. Looks come more often
--    than once in horizon_s, so it lands before everything created since.
-- An operation that becomes PROCESSING again is old, and gets its doubt with that change.
--
-- A transaction of anybody on this server that stays open holds the watermark back (2.). What was
-- created since is looked at all the same, by storage.postgres.search, and only what is committed
-- later than horizon_s after it began has to wait for the watermark.
UPDATE recovery_watermark
SET created_before = least(
        coalesce(:created_before::timestamptz, created_before),
        now() - :horizon_s::float8 * interval '1 second'
    ),
    proposed_before = CASE
        WHEN :proposes::bool THEN now() - :horizon_s::float8 * interval '1 second'
        ELSE least(proposed_before, now() - :horizon_s::float8 * interval '1 second')
    END,
    proposed_xid = CASE WHEN :proposes::bool THEN pg_current_xact_id() ELSE proposed_xid END
WHERE partition = 0;

-- :name search_behind
-- How old the watermark is; while it has none, how old the first proposal of one.
SELECT
    coalesce(
        extract(
            epoch FROM now() - CASE
                WHEN isfinite(created_before) THEN created_before
                WHEN isfinite(proposed_before) THEN proposed_before
            END
        ),
        0
    )::float8 AS behind_s
FROM recovery_watermark
WHERE partition = 0;

-- :name read_in_order
-- Around lock_due, for the transaction: it reads the list along its index and stops when it has enough.
-- By its estimates of an empty list PostgreSQL would sort all that is due, each time.
SELECT
    set_config('enable_sort', :sorts::text, true),
    set_config('enable_bitmapscan', :sorts::text, true);

-- :name lock_due
-- The doubts that are due, those longest due first, with their payments locked; but none of accounts
-- that have as many at work as they may, and none that the caller is at work on. Each account's are
-- looked at by themselves and only as many as it may have, so a long list of one that hangs costs
-- nothing.
-- Of those that are due, locked_max may be locked by others without hiding who comes after them. The
-- locks are taken in no order, since none is waited for.
WITH RECURSIVE account AS (
    (
        SELECT connector_account_id FROM doubts
        WHERE connector_account_id >= ''
        ORDER BY connector_account_id
        LIMIT 1
    )
    UNION ALL
    -- The next one in the index, not all entries of this one.
    SELECT next.connector_account_id
    FROM account
    CROSS JOIN LATERAL (
        SELECT connector_account_id FROM doubts
        WHERE connector_account_id > account.connector_account_id
        ORDER BY connector_account_id
        LIMIT 1
    ) AS next
)
SELECT due.merchant_id, due.operation_id, due.connector_account_id
FROM (
    SELECT doubt.merchant_id, doubt.operation_id, doubt.payment_id, account.connector_account_id
    FROM account
    CROSS JOIN LATERAL (
        SELECT merchant_id, operation_id, payment_id, check_at
        FROM doubts
        -- As a range of the account's index alone: whatever PostgreSQL believes of the accounts'
        -- numbers, it has no other that is in this order.
        WHERE (connector_account_id, check_at) >= (account.connector_account_id, '-infinity')
            AND (connector_account_id, check_at) <= (account.connector_account_id, now())
            AND (lease_until IS NULL OR lease_until <= now())
            AND operation_id <> ALL (:at_work::text[])
        ORDER BY connector_account_id, check_at
        LIMIT :account_limit::int4 + :locked_max::int4
    ) AS doubt
    WHERE account.connector_account_id <> ALL (:full_accounts::text[])
    ORDER BY doubt.check_at
    LIMIT :limit::int4 + :locked_max::int4
) AS due
CROSS JOIN LATERAL (
    SELECT FROM payments AS payment
    WHERE payment.merchant_id = due.merchant_id AND payment.payment_id = due.payment_id
    FOR NO KEY UPDATE SKIP LOCKED
) AS payment
LIMIT :limit::int4;

-- :name lease
-- In the transaction of lock_due, as a statement of its own: it sees what the locks' last holders
-- wrote, so a doubt that another recoverer has just leased is not due any more.
-- The raised epoch fences out whoever held the operation. One with a definite outcome has nobody
-- to fence out; it is leased all the same, so that its evidence is weighed and its row removed.
WITH leased AS (
    UPDATE doubts AS doubt
    SET lease_until = now() + :lease_s::float8 * interval '1 second',
        tries = tries + 1,
        evidence_leased = true
    FROM unnest(:merchant_id::text[], :operation_id::text[]) AS input (merchant_id, operation_id)
    WHERE doubt.merchant_id = input.merchant_id
        AND doubt.operation_id = input.operation_id
        -- "IS TRUE" keeps the index on check_at out of it.
        AND (doubt.check_at <= now()) IS TRUE
        AND (doubt.lease_until IS NULL OR doubt.lease_until <= now())
    RETURNING
        doubt.merchant_id, doubt.operation_id, doubt.payment_id, doubt.tries, doubt.evidence,
        doubt.cancel_begun
),
raised AS (
    UPDATE operations AS operation
    SET epoch = operation.epoch + 1
    FROM leased
    WHERE operation.merchant_id = leased.merchant_id
        AND operation.operation_id = leased.operation_id
        AND operation.state = ANY (:unfinished::int2[])
)
SELECT
    merchant_id, operation_id, payment_id, tries - 1 AS tries, evidence, cancel_begun,
    -- Later than now(), which is when the transaction began.
    clock_timestamp() AS at
FROM leased;

-- :name unweighed
-- In the transaction of lease: what it has leased and cannot be read here has been seen by nobody, so
-- that no outcome removes its evidence before a version that can read it has weighed it.
UPDATE doubts AS doubt
SET evidence_leased = false
FROM unnest(:merchant_id::text[], :operation_id::text[]) AS input (merchant_id, operation_id)
WHERE doubt.merchant_id = input.merchant_id AND doubt.operation_id = input.operation_id;

-- :name begin_cancel
-- By the operation's present owner alone.
UPDATE doubts AS doubt
SET cancel_begun = true
{{of_owner}}
RETURNING true AS begun;

-- :name postpone
-- By its present owner alone: one who was overtaken would have a new attempt looked at too early.
-- What waits for a customer or for a PSP's later answer is marked: no move leads from there back to an
-- unknown outcome (gateway.domain.states), so whoever counts need not look at the operation any more.
UPDATE doubts AS doubt
SET check_at = CASE
        -- Evidence that no recoverer has seen yet does not wait.
        WHEN evidence IS NOT NULL AND NOT evidence_leased THEN now()
        ELSE now() + :check_after_s::float8 * interval '1 second'
    END,
    lease_until = NULL,
    cause = CASE
        WHEN operation.state = ANY (:waiting::int2[]) AND NOT :needs_person::bool
        THEN :only_waits::int2
        ELSE :cause::int2
    END,
    needs_person = :needs_person::bool
{{of_owner}};

-- :name hasten
-- What is to be looked at later is due. A recoverer at work says itself when to look again.
UPDATE doubts
SET check_at = now()
WHERE merchant_id = :merchant_id::text
    AND operation_id = :operation_id::text
    AND lease_until IS NULL
    -- "IS TRUE" keeps the index on check_at out of it.
    AND (check_at > now()) IS TRUE;

-- :name forget
-- Only what is definite, and only where no evidence has come since the lease. The payment is locked first
-- and the operation looked at under the lock, so that no attempt can begin meanwhile that is forgotten
-- with it.
DELETE FROM doubts AS doubt
USING {{locked_payment}}
CROSS JOIN LATERAL (
    SELECT FROM operations
    WHERE merchant_id = payment.merchant_id
        AND operation_id = :operation_id::text
        AND state <> ALL (:unfinished::int2[])
    FOR NO KEY UPDATE
) AS operation
WHERE doubt.merchant_id = :merchant_id::text
    AND doubt.operation_id = :operation_id::text
    AND (doubt.evidence IS NULL OR doubt.evidence_leased);

-- :name add_evidence
-- The payment is locked first and the operation looked at under the lock, so that no change can
-- both miss the evidence and remove it. Whoever brings evidence has looked at what else was told, and
-- looks again where somebody has taken the operation over since: what is outdated must not replace
-- what is not.
-- There is room for one answer. That to an earlier attempt may be a charge which nobody has reversed
-- yet: it stays, and is returned, but where the caller says that it has seen to it.
INSERT INTO doubts AS doubt (
    merchant_id, operation_id, payment_id, connector_account_id, check_at, evidence,
    evidence_leased
)
SELECT
    operation.merchant_id, operation.operation_id, operation.payment_id,
    operation.connector_account_id, now(), :evidence::jsonb, false
FROM {{locked_payment}}
CROSS JOIN LATERAL (
    SELECT merchant_id, operation_id, payment_id, connector_account_id
    FROM operations
    WHERE merchant_id = payment.merchant_id
        AND operation_id = :operation_id::text
        AND payment_id = payment.payment_id
        AND attempt_number = :attempt_number::int4
        AND epoch = :epoch::int4
        AND state = ANY (:unfinished::int2[])
    FOR NO KEY UPDATE
) AS operation
ON CONFLICT (merchant_id, operation_id) DO UPDATE
SET evidence = CASE WHEN {{stays}} THEN doubt.evidence ELSE excluded.evidence END,
    evidence_leased = {{stays}} AND doubt.evidence_leased,
    check_at = least(doubt.check_at, now())
RETURNING evidence;

-- :name count_doubts
-- What waits for a customer or for a PSP's later answer is on recovery's list and in no doubt, but for
-- what recovery has given up: a void or reversal that nobody confirms. There may be very many that wait:
-- they are passed over by the mark that "postpone" has left, without a look at their operations, which
-- lie each on a page of its own. The bound of "check_at" leads to its index: by it, or by a bitmap of it,
-- the table is read in an order that is nearer to that of its pages than the primary key's.
WITH unmarked AS MATERIALIZED (
    SELECT merchant_id, operation_id, since, needs_person
    FROM doubts
    WHERE check_at > '-infinity' AND cause <> :only_waits::int2
),
ages AS MATERIALIZED (
    SELECT extract(epoch FROM now() - since)::float8 AS age_s, needs_person
    FROM (
        -- Not a join, which a plan made while the tables are small may do by reading all operations.
        SELECT since, needs_person, (
            SELECT state FROM operations
            WHERE merchant_id = unmarked.merchant_id AND operation_id = unmarked.operation_id
        ) AS state
        FROM unmarked
        OFFSET 0
    ) AS looked_at
    WHERE state = ANY (:in_doubt::int2[]) OR (state = :accepted::int2 AND needs_person)
)
SELECT
    (SELECT count(*) FROM ages) AS doubts,
    (SELECT max(age_s) FROM ages) AS oldest_age_s,
    (SELECT count(*) FROM ages WHERE needs_person) AS needs_person,
    array(
        SELECT (SELECT count(*) FROM ages WHERE age_s <= bound)
        FROM unnest(:age_bounds_s::float8[]) WITH ORDINALITY AS bounds (bound, number)
        ORDER BY number
    ) AS by_age;

-- The statistics' estimate: a count would read the whole table, which holds every event.
-- :name estimate_outbox
SELECT n_live_tup AS events
FROM pg_stat_user_tables
WHERE relid = 'outbox'::regclass;

-- :fragment locked_payment
(
    SELECT merchant_id, payment_id
    FROM payments
    WHERE merchant_id = :merchant_id::text AND payment_id = :payment_id::text
    FOR NO KEY UPDATE
) AS payment

-- :fragment stays
coalesce(
    (doubt.evidence ->> 'attempt_number')::int4 < :attempt_number::int4
    AND (doubt.evidence ->> 'attempt_number')::int4 <> ALL (:seen_to::int4[]),
    false
)

-- :fragment of_owner
-- The payment is locked first and the epoch looked at under the lock, as in add_evidence.
FROM {{locked_payment}}
CROSS JOIN LATERAL (
    SELECT state FROM operations
    WHERE merchant_id = payment.merchant_id
        AND operation_id = :operation_id::text
        AND epoch = :epoch::int4
        AND state = ANY (:unfinished::int2[])
    FOR NO KEY UPDATE
) AS operation
WHERE doubt.merchant_id = :merchant_id::text AND doubt.operation_id = :operation_id::text
