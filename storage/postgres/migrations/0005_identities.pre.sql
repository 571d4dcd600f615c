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
