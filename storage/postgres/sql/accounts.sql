-- Organisations, merchants and API keys. Small tables, read by a cache with a short life.
--
-- What has an id of its own is written under a new one. Where that is there already, an earlier try of
-- the same call wrote it, whose commit was not answered.

-- :name create_organisation
INSERT INTO organisations (organisation_id, name)
VALUES (:organisation_id::text, :name::text)
ON CONFLICT (organisation_id) DO UPDATE SET name = excluded.name
RETURNING organisation_id, name, created_at;

-- :name list_organisations
SELECT organisation_id, name, created_at FROM organisations ORDER BY created_at, organisation_id;

-- :name create_merchant
-- No row where the organisation does not exist.
INSERT INTO merchants (merchant_id, organisation_id, name, pan_exempt_order_id)
SELECT :merchant_id::text, organisation_id, :name::text, :pan_exempt_order_id::bool
FROM organisations
WHERE organisation_id = :organisation_id::text
ON CONFLICT (merchant_id) DO UPDATE SET name = excluded.name
RETURNING merchant_id, organisation_id, name, pan_exempt_order_id, created_at;

-- :name limit_merchant
-- No row where the merchant does not exist.
UPDATE merchants
SET rate_limit_per_s = :per_s::float8, rate_limit_burst = :burst::int4
WHERE merchant_id = :merchant_id::text
RETURNING merchant_id;

-- :name find_organisation
SELECT organisation_id FROM organisations WHERE organisation_id = :organisation_id::text;

-- :name find_merchant
SELECT merchant_id FROM merchants WHERE merchant_id = :merchant_id::text;

-- :name list_merchants
SELECT
    merchant_id, organisation_id, name, pan_exempt_order_id, created_at, rate_limit_per_s,
    rate_limit_burst
FROM merchants
WHERE :organisation_id::text IS NULL OR organisation_id = :organisation_id::text
ORDER BY created_at, merchant_id;

-- :name create_key
-- No row where the organisation does not exist, or a merchant is not one of its.
INSERT INTO api_keys (
    key_id, organisation_id, name, secret_hash, scopes, merchant_ids, mode, expires_at
)
SELECT
    :key_id::text, organisation_id, :name::text, :secret_hash::bytea, :scopes::text[],
    :merchant_ids::text[], :mode::int2, :expires_at::timestamptz
FROM organisations
WHERE organisation_id = :organisation_id::text
    AND {{merchants_are_its}}
ON CONFLICT (key_id) DO UPDATE SET name = excluded.name
RETURNING key_id;

-- :name list_keys
SELECT key_id, expires_at, revoked_at, {{its_columns}}
FROM api_keys AS credential
WHERE :organisation_id::text IS NULL OR organisation_id = :organisation_id::text
ORDER BY created_at, key_id;

-- :name revoke_key
UPDATE api_keys SET revoked_at = now()
WHERE key_id = :key_id::text AND revoked_at IS NULL
RETURNING key_id;

-- :name load_key
-- A row for each merchant that the key may act for; one with NULLs where there is none.
SELECT key_id, secret_hash, expires_at, revoked_at, {{its_columns}}, {{its_merchant}}
FROM api_keys AS credential
{{and_its_merchants}}
WHERE key_id = :key_id::text
ORDER BY merchant.merchant_id;

-- :name add_identity
-- No row where the organisation does not exist, a merchant is not one of its, or the URI is taken.
INSERT INTO client_identities (uri, organisation_id, name, scopes, merchant_ids, mode)
SELECT
    :uri::text, organisation_id, :name::text, :scopes::text[], :merchant_ids::text[], :mode::int2
FROM organisations
WHERE organisation_id = :organisation_id::text
    AND {{merchants_are_its}}
ON CONFLICT DO NOTHING
RETURNING uri;

-- :name list_identities
SELECT uri, {{its_columns}}
FROM client_identities AS credential
WHERE :organisation_id::text IS NULL OR organisation_id = :organisation_id::text
ORDER BY uri;

-- :name remove_identity
DELETE FROM client_identities WHERE uri = :uri::text RETURNING uri;

-- :name load_identity
-- A row for each merchant that the identity may act for; one with NULLs where there is none.
SELECT uri, {{its_columns}}, {{its_merchant}}
FROM client_identities AS credential
{{and_its_merchants}}
WHERE uri = :uri::text
ORDER BY merchant.merchant_id;

-- :name load_merchants
-- Those of the named merchants that the organisation has; all of its where none are named.
SELECT {{its_merchant}}
FROM merchants AS merchant
WHERE organisation_id = :organisation_id::text
    AND (:merchant_ids::text[] IS NULL OR merchant_id = ANY (:merchant_ids::text[]))
ORDER BY merchant_id;

-- :fragment its_columns
credential.organisation_id, credential.name, credential.scopes, credential.merchant_ids,
credential.mode, credential.created_at

-- :fragment and_its_merchants
LEFT JOIN merchants AS merchant
    ON merchant.organisation_id = credential.organisation_id
    AND (credential.merchant_ids IS NULL OR merchant.merchant_id = ANY (credential.merchant_ids))

-- :fragment its_merchant
merchant.merchant_id AS merchant_id, merchant.pan_exempt_order_id AS merchant_pan_exempt_order_id,
merchant.rate_limit_per_s AS merchant_rate_limit_per_s,
merchant.rate_limit_burst AS merchant_rate_limit_burst

-- :fragment merchants_are_its
NOT EXISTS (
    SELECT FROM unnest(:merchant_ids::text[]) AS named (merchant_id)
    WHERE NOT EXISTS (
        SELECT FROM merchants
        WHERE merchants.merchant_id = named.merchant_id
            AND merchants.organisation_id = organisations.organisation_id
    )
)
