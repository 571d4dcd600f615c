-- What the audit reads: everything, a page at a time, in the order of the primary keys. "until" is the
-- one merchant that is looked at, or the greatest text there is.

-- :name audit_payments
SELECT merchant_id, payment_id
FROM payments
WHERE (merchant_id, payment_id) > (:after_merchant_id::text, :after_id::text)
    AND merchant_id <= :until_merchant_id::text
ORDER BY merchant_id, payment_id
LIMIT :limit::int4;

-- :name audit_events
SELECT outbox.merchant_id, outbox.payment_id, payment_version, seq, payload
FROM unnest(:merchant_id::text[], :payment_id::text[]) AS input (merchant_id, payment_id)
JOIN outbox
    ON outbox.merchant_id = input.merchant_id AND outbox.payment_id = input.payment_id
ORDER BY outbox.merchant_id, outbox.payment_id, payment_version, seq;

-- :name audit_unfinished
-- The operations that recovery has on its list, and those that it should have.
SELECT operation.merchant_id, operation.payment_id, operation.operation_id,
    doubt.operation_id IS NOT NULL AS listed,
    operation.state = :processing::int2
        AND operation.recover_after < now() - :overdue_s::float8 * interval '1 second' AS overdue
FROM unnest(:merchant_id::text[], :payment_id::text[]) AS input (merchant_id, payment_id)
JOIN operations AS operation
    ON operation.merchant_id COLLATE "default" = input.merchant_id
    AND operation.payment_id = input.payment_id
LEFT JOIN doubts AS doubt
    ON doubt.merchant_id = operation.merchant_id AND doubt.operation_id = operation.operation_id
WHERE operation.state = ANY (:unfinished::int2[]);

-- :name audit_discrepancies
SELECT DISTINCT known.merchant_id, known.payment_id, known.operation_id, known.kind
FROM unnest(:merchant_id::text[], :payment_id::text[]) AS input (merchant_id, payment_id)
JOIN discrepancies AS known
    ON known.merchant_id = input.merchant_id AND known.payment_id = input.payment_id;

-- :name existing_payments
SELECT DISTINCT payment_id FROM operations WHERE payment_id = ANY (:payment_ids::text[]);

-- Of each page the orphans, and its last row, from which the next page goes on.

-- :name orphans_of_operations
WITH page AS MATERIALIZED (
    SELECT merchant_id, operation_id AS id, payment_id, operation_id
    FROM operations
    WHERE {{page_by_operation}}
),
marked AS (
    SELECT *, {{payment_is_missing}} AS is_orphan FROM page
)
{{orphans_and_last}};

-- :name orphans_of_outbox
-- By payments: the rest of one that a page cuts off needs no second look.
WITH page AS MATERIALIZED (
    SELECT merchant_id, payment_id AS id, payment_id, '' AS operation_id
    FROM outbox
    WHERE (merchant_id, payment_id) > (:after_merchant_id::text, :after_id::text)
        AND merchant_id <= :until_merchant_id::text
    ORDER BY merchant_id, payment_id
    LIMIT :limit::int4
),
marked AS (
    SELECT *, {{payment_is_missing}} AS is_orphan FROM (SELECT DISTINCT * FROM page) AS page
)
{{orphans_and_last}};

-- :name orphans_of_superseded_attempts
WITH page AS MATERIALIZED (
    SELECT merchant_id, operation_id AS id, '' AS payment_id, operation_id
    FROM superseded_attempts
    WHERE {{page_by_operation}}
),
marked AS (
    SELECT *, {{operation_is_missing}} AS is_orphan FROM (SELECT DISTINCT * FROM page) AS page
)
{{orphans_and_last}};

-- :name orphans_of_doubts
WITH page AS MATERIALIZED (
    SELECT merchant_id, operation_id AS id, payment_id, operation_id
    FROM doubts
    WHERE {{page_by_operation}}
),
marked AS (
    SELECT *, {{operation_is_missing}} AS is_orphan FROM page
)
{{orphans_and_last}};

-- :name orphans_of_resolutions
WITH page AS MATERIALIZED (
    SELECT merchant_id, operation_id AS id, payment_id, operation_id
    FROM resolutions
    WHERE {{page_by_operation}}
),
marked AS (
    SELECT *, {{operation_is_missing}} AS is_orphan FROM (SELECT DISTINCT * FROM page) AS page
)
{{orphans_and_last}};

-- :name orphans_of_discrepancies
WITH page AS MATERIALIZED (
    SELECT merchant_id, discrepancy_id::text AS id, payment_id, operation_id
    FROM discrepancies
    WHERE (merchant_id, discrepancy_id::text) > (:after_merchant_id::text, :after_id::text)
        AND merchant_id <= :until_merchant_id::text
    ORDER BY merchant_id, discrepancy_id::text
    LIMIT :limit::int4
),
marked AS (
    SELECT *, {{operation_is_missing}} AS is_orphan FROM page
)
{{orphans_and_last}};

-- :fragment page_by_operation
(merchant_id, operation_id) > (:after_merchant_id::text, :after_id::text)
        AND merchant_id <= :until_merchant_id::text
    ORDER BY merchant_id, operation_id
    LIMIT :limit::int4

-- :fragment payment_is_missing
NOT EXISTS (
    SELECT FROM payments
    WHERE payments.merchant_id = page.merchant_id AND payments.payment_id = page.payment_id
)

-- :fragment operation_is_missing
NOT EXISTS (
    SELECT FROM operations
    WHERE operations.merchant_id = page.merchant_id
        AND operations.operation_id = page.operation_id
)

-- :fragment orphans_and_last
SELECT merchant_id, id, payment_id, operation_id, is_orphan, whole
FROM (
    SELECT
        *,
        (SELECT count(*) FROM page) = :limit::int4 AS whole,
        row_number() OVER (ORDER BY merchant_id DESC, id DESC) = 1 AS is_last
    FROM marked
) AS numbered
WHERE is_orphan OR is_last
ORDER BY merchant_id, id
