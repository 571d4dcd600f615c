-- What recovery has to look at, and how far it has looked.

-- Operations that recovery is to look at. Small: a row is here only while something is in doubt.
CREATE TABLE doubts (
    merchant_id text COLLATE "C" NOT NULL,
    operation_id text COLLATE "C" NOT NULL,
    payment_id text COLLATE "C" NOT NULL,
    since timestamptz NOT NULL DEFAULT now(),
    check_at timestamptz NOT NULL,
    -- A recoverer is at work until then. For liveness only: correctness rests on the epoch.
    lease_until timestamptz,
    tries integer NOT NULL DEFAULT 0,
    -- gateway.application.ports' ConnectorAnswer that came to a sender who had been fenced out.
    evidence jsonb,
    -- Whether a lease has handed the evidence to a recoverer. Until then nobody may forget it.
    evidence_leased boolean NOT NULL DEFAULT false,
    PRIMARY KEY (merchant_id, operation_id)
) WITH (fillfactor = 50);

CREATE INDEX doubts_check_at ON doubts (check_at);

-- All operations created before created_before are finished, or are doubts; see recovery.sql.
CREATE TABLE recovery_watermark (
    partition smallint PRIMARY KEY,
    created_before timestamptz NOT NULL,
    -- What created_before may become once every transaction before proposed_xid has ended.
    proposed_before timestamptz NOT NULL,
    proposed_xid xid8 NOT NULL
);

INSERT INTO recovery_watermark
VALUES (0, '-infinity', '-infinity', pg_current_xact_id());
