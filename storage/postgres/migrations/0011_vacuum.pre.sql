-- Autovacuum comes to operations after so many new rows, however many there are already: by default
-- after a fifth of the table. BRIN covers the newest part from then on, which every search for dead
-- senders reads as long as it does not; autosummarize alone falls behind above some 250 operations a
-- second, for autovacuum's list of what to summarize is short. Only new pages are read by it.
ALTER TABLE operations SET (
    autovacuum_vacuum_insert_scale_factor = 0,
    autovacuum_vacuum_insert_threshold = 100000
);
