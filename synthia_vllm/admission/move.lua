-- Takes what a user may have, or gives it back: all of it or nothing.
--
-- KEYS: the replicas, the user.
-- ARGV: the replica, places to take, the most places at a time (0: any number), what to charge the
-- user's counter; then for each rate its name, limit and seconds, what is needed of it, what is
-- taken if all can be had, and what is taken if not.
--
-- Says "lost" to who is not known as a live replica, and changes nothing. Else, in one line: "taken",
-- the rate that is short, or "places"; the places other replicas hold; the counter; each rate's level.
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000

local function lives(replica)
  local lease = redis.call('ZSCORE', KEYS[1], replica)
  return lease and tonumber(lease) >= now
end

local me, places, most = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
if not lives(me) then
  return 'lost'
end

local user, fields = {}, redis.call('HGETALL', KEYS[2])
for i = 1, #fields, 2 do
  user[fields[i]] = fields[i + 1]
end

local said, levels = 'taken', {}
for i = 5, #ARGV, 6 do
  local rate, limit, seconds, need = ARGV[i], tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3])
  local level = limit
  if user[rate] then
    local passed = math.max(0, now - tonumber(user[rate .. '@']))
    level = math.min(limit, tonumber(user[rate]) + passed * limit / seconds)
  end
  if said == 'taken' and need > 0 and math.min(need, limit) - level > 1e-6 then
    said = rate
  end
  levels[#levels + 1] = level
end

-- A field '#replica' has the places that the user holds there.
local elsewhere = 0
for field, count in pairs(user) do
  if string.sub(field, 1, 1) == '#' and field ~= '#' .. me then
    if lives(string.sub(field, 2)) then
      elsewhere = elsewhere + count
    else
      redis.call('HDEL', KEYS[2], field)
    end
  end
end
if said == 'taken' and places > 0 and most > 0 and elsewhere + (user['#' .. me] or 0) + places > most then
  said = 'places'
end

local told, longest = {said, elsewhere, user.counter or 0}, 0
if said == 'taken' then
  if redis.call('HINCRBY', KEYS[2], '#' .. me, places) <= 0 then
    redis.call('HDEL', KEYS[2], '#' .. me)
  end
  if tonumber(ARGV[4]) ~= 0 then
    told[3] = redis.call('HINCRBYFLOAT', KEYS[2], 'counter', ARGV[4])
  end
end
for i = 5, #ARGV, 6 do
  local limit, seconds = tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2])
  local take = tonumber(said == 'taken' and ARGV[i + 4] or ARGV[i + 5])
  local level = levels[(i + 1) / 6]
  if take ~= 0 then
    level = math.min(limit, level - take)
    redis.call('HSET', KEYS[2], ARGV[i], string.format('%.17g', level), ARGV[i] .. '@', string.format('%.17g', now))
  end
  told[#told + 1] = string.format('%.6f', level)
  longest = math.max(longest, (limit - level) * seconds / limit)
end
-- Who is idle for an hour with full buckets is forgotten: nothing of it says more than a new one's.
redis.call('EXPIRE', KEYS[2], math.ceil(3600 + longest))
return table.concat(told, ' ')
