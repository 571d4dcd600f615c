-- What processes tell each other of their circuit breakers.
--
-- KEYS   1: a hash with a field for each breaker that is open or half-open.
-- ARGV   1: who tells; 2: life in milliseconds of an opening whose pause is over; then, for each
--        report, five: its kind, the breaker's name, milliseconds, the streak, the version.
--        'O'  it opened, for so many milliseconds, so often in a row. Two processes that open it at
--             once make one opening, which ends with the longer pause.
--        'C'  it closed: the opening of this version is over. A later one stays.
--        'P'  its pause is over, and whoever tells would try it, for so many milliseconds. One
--             process has this right at a time, the first that asks. One that others were not told
--             of (version 0) is an opening from then on; another that is not there has closed.
--
-- A field holds the version, the end of the pause by the server's clock in milliseconds, the streak,
-- the end of the right to try, and whose it is. Times are told as what is left of them: no other
-- clock has to agree. Told twice, all of it comes to the same, but for a version more.
--
-- Returns, for each breaker that is left: its name, the version, what is left of the pause, the
-- streak, and 1 where the right to try it is the asker's. What is no field of anybody's is removed:
-- names are JSON.

local key, who = KEYS[1], ARGV[1]
local life_ms = tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function read(text)
  local version, ends, streak, lease, owner = string.match(text or '', '^(%d+) (%d+) (%d+) (%d+) (%S*)$')
  if not version then
    return nil
  end
  return {
    version = tonumber(version),
    ends = tonumber(ends),
    streak = tonumber(streak),
    lease = tonumber(lease),
    owner = owner,
  }
end

local function write(name, it)
  redis.call('HSET', key, name,
    string.format('%d %d %d %d %s', it.version, it.ends, it.streak, it.lease, it.owner))
end

-- A version is the time of its opening. One from the future is of a clock that was set back since, or
-- of another server's: its pause begins now, or it would last until this clock has caught up.
local stored = redis.call('HGETALL', key)
for i = 1, #stored, 2 do
  local it = read(stored[i + 1])
  if it and it.version > now + 1000 then
    it.ends = now + math.max(0, it.ends - it.version)
    it.version, it.lease, it.owner = now, 0, ''
    write(stored[i], it)
  end
end

for i = 3, #ARGV, 5 do
  local kind, name = ARGV[i], ARGV[i + 1]
  local span_ms, streak, version = tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3]), tonumber(ARGV[i + 4])
  local it = read(redis.call('HGET', key, name))
  if kind == 'O' then
    local ends = now + span_ms
    if it and it.ends > now then
      it.ends = math.max(it.ends, ends)
      it.streak = math.max(it.streak, streak)
    else
      -- By the clock, so that no version comes twice, even after the hash was lost.
      it = { version = math.max(now, it and it.version + 1 or 0), ends = ends, streak = streak }
    end
    it.lease, it.owner = 0, ''
    write(name, it)
  elseif kind == 'C' then
    if it and it.version == version then
      redis.call('HDEL', key, name)
    end
  elseif kind == 'P' then
    if not it and version == 0 then
      it = { version = now, ends = now, streak = streak, lease = 0, owner = '' }
    end
    if it and it.ends <= now and (it.lease <= now or it.owner == who) then
      it.lease, it.owner = now + span_ms, who
      write(name, it)
    end
  end
end

local reply = {}
local all = redis.call('HGETALL', key)
for i = 1, #all, 2 do
  local name, it = all[i], read(all[i + 1])
  if not it or it.ends + life_ms < now or not pcall(cjson.decode, name) then
    redis.call('HDEL', key, name)
  else
    reply[#reply + 1] = name
    reply[#reply + 1] = it.version
    reply[#reply + 1] = math.max(0, it.ends - now)
    reply[#reply + 1] = it.streak
    reply[#reply + 1] = (it.owner == who and it.lease > now) and 1 or 0
  end
end
return reply
