-- Routing rules of merchants, and which of their versions were in force when, by whom and why.

-- A version is written once and never changed.
CREATE TABLE routing_rules (
    merchant_id text COLLATE "C" NOT NULL REFERENCES merchants,
    mode smallint NOT NULL,
    version integer NOT NULL CHECK (version >= 1),
    rules text NOT NULL,
    reason text NOT NULL,
    -- The key of the call, or `login:<name>` from the command line.
    created_by text NOT NULL CHECK (created_by <> ''),
    request_id text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (merchant_id, mode, version)
);

-- The one of the highest number is in force.
CREATE TABLE routing_activations (
    merchant_id text COLLATE "C" NOT NULL REFERENCES merchants,
    mode smallint NOT NULL,
    number integer NOT NULL CHECK (number >= 1),
    -- 0: none is in force any more.
    version integer NOT NULL CHECK (version >= 0),
    reason text NOT NULL,
    activated_by text NOT NULL CHECK (activated_by <> ''),
    request_id text NOT NULL,
    activated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (merchant_id, mode, number)
);

-- Gateways ask what was activated since they last asked.
CREATE INDEX routing_activations_activated_at ON routing_activations (activated_at);
