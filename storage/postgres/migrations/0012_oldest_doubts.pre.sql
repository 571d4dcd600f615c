-- The list of doubts, the oldest first: without an index each page reads all doubts, with their
-- operations and payments, and after an outage of a PSP there may be millions. Not CONCURRENTLY: the
-- table is small at other times, and nobody waits for an index of it.
CREATE INDEX doubts_oldest_first ON doubts (since, operation_id);
