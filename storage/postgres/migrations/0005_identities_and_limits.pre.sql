-- Callers that are known by the identity in their certificate (SPIFFE), each as an API key would be.

CREATE TABLE client_identities (
    -- The URI in the certificate, spiffe://<trust domain>/<path>.
    uri text COLLATE "C" PRIMARY KEY,
    organisation_id text COLLATE "C" NOT NULL REFERENCES organisations,
    name text NOT NULL,
    scopes text[] NOT NULL,
    -- NULL: all merchants of the organisation, later ones too.
    merchant_ids text[],
    mode smallint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE INDEX client_identities_organisation ON client_identities (organisation_id);

-- How often a merchant's money calls may begin; without both, as often as the gateway can.
ALTER TABLE merchants
    ADD COLUMN rate_limit_per_s double precision,
    ADD COLUMN rate_limit_burst integer;
ALTER TABLE merchants
    ADD CONSTRAINT rate_limit_is_whole CHECK (
        (rate_limit_per_s IS NULL) = (rate_limit_burst IS NULL)
        AND (rate_limit_per_s IS NULL OR rate_limit_per_s BETWEEN 0.001 AND 100000)
        AND (rate_limit_burst IS NULL OR rate_limit_burst BETWEEN 1 AND 1000000)
    ) NOT VALID;
