-- The record of what was changed of the configuration. Triggers write it (0015_configuration_changes).

-- :name list_all
SELECT {{columns}}
FROM configuration_changes
WHERE {{in_page}}
{{newest_first}};

-- :name list_of_organisation
SELECT {{columns}}
FROM configuration_changes
WHERE of_organisation = :organisation_id::text AND {{in_page}}
{{newest_first}};

-- :name list_of_merchant
SELECT {{columns}}
FROM configuration_changes
WHERE of_merchant = :merchant_id::text AND {{in_page}}
{{newest_first}};

-- :name find_time
SELECT changed_at FROM configuration_changes WHERE change_id = :change_id::int8;

-- :name unrecorded
-- Tables of which a change would not be recorded, and the record itself where it is not kept: a trigger
-- of theirs was taken away, or switched off.
SELECT wanted.table_name
FROM (VALUES
    ('organisations', 2), ('merchants', 2), ('api_keys', 2), ('client_identities', 2),
    ('connector_accounts', 2), ('event_consumers', 3), ('configuration_changes', 2)
) AS wanted (table_name, triggers)
WHERE wanted.triggers > (
    SELECT count(*)
    FROM pg_trigger AS present
    JOIN pg_proc AS called ON called.oid = present.tgfoid
    WHERE present.tgrelid = to_regclass(wanted.table_name)
        AND called.proname IN ('record_configuration_change', 'keep_configuration_changes')
        AND present.tgenabled IN ('O', 'A')
)
ORDER BY wanted.table_name;

-- :fragment columns
change_id, changed_at, author, database_user, client_address, action, table_name, row_id, mode,
of_organisation, of_merchant, old_values::text AS old_values, new_values::text AS new_values

-- :fragment in_page
(changed_at, change_id) < (
    coalesce(:before_time::timestamptz, 'infinity'), coalesce(:before_id::int8, 0)
)
    AND changed_at >= coalesce(:since::timestamptz, '-infinity')

-- :fragment newest_first
ORDER BY changed_at DESC, change_id DESC
LIMIT :limit::int4
