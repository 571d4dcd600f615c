-- One commit of one intent row, as the gateway writes it: an id that sorts by time, a random key.
\set n random(1, 9000000000000000000)
INSERT INTO operations (
    merchant_id, operation_id, payment_id, kind, origin, state, amount_minor, currency, epoch, final,
    idempotency_key, fingerprint, request_id, merchant_transaction_id, attempt_number, connector,
    connector_account_id, delivery, recover_after, created_at, updated_at
)
SELECT
    'mer_0123456789abcdef0123456789abcdef', 'op_' || id, 'pay_' || id, 1, 1, 1, 1000, 'EUR', 1, false,
    md5(:n::bigint::text), '\x0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123'::bytea,
    'req_' || id, '', 1, 'in_process', 'mer_0123456789abcdef0123456789abcdef', 2,
    now() + interval '25 seconds', now(), now()
FROM (
    SELECT lpad(to_hex((extract(epoch FROM clock_timestamp()) * 1000000)::bigint), 16, '0')
        || lpad(to_hex(:n::bigint), 16, '0') AS id
) AS new
ON CONFLICT (idempotency_key, merchant_id) DO NOTHING;
