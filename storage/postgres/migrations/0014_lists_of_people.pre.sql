-- no transaction
-- What people list, in the order in which they see it: without these, each page reads all that there
-- is, and ends with the statement's time where that is many millions.

DROP INDEX CONCURRENTLY IF EXISTS notifications_newest_first;
CREATE INDEX CONCURRENTLY notifications_newest_first
    ON notifications (merchant_id, received_at DESC, event_id);
DROP INDEX CONCURRENTLY IF EXISTS discrepancies_oldest_first;
CREATE INDEX CONCURRENTLY discrepancies_oldest_first
    ON discrepancies (created_at, (discrepancy_id::text));
