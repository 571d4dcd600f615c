-- Whose PSP is to be asked: an account has a share of what recovery has at work, and what lies beyond
-- it need not be read. It is the operation's present attempt's. Rows of before, and those that a
-- gateway of the release before writes yet, have no account, and share the places of one.
ALTER TABLE doubts ADD COLUMN connector_account_id text COLLATE "C" NOT NULL DEFAULT '';

-- Not CONCURRENTLY, as doubts_oldest_first.
CREATE INDEX doubts_by_account ON doubts (connector_account_id, check_at);
