-- What a person needs to settle what recovery cannot, and who settled what.

-- Why recovery's latest look left the operation as it was: gateway.domain.model's DoubtCause.
ALTER TABLE doubts ADD COLUMN cause smallint NOT NULL DEFAULT 0;
-- Recovery has asked often enough, or has no means: it looks seldom now, and a person has to.
ALTER TABLE doubts ADD COLUMN needs_person boolean NOT NULL DEFAULT false;

-- The audit record of each doubt that a person ended, written with the outcome. One attempt is ended
-- once: that key makes a repeated decision recognisable.
CREATE TABLE resolutions (
    merchant_id text COLLATE "C" NOT NULL,
    operation_id text COLLATE "C" NOT NULL,
    attempt_number integer NOT NULL CHECK (attempt_number >= 1),
    payment_id text COLLATE "C" NOT NULL,
    resolved_at timestamptz NOT NULL DEFAULT now(),
    -- The key of the call, or `login:<name>` from the command line.
    resolved_by text NOT NULL CHECK (resolved_by <> ''),
    outcome smallint NOT NULL,
    connector_transaction_id text NOT NULL,
    amount_reported_minor bigint,
    reason text NOT NULL CHECK (reason <> ''),
    request_id text NOT NULL,
    state_before smallint NOT NULL,
    state_after smallint NOT NULL,
    payment_state_before smallint NOT NULL,
    payment_state_after smallint NOT NULL,
    payment_version bigint NOT NULL,
    PRIMARY KEY (merchant_id, operation_id, attempt_number)
);

CREATE TYPE doubt_resolution AS (
    merchant_id text, operation_id text, attempt_number int4, payment_id text, resolved_by text,
    outcome int2, connector_transaction_id text, amount_reported_minor int8, reason text,
    request_id text, state_before int2, state_after int2, payment_state_before int2,
    payment_state_after int2, payment_version int8
);
