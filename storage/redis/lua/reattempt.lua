-- Counts one more reattempt of a card, where every limit allows it.
--
-- KEYS[1]  a sorted set: one member for each reattempt, its score the time in milliseconds
-- ARGV[1]  the new member
-- ARGV[2…] pairs of a window in seconds and how many may be in it
--
-- Returns 1 where it was counted. By Redis's clock, so that all gateways count alike.
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local longest_s = 0
for index = 2, #ARGV, 2 do
    longest_s = math.max(longest_s, tonumber(ARGV[index]))
end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', '(' .. (now_ms - longest_s * 1000))
for index = 2, #ARGV, 2 do
    local since_ms = now_ms - ARGV[index] * 1000
    if redis.call('ZCOUNT', KEYS[1], since_ms, '+inf') >= tonumber(ARGV[index + 1]) then
        return 0
    end
end
redis.call('ZADD', KEYS[1], now_ms, ARGV[1])
redis.call('EXPIRE', KEYS[1], longest_s)
return 1
