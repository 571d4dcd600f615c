-- Who changed what of the configuration, when, and from where (PCI DSS 4.0, 10.2.1.2, 10.2.1.5 and
-- 10.2.2): organisations, merchants, API keys, identities, accounts at PSPs, consumers of events.
-- Triggers write it, so that no statement can forget to, and a change by hand stands here too.

-- No foreign keys: a change is kept for longer than what was changed. No column is called merchant_id,
-- for row-level security would give the lanes rights to the table, and none of them needs any.
CREATE TABLE configuration_changes (
    change_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    changed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- What the session says of itself: `login:<name>` from the command line, or the credential of a
    -- call; `database:<user>` where it says nothing. Any session may say anything, so:
    author text NOT NULL CHECK (author <> ''),
    -- As whom it logged in, and from where; NULL through a Unix socket.
    database_user text NOT NULL,
    client_address inet,
    -- INSERT, UPDATE, DELETE or TRUNCATE.
    action text NOT NULL,
    table_name text NOT NULL,
    -- The id in that table; NULL where all rows went.
    row_id text,
    mode smallint,
    of_organisation text COLLATE "C",
    of_merchant text COLLATE "C",
    -- The columns that changed. What must not be read here is "***".
    old_values jsonb,
    new_values jsonb
);

CREATE INDEX configuration_changes_in_order ON configuration_changes (changed_at, change_id);
CREATE INDEX configuration_changes_organisation ON configuration_changes
    (of_organisation, changed_at, change_id);
CREATE INDEX configuration_changes_merchant ON configuration_changes
    (of_merchant, changed_at, change_id);

-- Its arguments: the column of the row's id, the columns whose values may be read in the record, and
-- those that tell nothing. A column that a later migration adds is told without its value.
--
-- It writes with its owner's rights, whoever changes the row: who could write the record could forge
-- it. So it takes no name from the session's search_path.
CREATE FUNCTION record_configuration_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET timezone = 'UTC'
AS $$
DECLARE
    old_row jsonb;
    new_row jsonb;
    present jsonb;
    organisation text;
    old_values jsonb;
    new_values jsonb;
BEGIN
    IF TG_OP IN ('UPDATE', 'DELETE') THEN
        old_row := to_jsonb(OLD);
    END IF;
    IF TG_OP IN ('INSERT', 'UPDATE') THEN
        new_row := to_jsonb(NEW);
    END IF;
    present := coalesce(new_row, old_row);
    SELECT
        jsonb_object_agg(
            key, CASE WHEN key = ANY (TG_ARGV[1]::text[]) THEN old_row -> key ELSE '"***"' END
        ) FILTER (WHERE old_row IS NOT NULL),
        jsonb_object_agg(
            key, CASE WHEN key = ANY (TG_ARGV[1]::text[]) THEN new_row -> key ELSE '"***"' END
        ) FILTER (WHERE new_row IS NOT NULL)
    INTO old_values, new_values
    FROM jsonb_object_keys(present) AS key
    WHERE coalesce(old_row -> key, 'null') <> coalesce(new_row -> key, 'null')
        AND key <> ALL (TG_ARGV[2]::text[]);
    IF TG_OP = 'UPDATE' AND new_values IS NULL THEN
        RETURN NULL;
    END IF;
    organisation := nullif(present ->> 'organisation_id', '');
    IF organisation IS NULL AND present ? 'merchant_id' THEN
        EXECUTE format(
            'SELECT organisation_id FROM %I.merchants WHERE merchant_id = $1', TG_TABLE_SCHEMA
        ) INTO organisation USING present ->> 'merchant_id';
    END IF;
    EXECUTE format(
        'INSERT INTO %I.configuration_changes (author, database_user, client_address, action,'
            ' table_name, row_id, mode, of_organisation, of_merchant, old_values, new_values)'
            ' VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)',
        TG_TABLE_SCHEMA
    ) USING
        coalesce(nullif(current_setting('gateway.author', true), ''), 'database:' || session_user),
        session_user::text, inet_client_addr(), TG_OP, TG_TABLE_NAME, present ->> TG_ARGV[0],
        (present ->> 'mode')::smallint, organisation, present ->> 'merchant_id', old_values,
        new_values;
    RETURN NULL;
END
$$;

-- Otherwise anybody could make it the trigger of a table of their own.
REVOKE ALL ON FUNCTION record_configuration_change() FROM PUBLIC;

CREATE TRIGGER configuration_change AFTER INSERT OR UPDATE OR DELETE ON organisations
    FOR EACH ROW EXECUTE FUNCTION record_configuration_change(
        'organisation_id', '{organisation_id, name}', '{created_at}'
    );
CREATE TRIGGER configuration_change AFTER INSERT OR UPDATE OR DELETE ON merchants
    FOR EACH ROW EXECUTE FUNCTION record_configuration_change(
        'merchant_id',
        '{merchant_id, organisation_id, name, pan_exempt_order_id, rate_limit_per_s, rate_limit_burst}',
        '{created_at}'
    );
CREATE TRIGGER configuration_change AFTER INSERT OR UPDATE OR DELETE ON api_keys
    FOR EACH ROW EXECUTE FUNCTION record_configuration_change(
        'key_id',
        '{key_id, organisation_id, name, scopes, merchant_ids, mode, expires_at, revoked_at}',
        '{created_at}'
    );
CREATE TRIGGER configuration_change AFTER INSERT OR UPDATE OR DELETE ON client_identities
    FOR EACH ROW EXECUTE FUNCTION record_configuration_change(
        'uri', '{uri, organisation_id, name, scopes, merchant_ids, mode}', '{created_at}'
    );
CREATE TRIGGER configuration_change AFTER INSERT OR UPDATE OR DELETE ON connector_accounts
    FOR EACH ROW EXECUTE FUNCTION record_configuration_change(
        'account_id',
        '{merchant_id, account_id, mode, connector, priority, enabled, capabilities, removed_at, '
            'wrapping_key_id}',
        '{version, created_at, updated_at}'
    );

-- A consumer appears with its first read and moves with every acknowledgement: that is its use. What is
-- recorded is what takes events away from it, or gives them to it again: its removal, each reset (it
-- remembers the last one), and a position that goes back without one.
CREATE TRIGGER configuration_change AFTER DELETE ON event_consumers
    FOR EACH ROW EXECUTE FUNCTION record_configuration_change(
        'name',
        '{organisation_id, mode, name, merchant_ids, at_xact_id, at_merchant_id, at_payment_id, '
            'at_payment_version, at_seq, at_event_id, reset_at, reset_by, reset_reason}',
        '{created_at, acknowledged_at}'
    );
CREATE TRIGGER configuration_change_by_update AFTER UPDATE ON event_consumers
    FOR EACH ROW
    WHEN (
        OLD.reset_at IS DISTINCT FROM NEW.reset_at
        OR (OLD.organisation_id, OLD.mode, OLD.name) <> (NEW.organisation_id, NEW.mode, NEW.name)
        OR (
            NEW.at_xact_id, NEW.at_merchant_id, NEW.at_payment_id, NEW.at_payment_version, NEW.at_seq
        ) < (
            OLD.at_xact_id, OLD.at_merchant_id, OLD.at_payment_id, OLD.at_payment_version, OLD.at_seq
        )
    )
    EXECUTE FUNCTION record_configuration_change(
        'name',
        '{organisation_id, mode, name, merchant_ids, at_xact_id, at_merchant_id, at_payment_id, '
            'at_payment_version, at_seq, at_event_id, reset_at, reset_by, reset_reason}',
        '{created_at, acknowledged_at}'
    );

CREATE TRIGGER configuration_change_of_all AFTER TRUNCATE ON organisations
    FOR EACH STATEMENT EXECUTE FUNCTION record_configuration_change();
CREATE TRIGGER configuration_change_of_all AFTER TRUNCATE ON merchants
    FOR EACH STATEMENT EXECUTE FUNCTION record_configuration_change();
CREATE TRIGGER configuration_change_of_all AFTER TRUNCATE ON api_keys
    FOR EACH STATEMENT EXECUTE FUNCTION record_configuration_change();
CREATE TRIGGER configuration_change_of_all AFTER TRUNCATE ON client_identities
    FOR EACH STATEMENT EXECUTE FUNCTION record_configuration_change();
CREATE TRIGGER configuration_change_of_all AFTER TRUNCATE ON connector_accounts
    FOR EACH STATEMENT EXECUTE FUNCTION record_configuration_change();
CREATE TRIGGER configuration_change_of_all AFTER TRUNCATE ON event_consumers
    FOR EACH STATEMENT EXECUTE FUNCTION record_configuration_change();

-- Nothing changes an entry, and none goes within a year (10.5.1), but by whoever takes this away.
CREATE FUNCTION keep_configuration_changes() RETURNS trigger
LANGUAGE plpgsql
AS $$
BEGIN
    IF TG_OP = 'DELETE' THEN
        IF OLD.changed_at < now() - interval '1 year' THEN
            RETURN OLD;
        END IF;
    END IF;
    RAISE EXCEPTION 'entries of configuration_changes are kept as they are for a year'
        USING ERRCODE = 'insufficient_privilege';
END
$$;

CREATE TRIGGER kept BEFORE UPDATE OR DELETE ON configuration_changes
    FOR EACH ROW EXECUTE FUNCTION keep_configuration_changes();
CREATE TRIGGER all_kept BEFORE TRUNCATE ON configuration_changes
    FOR EACH STATEMENT EXECUTE FUNCTION keep_configuration_changes();
