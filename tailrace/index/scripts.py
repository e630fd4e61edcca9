"""What Redis must do in one go. Each script's keys lie in one slot."""

from dataclasses import dataclass, field
from hashlib import sha1

from tailrace.index.keys import ENTRY_BYTES, MARK_BYTES, MAX_HOLDERS
from tailrace.kv.hashing import HASH_BYTES


@dataclass(frozen=True, slots=True)
class Script:
    """Lua, and the name under which Redis keeps it."""

    source: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha", sha1(self.source.encode(), usedforsecurity=False).hexdigest())


_OTHERS = f"""
local function others(key, mark)
    local held = redis.pcall('GET', key)
    if type(held) ~= 'string' or #held % {ENTRY_BYTES} ~= 0 then return '' end
    if #held == {ENTRY_BYTES} and string.sub(held, 1, {MARK_BYTES}) == mark then return '' end
    local kept = {{}}
    for i = 1, #held, {ENTRY_BYTES} do
        if string.sub(held, i, i + {MARK_BYTES - 1}) ~= mark then
            kept[#kept + 1] = string.sub(held, i, i + {ENTRY_BYTES - 1})
        end
    end
    return table.concat(kept)
end
"""

# KEYS: blocks; ARGV: entry, milliseconds to live. The newest entry stands last, so the oldest is the one to drop.
PUBLISH = Script(f"""{_OTHERS}
local mark = string.sub(ARGV[1], 1, {MARK_BYTES})
for _, key in ipairs(KEYS) do
    local kept = others(key, mark)
    if #kept >= {MAX_HOLDERS * ENTRY_BYTES} then kept = string.sub(kept, -{(MAX_HOLDERS - 1) * ENTRY_BYTES}) end
    redis.call('SET', key, kept .. ARGV[1], 'PX', ARGV[2])
end
return #KEYS
""")

# KEYS: blocks; ARGV: mark. A value that nobody of us wrote goes as well.
RETRACT = Script(f"""{_OTHERS}
for _, key in ipairs(KEYS) do
    local kept = others(key, ARGV[1])
    if kept == '' then redis.call('DEL', key) else redis.call('SET', key, kept, 'KEEPTTL') end
end
return #KEYS
""")

# ARGV: what comes before a block's braces; hashes of a prompt, one after the other. Its keys are no KEYS, which would
# each cost as much as the reads that are saved, and lie in one slot. Answers mark, depth, mark, depth...
# A binary search, in which marks go together as long as they agree; the last block first, as it often is the answer.
SEARCH = Script(f"""
local values, refused = {{}}, nil
local function value(depth)
    local held = values[depth]
    if not held then
        local hash = string.sub(ARGV[2], {HASH_BYTES} * (depth - 1) + 1, {HASH_BYTES} * depth)
        held = redis.pcall('GET', ARGV[1] .. string.format('{{%02x}}', string.byte(hash)) .. hash)
        if type(held) == 'table' and not string.find(held.err, 'WRONGTYPE', 1, true) then refused = held end
        if type(held) ~= 'string' then held = '' end
        values[depth] = held
    end
    return held
end
local function marks(held)
    local found = {{}}
    for i = 1, #held - {MARK_BYTES}, {ENTRY_BYTES} do found[#found + 1] = string.sub(held, i, i + {MARK_BYTES - 1}) end
    return found
end
local answer = {{}}
local function search(alive, low, high, middle)
    while #alive > 0 and high - low > 1 do
        local there, kept, lost = {{}}, {{}}, {{}}
        if value(middle) == value(low) then
            kept = alive
        else
            for _, mark in ipairs(marks(value(middle))) do there[mark] = true end
            for _, mark in ipairs(alive) do
                if there[mark] then kept[#kept + 1] = mark else lost[#lost + 1] = mark end
            end
        end
        if #kept == 0 then
            high = middle
        else
            search(lost, low, middle, math.floor((low + middle) / 2))
            alive, low = kept, middle
        end
        middle = math.floor((low + high) / 2)
    end
    for _, mark in ipairs(alive) do
        answer[#answer + 1] = mark
        answer[#answer + 1] = low
    end
end
local count = #ARGV[2] / {HASH_BYTES}
search(marks(value(1)), 1, count + 1, count)
return refused or answer
""")

REGISTERED, WAS_MISSING, FENCED, IS_FULL = 1, 2, 3, 4

# KEYS: names, the worker's key; ARGV: id, epoch, registration, milliseconds to live, most workers.
# Names whose keys have expired are struck off when a worker comes, not by readers, who need no right to write.
REGISTER = Script(f"""
local held = redis.pcall('GET', KEYS[2])
if type(held) == 'string' then
    local ok, told = pcall(cjson.decode, held)
    local epoch = ok and type(told) == 'table' and tonumber(told.epoch)
    if epoch and epoch > tonumber(ARGV[2]) then return {FENCED} end
else
    local prefix = string.sub(KEYS[2], 1, #KEYS[2] - #ARGV[1])
    for _, name in ipairs(redis.call('SMEMBERS', KEYS[1])) do
        if redis.call('EXISTS', prefix .. name) == 0 then redis.call('SREM', KEYS[1], name) end
    end
    if redis.call('SCARD', KEYS[1]) >= tonumber(ARGV[5]) then return {IS_FULL} end
end
redis.call('SADD', KEYS[1], ARGV[1])
redis.call('SET', KEYS[2], ARGV[3], 'PX', ARGV[4])
return type(held) == 'string' and {REGISTERED} or {WAS_MISSING}
""")

# KEYS: names, the worker's key; ARGV: id, epoch. A newer life's registration stays.
LEAVE = Script("""
local held = redis.pcall('GET', KEYS[2])
local ok, told = pcall(cjson.decode, type(held) == 'string' and held or '')
if ok and type(told) == 'table' and tonumber(told.epoch) == tonumber(ARGV[2]) then
    redis.call('DEL', KEYS[2])
    redis.call('SREM', KEYS[1], ARGV[1])
end
return 1
""")
