-- A replica says that it lives, and what its users hold there.
--
-- KEYS: the replicas, the fleet, users.
-- ARGV: the replica, whether it comes under a new name ("joins"), the fleet it knows, the seconds of
-- its lease; then for each user the places it holds there, what to charge its counter, and how many rates follow; for
-- each of these its name, limit, seconds, its level as the replica knows it, and what was used of it
-- without this having been asked.
--
-- Says "lost" to who is not known as a live replica and does not come under a new name, and changes
-- nothing. Else the fleet, which is another after all was lost, and how many replicas live.
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local me, joins, known, lease = ARGV[1], ARGV[2] == 'joins', ARGV[3], tonumber(ARGV[4])

-- Where nobody could say that it lives, for this was stopped or started anew, nobody is dead for it.
local seen = tonumber(redis.call('HGET', KEYS[2], 'seen') or now)
if now - seen > lease / 2 then
  local replicas = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')
  for i = 1, #replicas, 2 do
    redis.call('ZADD', KEYS[1], string.format('%.17g', replicas[i + 1] + now - seen), replicas[i])
  end
end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('(%.17g', now))
if not joins and not redis.call('ZSCORE', KEYS[1], me) then
  return 'lost'
end
if joins then
  -- Its names are numbered: earlier ones are gone, and one that comes late is none.
  local name, number = string.match(me, '^(.*)%.(%d+)$')
  for _, other in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
    local its_name, its_number = string.match(other, '^(.*)%.(%d+)$')
    if its_name == name and tonumber(its_number) > tonumber(number) then
      return 'lost'
    elseif its_name == name then
      redis.call('ZREM', KEYS[1], other)
    end
  end
end
redis.call('ZADD', KEYS[1], string.format('%.17g', now + lease), me)
if redis.call('HSETNX', KEYS[2], 'name', me) == 1 then
  redis.call('HSET', KEYS[2], 'since', string.format('%.17g', now))
end
redis.call('HSET', KEYS[2], 'seen', string.format('%.17g', now))
redis.call('EXPIRE', KEYS[1], 86400)
redis.call('EXPIRE', KEYS[2], 86400)
local fleet = redis.call('HGET', KEYS[2], 'name')
local anew = known ~= '' and known ~= fleet
local just = anew and now - redis.call('HGET', KEYS[2], 'since') < 10

local a = 5
for k = 3, #KEYS do
  local places, charge, rates, longest = tonumber(ARGV[a]), tonumber(ARGV[a + 1]), tonumber(ARGV[a + 2]), 0
  a = a + 3
  if places > 0 then
    redis.call('HSET', KEYS[k], '#' .. me, places)
  else
    redis.call('HDEL', KEYS[k], '#' .. me)
  end
  if charge ~= 0 then
    redis.call('HINCRBYFLOAT', KEYS[k], 'counter', ARGV[a - 2])
  end
  for _ = 1, rates do
    local rate, limit, seconds = ARGV[a], tonumber(ARGV[a + 1]), tonumber(ARGV[a + 2])
    local told, used = tonumber(ARGV[a + 3]), tonumber(ARGV[a + 4])
    a = a + 5
    local kept, level = redis.call('HMGET', KEYS[k], rate, rate .. '@', rate .. '-'), limit
    if kept[1] then
      level = math.min(limit, kept[1] + math.max(0, now - kept[2]) * limit / seconds)
    end
    if anew then
      -- Of those who remember, the lowest knew it last. What each of them used comes on top.
      local others = just and tonumber(kept[3]) or 0
      level = math.min(level + others, told) - others
      redis.call('HSET', KEYS[k], rate .. '-', string.format('%.17g', others + used))
    end
    level = math.min(limit, level - used)
    redis.call('HSET', KEYS[k], rate, string.format('%.17g', level), rate .. '@', string.format('%.17g', now))
    longest = math.max(longest, (limit - level) * seconds / limit)
  end
  redis.call('EXPIRE', KEYS[k], math.ceil(3600 + longest))
end
return fleet .. ' ' .. redis.call('ZCARD', KEYS[1])
