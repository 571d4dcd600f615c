-- no transaction
-- What reads the outbox: in the order of transactions, and up to where named consumers have come.

-- For reading all merchants' events in their order. It grows at its right edge only, and a batch's rows
-- share a value, so a write costs it little.
DROP INDEX CONCURRENTLY IF EXISTS outbox_xact_id;
CREATE INDEX CONCURRENTLY outbox_xact_id ON outbox (xact_id);

-- A consumer's position is an event that it has processed: the outbox row's order, and its id, by which
-- a database that has lost the event is told from one that has it. No column is called merchant_id: a
-- consumer belongs to an organisation, as API keys do.
CREATE TABLE IF NOT EXISTS event_consumers (
    -- Empty: the operator's, of every merchant there is.
    organisation_id text COLLATE "C" NOT NULL,
    mode smallint NOT NULL,
    name text COLLATE "C" NOT NULL CHECK (name <> ''),
    -- What was reached by the credential that moved it last; NULL: every merchant there is.
    merchant_ids text[],
    at_xact_id xid8 NOT NULL,
    at_merchant_id text COLLATE "C" NOT NULL,
    at_payment_id text COLLATE "C" NOT NULL,
    at_payment_version bigint NOT NULL,
    at_seq smallint NOT NULL,
    -- Empty: before the first event.
    at_event_id text COLLATE "C" NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    acknowledged_at timestamptz NOT NULL DEFAULT now(),
    reset_at timestamptz,
    reset_by text NOT NULL DEFAULT '',
    reset_reason text NOT NULL DEFAULT '',
    PRIMARY KEY (organisation_id, mode, name)
) WITH (fillfactor = 50);
