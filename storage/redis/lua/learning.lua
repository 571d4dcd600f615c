-- Adds up what processes count of accounts in segments of payments.
--
-- KEYS   a hash for each segment, with a field for each account.
-- ARGV   1: the half-life in milliseconds; 2: life of a segment that nobody asks about, in
--        milliseconds; then for each key the number of accounts that follow, and for each of them
--        its field, successes and failures since they were last told.
--
-- A field holds successes and failures, and when, by the server's clock in milliseconds, they were
-- so many; they fade from then on. What is none of ours counts for nothing.
--
-- Returns for each key its fields, each with successes and failures as of now.

local half_life_ms, life_ms = tonumber(ARGV[1]), tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local count_max = 1e15 -- more than anybody can count
local place = 3
local reply = {}

for number, key in ipairs(KEYS) do
  local counts = {}
  local stored = redis.call('HGETALL', key)
  for i = 1, #stored, 2 do
    -- Neither 'inf' nor 'nan', which count for ever, nor what is below 0.
    local successes, failures, at = string.match(stored[i + 1], '^([%d.]+) ([%d.]+) (%d+)$')
    successes, failures, at = tonumber(successes), tonumber(failures), tonumber(at)
    if successes and failures and at and math.max(successes, failures) < count_max then
      local fading = 2 ^ (-math.max(0, now - at) / half_life_ms)
      counts[stored[i]] = { successes * fading, failures * fading }
    end
  end
  local told = tonumber(ARGV[place])
  place = place + 1
  for _ = 1, told do
    local field = ARGV[place]
    local it = counts[field] or { 0, 0 }
    it[1] = it[1] + tonumber(ARGV[place + 1])
    it[2] = it[2] + tonumber(ARGV[place + 2])
    counts[field] = it
    redis.call('HSET', key, field, string.format('%.6f %.6f %d', it[1], it[2], now))
    place = place + 3
  end
  redis.call('PEXPIRE', key, life_ms)
  local fields = {}
  for field, it in pairs(counts) do
    fields[#fields + 1] = field
    fields[#fields + 1] = string.format('%.6f', it[1])
    fields[#fields + 1] = string.format('%.6f', it[2])
  end
  reply[number] = fields
end
return reply
