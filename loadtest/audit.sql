-- The audit's books and their comparison, in SQLite: on disk, so that millions of payments fit.

-- schema
CREATE TABLE told (
    kind TEXT NOT NULL, merchant_id TEXT NOT NULL, key TEXT NOT NULL,
    operation_id TEXT NOT NULL, payment_id TEXT NOT NULL,
    -- OperationState; negative: the status code of a call without an answer.
    state INTEGER NOT NULL,
    amount_minor INTEGER NOT NULL, digest TEXT NOT NULL
);
CREATE TABLE stored (
    key TEXT NOT NULL, operation_id TEXT NOT NULL, payment_id TEXT NOT NULL,
    state INTEGER NOT NULL, amount_minor INTEGER NOT NULL,
    -- Of the frozen answer; empty where there is none, or where it is not at hand.
    digest TEXT NOT NULL
);
-- What the PSP did, by its journal: 'authorization' and 'charge' hold or take the customer's money.
CREATE TABLE effects (
    transaction_id TEXT NOT NULL, effect TEXT NOT NULL,
    operation_id TEXT NOT NULL, payment_id TEXT NOT NULL, amount_minor INTEGER NOT NULL
);
CREATE TABLE taken_back (transaction_id TEXT PRIMARY KEY) WITHOUT ROWID;
-- Payments of which the gateway is taking something back, and does not know yet that it has.
CREATE TABLE reversing (payment_id TEXT PRIMARY KEY) WITHOUT ROWID;

-- only_merchant
UPDATE told SET merchant_id = (SELECT max(merchant_id) FROM told)
WHERE merchant_id = ''
    AND (SELECT count(DISTINCT merchant_id) FROM told WHERE merchant_id <> '') = 1;

-- indexes
CREATE INDEX told_key ON told (key, state);
CREATE INDEX stored_key ON stored (key);
CREATE INDEX stored_payment ON stored (payment_id);
CREATE TABLE standing AS
    SELECT payment_id, count(*) AS charges, sum(amount_minor) AS amount_minor
    FROM effects
    WHERE effect IN ('authorization', 'charge')
        AND transaction_id NOT IN (SELECT transaction_id FROM taken_back)
    GROUP BY payment_id;
CREATE UNIQUE INDEX standing_payment ON standing (payment_id);
-- What else was done, by its operation.
CREATE TABLE done AS
    SELECT operation_id, max(payment_id) AS payment_id, max(effect) AS effect,
        count(*) AS effects, sum(amount_minor) AS amount_minor
    FROM effects
    WHERE effect NOT IN ('authorization', 'charge')
        AND transaction_id NOT IN (SELECT transaction_id FROM taken_back)
    GROUP BY operation_id;
CREATE UNIQUE INDEX done_operation ON done (operation_id);
-- What callers were told and what the database has, answered or not: both are held to the PSP. Told
-- alone, 7 (NOT_SENT) binds only where nothing is stored: a repeat of the call executes it again.
CREATE TABLE said AS
    SELECT kind, key, operation_id, payment_id, amount_minor, state FROM told
    WHERE state > 0 AND (state <> 7 OR key NOT IN (SELECT key FROM stored))
    UNION
    SELECT told.kind, told.key, stored.operation_id, stored.payment_id, told.amount_minor,
        stored.state
    FROM stored JOIN told ON told.key = stored.key;
-- Payments whose charge was taken back as a whole to void them.
CREATE TABLE voided AS
    SELECT DISTINCT payment_id FROM said
    WHERE kind = 'VOID' AND state = 4 AND payment_id IN (
        SELECT payment_id FROM effects
        WHERE effect IN ('authorization', 'charge')
            AND transaction_id IN (SELECT transaction_id FROM taken_back)
    );
-- Keys that were never answered. CANCELLED, UNKNOWN, DEADLINE_EXCEEDED, ABORTED, INTERNAL and
-- UNAVAILABLE leave open what became of the call; every other status is a refusal.
CREATE TABLE silent AS
    SELECT key, min(kind) AS kind, max(state IN (-1, -2, -4, -10, -13, -14)) AS unknown
    FROM told GROUP BY key HAVING max(state) < 0;

-- acked: authorizations that a caller was told about, each counted once
SELECT count(DISTINCT key) FROM told WHERE state > 0 AND kind IN ('AUTHORIZE', 'DECLINE', 'VERIFY');

-- acked_operations: the same of every kind of operation
SELECT count(DISTINCT key) FROM told WHERE state > 0;

-- missing_rows: told, and not in the database
SELECT count(DISTINCT key) FROM told
WHERE state > 0 AND key NOT IN (SELECT key FROM stored);

-- repeated_rows: keys that stand in the database more than once
SELECT count(*) FROM (SELECT key FROM stored GROUP BY key HAVING count(*) > 1);

-- contradicted: told otherwise than the database has it
SELECT count(DISTINCT told.key) FROM told JOIN stored ON stored.key = told.key
WHERE told.state > 0 AND (
    told.operation_id <> stored.operation_id OR told.payment_id <> stored.payment_id
    OR told.amount_minor <> stored.amount_minor
    OR (told.digest <> '' AND stored.digest <> '' AND told.digest <> stored.digest)
    -- Succeeded, declined, failed, cancelled, expired. Nothing undoes them here.
    OR (told.state IN (4, 5, 6, 9, 10) AND told.state <> stored.state)
);

-- unkept: answers with a definite outcome that the database has not kept
SELECT count(DISTINCT told.key) FROM told JOIN stored ON stored.key = told.key
WHERE told.digest <> '' AND stored.digest = '';

-- uncharged: said that it succeeded (4), and the PSP has not done it with this amount
SELECT count(DISTINCT said.key) FROM said
LEFT JOIN standing ON standing.payment_id = said.payment_id
LEFT JOIN done ON done.operation_id = said.operation_id
WHERE said.state = 4 AND CASE
    WHEN said.kind IN ('AUTHORIZE', 'DECLINE') THEN
        coalesce(standing.amount_minor, 0) <> said.amount_minor * coalesce(standing.charges, 1)
        AND said.payment_id NOT IN (SELECT payment_id FROM voided)
    -- What is void already needs no void of its own.
    WHEN said.kind = 'VOID' AND standing.charges IS NULL THEN 0
    ELSE done.effects IS NULL OR done.amount_minor <> said.amount_minor * done.effects
END;

-- charged_declines: said that it did not happen (declined, failed, not sent, cancelled) or that it
-- takes no money, and the PSP has done it
SELECT count(DISTINCT said.key) FROM said
LEFT JOIN standing ON standing.payment_id = said.payment_id
LEFT JOIN done ON done.operation_id = said.operation_id
WHERE (said.state IN (5, 6, 7, 9) OR said.kind = 'VERIFY')
    AND said.payment_id NOT IN (SELECT payment_id FROM reversing)
    AND CASE
        WHEN said.kind IN ('AUTHORIZE', 'DECLINE', 'VERIFY') THEN standing.charges IS NOT NULL
        -- What a late void released cannot be had back: the gateway reports it as a discrepancy.
        WHEN said.kind = 'VOID' THEN 0
        ELSE done.effects IS NOT NULL
    END;

-- charged_refusals: refused each time with a definite status, and the PSP has done it
SELECT count(DISTINCT stored.key) FROM stored
JOIN silent ON silent.key = stored.key
LEFT JOIN standing ON standing.payment_id = stored.payment_id
LEFT JOIN done ON done.operation_id = stored.operation_id
WHERE NOT silent.unknown AND CASE
    WHEN silent.kind IN ('AUTHORIZE', 'DECLINE', 'VERIFY') THEN standing.charges IS NOT NULL
    ELSE done.effects IS NOT NULL
END;

-- duplicate_charges: charges beyond the first that stand for one payment
SELECT coalesce(sum(charges - 1), 0) FROM standing
WHERE payment_id NOT IN (SELECT payment_id FROM reversing);

-- repeated_effects: captures, voids, refunds and the like that the PSP did beyond the first
SELECT coalesce(sum(effects - 1), 0) FROM done
WHERE payment_id NOT IN (SELECT payment_id FROM reversing);

-- unrecorded_charges: what moved money and stands, and of which the database knows nothing
SELECT
    (SELECT count(*) FROM standing WHERE payment_id NOT IN (SELECT payment_id FROM stored))
    + (
        SELECT count(*) FROM done
        WHERE effect IN ('capture', 'refund', 'increment')
            AND operation_id NOT IN (SELECT operation_id FROM stored)
    );

-- unknown: calls that ended without an answer or a definite refusal
SELECT count(*) FROM silent WHERE unknown;

-- unknown_recorded: of these, how many the database knows, whatever became of them
SELECT count(DISTINCT key) FROM stored WHERE key IN (SELECT key FROM silent WHERE unknown);
