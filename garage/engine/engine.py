"""The engine: requests in, tokens out, many at once over one model and one pool of pages.

    engine = Engine.open(directory, None, EngineSpec())
    engine.generate([Request("1", "Once upon a time")])         # a core.protocols.Generator

A server drives it a step at a time instead: `submit`, `step` while `has_work`, `abort`. One request's failure (it can never fit,
its logits are not finite) is its own completion with finish_reason "error"; an exception out of `step` means that the step as a
whole failed: everything that ran is finished with an error, nothing of it stays in the cache, and the engine can go on.

Not thread-safe: one thread calls everything but `encode`, which any thread may call. It sets no thread counts.
"""

import secrets
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch

from garage.core.errors import UserError
from garage.core.types import Completion, FinishReason, Message, Request
from garage.engine.adapters import Adapter, Adapters, Ready
from garage.engine.constrain import Grammars
from garage.engine.defaults import GenerationDefaults
from garage.engine.loading import load, load_draft
from garage.engine.pages import PagePool, root
from garage.engine.request import PENDING, Delta, QueueFull, Sequence, State, Stats
from garage.engine.rules import make_rules
from garage.engine.runner import Runner
from garage.engine.sampler import Chosen
from garage.engine.scheduler import Limits, Scheduler
from garage.engine.speculate import speculation_of
from garage.engine.stops import Answer, stop_ids
from garage.engine.task import Flight, OnToken, Task, reading_of
from garage.models.layers import Model
from garage.specs.serve import EngineSpec
from garage.tokens.chat import Chat
from garage.tokens.tokenizer import Tokenizer


class Engine:
    """Continuous batching over one model. `chat` None: the model has no template and takes texts and ids only."""

    def __init__(
        self, model: Model, tokenizer: Tokenizer, chat: Chat | None, settings: EngineSpec, *,
        defaults: GenerationDefaults | None = None, base: Path | None = None, draft: Model | None = None,
    ) -> None:  # fmt: skip
        self.tokenizer, self.chat = tokenizer, chat
        self.defaults = defaults or GenerationDefaults()
        self._model, self.weight_version = model, 0
        self._model_vocab = model.config.vocab_size
        self.vocab_size = min(tokenizer.vocab_size, self._model_vocab)
        self._adapters = Adapters(model, settings, base)
        self._runner = Runner(model, settings, self.vocab_size, self._adapters.many)
        self.max_model_len = self._runner.max_model_len
        self._eos_ids = self.defaults.eos_ids | frozenset(tokenizer.eos_ids) | frozenset(chat.stop_ids if chat else ())
        pool = PagePool(self._runner.num_pages, settings.page_size, keep=settings.enable_prefix_caching)
        names = ("max_num_seqs", "max_num_batched_tokens", "max_waiting", "max_waiting_tokens")
        limits = Limits(max_model_len=self.max_model_len, **{name: getattr(settings, name) for name in names})
        self._scheduler = Scheduler(pool, limits, self._runner.layout.groups)
        self._grammars = Grammars(tokenizer, self.vocab_size, self._eos_ids)
        self._speculation = speculation_of(settings, draft, self.vocab_size)
        self._is_async = self._runner.is_ahead and self._speculation is None
        self._tasks: dict[str, Task] = {}
        self._flight: Flight | None = None  # the step that has begun and was not read
        self._numbers = count()
        self._prompt_tokens = self._generation_tokens = self.last_step_tokens = 0

    @classmethod
    def open(
        cls, base: Path, adapter: Path | None, settings: EngineSpec, *, tell: Callable[[str], None] = lambda phase: None
    ) -> "Engine":
        """An engine over the model in `base`, with the adapter folded into its weights if one is given. `tell` hears what begins.

        Raises:
            UserError: something in the directories is missing, damaged or of another model.
        """
        loaded = load(base, adapter, settings, tell=tell)
        draft = load_draft(settings, loaded.tokenizer)
        tell("cache")
        return cls(loaded.model, loaded.tokenizer, loaded.chat, settings, defaults=loaded.defaults, base=loaded.base, draft=draft)

    @property
    def has_work(self) -> bool:
        return bool(self._tasks)

    @property
    def num_free_places(self) -> int:
        """How many more requests may wait. Any thread may ask."""
        return self._scheduler.limits.max_waiting - len(self._scheduler.waiting)

    @property
    def active_ids(self) -> list[str]:
        """Ids of the requests that wait or run."""
        return list(self._tasks)

    def overdue(self, seconds: float) -> list[str]:
        """Ids of the requests that have waited longer than this and never started."""
        now = time.monotonic()
        return [name for name, task in self._tasks.items() if task.started is None and now - task.arrived > seconds]

    def stats(self) -> Stats:
        scheduler, pool = self._scheduler, self._scheduler.pool
        return Stats(
            num_running=len(scheduler.running), num_waiting=len(scheduler.waiting),
            num_waiting_tokens=scheduler.num_waiting_tokens, num_pages=pool.num_pages, num_pages_used=pool.num_used,
            num_pages_cached=pool.num_cached, prompt_tokens=self._prompt_tokens, generation_tokens=self._generation_tokens,
            num_preemptions=scheduler.num_preemptions, prefix_queries=scheduler.prefix_queries, prefix_hits=scheduler.prefix_hits,
            draft_tokens=self._speculation.draft_tokens if self._speculation else 0,
            accepted_tokens=self._speculation.accepted_tokens if self._speculation else 0,
        )  # fmt: skip

    def check_books(self) -> None:
        """Assert that no page is lost, that every accepted request is waiting or running, and who uses which adapter."""
        self._scheduler.check_books()
        queued = {s.id for s in self._scheduler.running} | {s.id for s in self._scheduler.waiting}
        assert queued == set(self._tasks), f"accepted and scheduled requests differ: {queued ^ set(self._tasks)}"
        self._adapters.check_books(task.sequence.adapter for task in self._tasks.values())

    def encode(self, request: Request) -> tuple[int, ...]:
        """The prompt's token ids: a conversation rendered by the model's template, a text with the model's BOS, or the ids given.

        Control tokens spelled out in a text or a message stay text. A structure is compiled here if it is new, which can take seconds.

        Raises:
            UserError: the prompt is empty, has ids the model does not know, or is a conversation and there is no template.
        """
        ids = self._ids(request)
        if not ids:
            raise UserError("the prompt is empty", remedy="send at least one token")
        if request.structure is not None:
            self._grammars.start(request.structure, len(ids))
        wrong = next((i for i in ids if not 0 <= i < self._model_vocab), None)
        if wrong is not None:
            raise UserError(f"the model has no token {wrong}, only {self._model_vocab}", remedy="use ids of this model's tokenizer")
        return ids

    def submit(self, request: Request, on_token: OnToken | None = None) -> int:
        """Accept a request; `on_token` hears of every step that adds to its answer. Returns the number of prompt tokens.

        Raises:
            UserError: it cannot be encoded, can never fit, or its id is in use.
            QueueFull: too many requests or tokens wait.
        """
        if request.id in self._tasks:
            raise UserError(f"request {request.id!r} is already running", remedy="give every request an id of its own")
        tokens = list(self.encode(request))
        sampling = request.sampling
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed % 2**63
        limit = len(tokens) + (0 if request.wants_embedding else sampling.max_tokens)
        sequence = Sequence(request.id, tokens, len(tokens), limit, sampling, seed, reading=reading_of(request, len(tokens)))
        sequence.adapter, sequence.weight_version = self._adapters.named(request.adapter), self.weight_version
        sequence.root = self._root(request, sequence.adapter)
        sequence.rules = make_rules(sampling, tokens, stop_ids(sampling, self._eos_ids), self.tokenizer, self.vocab_size)
        if request.structure is not None:
            sequence.constraint = self._grammars.start(request.structure, len(tokens))
        self._scheduler.add(sequence, request.priority)
        self._adapters.take(sequence.adapter)
        answer = Answer(sequence, self.tokenizer, self._eos_ids, is_read=on_token is not None)
        self._tasks[request.id] = Task(request, sequence, answer, on_token, time.monotonic())
        return len(tokens)

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Compute one batch and hand out what it sampled. Returns the completions that ended; nothing to do is an empty list.

        With asynchronous scheduling the next batch is given to the device first, so that it works while the host reads, answers and
        plans: tokens it does not know yet it finds on the device. What it computes for a sequence that turns out to have ended is dropped.
        """
        try:
            flight, self._flight = self._flight or self._begin(), None
            if flight is None:
                return []
            if self._is_async and flight.can_be_followed:
                flight.stand_in(PENDING)
                self._flight = self._begin()
            chosen = flight.sampled.read() if flight.sampled else None
        except BaseException as error:
            self._fail_running(f"the step failed: {type(error).__name__}")
            raise
        self.last_step_tokens, made, guesses = flight.num_tokens, self._generation_tokens, [s.settle() for s in flight.ready]
        ended = [self._end_read(self._tasks[s.id]) for s in flight.was_read if s.state is not State.FINISHED]
        ended += self._absorb(flight.ready, guesses, chosen) if chosen else []
        if self._speculation is not None:
            self._speculation.settle(any(guesses), self._generation_tokens - made)
        if not self._tasks:
            self._flight = None
        return ended

    def abort(self, request_id: str) -> None:
        """End a request in whatever state it is; unknown and finished ids are ignored. Its pages are free when this returns."""
        task = self._tasks.get(request_id)
        if task is not None:
            self._end(task, "abort")

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that requests may ask for."""
        return tuple(adapter.name for adapter in self._adapters.loaded)

    def read_adapter(self, path: str | Path) -> Ready:
        """The long half of `load_adapter`, which touches nothing: any thread may call it.

        Raises:
            UserError: there is no adapter at `path`, or it does not fit this model.
        """
        return self._adapters.read(path, self.tokenizer, self.chat)

    def load_adapter(self, name: str, adapter: str | Path | Ready) -> None:
        """Let requests ask for the adapter in a directory, a run or a Hub repository, or for one that was read; what runs goes on.

        Raises:
            UserError: it cannot be read, does not fit this model, or the name or all slots are taken.
        """
        self._adapters.put(name, adapter if isinstance(adapter, Ready) else self.read_adapter(adapter))

    def unload_adapter(self, name: str) -> None:
        """Refuse new requests for an adapter; those that run or wait end with it, then its slot is free. A UserError if there is none."""
        self._adapters.unload(name)

    def update_weights(self, apply: Callable[[Model], None]) -> None:
        """Let `apply` change the model's weights in place, between two steps.

        Nothing that was cached matches any more. Requests that run go on with the new weights over the keys and values of the old;
        those that wait begin with the new ones. `Completion.weight_version` says with which a request began.
        """
        self.weight_version += 1
        self._scheduler.pool.forget()
        for task in self._tasks.values():
            if task.started is None:
                task.sequence.weight_version = self.weight_version
                task.sequence.root = self._root(task.request, task.sequence.adapter)
                self._scheduler.rekey(task.sequence)
        with torch.no_grad():
            apply(self._model)

    def generate(self, requests: Seq[Request]) -> list[Completion]:
        """Answer all requests, in their order. Failed ones have finish_reason "error"."""
        names = [f"generate-{next(self._numbers)}" for _ in requests]
        todo = deque(replace(request, id=name) for request, name in zip(requests, names, strict=True))
        done: dict[str, Completion] = {}
        try:
            while len(done) < len(names):
                self._feed(todo, done)
                done.update((completion.id, completion) for completion in self.step())
        finally:
            for name in names:
                self.abort(name)
        return [replace(done[name], id=request.id) for request, name in zip(requests, names, strict=True)]

    def _root(self, request: Request, adapter: Adapter | None) -> bytes:
        return root(self.weight_version, adapter.number if adapter else 0, request.cache_salt)

    def _ids(self, request: Request) -> tuple[int, ...]:
        prompt = request.prompt
        if isinstance(prompt, str):
            bos = (self.tokenizer.bos_id,) if self.tokenizer.adds_bos and self.tokenizer.bos_id is not None else ()
            return (*bos, *self.tokenizer.encode(prompt))
        messages = tuple(item for item in prompt if isinstance(item, Message))
        ids = tuple(item for item in prompt if isinstance(item, int))
        if not messages:
            return ids
        if self.chat is None:
            raise UserError("this model has no chat template", remedy="send a text or token ids, or serve a model that has one")
        return self.chat.render(messages, tools=request.tools, add_generation_prompt=True, thinking=request.thinking).ids

    def _feed(self, todo: deque[Request], done: dict[str, Completion]) -> None:
        waiting, most = self._scheduler.waiting, self._scheduler.limits.max_waiting
        while todo and len(waiting) < most:
            request = todo[0]
            try:
                self.submit(request)
            except QueueFull:
                return
            except UserError as error:
                done[request.id] = Completion(request.id, "", (), "error", 0, error=str(error))
            todo.popleft()

    def _begin(self) -> Flight | None:
        """Plan a step and give it to the device; None if there is nothing to compute."""
        drafted = self._guess()
        slices = self._scheduler.plan()
        if not slices:
            return None
        ready, now = [part.sequence for part in slices if part.is_last], time.monotonic()
        for sequence in drafted:
            if sequence.state is not State.RUNNING:  # no page was left for it
                sequence.settle()
        for part in slices:
            task = self._tasks[part.sequence.id]
            task.started = now if task.started is None else task.started
        rows = [(s, length) for s in ready for length in range(len(s.tokens) - s.num_drafts, len(s.tokens) + 1)]
        sampled, num_tokens = self._runner.step(slices, rows), sum(part.stop - part.start for part in slices)
        self._scheduler.computed(slices)
        return Flight(ready, [part.sequence for part in slices if part.is_end], sampled, num_tokens)

    def _absorb(self, ready: Seq[Sequence], guessed: Seq[list[int]], chosen: Chosen) -> list[Completion]:
        ended, now, first = list[Completion](), time.monotonic(), 0
        for sequence, guesses in zip(ready, guessed, strict=True):
            rows, first = range(first, first + len(guesses) + 1), first + len(guesses) + 1
            if sequence.state is State.FINISHED:  # who heard of another's token has ended it, or its own last token has
                continue
            task = self._tasks[sequence.id]
            if rows.start in chosen.faults:
                ended.append(self._end(task, "error", error=chosen.faults[rows.start]))
                continue
            if task.first_token is None:
                task.first_token = now
                self._prompt_tokens += sequence.num_prompt
            delta = task.add(rows, guesses, chosen)
            self._generation_tokens += delta.num_tokens
            if self._speculation is not None:
                self._speculation.draft_tokens += len(guesses)
                self._speculation.accepted_tokens += delta.num_tokens - 1
            if task.answer.finish_reason is not None:
                ended.append(self._end(task, task.answer.finish_reason, last=delta))
            elif task.on_token is not None:
                task.on_token(delta)
        return ended

    def _guess(self) -> list[Sequence]:
        if self._speculation is None:
            return []
        self._speculation.guess(self._scheduler.running, self._scheduler.limits.max_num_batched_tokens)
        return [s for s in self._scheduler.running if s.num_drafts]

    def _end_read(self, task: Task) -> Completion:
        """A prompt that was only read is done."""
        task.first_token = time.monotonic()
        self._prompt_tokens += task.sequence.num_prompt
        return self._end(task, "stop" if task.request.wants_embedding else "length")

    def _fail_running(self, why: str) -> None:
        self._flight = None
        running = [s.id for s in self._scheduler.running]
        self._scheduler.pool.forget()
        for name in running:
            self._end(self._tasks[name], "error", error=why)
        for task in self._tasks.values():  # what was taken back while its token was being sampled waits without it
            task.sequence.settle()

    def _end(self, task: Task, reason: FinishReason, *, error: str = "", last: Delta | None = None) -> Completion:
        """Take a task out, give its pages back and tell its reader."""
        sequence = task.sequence
        del self._tasks[sequence.id]
        sequence.settle()
        self._scheduler.finish(sequence)
        self._adapters.give_back(sequence.adapter)
        return task.end(reason, error, last)
