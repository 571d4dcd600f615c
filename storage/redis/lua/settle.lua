-- Ends claims of one bucket: releases them, or puts frozen responses in their place.
--
-- KEYS   the keys to settle, all in one hash tag.
-- ARGV   1: life of a frozen response in milliseconds; then, for each key, an entry:
--        'C' and a nonce: delete the key if it holds exactly this claim (never another owner's);
--        'R' and a frozen response: write it over whatever claim stands there, since the committed
--        response is the truth whoever claims the key, but never over another response.
--
-- Returns how many keys Redis refused (out of memory). Where another server takes the writes by now,
-- its refusal is the reply: it is none of the keys' own.

local life_ms = ARGV[1]
local refused = 0

for i, key in ipairs(KEYS) do
  local entry = ARGV[i + 1]
  -- pcall: a key that cannot be settled spoils no other.
  local reply
  if string.sub(entry, 1, 1) == 'C' then
    reply = redis.pcall('GET', key)
    if reply == entry then
      reply = redis.pcall('DEL', key)
    end
  else
    reply = redis.pcall('GETRANGE', key, 0, 0)
    if reply ~= 'R' and type(reply) == 'string' then
      reply = redis.pcall('SET', key, entry, 'PX', life_ms)
    end
  end
  if type(reply) == 'table' and reply.err then
    local code = string.match(reply.err, '^%u+')
    if code == 'READONLY' or code == 'MASTERDOWN' or code == 'MOVED' then
      return reply
    end
    refused = refused + 1
  end
end

return refused
