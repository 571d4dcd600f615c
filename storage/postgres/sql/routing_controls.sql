-- Suspensions of accounts, and merchants' costs: few rows, read into memory by every gateway.

-- :name suspend
-- No row where the merchant has no such account. The id is new: where it is there already, an earlier
-- try of the same call wrote it, whose commit was not answered.
INSERT INTO connector_suspensions (
    merchant_id, suspension_id, kind, connector, account_id, method, begins_at, ends_at,
    reason, created_by
)
SELECT
    :merchant_id::text, :suspension_id::text, :kind::int2, :connector::text, :account_id::text,
    :method::text, coalesce(:begins_at::timestamptz, now()),
    coalesce(:ends_at::timestamptz, 'infinity'), :reason::text, :created_by::text
WHERE :account_id::text = ''
    OR EXISTS (
        SELECT FROM connector_accounts
        WHERE merchant_id = :merchant_id::text AND account_id = :account_id::text
            AND connector = :connector::text AND removed_at IS NULL
    )
ON CONFLICT (merchant_id, suspension_id) DO UPDATE SET reason = excluded.reason
RETURNING {{columns}};

-- :name end_suspension
-- By its id alone: a person has it from the list. No index: they are few. `again`: an earlier try of
-- the same call may have ended it, and its commit was not answered.
UPDATE connector_suspensions
SET ended_at = coalesce(ended_at, now()), ended_by = :ended_by::text, ended_reason = :reason::text
WHERE suspension_id = :suspension_id::text
    AND (
        (ended_at IS NULL AND ends_at > now())
        OR (:again::bool AND ended_by = :ended_by::text AND ended_reason = :reason::text)
    )
RETURNING {{columns}};

-- :name current_suspensions
SELECT {{columns}}
FROM connector_suspensions
WHERE ended_at IS NULL AND ends_at > now()
ORDER BY begins_at, suspension_id;

-- :name all_suspensions
SELECT {{columns}}
FROM connector_suspensions
ORDER BY created_at DESC, suspension_id DESC
LIMIT :limit::int4;

-- :name put_costs
-- No version where another call took the number; no row without the merchant. Where the latest version
-- is just this, an earlier try of the same call wrote it, whose commit was not answered.
WITH latest AS (
    SELECT {{cost_columns}}
    FROM routing_costs
    WHERE merchant_id = :merchant_id::text
    ORDER BY version DESC
    LIMIT 1
),
written AS (
    SELECT *
    FROM latest
    WHERE (body, reason, created_by) = (:body::text, :reason::text, :created_by::text)
),
put AS (
    INSERT INTO routing_costs (merchant_id, version, body, reason, created_by)
    SELECT
        merchant_id, coalesce((SELECT version FROM latest), 0) + 1, :body::text, :reason::text,
        :created_by::text
    FROM merchants
    WHERE merchant_id = :merchant_id::text AND NOT EXISTS (SELECT FROM written)
    ON CONFLICT DO NOTHING
    RETURNING {{cost_columns}}
)
SELECT costs.*
FROM merchants
LEFT JOIN (SELECT * FROM written UNION ALL SELECT * FROM put) AS costs ON true
WHERE merchants.merchant_id = :merchant_id::text;

-- :name costs_of
SELECT {{cost_columns}}
FROM routing_costs
WHERE merchant_id = :merchant_id::text
ORDER BY version DESC
LIMIT :limit::int4;

-- :name changed_costs
-- A transaction that began earlier may be seen later, by at most as long as its statement may take.
-- Where the clock was set back, what is new was put before what was seen.
SELECT DISTINCT ON (merchant_id) {{cost_columns}}
FROM routing_costs
WHERE created_at >= CASE
    WHEN :since::timestamptz IS NULL THEN '-infinity'
    ELSE least(:since::timestamptz, now()) - make_interval(secs => :overlap_s::float8)
END
ORDER BY merchant_id, version DESC;

-- :fragment columns
merchant_id, suspension_id, kind, connector, account_id, method, begins_at,
CASE WHEN isfinite(ends_at) THEN ends_at END AS ends_at,
extract(epoch FROM begins_at - now())::float8 AS begins_in_s,
CASE WHEN isfinite(ends_at) THEN extract(epoch FROM ends_at - now())::float8 END AS ends_in_s,
reason, created_by, created_at, ended_at, ended_by, ended_reason

-- :fragment cost_columns
merchant_id, version, body, reason, created_by, created_at
