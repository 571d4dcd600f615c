-- What PSPs told of their own accord, kept before they are told so.

CREATE TABLE notifications (
    merchant_id text COLLATE "C" NOT NULL,
    connector_account_id text COLLATE "C" NOT NULL,
    -- The PSP's: it may send the same event many times.
    event_id text COLLATE "C" NOT NULL,
    connector text NOT NULL,
    event_type text NOT NULL,
    kind smallint NOT NULL,
    -- gateway.domain.states' Event that the answer is; NULL where it holds none.
    event smallint,
    -- By the PSP's clock.
    occurred_at timestamptz,
    received_at timestamptz NOT NULL DEFAULT now(),
    -- Our reference of the attempt that it is about, or the PSP's id of it; empty where it names none.
    subject text COLLATE "C" NOT NULL,
    -- gateway.application.notifications' Notification by field names, defaults left out.
    content jsonb NOT NULL,
    -- gateway.application.notifications' Result; NULL until it was applied.
    result smallint,
    applied_at timestamptz,
    payment_id text COLLATE "C",
    operation_id text COLLATE "C",
    PRIMARY KEY (merchant_id, connector_account_id, event_id)
);

-- Of the events of one thing the latest counts.
CREATE INDEX notifications_subject ON notifications (merchant_id, subject)
    WHERE subject <> '';
CREATE INDEX notifications_received_at ON notifications
    USING brin (received_at) WITH (pages_per_range = 16, autosummarize = on);

-- Those that are yet to be applied. Small: a row goes with its application.
CREATE TABLE pending_notifications (
    merchant_id text COLLATE "C" NOT NULL,
    connector_account_id text COLLATE "C" NOT NULL,
    event_id text COLLATE "C" NOT NULL,
    since timestamptz NOT NULL DEFAULT now(),
    apply_at timestamptz NOT NULL DEFAULT now(),
    -- Somebody is at work until then. For liveness only: applying one twice has one effect.
    lease_until timestamptz,
    tries integer NOT NULL DEFAULT 0,
    PRIMARY KEY (merchant_id, connector_account_id, event_id)
) WITH (fillfactor = 50);

CREATE INDEX pending_notifications_apply_at ON pending_notifications (apply_at);

CREATE TYPE received_notification AS (
    merchant_id text, connector_account_id text, event_id text, connector text, event_type text,
    kind int2, event int2, occurred_at timestamptz, subject text, content jsonb
);
