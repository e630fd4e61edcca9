"""The decode worker's schedule: continuous batching of what has its KV, chunked local prefill of what has not.

A request arrives in one of two ways. *Booked*: its prompt's KV is pulled from a prefill worker; it gets destination
blocks when there is room (all or nothing), and joins the batch when the last one has landed. *Local*: its prompt is
computed here, in chunks beside the running batch; so is whatever was preempted or could not be pulled. Memory comes
free by decode's own progress only, so prefill and decode cannot wait for each other.

One step may be planned behind another that still computes. Its rows draw after tokens that only the device knows yet:
how many a sequence has is known all the same, and so is whether it ends by its length. A sequence that turns out to
have ended otherwise leaves a row behind that is nobody's.
"""

from collections.abc import Sequence as Seq

from tailrace.kv.block_pool import BlockPool
from tailrace.kv.hashing import extend_hashes, parent_of
from tailrace.kv.window import Window
from tailrace.plan import BlockAppend, SequenceStart, StepOutput, StepPlan
from tailrace.policy.arrivals import Arrivals
from tailrace.policy.copies import PendingCopies
from tailrace.policy.flights import Flights
from tailrace.policy.forks import branch
from tailrace.policy.local_prefill import LocalPrefill
from tailrace.policy.offers import OfferPolicy
from tailrace.policy.request import DrawnToken, Request, StopRule
from tailrace.policy.running import PlannedRows, RunningBatch, drawn_rows
from tailrace.policy.sequence import Arrival, DecodeStep, Finish, Sequence
from tailrace.policy.slots import Slots
from tailrace.policy.swap import SwapCost, SwapIns


class DecodeScheduler:
    """Owns the requests of a decode worker; `pool` is written here only."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        stop: StopRule,
        window: int = 0,
        offers: OfferPolicy | None = None,
        swap_cost: SwapCost | None = None,
    ) -> None:
        """`window`: KVLayout.window; `offers`: None where there is no store; `swap_cost`: None where nothing is
        fetched back from it."""
        self._pool = pool
        self._block_size = block_size
        self._budget = max_num_batched_tokens
        self._slots = Slots(max_num_seqs)
        self._stop = stop
        self._offers = offers
        self._window = Window(window, block_size)
        self._arrivals = Arrivals(pool, self._window)
        self._joining: list[Sequence] = []
        self._running = RunningBatch(block_size, stop)
        self._flights: Flights[PlannedRows] = Flights(pool)
        self._copies = PendingCopies(pool)
        self._local = LocalPrefill(pool, self._slots, self._flights, self._window, self._budget, swap_cost)
        self.num_preempted = 0

    # -- load ---------------------------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        return len(self._arrivals) + self._local.num_waiting + len(self._joining)

    @property
    def num_running(self) -> int:
        return len(self._running) + len(self._local.computing)

    @property
    def waiting_tokens(self) -> int:
        return self._local.waiting_tokens

    @property
    def booked_blocks(self) -> int:
        return self._arrivals.booked_blocks

    def sequences(self) -> list[Sequence]:
        """Everyone who holds blocks."""
        return [*self._running.sequences(), *self._local.computing, *self._joining]

    def arrivals(self) -> list[Arrival]:
        return self._arrivals.all()

    def prefilling(self) -> list[int]:
        """The requests whose chunks the last plan has, in their order."""
        return [sequence.request.id for sequence in self._flights.youngest.prompts]

    def fits(self, num_tokens: int) -> bool:
        """Could this prompt, and one token more, ever be held?"""
        return self._window.least_held(num_tokens + 1) <= self._pool.num_blocks

    def first_handed_over(self, num_tokens: int) -> int:
        """The first block that is pulled of a prompt of so many tokens. From any thread."""
        return self._window.first_handed_over(num_tokens)

    # -- arrivals: booked, granted, landed, joined --------------------------------------------------------------------

    def book(self, request: Request) -> bool:
        """Promise room for the prompt and a block more. False: not now; the sender may come back."""
        if self._arrivals.needed(request) > self._pool.num_available and not self._is_idle():
            return False
        self._arrivals.book(request)
        return True

    def _is_idle(self) -> bool:
        return not (self._arrivals or self._local.num_waiting or self.sequences())

    def want_destination(self, request_id: int) -> None:
        """The owner has something to pull; `grant` gives the blocks as soon as there is room."""
        if (arrival := self._arrivals.get(request_id)) is not None:
            arrival.wanted = True

    def grant(self) -> list[Arrival]:
        """Destinations for those that wait for one, in order of rank, while there is room. Head of the line first."""
        granted: list[Arrival] = []
        for arrival in self._arrivals.waiting():
            overtakes = (head := self._local.line.head) is not None and head.request.rank < arrival.request.rank
            # A running sequence may need its next block at the next step: keep one for each.
            if overtakes or not self._arrivals.claim(arrival, spare=len(self._running)):
                break
            granted.append(arrival)
        return granted

    def landed(self, request_id: int, blocks: Seq[int]) -> None:
        """A read into these blocks ended well. The request may be gone by now: then they are free."""
        self._arrivals.landed(request_id, blocks)

    def join(self, request_id: int, first: Seq[DrawnToken]) -> DecodeStep:
        """All blocks have landed: every choice that goes on becomes a sequence. Reports the first tokens once more."""
        arrival = self._arrivals.pop(request_id)
        assert arrival is not None, "callers know what they booked"
        request = arrival.request
        self._register(request, arrival.blocks, request.hashes, arrival.num_gone, len(request.hashes))
        parent = Sequence(
            request, request.choices, list(request.tokens), list(request.hashes), arrival.blocks, len(request.tokens)
        )
        parent.num_gone = arrival.num_gone
        step = DecodeStep()
        self._joining.extend(self._fork(parent, first, step))
        return step

    def recompute(self, request_id: int, in_flight: Seq[int]) -> None:
        """The pull failed: prefill here instead. Blocks `in_flight` stay landing until `settle`."""
        if (arrival := self._arrivals.pop(request_id)) is not None:
            self._arrivals.give_back(arrival, in_flight)
            if arrival.request.choices:
                self.submit_local(arrival.request)

    def settle(self, blocks: Seq[int]) -> None:
        """The read that kept these blocks is over, and nobody wants them."""
        self._pool.abandon_landing(blocks)

    def quarantine(self, blocks: Seq[int]) -> None:
        """The read into these blocks stalls: it may still write them."""
        self._pool.quarantine(blocks)

    # -- blocks that are fetched for what is computed here -------------------------------------------------------------

    @property
    def swaps(self) -> SwapIns:
        """Who fetches before it computes: to be asked for what is granted, and told what has landed."""
        return self._local.swaps

    def end_swap(self, swap_id: int, in_flight: Seq[int]) -> bool:
        """Nothing more is read for it. Blocks `in_flight` may still be written, and stay landing until `settle`.

        True: it is in line again, to be computed from what is here then.
        """
        return self._local.end_swap(swap_id, in_flight)

    # -- local work ---------------------------------------------------------------------------------------------------

    def submit_local(self, request: Request, elsewhere: Seq[range] = ()) -> None:
        """Compute the prompt here. `elsewhere`: blocks of its chain that others are said to hold, to be fetched."""
        self._local.line.add(Sequence(request, request.choices, list(request.tokens), [], elsewhere=elsewhere))

    def drop(self, request_id: int, choices: Seq[int] = (), in_flight: Seq[int] = ()) -> None:
        """Cancelled. `choices` empty: the whole request. Unknown ids are fine. `in_flight` as in `recompute`."""
        wanted = set(choices)
        if (arrival := self._arrivals.get(request_id)) is not None:
            # Without its last choice an arrival still waits for its reads: only its pull knows which blocks they write.
            arrival.request.choices = _without(arrival.request.choices, wanted)
            if not wanted:
                self._arrivals.pop(request_id)
                self._arrivals.give_back(arrival, in_flight)
        for sequence in self._of_request(request_id):
            rest = _without(sequence.choices, wanted)
            if not rest:
                self._remove(sequence)
            elif rest != sequence.choices:
                sequence.choices = rest

    def _of_request(self, request_id: int) -> list[Sequence]:
        return [s for s in [*self.sequences(), *self._local.waiting()] if s.request.id == request_id]

    def _remove(self, sequence: Sequence) -> None:
        self._running.discard(sequence)
        self._local.discard(sequence)
        self._joining = [s for s in self._joining if s is not sequence]
        self._vacate(sequence)

    def _vacate(self, sequence: Sequence) -> None:
        self._copies.forget(sequence.held)
        self._flights.release(sequence.held)
        sequence.blocks, sequence.num_gone = [], 0
        if sequence.slot >= 0:
            self._slots.give_back(sequence.slot)
            sequence.slot = -1

    # -- one step -----------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Decode rows first, then those that joined, then local prefill within what is left of the token budget.

        May be called once more before `finish`. The plan is empty then while somebody would have to give way: the step
        in flight cannot be called back.
        """
        due = self._running.due()
        if self._flights and len(due.growing) > self._pool.num_available:
            return StepPlan()
        appended = self._grow(due.growing)
        started = self._start_joined()
        rows = self._running.rows(has_ended=due.has_ended)
        local = self._local.plan(self._budget - len(rows.slots), spare=len(self._running))
        if self._local.computing and not (rows.slots or local.chunks or self._flights):
            # Each waits for blocks that others share with whoever let go of them.
            self._preempt(max([*self._local.computing, *self._joining], key=lambda s: s.rank))
            return self.schedule()
        plan = StepPlan(
            chunks=local.chunks,
            released=self._slots.drain_released(),
            started=[*started, *local.started],
            appended=[*appended, *local.appended],
            copies=self._copies.drain(),
            decode=rows.slots,
        )
        if plan.changes_anything:
            self._begin(plan, PlannedRows(rows, local.prompts))
        return plan

    def _begin(self, plan: StepPlan, rows: PlannedRows) -> None:
        for sequence in rows.decode.sequences:
            sequence.num_tokens += 1
        promised: set[bytes] = set()
        for sequence, chunk in zip(rows.prompts, plan.chunks, strict=True):
            promised.update(sequence.hashes[chunk.start // self._block_size : chunk.end // self._block_size])
            # A prompt that draws for its slot alone decodes on from there; others fork first.
            if chunk.choices == (sequence.slot_choice,):
                self._local.computing.remove(sequence)
                self._running.add(sequence)
                sequence.num_tokens += 1
        self._flights.begin(plan, rows, frozenset(promised))

    def _grow(self, growing: list[Sequence]) -> list[BlockAppend]:
        """A block for each whose last token starts one; the lowest in rank give way when there is none."""
        appended: list[BlockAppend] = []
        for sequence in growing:
            if sequence.is_gone:
                continue
            block = self._allocate_by_preempting(sequence)
            if block is not None:
                appended.append(BlockAppend(sequence.slot, len(sequence.blocks), [block]))
                sequence.blocks.append(block)
                self._running.set_room(sequence)
        if not appended:
            return []
        held = {s.slot for s in growing}
        return [a for a in appended if a.slot in held]

    def _allocate_by_preempting(self, sequence: Sequence) -> int | None:
        """None: the sequence itself was the lowest in rank, and gave way."""
        while (got := self._pool.allocate(1)) is None:
            victim = max([*self._running.sequences(), *self._local.computing], key=lambda s: s.rank)
            self._preempt(victim)
            if victim is sequence:
                return None
        return got[0]

    def _preempt(self, sequence: Sequence) -> None:
        """Let its blocks go (they stay cached while nobody needs them); compute it again later, from what is left."""
        self.num_preempted += 1
        self._offer(sequence)
        sequence.num_offered = sequence.num_computed // self._block_size
        self._remove(sequence)
        sequence.num_computed = sequence.num_planned = 0
        sequence.hashes = []
        self._local.line.add(sequence)

    def _start_joined(self) -> list[SequenceStart]:
        """Rows for the joined ones. When nobody runs and none can start, the lowest in rank gives way."""
        started = [s.as_start() for s in list(self._joining) if self._try_start(s)]
        while not (started or self._running or self._local.computing or self._flights) and len(self._joining) > 1:
            self._preempt(max(self._joining, key=lambda s: s.rank))
            started = [s.as_start() for s in list(self._joining) if self._try_start(s)]
        return started

    def _try_start(self, sequence: Sequence) -> bool:
        if not len(self._slots) or not self._has_room_for_last(sequence):
            return False
        sequence.enter(self._slots.take())
        self._joining.remove(sequence)
        self._running.add(sequence)
        return True

    def _has_room_for_last(self, sequence: Sequence) -> bool:
        if len(sequence.tokens) <= len(sequence.blocks) * self._block_size:
            return True
        fresh = self._pool.allocate(1)
        if fresh is not None:
            sequence.blocks.extend(fresh)
        return fresh is not None

    # -- after the step -----------------------------------------------------------------------------------------------

    def finish(self, plan: StepPlan, out: StepOutput) -> DecodeStep:
        """Book what the runner drew: tokens appended, full blocks findable, finished choices gone.

        Rows of sequences that are gone by now are dropped: nobody asked for their tokens.
        """
        rows = self._flights.end(plan)
        step = DecodeStep(computed_tokens=plan.num_tokens)
        self._drop_bad(rows.decode.sequences, out, step)
        drawn = drawn_rows(rows.decode, out)
        step.tokens.extend(drawn.tokens)
        for sequence, token in zip(drawn.sequences, drawn.tokens.token_ids, strict=True):
            tokens = sequence.tokens
            tokens.append(token)
            if len(tokens) > sequence.watch or token in sequence.ending:
                self._look_at(sequence, token, step)
        self._finish_prompts(plan, rows.prompts, out, step)
        self._copies.done(plan.copies)
        return step

    def _drop_bad(self, sequences: list[Sequence], out: StepOutput, step: DecodeStep) -> None:
        for row in out.bad_rows:
            if row < len(sequences) and not sequences[row].is_gone:
                step.bad.append(sequences[row].request.id)
                self._remove(sequences[row])

    def _look_at(self, sequence: Sequence, token: int, step: DecodeStep) -> None:
        """Its last known token may end it; all before it are computed."""
        num_tokens = len(sequence.tokens)
        self._computed(sequence, num_tokens - 1)
        reason = self._stop.finish_reason(token, num_tokens, sequence.request)
        if reason is None:
            self._running.set_watch(sequence)
            self._let_go(sequence, num_tokens - 1)
        else:
            step.finished.append(Finish(sequence.key, reason))
            self._offer(sequence)
            self._remove(sequence)

    def _finish_prompts(self, plan: StepPlan, prompts: list[Sequence], out: StepOutput, step: DecodeStep) -> None:
        end = len(plan.decode)
        for chunk, sequence in zip(plan.chunks, prompts, strict=True):
            draws = range(end, end + len(chunk.choices))
            end = draws.stop
            if sequence.is_gone:
                continue
            if any(row in draws for row in out.bad_rows):
                step.bad.append(sequence.request.id)
                self._remove(sequence)
                continue
            self._computed(sequence, chunk.end)
            self._let_go(sequence, chunk.end)
            if draws:
                step.prefilled.append(sequence.request.id)
                self._settle_prompt(sequence, [self._drawn(sequence, out, row) for row in draws], step)

    def _drawn(self, sequence: Sequence, out: StepOutput, row: int) -> DrawnToken:
        token = out.tokens[row]
        logprob = out.logprobs[row] if out.logprobs is not None else None
        reason = self._stop.finish_reason(token, len(sequence.tokens) + 1, sequence.request)
        return DrawnToken(out.choices[row], token, logprob, reason)

    def _computed(self, sequence: Sequence, num_tokens: int) -> None:
        """KV of the first `num_tokens` tokens is written: full blocks can be found from now on."""
        full, size = num_tokens // self._block_size, self._block_size
        first = sequence.num_computed // size
        sequence.num_computed = num_tokens
        if full > len(sequence.hashes):
            parent = sequence.hashes[-1] if sequence.hashes else sequence.request.hash_seed
            fresh = sequence.tokens[len(sequence.hashes) * size : full * size]
            sequence.hashes += extend_hashes(fresh, size, parent)
        self._register(sequence.request, sequence.blocks, sequence.hashes, first, full)

    def _register(self, request: Request, blocks: Seq[int], hashes: Seq[bytes], first: int, end: int) -> None:
        for index in range(first, end):
            self._pool.register(blocks[index], hashes[index], parent_of(hashes, index), request.tenant)

    def _let_go(self, sequence: Sequence, position: int) -> None:
        """Of what is before the window of the token at `position`, which is computed next or in flight."""
        if leaving := self._window.let_go(sequence, position):
            self._flights.release(leaving)
            if self._offers is not None:
                self._offers.pass_over(leaving)

    def _offer(self, sequence: Sequence) -> None:
        """It lets its blocks go: the store may want those that are computed."""
        if self._offers is not None:
            chain = sequence.hashes[: sequence.num_computed // self._block_size]
            self._offers.note_over(chain, sequence.request.tenant, sequence.num_found)

    def _settle_prompt(self, sequence: Sequence, first: list[DrawnToken], step: DecodeStep) -> None:
        """The last chunk drew for every choice. The slot stays with its own choice, if that goes on."""
        if sequence in self._running:
            self._continue(sequence, first[0], step)
            return
        self._local.computing.remove(sequence)
        slot, own = sequence.slot, sequence.slot_choice
        for child in self._fork(sequence, first, step):
            if child.choices[0] == own:
                child.slot, child.slot_choice = slot, own
                self._running.add(child)
                slot = -1
            else:
                self._joining.append(child)
        if slot >= 0:
            self._slots.give_back(slot)

    def _continue(self, sequence: Sequence, token: DrawnToken, step: DecodeStep) -> None:
        """It runs since its last chunk was planned."""
        step.add(sequence.request.id, len(sequence.tokens), token)
        sequence.tokens.append(token.token_id)
        self._running.set_watch(sequence)
        if token.finish_reason is not None:
            self._offer(sequence)
            self._remove(sequence)

    def _fork(self, parent: Sequence, first: Seq[DrawnToken], step: DecodeStep) -> list[Sequence]:
        """Those of its choices that go on and have their blocks; the others wait to be computed again."""
        branches = branch(self._pool, self._copies, self._block_size, parent, first, step)
        for child in branches.homeless:
            self._local.line.add(child)
        if not branches.held:
            self._offer(parent)
            self._flights.release(parent.held)
        return branches.held


def _without(choices: tuple[int, ...], dropped: set[int]) -> tuple[int, ...]:
    """Nobody named: everybody is."""
    return tuple(c for c in choices if c not in dropped) if dropped else ()
