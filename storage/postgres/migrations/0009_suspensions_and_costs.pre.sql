-- What persons say of accounts at PSPs: that nothing is sent to them, and what they cost.

-- Kill switches and maintenance windows. Rows stay when they are over: who switched what off and on
-- again, when and why.
CREATE TABLE connector_suspensions (
    -- Empty where all accounts of a connector are meant, of every merchant; so is account_id then.
    merchant_id text COLLATE "C" NOT NULL,
    suspension_id text COLLATE "C" NOT NULL,
    -- gateway.routing.availability's SuspensionKind.
    kind smallint NOT NULL,
    connector text NOT NULL CHECK (connector <> ''),
    account_id text COLLATE "C" NOT NULL,
    -- Empty: everything that would be sent.
    method text NOT NULL,
    begins_at timestamptz NOT NULL,
    ends_at timestamptz NOT NULL,
    reason text NOT NULL CHECK (reason <> ''),
    created_by text NOT NULL CHECK (created_by <> ''),
    created_at timestamptz NOT NULL DEFAULT now(),
    -- Where a person ended it.
    ended_at timestamptz,
    ended_by text NOT NULL DEFAULT '',
    ended_reason text NOT NULL DEFAULT '',
    PRIMARY KEY (merchant_id, suspension_id),
    CHECK ((merchant_id = '') = (account_id = '')),
    CHECK (begins_at < ends_at),
    CHECK (ended_at IS NULL OR (ended_by <> '' AND ended_reason <> ''))
);

-- Gateways ask for those that are or are to come, among all that ever were.
CREATE INDEX connector_suspensions_ends_at ON connector_suspensions (ends_at) WHERE ended_at IS NULL;

-- What a merchant's accounts cost, as a file in each of its versions; the latest one counts.
CREATE TABLE routing_costs (
    merchant_id text COLLATE "C" NOT NULL REFERENCES merchants,
    version integer NOT NULL CHECK (version >= 1),
    -- Empty: from this version on the merchant has none.
    body text NOT NULL,
    reason text NOT NULL CHECK (reason <> ''),
    created_by text NOT NULL CHECK (created_by <> ''),
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (merchant_id, version)
);

-- Gateways ask what has changed since they last asked.
CREATE INDEX routing_costs_created_at ON routing_costs (created_at);
