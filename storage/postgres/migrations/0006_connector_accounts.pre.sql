-- Merchants' accounts at PSPs. Their credentials are encrypted before they come here.

CREATE TABLE connector_accounts (
    merchant_id text COLLATE "C" NOT NULL REFERENCES merchants,
    account_id text COLLATE "C" NOT NULL,
    mode smallint NOT NULL,
    connector text NOT NULL,
    priority integer NOT NULL,
    enabled boolean NOT NULL DEFAULT true,
    -- Where the account differs from what is usual at the connector.
    capabilities jsonb NOT NULL,
    version integer NOT NULL DEFAULT 1,
    -- Removed accounts stay, without credentials: gateways learn of the removal, and payments made
    -- with an account go on to name it.
    removed_at timestamptz,
    -- AES-256-GCM under a data key, which is wrapped by the key wrapping_key_id.
    credentials bytea NOT NULL,
    wrapping_key_id text NOT NULL,
    wrapped_data_key bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (merchant_id, account_id),
    CHECK (removed_at IS NULL OR credentials = '')
);

-- Gateways ask what has changed since they last asked.
CREATE INDEX connector_accounts_updated_at ON connector_accounts (updated_at);
