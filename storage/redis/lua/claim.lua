-- Claims the idempotency keys of one bucket, or says what stands in their place.
--
-- KEYS   the keys to claim, all in one hash tag.
-- ARGV   1: life of a claim in milliseconds; 2: the claimers' nonces, joined, all of equal length.
--
-- An entry is 'C' and its owner's nonce (a bare claim), or 'R' and a frozen response.
--
-- Returns the outcomes as one string, a letter for each key, and after it the entries of those
-- with the letter R, in order. One string costs the client less than one reply for each key.
--   N  claimed now, or already claimed with this very nonce: the same claim, sent again after its
--      answer was lost
--   F  claimed by someone else
--   R  a frozen response stands there
--   U  unknown: Redis refused the key (out of memory, read only), or the entry is of no known kind

local life_ms = ARGV[1]
local nonces = ARGV[2]
local nonce_size = #nonces / #KEYS
local outcomes = {}
local reply = { '' }

for i, key in ipairs(KEYS) do
  local claim = 'C' .. string.sub(nonces, (i - 1) * nonce_size + 1, i * nonce_size)
  -- pcall: a key that cannot be claimed spoils no other.
  local found = redis.pcall('SET', key, claim, 'NX', 'GET', 'PX', life_ms)
  if not found or found == claim then
    outcomes[i] = 'N'
  elseif type(found) ~= 'string' then
    outcomes[i] = 'U'
  else
    local kind = string.sub(found, 1, 1)
    if kind == 'C' then
      outcomes[i] = 'F'
    elseif kind == 'R' then
      outcomes[i] = 'R'
      reply[#reply + 1] = found
    else
      outcomes[i] = 'U'
    end
  end
end

reply[1] = table.concat(outcomes)
return reply
