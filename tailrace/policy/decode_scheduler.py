"""The decode worker's schedule: continuous batching of what has its KV, chunked local prefill of what has not.

A request arrives in one of two ways. *Booked*: its prompt's KV is pulled from a prefill worker; it gets destination
blocks when there is room (all or nothing), and joins the batch when the last one has landed. *Local*: its prompt is
computed here, in chunks beside the running batch; so is whatever was preempted or could not be pulled. Memory comes
free by decode's own progress only, so prefill and decode cannot wait for each other.
"""

import heapq
from collections.abc import Sequence as Seq

from tailrace.kv.block_pool import BlockPool
from tailrace.kv.hashing import hash_blocks
from tailrace.plan import BlockAppend, Chunk, SequenceStart, StepOutput, StepPlan
from tailrace.policy.copies import PendingCopies
from tailrace.policy.request import DrawnToken, Request, StopRule, blocks_for
from tailrace.policy.sequence import Arrival, DecodeStep, Sequence
from tailrace.policy.slots import Slots
from tailrace.types import SequenceKey


class DecodeScheduler:
    """Owns the requests of a decode worker; `pool` is written here only."""

    def __init__(
        self, pool: BlockPool, *, block_size: int, max_num_seqs: int, max_num_batched_tokens: int, stop: StopRule
    ) -> None:
        self._pool = pool
        self._block_size = block_size
        self._budget = max_num_batched_tokens
        self._slots = Slots(max_num_seqs)
        self._stop = stop
        self._arrivals: dict[int, Arrival] = {}
        self._local: list[tuple[tuple[int, int, int], Sequence]] = []
        self._computing: list[Sequence] = []
        self._joining: list[Sequence] = []
        self._running: dict[SequenceKey, Sequence] = {}
        self._copies = PendingCopies(pool)
        self.num_preempted = 0

    # -- load ---------------------------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        return len(self._arrivals) + len(self._local) + len(self._joining)

    @property
    def num_running(self) -> int:
        return len(self._running) + len(self._computing)

    @property
    def waiting_tokens(self) -> int:
        waiting = [sequence for _, sequence in self._local]
        return sum(len(s.tokens) - s.num_computed for s in [*waiting, *self._computing])

    @property
    def booked_blocks(self) -> int:
        return sum(a.num_blocks for a in self._arrivals.values() if not a.is_granted)

    def sequences(self) -> list[Sequence]:
        """Everyone who holds blocks."""
        return [*self._running.values(), *self._computing, *self._joining]

    def arrivals(self) -> list[Arrival]:
        return list(self._arrivals.values())

    def request_in(self, slot: int) -> int:
        """Whose local prefill runs in a slot."""
        return next(s.request.id for s in self._computing if s.slot == slot)

    def fits(self, num_tokens: int) -> bool:
        """Could this prompt, and one token more, ever be held?"""
        return blocks_for(num_tokens + 1, self._block_size) <= self._pool.num_blocks

    # -- arrivals: booked, granted, landed, joined --------------------------------------------------------------------

    def book(self, request: Request) -> bool:
        """Promise room for the prompt and a block more. False: not now; the sender may come back."""
        needed = blocks_for(len(request.tokens), self._block_size)
        if self.booked_blocks + needed + 1 > self._pool.num_available and not self._is_idle():
            return False
        self._arrivals[request.id] = Arrival(request, needed)
        return True

    def _is_idle(self) -> bool:
        return not (self._arrivals or self._local or self.sequences())

    def want_destination(self, request_id: int) -> None:
        """The owner has something to pull; `grant` gives the blocks as soon as there is room."""
        if (arrival := self._arrivals.get(request_id)) is not None:
            arrival.wanted = True

    def grant(self) -> list[Arrival]:
        """Destinations for those that wait for one, in order of rank, while there is room. Head of the line first."""
        granted: list[Arrival] = []
        waiting = [a for a in self._arrivals.values() if a.wanted and not a.is_granted]
        for arrival in sorted(waiting, key=lambda a: a.request.rank):
            overtakes = self._local and self._local[0][1].request.rank < arrival.request.rank
            if overtakes or not self._claim_landing(arrival):
                break
            granted.append(arrival)
        return granted

    def _claim_landing(self, arrival: Arrival) -> bool:
        local = self._pool.find_prefix(arrival.request.hashes)
        self._pool.acquire(local)
        # A running sequence may need its next block at the next step: keep one for each.
        missing = arrival.num_blocks - len(local)
        fresh = (
            self._pool.allocate_landing(missing) if self._pool.num_available >= missing + len(self._running) else None
        )
        if fresh is None:
            self._pool.release(local)
            return False
        arrival.blocks, arrival.num_local = [*local, *fresh], len(local)
        return True

    def landed(self, request_id: int, blocks: Seq[int]) -> None:
        """A read into these blocks ended well. The request may be gone by now: then they are free."""
        if (arrival := self._arrivals.get(request_id)) is None:
            self._pool.abandon_landing(blocks)
            return
        self._pool.landed(blocks)
        arrival.landed.update(blocks)

    def join(self, request_id: int, first: Seq[DrawnToken]) -> DecodeStep:
        """All blocks have landed: every choice that goes on becomes a sequence. Reports the first tokens once more."""
        arrival = self._arrivals.pop(request_id)
        request = arrival.request
        for block, block_hash in zip(arrival.blocks, request.hashes, strict=False):
            self._pool.register(block, block_hash)
        parent = Sequence(
            request, request.choices, list(request.tokens), list(request.hashes), arrival.blocks, len(request.tokens)
        )
        step = DecodeStep()
        self._joining.extend(self._branch(parent, first, step))
        return step

    def recompute(self, request_id: int, in_flight: Seq[int]) -> None:
        """The pull failed: prefill here instead. Blocks `in_flight` stay landing until `settle`."""
        if (arrival := self._arrivals.pop(request_id, None)) is not None:
            self._give_back(arrival, in_flight)
            if arrival.request.choices:
                self.submit_local(arrival.request)

    def settle(self, blocks: Seq[int]) -> None:
        """The read that kept these blocks is over, and nobody wants them."""
        self._pool.abandon_landing(blocks)

    def quarantine(self, blocks: Seq[int]) -> None:
        """The read into these blocks stalls: it may still write them."""
        self._pool.quarantine(blocks)

    def _give_back(self, arrival: Arrival, in_flight: Seq[int]) -> None:
        """Local and landed blocks are released, those that nobody writes freed; `in_flight` ones stay landing."""
        self._pool.release(arrival.blocks[: arrival.num_local])
        writing = set(in_flight)
        pulled = arrival.blocks[arrival.num_local :]
        self._pool.release([b for b in pulled if b in arrival.landed])
        self._pool.abandon_landing([b for b in pulled if b not in arrival.landed and b not in writing])

    # -- local work ---------------------------------------------------------------------------------------------------

    def submit_local(self, request: Request) -> None:
        """Compute the prompt here."""
        self._wait(Sequence(request, request.choices, list(request.tokens), []))

    def _wait(self, sequence: Sequence) -> None:
        heapq.heappush(self._local, (sequence.rank, sequence))

    def drop(self, request_id: int, choices: Seq[int] = (), in_flight: Seq[int] = ()) -> None:
        """Cancelled. `choices` empty: the whole request. Unknown ids are fine. `in_flight` as in `recompute`."""
        wanted = set(choices)
        if (arrival := self._arrivals.get(request_id)) is not None:
            # Without its last choice an arrival still waits for its reads: only its pull knows which blocks they write.
            arrival.request.choices = _without(arrival.request.choices, wanted)
            if not wanted:
                del self._arrivals[request_id]
                self._give_back(arrival, in_flight)
        for sequence in self._of_request(request_id):
            rest = _without(sequence.choices, wanted)
            if not rest:
                self._remove(sequence)
            elif rest != sequence.choices:
                sequence.choices = rest

    def _of_request(self, request_id: int) -> list[Sequence]:
        waiting = [sequence for _, sequence in self._local]
        return [s for s in [*self.sequences(), *waiting] if s.request.id == request_id]

    def _remove(self, sequence: Sequence) -> None:
        self._running.pop(sequence.key, None)
        self._computing = [s for s in self._computing if s is not sequence]
        self._joining = [s for s in self._joining if s is not sequence]
        if any(s is sequence for _, s in self._local):
            self._local = [entry for entry in self._local if entry[1] is not sequence]
            heapq.heapify(self._local)
        self._vacate(sequence)

    def _vacate(self, sequence: Sequence) -> None:
        self._copies.forget(sequence.blocks)
        self._pool.release(sequence.blocks)
        sequence.blocks = []
        if sequence.slot >= 0:
            self._slots.give_back(sequence.slot)
            sequence.slot = -1

    # -- one step -----------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Decode rows first, then those that joined, then local prefill within what is left of the token budget."""
        appended = self._grow()
        started = self._start_joined()
        decode = [s.slot for s in self._running.values()]
        chunks = self._chunks(self._budget - len(decode), started)
        return StepPlan(
            released=self._slots.drain_released(),
            started=started,
            appended=appended,
            copies=self._copies.drain(),
            chunks=chunks,
            decode=decode,
        )

    def _grow(self) -> list[BlockAppend]:
        """A block for each sequence whose last token starts one; the lowest in rank give way when there is none."""
        appended: list[BlockAppend] = []
        for sequence in list(self._running.values()):
            if sequence.slot < 0 or len(sequence.tokens) <= len(sequence.blocks) * self._block_size:
                continue
            block = self._allocate_by_preempting(sequence)
            if block is not None:
                appended.append(BlockAppend(sequence.slot, len(sequence.blocks), [block]))
                sequence.blocks.append(block)
        if not appended:
            return []
        held = {s.slot for s in self._running.values()}
        return [a for a in appended if a.slot in held]

    def _allocate_by_preempting(self, sequence: Sequence) -> int | None:
        """None: the sequence itself was the lowest in rank, and gave way."""
        while (got := self._pool.allocate(1)) is None:
            victim = max([*self._running.values(), *self._computing], key=lambda s: s.rank)
            self._preempt(victim)
            if victim is sequence:
                return None
        return got[0]

    def _preempt(self, sequence: Sequence) -> None:
        """Let its blocks go (they stay cached while nobody needs them); compute it again later, from what is left."""
        self.num_preempted += 1
        self._remove(sequence)
        sequence.num_computed = 0
        sequence.hashes = []
        self._wait(sequence)

    def _start_joined(self) -> list[SequenceStart]:
        """Rows for the joined ones. When nobody runs and none can start, the lowest in rank gives way."""
        started = [_start(s) for s in list(self._joining) if self._try_start(s)]
        while not started and not self._running and not self._computing and len(self._joining) > 1:
            self._preempt(max(self._joining, key=lambda s: s.rank))
            started = [_start(s) for s in list(self._joining) if self._try_start(s)]
        return started

    def _try_start(self, sequence: Sequence) -> bool:
        if not len(self._slots) or not self._has_room_for_last(sequence):
            return False
        self._take_slot(sequence)
        self._joining.remove(sequence)
        self._running[sequence.key] = sequence
        return True

    def _take_slot(self, sequence: Sequence) -> None:
        slot = self._slots.take()
        assert slot is not None, "callers look first"
        sequence.slot, sequence.slot_choice = slot, sequence.choices[0]

    def _has_room_for_last(self, sequence: Sequence) -> bool:
        if len(sequence.tokens) <= len(sequence.blocks) * self._block_size:
            return True
        fresh = self._pool.allocate(1)
        if fresh is not None:
            sequence.blocks.extend(fresh)
        return fresh is not None

    def _chunks(self, budget: int, started: list[SequenceStart]) -> list[Chunk]:
        chunks: list[Chunk] = []
        for sequence in self._computing:
            if budget > 0:
                budget -= self._add_chunk(sequence, budget, chunks)
        while budget > 0 and (admitted := self._admit_local()) is not None:
            started.append(_start(admitted))
            budget -= self._add_chunk(admitted, budget, chunks)
        return chunks

    def _add_chunk(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        total = len(sequence.tokens)
        end = min(total, sequence.num_computed + budget)
        chunks.append(Chunk(sequence.slot, sequence.num_computed, end, sequence.choices if end == total else ()))
        return end - sequence.num_computed

    def _admit_local(self) -> Sequence | None:
        if not self._local or not len(self._slots):
            return None
        sequence = self._local[0][1]
        if not sequence.hashes:
            sequence.hashes = hash_blocks(sequence.tokens, self._block_size, sequence.request.hash_seed)
        cached = self._pool.find_prefix(sequence.hashes[: (len(sequence.tokens) - 1) // self._block_size])
        self._pool.acquire(cached)
        missing = blocks_for(len(sequence.tokens), self._block_size) - len(cached)
        has_room = self._pool.num_available >= missing + len(self._running)
        fresh = self._pool.allocate(missing) if has_room else None
        if fresh is None:
            self._pool.release(cached)
            return None
        heapq.heappop(self._local)
        self._take_slot(sequence)
        sequence.blocks = [*cached, *fresh]
        sequence.num_computed = len(cached) * self._block_size
        self._computing.append(sequence)
        return sequence

    # -- after the step -----------------------------------------------------------------------------------------------

    def finish(self, plan: StepPlan, out: StepOutput) -> DecodeStep:
        """Book what the runner drew: tokens appended, full blocks findable, finished choices gone."""
        step = DecodeStep(computed_tokens=plan.num_tokens)
        by_slot = {s.slot: s for s in [*self._running.values(), *self._computing]}
        for row, slot in enumerate(plan.decode):
            self._advance(by_slot[slot], self._drawn(by_slot[slot], out, row), step)
        row = len(plan.decode)
        for chunk in plan.chunks:
            sequence = by_slot[chunk.slot]
            self._computed(sequence, chunk.end)
            if chunk.choices:
                first = [self._drawn(sequence, out, at) for at in range(row, row + len(chunk.choices))]
                row += len(chunk.choices)
                self._computing.remove(sequence)
                self._settle_prompt(sequence, first, step)
        self._copies.done(plan.copies)
        return step

    def _drawn(self, sequence: Sequence, out: StepOutput, row: int) -> DrawnToken:
        token = out.tokens[row]
        logprob = out.logprobs[row] if out.logprobs is not None else None
        reason = self._stop.finish_reason(token, len(sequence.tokens) + 1, sequence.request)
        return DrawnToken(out.choices[row], token, logprob, reason, row in out.bad_rows)

    def _advance(self, sequence: Sequence, token: DrawnToken, step: DecodeStep) -> None:
        self._computed(sequence, len(sequence.tokens))
        step.add(sequence.request.id, len(sequence.tokens), token)
        sequence.tokens.append(token.token_id)
        if token.finish_reason is not None:
            self._remove(sequence)

    def _computed(self, sequence: Sequence, num_tokens: int) -> None:
        """KV of the first `num_tokens` tokens is written: full blocks can be found from now on."""
        full, size = num_tokens // self._block_size, self._block_size
        first = sequence.num_computed // size
        sequence.num_computed = num_tokens
        if full > len(sequence.hashes):
            parent = sequence.hashes[-1] if sequence.hashes else None
            at = len(sequence.hashes)
            sequence.hashes += hash_blocks(
                sequence.tokens[: full * size], size, sequence.request.hash_seed, first=at, parent=parent
            )
        for index in range(first, full):
            self._pool.register(sequence.blocks[index], sequence.hashes[index])

    def _settle_prompt(self, sequence: Sequence, first: list[DrawnToken], step: DecodeStep) -> None:
        """The last chunk drew for every choice. The slot stays with its own choice, if that goes on."""
        slot, own = sequence.slot, sequence.slot_choice
        for child in self._branch(sequence, first, step):
            if child.choices[0] == own:
                child.slot, child.slot_choice = slot, own
                self._running[child.key] = child
                slot = -1
            else:
                self._joining.append(child)
        if slot >= 0:
            self._slots.give_back(slot)

    def _branch(self, parent: Sequence, first: Seq[DrawnToken], step: DecodeStep) -> list[Sequence]:
        """Fork into the choices that go on: full blocks shared, the partial last one copied.

        The parent's own references pass to the first child; a choice that cannot get a block is computed again later.
        """
        children: list[Sequence] = []
        position = len(parent.tokens)
        for token in first:
            if token.choice not in parent.choices:
                continue
            step.add(parent.request.id, position, token)
            if token.finish_reason is not None:
                continue
            child = Sequence(
                parent.request, (token.choice,), [*parent.tokens, token.token_id], list(parent.hashes), [], position
            )
            if not children:
                child.blocks = parent.blocks
                children.append(child)
            elif self._copy_table(parent.blocks, position, child):
                children.append(child)
            else:
                child.num_computed, child.hashes = 0, []
                self._wait(child)
        if not children:
            self._pool.release(parent.blocks)
        return children

    def _copy_table(self, blocks: list[int], num_tokens: int, child: Sequence) -> bool:
        full = num_tokens // self._block_size
        shared, partial = blocks[:full], blocks[full:]
        fresh = self._pool.allocate(len(partial))
        if fresh is None:
            return False
        self._pool.acquire(shared)
        child.blocks = [*shared, *fresh]
        for source, target in zip(partial, fresh, strict=True):
            self._copies.add(source, target)
        return True


def _without(choices: tuple[int, ...], dropped: set[int]) -> tuple[int, ...]:
    """Nobody named: everybody is."""
    return tuple(c for c in choices if c not in dropped) if dropped else ()


def _start(sequence: Sequence) -> SequenceStart:
    request = sequence.request
    return SequenceStart(
        slot=sequence.slot,
        tokens=sequence.tokens,
        num_prompt_tokens=request.num_prompt_tokens,
        sampling=request.sampling,
        choice=sequence.choices[0],
        blocks=sequence.blocks,
    )
