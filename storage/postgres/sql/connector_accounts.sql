-- Merchants' accounts at PSPs: few rows, read into memory by every gateway.

-- :name add
-- No row where the merchant does not exist. The id is new: where it is there already, an earlier try of
-- the same call wrote it, whose commit was not answered.
INSERT INTO connector_accounts (
    merchant_id, account_id, mode, connector, priority, capabilities,
    credentials, wrapping_key_id, wrapped_data_key
)
SELECT
    merchant_id, :account_id::text, :mode::int2, :connector::text, :priority::int4,
    :capabilities::jsonb, :credentials::bytea, :wrapping_key_id::text, :wrapped_data_key::bytea
FROM merchants
WHERE merchant_id = :merchant_id::text
ON CONFLICT (merchant_id, account_id) DO UPDATE SET connector = excluded.connector
RETURNING {{columns}};

-- :name list
SELECT {{columns}}
FROM connector_accounts
WHERE removed_at IS NULL
    AND (:merchant_id::text IS NULL OR merchant_id = :merchant_id::text)
ORDER BY merchant_id, mode, priority, account_id;

-- :name find
SELECT {{columns}}
FROM connector_accounts
WHERE merchant_id = :merchant_id::text AND account_id = :account_id::text AND removed_at IS NULL;

-- :name changed_since
-- A transaction that began earlier may be seen later, by at most as long as its statement may take.
-- Where the clock was set back, what is new was changed before what was seen.
SELECT {{columns}}
FROM connector_accounts
WHERE updated_at >= CASE
        WHEN :since::timestamptz IS NULL THEN '-infinity'
        ELSE least(:since::timestamptz, now()) - make_interval(secs => :overlap_s::float8)
    END
    AND (removed_at IS NULL OR :since::timestamptz IS NOT NULL)
ORDER BY updated_at;

-- :name change
UPDATE connector_accounts
SET
    enabled = coalesce(:enabled::bool, enabled),
    priority = coalesce(:priority::int4, priority),
    version = version + 1,
    updated_at = now()
WHERE merchant_id = :merchant_id::text AND account_id = :account_id::text AND removed_at IS NULL
RETURNING {{columns}};

-- :name replace_credentials
UPDATE connector_accounts
SET
    credentials = :credentials::bytea,
    wrapping_key_id = :wrapping_key_id::text,
    wrapped_data_key = :wrapped_data_key::bytea,
    version = version + 1,
    updated_at = now()
WHERE merchant_id = :merchant_id::text AND account_id = :account_id::text AND removed_at IS NULL
RETURNING {{columns}};

-- :name remove
UPDATE connector_accounts
SET
    enabled = false,
    credentials = '',
    wrapped_data_key = '',
    removed_at = now(),
    version = version + 1,
    updated_at = now()
WHERE merchant_id = :merchant_id::text AND account_id = :account_id::text AND removed_at IS NULL
RETURNING {{columns}};

-- :name rewrap
-- Only the credentials that were unwrapped: they may have been replaced meanwhile.
UPDATE connector_accounts
SET wrapping_key_id = :wrapping_key_id::text, wrapped_data_key = :wrapped_data_key::bytea
WHERE merchant_id = :merchant_id::text AND account_id = :account_id::text
    AND removed_at IS NULL AND wrapped_data_key = :expected_wrapped::bytea
RETURNING {{columns}};

-- :fragment columns
merchant_id, account_id, mode, connector, priority, enabled, capabilities::text AS capabilities,
version, removed_at, credentials, wrapping_key_id, wrapped_data_key, created_at, updated_at
