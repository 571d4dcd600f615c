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
-- What the PSP's journal calls an authorization or a charge.
CREATE TABLE charges (
    authorization_id TEXT PRIMARY KEY, payment_id TEXT NOT NULL, amount_minor INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE reversed (authorization_id TEXT PRIMARY KEY) WITHOUT ROWID;

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
    FROM charges WHERE authorization_id NOT IN (SELECT authorization_id FROM reversed)
    GROUP BY payment_id;
CREATE UNIQUE INDEX standing_payment ON standing (payment_id);
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
    -- 4: succeeded, 5: declined. Nothing undoes them here.
    OR (told.state IN (4, 5) AND told.state <> stored.state)
);

-- unkept: answers with a definite outcome that the database has not kept
SELECT count(DISTINCT told.key) FROM told JOIN stored ON stored.key = told.key
WHERE told.digest <> '' AND stored.digest = '';

-- uncharged: told that it succeeded, and no charge of the amount stands at the PSP
SELECT count(DISTINCT told.key) FROM told
LEFT JOIN standing ON standing.payment_id = told.payment_id
WHERE told.kind = 'AUTHORIZE' AND told.state = 4
    AND coalesce(standing.amount_minor, 0) <> told.amount_minor * coalesce(standing.charges, 1);

-- charged_declines: told that it was declined, and a charge stands
SELECT count(DISTINCT told.key) FROM told JOIN standing ON standing.payment_id = told.payment_id
WHERE told.kind IN ('DECLINE', 'AUTHORIZE') AND told.state = 5;

-- charged_refusals: refused each time with a definite status, and a charge stands
SELECT count(DISTINCT stored.key) FROM stored JOIN standing ON standing.payment_id = stored.payment_id
WHERE stored.key IN (SELECT key FROM silent WHERE NOT unknown AND kind = 'AUTHORIZE');

-- duplicate_charges: charges beyond the first that stand for one payment
SELECT coalesce(sum(charges - 1), 0) FROM standing;

-- unrecorded_charges: charges that stand for payments of which the database knows nothing
SELECT count(*) FROM standing WHERE payment_id NOT IN (SELECT payment_id FROM stored);

-- unknown: calls that ended without an answer or a definite refusal
SELECT count(*) FROM silent WHERE unknown;

-- unknown_recorded: of these, how many the database knows, whatever became of them
SELECT count(DISTINCT key) FROM stored WHERE key IN (SELECT key FROM silent WHERE unknown);
