-- What every connection is asked and told when it is opened.

-- :name generation
-- The server and its timeline: a failover or a restore makes a new one.
SELECT
    (SELECT system_identifier FROM pg_control_system())::text
        || '-' || left(pg_walfile_name(pg_current_wal_lsn()), 8) AS generation;

-- :name confirm
-- Where commits wait for standbys: the commit of this very transaction waits until they have all that
-- this server has logged. It logs an empty message, for the commit of a transaction that has nothing
-- but an id waits for nobody. Without standbys nothing is logged.
SELECT CASE
    WHEN current_setting('synchronous_standby_names') <> ''
    THEN pg_logical_emit_message(true, 'gateway', '') IS NOT NULL
    ELSE false
END AS confirmed;

-- :name durability
-- As they are for a new session of this user, whatever was set in this one.
SELECT name, reset_val AS value
FROM pg_settings
WHERE name IN ('fsync', 'full_page_writes', 'synchronous_commit')
ORDER BY name;

-- :name plans
-- One plan for every size of a batch, and none that reads a whole table while it is small and goes
-- on doing so when it has grown: nested loops over indexes are right at every size.
SELECT
    -- A gateway that is stopped between sending a statement to be prepared and using it is not idle
    -- to PostgreSQL, so idle_in_transaction_session_timeout does not end it, and it keeps its locks.
    -- PostgreSQL 17 and later.
    (
        SELECT set_config(name, :transaction_timeout::text, false)
        FROM pg_settings
        WHERE name = 'transaction_timeout'
    ),
    set_config('plan_cache_mode', 'force_generic_plan', false),
    set_config('enable_seqscan', 'off', false),
    set_config('enable_hashjoin', 'off', false),
    set_config('enable_mergejoin', 'off', false),
    set_config('enable_memoize', 'off', false),
    set_config('jit', 'off', false),
    -- Triggers read it for the record of what is changed. Empty too: a pooler's session may be another's.
    set_config('gateway.author', :author::text, false),
    -- Stronger than "on": a server that waits for its standbys to apply keeps doing so.
    set_config(
        'synchronous_commit',
        CASE current_setting('synchronous_commit')
            WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on'
        END,
        false
    );
