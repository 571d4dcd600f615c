-- Claims the idempotency keys of one bucket, or says what stands in their place; a new claim of a
-- merchant with a rate limit is counted, and taken back where the limit is used up.
--
-- KEYS   the keys to claim, then the limits' keys, one for each limited merchant; all in one hash
--        tag.
-- ARGV   1: life of a claim in milliseconds; 2: the claimers' nonces, joined, all of equal length.
--        Only where a merchant has a limit: 3: for each claim the number of its limit, from 1, in
--        two bytes, 0 for none; then for each limit its interval in microseconds and its burst.
--
-- An entry is 'C' and its owner's nonce (a bare claim), or 'R' and a frozen response.
--
-- A limit is the generic cell rate algorithm (ITU-T I.371, annex A): its key holds the time, by the
-- server's clock in microseconds, at which all that was let in is worked off at one an interval. A
-- call is let in while that is at most a burst ahead. What was claimed before, replays and conflicts
-- cost nothing. A key that Redis refuses or that is damaged lets everything in.
--
-- Returns the outcomes as one string, a letter for each key, and after it, in order, the entries of
-- those with the letter R and the milliseconds of those with the letter L. One string costs the
-- client less than one reply for each key.
--   N  claimed now, or already claimed with this very nonce: the same claim, sent again after its
--      answer was lost
--   F  claimed by someone else
--   R  a frozen response stands there
--   L  not claimed, since the merchant's limit is used up; it has room for it in so many milliseconds
--   U  unknown: Redis refused the key (out of memory), or the entry is of no known kind
-- Where another server takes the writes by now, its refusal is the reply: it is none of the keys' own.

local life_ms = ARGV[1]
local nonces = ARGV[2]
local numbers = ARGV[3]
local limits_count = numbers and (#ARGV - 3) / 2 or 0
local claims_count = #KEYS - limits_count
local nonce_size = #nonces / claims_count
local outcomes = {}
local reply = { '' }

local now_us
local limits = {}

local function limit_of(i)
  local high, low = string.byte(numbers, 2 * i - 1, 2 * i)
  local number = high * 256 + low
  if number == 0 then
    return nil
  end
  if not limits[number] then
    if not now_us then
      local time = redis.call('TIME')
      now_us = time[1] * 1000000 + time[2]
    end
    local interval_us = tonumber(ARGV[2 + 2 * number])
    local full_us = interval_us * tonumber(ARGV[3 + 2 * number])
    local key = KEYS[claims_count + number]
    local ahead_us = (tonumber(redis.pcall('GET', key)) or 0) - now_us
    if ahead_us ~= ahead_us then
      ahead_us = 0 -- not a number
    end
    limits[number] = {
      key = key,
      interval_us = interval_us,
      full_us = full_us,
      -- Not more than a burst, and that from now on: the limit was lowered, or the clock set back.
      ahead_us = math.min(math.max(ahead_us, 0), full_us),
      counted = ahead_us > full_us,
      refused = 0,
    }
  end
  return limits[number]
end

for i = 1, claims_count do
  local key = KEYS[i]
  local claim = 'C' .. string.sub(nonces, (i - 1) * nonce_size + 1, i * nonce_size)
  -- pcall: a key that cannot be claimed spoils no other.
  local found = redis.pcall('SET', key, claim, 'NX', 'GET', 'PX', life_ms)
  if not found then
    outcomes[i] = 'N'
    local limit = numbers and limit_of(i)
    if limit then
      -- Half a microsecond, since intervals are fractions.
      local over_us = limit.ahead_us + limit.interval_us - limit.full_us - 0.5
      if over_us <= 0 then
        limit.ahead_us = limit.ahead_us + limit.interval_us
        limit.counted = true
      else
        redis.pcall('DEL', key)
        outcomes[i] = 'L'
        -- Those that are refused together are not told the same moment.
        local wait_us = over_us + limit.refused * limit.interval_us
        limit.refused = limit.refused + 1
        reply[#reply + 1] = string.format('%.0f', math.ceil(wait_us / 1000))
      end
    end
  elseif found == claim then
    outcomes[i] = 'N'
  elseif type(found) ~= 'string' then
    local code = string.match(found.err or '', '^%u+')
    if code == 'READONLY' or code == 'MASTERDOWN' or code == 'MOVED' then
      return found
    end
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

for _, limit in pairs(limits) do
  if limit.counted then
    local until_us = string.format('%.0f', now_us + limit.ahead_us)
    redis.pcall('SET', limit.key, until_us, 'PX', math.ceil(limit.ahead_us / 1000) + 1)
  end
end

reply[1] = table.concat(outcomes)
return reply
