-- Routing rules: few rows, read into memory by every gateway.

-- :name put
-- The next version, or the newest one where its text is the same. No version where another call took
-- the number; no row without the merchant.
WITH newest AS (
    SELECT version, rules
    FROM routing_rules
    WHERE merchant_id = :merchant_id::text AND mode = :mode::int2
    ORDER BY version DESC
    LIMIT 1
),
put AS (
    INSERT INTO routing_rules (
        merchant_id, mode, version, rules, reason, created_by, request_id
    )
    SELECT
        merchant_id, :mode::int2, coalesce((SELECT version FROM newest), 0) + 1, :rules::text,
        :reason::text, :created_by::text, :request_id::text
    FROM merchants
    WHERE merchant_id = :merchant_id::text
        AND NOT EXISTS (SELECT FROM newest WHERE rules = :rules::text)
    ON CONFLICT DO NOTHING
    RETURNING version
)
SELECT coalesce(
    (SELECT version FROM put), (SELECT version FROM newest WHERE rules = :rules::text)
) AS version
FROM merchants
WHERE merchant_id = :merchant_id::text;

-- :name activate
-- No row where the version does not exist, or another one than expected is in force, or another call
-- took the number. Where just this stands already, an earlier try of the same call wrote it, whose
-- commit was not answered.
WITH activated AS (
    INSERT INTO routing_activations (
        merchant_id, mode, number, version, reason, activated_by, request_id
    )
    SELECT
        merchant_id, :mode::int2, coalesce(last.number, 0) + 1, :version::int4, :reason::text,
        :activated_by::text, :request_id::text
    FROM merchants
    LEFT JOIN LATERAL ({{last}}) AS last ON true
    WHERE merchant_id = :merchant_id::text
        AND (
            :version::int4 = 0
            OR EXISTS (
                SELECT FROM routing_rules
                WHERE merchant_id = :merchant_id::text
                    AND mode = :mode::int2
                    AND version = :version::int4
            )
        )
        AND coalesce(last.version, 0) = :expected::int4
    ON CONFLICT DO NOTHING
    RETURNING version
)
SELECT version FROM activated
UNION ALL
SELECT this.version
FROM ({{last}}) AS last
JOIN routing_activations AS this
    ON this.merchant_id = :merchant_id::text
    AND this.mode = :mode::int2
    AND this.number = last.number
LEFT JOIN routing_activations AS before
    ON before.merchant_id = this.merchant_id
    AND before.mode = this.mode
    AND before.number = this.number - 1
WHERE (this.version, this.reason, this.activated_by, this.request_id)
    = (:version::int4, :reason::text, :activated_by::text, :request_id::text)
    AND coalesce(before.version, 0) = :expected::int4;

-- :name active
SELECT coalesce(last.version, 0) AS version
FROM merchants
LEFT JOIN LATERAL ({{last}}) AS last ON true
WHERE merchant_id = :merchant_id::text;

-- :name list
-- The newest first, without their texts unless one is asked for.
SELECT
    rules.version, rules.reason, rules.created_by, rules.created_at,
    CASE WHEN :version::int4 IS NULL THEN '' ELSE rules.rules END AS rules,
    last.version IS NOT NULL AND last.version = rules.version AS active,
    activation.activated_at, activation.activated_by, activation.reason AS activation_reason
FROM routing_rules AS rules
LEFT JOIN LATERAL ({{last}}) AS last ON true
LEFT JOIN LATERAL (
    SELECT activated_at, activated_by, reason
    FROM routing_activations
    WHERE merchant_id = rules.merchant_id
        AND mode = rules.mode
        AND routing_activations.version = rules.version
    ORDER BY number DESC
    LIMIT 1
) AS activation ON true
WHERE rules.merchant_id = :merchant_id::text
    AND rules.mode = :mode::int2
    AND (:version::int4 IS NULL OR rules.version = :version::int4)
    AND (:before_version::int4 IS NULL OR rules.version < :before_version::int4)
ORDER BY rules.version DESC
LIMIT :page_size::int4;

-- :name active_since
-- The last one of each merchant and mode, and behind it the one before, for who cannot read the last.
-- A transaction that began earlier may be seen later, by at most as long as its statement may take.
-- Where the clock was set back, what is new was activated before what was seen.
WITH recent AS (
    SELECT
        merchant_id, mode, number, version, activated_at,
        row_number() OVER (PARTITION BY merchant_id, mode ORDER BY number DESC) AS place
    FROM routing_activations
    WHERE activated_at >= CASE
        WHEN :since::timestamptz IS NULL THEN '-infinity'
        ELSE least(:since::timestamptz, now()) - make_interval(secs => :overlap_s::float8)
    END
)
SELECT
    recent.merchant_id, recent.mode, recent.number, recent.version, recent.activated_at,
    coalesce(rules.rules, '') AS rules
FROM recent
LEFT JOIN routing_rules AS rules
    ON rules.merchant_id = recent.merchant_id
    AND rules.mode = recent.mode
    AND rules.version = recent.version
WHERE recent.place <= 2
ORDER BY recent.merchant_id, recent.mode, recent.number DESC;

-- :name past_payments
-- The newest first, each with the account that was asked first: a cascade may have ended elsewhere.
WITH past AS MATERIALIZED (
    SELECT
        merchant_id, payment_id, requested_minor, currency, details, connector,
        connector_account_id, created_at
    FROM payments
    WHERE merchant_id = :merchant_id::text
        AND mode = :mode::int2
        AND created_at >= now() - make_interval(days => :days::int4)
    ORDER BY created_at DESC, payment_id DESC
    LIMIT :payments_max::int4
)
SELECT
    past.payment_id, past.requested_minor, past.currency, past.details,
    coalesce(first.connector, past.connector) AS connector,
    coalesce(first.connector_account_id, past.connector_account_id) AS connector_account_id
FROM past
LEFT JOIN (
    SELECT
        operation.merchant_id, operation.payment_id, attempt.connector,
        attempt.connector_account_id
    FROM operations AS operation
    JOIN superseded_attempts AS attempt
        ON attempt.merchant_id = operation.merchant_id
        AND attempt.operation_id = operation.operation_id
        AND attempt.number = 1
    WHERE operation.attempt_number > 1 AND operation.kind = ANY (:kinds::int2[])
) AS first
    ON first.payment_id = past.payment_id
    AND first.merchant_id COLLATE "default" = past.merchant_id
ORDER BY past.created_at DESC, past.payment_id DESC;

-- :fragment last
SELECT number, version
FROM routing_activations
WHERE merchant_id = :merchant_id::text AND mode = :mode::int2
ORDER BY number DESC
LIMIT 1
