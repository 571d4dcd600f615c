-- no transaction
-- Whether a discrepancy is recorded already is asked whenever one is written, and the audit asks for
-- those of a page of payments: without this, each reads all that a merchant has.

DROP INDEX CONCURRENTLY IF EXISTS discrepancies_payment;
CREATE INDEX CONCURRENTLY discrepancies_payment ON discrepancies (merchant_id, payment_id);
