-- Accounts, payments, operations and the outbox.
--
-- Every primary key of a payment's data is led by merchant_id, so that all of it can be distributed
-- by merchant. There are no foreign keys between these tables: each would lock a merchant's or a
-- payment's row for every write beside it. Enums are the numbers of gateway.domain.model; ids
-- compare by bytes; times are the database's.

CREATE TABLE organisations (
    organisation_id text COLLATE "C" PRIMARY KEY,
    name text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE merchants (
    merchant_id text COLLATE "C" PRIMARY KEY,
    organisation_id text COLLATE "C" NOT NULL REFERENCES organisations,
    name text NOT NULL,
    -- Whether merchant_order_id may look like a card number (it is masked in logs then).
    pan_exempt_order_id boolean NOT NULL DEFAULT false,
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE INDEX merchants_organisation ON merchants (organisation_id);

CREATE TABLE api_keys (
    key_id text COLLATE "C" PRIMARY KEY,
    organisation_id text COLLATE "C" NOT NULL REFERENCES organisations,
    name text NOT NULL,
    -- SHA-256 of the secret. The secret has 256 random bits: there is nothing to stretch.
    secret_hash bytea NOT NULL CHECK (octet_length(secret_hash) = 32),
    scopes text[] NOT NULL,
    -- NULL: all merchants of the organisation, later ones too.
    merchant_ids text[],
    mode smallint NOT NULL,
    expires_at timestamptz,
    revoked_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE INDEX api_keys_organisation ON api_keys (organisation_id);

-- No index on a column that an outcome changes, and room in the pages, so that updates stay HOT
-- (heap-only tuples: no index is touched). What a batch inserts side by side, a batch updates at
-- once, so a page needs room for a second version of each row, and an operation's second version is
-- three times the first. The tables are no larger for it: the room is used by every payment. BRIN on
-- created_at does not stand in the way of HOT.
CREATE TABLE payments (
    merchant_id text COLLATE "C" NOT NULL,
    payment_id text COLLATE "C" NOT NULL,
    version bigint NOT NULL CHECK (version >= 1),
    requested_minor bigint NOT NULL CHECK (requested_minor BETWEEN 0 AND 1000000000000),
    authorized_minor bigint NOT NULL DEFAULT 0 CHECK (authorized_minor >= 0),
    capture_pending_minor bigint NOT NULL DEFAULT 0 CHECK (capture_pending_minor >= 0),
    captured_minor bigint NOT NULL DEFAULT 0 CHECK (captured_minor >= 0),
    refund_pending_minor bigint NOT NULL DEFAULT 0 CHECK (refund_pending_minor >= 0),
    refunded_minor bigint NOT NULL DEFAULT 0 CHECK (refunded_minor >= 0),
    voided_minor bigint NOT NULL DEFAULT 0 CHECK (voided_minor >= 0),
    increment_pending_minor bigint NOT NULL DEFAULT 0 CHECK (increment_pending_minor >= 0),
    -- What the PSP reported where that differs: facts, so without any CHECK.
    authorized_reported_minor bigint,
    captured_reported_minor bigint,
    refunded_reported_minor bigint,
    created_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL,
    authorization_expires_at timestamptz,
    mode smallint NOT NULL,
    state smallint NOT NULL,
    capture_method smallint NOT NULL,
    capture_closed boolean NOT NULL DEFAULT false,
    cancel_requested boolean NOT NULL DEFAULT false,
    allow_partial_approval boolean NOT NULL DEFAULT false,
    currency text NOT NULL,
    connector text NOT NULL,
    connector_account_id text NOT NULL,
    connector_transaction_id text NOT NULL DEFAULT '',
    auth_code text NOT NULL DEFAULT '',
    network_transaction_id text NOT NULL DEFAULT '',
    merchant_order_id text NOT NULL DEFAULT '',
    details bytea NOT NULL DEFAULT '',
    CONSTRAINT captures_within_authorized
        CHECK (captured_minor + capture_pending_minor <= authorized_minor),
    CONSTRAINT refunds_within_captured
        CHECK (refunded_minor + refund_pending_minor <= captured_minor)
) WITH (fillfactor = 45);

-- While a table is small, every index that a row's merchant stands in costs the planner about the
-- same, and any of them may have a page less than the right one. The lanes keep their plans while the
-- table grows. So the primary key is made after the index of the list, since of equals the planner
-- takes the newest, and the further indexes of operations cannot serve its conditions at all. Tests
-- look at the plans of an empty database and of every small one.
CREATE INDEX payments_newest_first ON payments (merchant_id, created_at DESC, payment_id DESC);
CREATE INDEX payments_merchant_order ON payments
    (merchant_id, merchant_order_id, created_at DESC, payment_id DESC)
    WHERE merchant_order_id <> '';
ALTER TABLE payments ADD PRIMARY KEY (merchant_id, payment_id);
CREATE INDEX payments_created_at ON payments
    USING brin (created_at) WITH (pages_per_range = 16, autosummarize = on);

CREATE TABLE operations (
    merchant_id text COLLATE "C" NOT NULL,
    operation_id text COLLATE "C" NOT NULL,
    payment_id text COLLATE "C" NOT NULL,
    amount_minor bigint NOT NULL CHECK (amount_minor >= 0),
    processing_ms double precision,
    created_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL,
    -- While PROCESSING: recovery does not touch the operation before this.
    recover_after timestamptz NOT NULL,
    epoch integer NOT NULL CHECK (epoch >= 1),
    attempt_number integer NOT NULL CHECK (attempt_number >= 1),
    kind smallint NOT NULL,
    origin smallint NOT NULL,
    state smallint NOT NULL,
    delivery smallint NOT NULL,
    final boolean NOT NULL,
    currency text NOT NULL,
    connector text NOT NULL,
    connector_account_id text NOT NULL,
    connector_transaction_id text NOT NULL DEFAULT '',
    parent_operation_id text COLLATE "C",
    idempotency_key text COLLATE "C",
    fingerprint bytea,
    request_id text NOT NULL DEFAULT '',
    merchant_transaction_id text NOT NULL DEFAULT '',
    note text NOT NULL DEFAULT '',
    reason text NOT NULL DEFAULT '',
    next_action_url text NOT NULL DEFAULT '',
    -- [[capture's operation id, minor units], …]
    allocations jsonb,
    -- gateway.domain.model.Outcome by field names, defaults left out; NULL until there is an answer.
    outcome jsonb,
    -- The frozen answer without its replay field.
    response bytea,
    PRIMARY KEY (merchant_id, operation_id)
) WITH (fillfactor = 20);

-- An index serves a condition of its own collation only, and equality is the same in all of these. So
-- merchant_id as it stands leads to the primary key alone, merchant_id COLLATE "POSIX" to the key's
-- index, and merchant_id COLLATE "default" to none: a payment's id leads to its operations.
CREATE UNIQUE INDEX operations_idempotency_key ON operations
    (idempotency_key, merchant_id COLLATE "POSIX");
CREATE INDEX operations_payment ON operations (payment_id);
CREATE INDEX operations_created_at ON operations
    USING brin (created_at) WITH (pages_per_range = 16, autosummarize = on);

-- Attempts that a later one replaced; the latest one stands in its operation.
CREATE TABLE superseded_attempts (
    merchant_id text COLLATE "C" NOT NULL,
    operation_id text COLLATE "C" NOT NULL,
    number integer NOT NULL CHECK (number >= 1),
    delivery smallint NOT NULL,
    processing_ms double precision,
    connector text NOT NULL,
    connector_account_id text NOT NULL,
    connector_transaction_id text NOT NULL,
    outcome jsonb,
    PRIMARY KEY (merchant_id, operation_id, number)
);

-- One event for each change of a payment, in the transaction of the change. xact_id lets a relay
-- leave alone what a transaction still running may yet precede.
CREATE TABLE outbox (
    merchant_id text COLLATE "C" NOT NULL,
    payment_id text COLLATE "C" NOT NULL,
    payment_version bigint NOT NULL,
    xact_id xid8 NOT NULL DEFAULT pg_current_xact_id(),
    created_at timestamptz NOT NULL DEFAULT now(),
    seq smallint NOT NULL DEFAULT 0,
    event_id text COLLATE "C" NOT NULL,
    event_type text NOT NULL,
    payload bytea NOT NULL,
    PRIMARY KEY (merchant_id, payment_id, payment_version, seq)
);

-- What a PSP reported and what contradicts our books; for a person.
CREATE TABLE discrepancies (
    merchant_id text COLLATE "C" NOT NULL,
    discrepancy_id uuid NOT NULL DEFAULT gen_random_uuid(),
    payment_id text COLLATE "C" NOT NULL,
    operation_id text COLLATE "C" NOT NULL,
    kind text NOT NULL,
    expected text NOT NULL,
    reported text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (merchant_id, discrepancy_id)
);

-- The rows that the batched statements take, an array of them each. A gateway fills every attribute
-- by its place, so a type is never altered: another shape is another type, made before a deploy and
-- dropped after it.
CREATE TYPE authorize_intent AS (
    merchant_id text, operation_id text, payment_id text, kind int2, origin int2, currency text,
    epoch int4, parent_operation_id text, idempotency_key text, fingerprint bytea,
    merchant_transaction_id text, state int2, amount_minor int8, final bool, request_id text,
    note text, reason text, next_action_url text, allocations jsonb, attempt_number int4,
    connector text, connector_account_id text, delivery int2, connector_transaction_id text,
    outcome jsonb, processing_ms float8, response bytea,
    recover_after_s float8, mode int2, payment_state int2, capture_method int2,
    requested_minor int8, version int8, merchant_order_id text, allow_partial_approval bool,
    details bytea
);

CREATE TYPE followup_intent AS (
    merchant_id text, operation_id text, payment_id text, kind int2, origin int2, currency text,
    epoch int4, parent_operation_id text, idempotency_key text, fingerprint bytea,
    merchant_transaction_id text, state int2, amount_minor int8, final bool, request_id text,
    note text, reason text, next_action_url text, allocations jsonb, attempt_number int4,
    connector text, connector_account_id text, delivery int2, connector_transaction_id text,
    outcome jsonb, processing_ms float8, response bytea,
    recover_after_s float8, expected_version int8,
    payment_version int8, payment_state int2, requested_minor int8, authorized_minor int8,
    capture_pending_minor int8, captured_minor int8, refund_pending_minor int8, refunded_minor int8,
    voided_minor int8, increment_pending_minor int8, authorized_reported_minor int8,
    captured_reported_minor int8, refunded_reported_minor int8, capture_closed bool,
    cancel_requested bool, payment_connector text, payment_connector_account_id text,
    payment_connector_transaction_id text, auth_code text, network_transaction_id text,
    authorization_expires_at timestamptz
);

CREATE TYPE payment_change AS (
    merchant_id text, operation_id text, payment_id text, expected_epoch int4, expected_state int2,
    expected_version int8, epoch int4, recover_after_s float8, check_after_s float8, event_id text,
    event_type text, event bytea,
    state int2, amount_minor int8, final bool, request_id text,
    note text, reason text, next_action_url text, allocations jsonb, attempt_number int4,
    connector text, connector_account_id text, delivery int2, connector_transaction_id text,
    outcome jsonb, processing_ms float8, response bytea, updated_at timestamptz,
    payment_version int8, payment_state int2, requested_minor int8, authorized_minor int8,
    capture_pending_minor int8, captured_minor int8, refund_pending_minor int8, refunded_minor int8,
    voided_minor int8, increment_pending_minor int8, authorized_reported_minor int8,
    captured_reported_minor int8, refunded_reported_minor int8, capture_closed bool,
    cancel_requested bool, payment_connector text, payment_connector_account_id text,
    payment_connector_transaction_id text, auth_code text, network_transaction_id text,
    authorization_expires_at timestamptz, payment_updated_at timestamptz
);

CREATE TYPE companion_operation AS (
    changed_by text,
    merchant_id text, operation_id text, payment_id text, kind int2, origin int2, currency text,
    epoch int4, parent_operation_id text, idempotency_key text, fingerprint bytea,
    merchant_transaction_id text, state int2, amount_minor int8, final bool, request_id text,
    note text, reason text, next_action_url text, allocations jsonb, attempt_number int4,
    connector text, connector_account_id text, delivery int2, connector_transaction_id text,
    outcome jsonb, processing_ms float8, response bytea,
    payment_version int8, seq int2, event_id text, event_type text, event bytea
);

CREATE TYPE superseded_attempt AS (
    merchant_id text, operation_id text, number int4, connector text, connector_account_id text,
    delivery int2, connector_transaction_id text, outcome jsonb, processing_ms float8
);

CREATE TYPE reported_discrepancy AS (
    changed_by text, merchant_id text, payment_id text, operation_id text, kind text, expected text,
    reported text
);
