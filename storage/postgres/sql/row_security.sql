-- Row-level security: the second wall between tenants. storage/postgres/row_security.py says how the
-- lanes use it.

-- :name create_roles
-- Roles are the server's, not the database's: they may be there already.
DO $$
DECLARE
    role_name text;
BEGIN
    FOREACH role_name IN ARRAY ARRAY['gateway_reader', 'gateway_writer', 'gateway_recoverer'] LOOP
        BEGIN
            -- Looked for first: who may not create roles may use those that there are.
            IF to_regrole(role_name) IS NULL THEN
                EXECUTE format('CREATE ROLE %I NOLOGIN', role_name);
            END IF;
        EXCEPTION WHEN duplicate_object OR unique_violation THEN
            NULL;
        END;
        BEGIN
            -- To become it, not to have its rights: whoever logs in sees no more than before.
            EXECUTE format(
                'GRANT %I TO %I' || CASE
                    WHEN current_setting('server_version_num')::int >= 160000
                    THEN ' WITH INHERIT FALSE, SET TRUE' ELSE ''
                END,
                role_name, current_setting('gateway.login')
            );
        EXCEPTION WHEN insufficient_privilege THEN
            IF NOT pg_has_role(current_setting('gateway.login'), role_name, 'MEMBER') THEN
                RAISE;
            END IF;
        END;
        EXECUTE format('GRANT USAGE ON SCHEMA %I TO %I', current_schema(), role_name);
    END LOOP;
END
$$;

-- :name protect
-- Every table whose rows are a merchant's, those of later migrations too when it runs again; but for
-- merchants itself, which is read to find out who calls. The conditions name merchant_id by a
-- collation that no index has, so that they are filters only and change no plan. In a subquery, a
-- setting is read once in a statement; without it there are no rows. With `gateway.protect` set to
-- `new`, those that are protected already are not locked.
DO $$
DECLARE
    its record;
    statement text;
BEGIN
    FOR its IN {{merchant_tables}} LOOP
        CONTINUE WHEN its.protected AND current_setting('gateway.protect') = 'new';
        FOREACH statement IN ARRAY ARRAY[
            'GRANT SELECT ON %1$s TO gateway_reader',
            'GRANT SELECT, INSERT, UPDATE, DELETE ON %1$s TO gateway_writer',
            'DROP POLICY IF EXISTS gateway_reader ON %1$s',
            'DROP POLICY IF EXISTS gateway_writer ON %1$s',
            'DROP POLICY IF EXISTS gateway_recoverer ON %1$s',
            'DROP POLICY IF EXISTS gateway_login ON %1$s',
            'CREATE POLICY gateway_reader ON %1$s FOR SELECT TO gateway_reader USING ('
                'merchant_id COLLATE "default" = (SELECT current_setting(''gateway.merchant'', true)))',
            'CREATE POLICY gateway_writer ON %1$s TO gateway_writer USING ('
                'merchant_id COLLATE "default" = ANY ((SELECT nullif('
                'current_setting(''gateway.merchants'', true), '''')::text[])::text[]))',
            'CREATE POLICY gateway_recoverer ON %1$s TO gateway_recoverer USING (true)',
            -- Gateways without the setting go on as they are, while the others are deployed.
            'CREATE POLICY gateway_login ON %1$s TO %2$I USING (true)',
            'ALTER TABLE %1$s ENABLE ROW LEVEL SECURITY'
        ] LOOP
            EXECUTE format(statement, its.name, current_setting('gateway.login'));
        END LOOP;
    END LOOP;
    EXECUTE format(
        'GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA %I TO gateway_recoverer',
        current_schema()
    );
    -- A trigger writes it, by its own rights.
    EXECUTE format(
        'REVOKE ALL ON %I.configuration_changes FROM gateway_recoverer', current_schema()
    );
END
$$;

-- :name unprotect
DO $$
DECLARE
    its record;
    role_name text;
BEGIN
    FOR its IN {{merchant_tables}} LOOP
        EXECUTE format('ALTER TABLE %s DISABLE ROW LEVEL SECURITY', its.name);
        FOREACH role_name IN ARRAY
            ARRAY['gateway_reader', 'gateway_writer', 'gateway_recoverer', 'gateway_login']
        LOOP
            EXECUTE format('DROP POLICY IF EXISTS %I ON %s', role_name, its.name);
        END LOOP;
    END LOOP;
END
$$;

-- :name prepare
-- For whom, without a login: for whom it was done before, and else for this user. For another one than
-- before, every table is to be protected anew.
WITH before AS (
    SELECT max(role.rolname::text) AS login
    FROM pg_policy AS policy
    JOIN pg_class AS class ON class.oid = policy.polrelid
    JOIN pg_roles AS role ON role.oid = ANY (policy.polroles)
    WHERE policy.polname = 'gateway_login'
        AND class.relnamespace = current_schema()::regnamespace
)
SELECT
    set_config('gateway.login', coalesce(:login::text, before.login, current_user::text), false),
    set_config(
        'gateway.protect',
        CASE WHEN :login::text <> before.login THEN 'all' ELSE :protect::text END,
        false
    )
FROM before;

-- :name problems
-- What keeps the wall from standing; no row where nothing does.
SELECT 'the role ' || wanted.name || CASE
    WHEN role.oid IS NULL THEN ' does not exist'
    WHEN role.rolsuper OR role.rolbypassrls THEN ' is not held by row-level security'
    ELSE ' is not granted to ' || session_user
END AS problem
FROM (VALUES ('gateway_reader'), ('gateway_writer'), ('gateway_recoverer')) AS wanted (name)
LEFT JOIN pg_roles AS role ON role.rolname = wanted.name
WHERE role.oid IS NULL
    OR role.rolsuper
    OR role.rolbypassrls
    OR NOT pg_has_role(session_user, role.oid, 'MEMBER')
UNION ALL
SELECT 'the table ' || its.name || ' is not protected'
FROM ({{merchant_tables}}) AS its
WHERE NOT its.protected
ORDER BY problem;

-- :name within_merchants
-- For the session: a round trip to the next statement, not to a transaction around it.
SELECT set_config('gateway.merchants', (:merchants::text[])::text, false);

-- :name within_merchant
SELECT set_config('gateway.merchant', :merchant::text, false);

-- :name read_as_merchant
-- For the transaction.
SELECT set_config('role', 'gateway_reader', true), set_config('gateway.merchant', :merchant::text, true);

-- :fragment merchant_tables
SELECT
    class.oid::regclass::text AS name,
    class.relrowsecurity AND (
        SELECT count(*) FROM pg_policy
        WHERE polrelid = class.oid
            AND polname IN ('gateway_reader', 'gateway_writer', 'gateway_recoverer')
    ) = 3 AS protected
FROM pg_class AS class
WHERE class.relnamespace = current_schema()::regnamespace
    AND class.relkind IN ('r', 'p')
    AND class.relname <> 'merchants'
    AND EXISTS (
        SELECT FROM pg_attribute AS attribute
        WHERE attribute.attrelid = class.oid
            AND attribute.attname = 'merchant_id'
            AND NOT attribute.attisdropped
    )
