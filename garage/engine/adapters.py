"""Adapters over the engine's one copy of the base: loaded and unloaded while requests run.

Loading has two halves. `read` takes the files and checks them, which takes long and touches nothing, so any thread may do it; `put`
lets the engine have them, between two steps. A name that is unloaded is refused to new requests at once; its slot is free when the last
request that began with it has ended. Under the same name another adapter may be loaded meanwhile: every load has a number of its own,
which is part of the prefix cache's keys, so nothing of the one before is found there.

An adapter speaks as its base does: one that was trained with another chat template or tokenizer is refused.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from garage.core.artifact import stated
from garage.core.errors import UserError
from garage.engine.loading import check_template, has_template
from garage.models.layers import Model
from garage.models.many import Many, Update
from garage.specs.serve import EngineSpec
from garage.store.fingerprint import check_base
from garage.store.locate import locate_adapter
from garage.tokens.chat import Chat
from garage.tokens.tokenizer import Tokenizer


@dataclass(eq=False, slots=True)
class Adapter:
    """One load of an adapter; `number` is never given twice."""

    name: str
    path: Path
    slot: int
    number: int
    num_users: int = 0


@dataclass(frozen=True)
class Ready:
    """An adapter that was read and fits."""

    path: Path
    updates: Mapping[str, Update]


class Adapters:
    """Which adapters are loaded, and who uses them. `base` is the directory of the model, None if it is not from one."""

    def __init__(self, model: Model, settings: EngineSpec, base: Path | None) -> None:
        sizes = {"max_loras": settings.max_loras, "max_lora_rank": settings.max_lora_rank}
        self.many = Many(model, **sizes) if settings.enable_lora else None
        self._base = base
        self._numbers = count(1)
        self._loaded: dict[str, Adapter] = {}

    @property
    def loaded(self) -> tuple[Adapter, ...]:
        """Those that take requests, in the order they were loaded."""
        return tuple(self._loaded.values())

    def read(self, path: str | Path, tokenizer: Tokenizer, chat: Chat | None) -> Ready:
        """The adapter at `path`: a directory, a run, or a Hub id. Any thread may call it.

        Raises:
            UserError: there is none, its files are damaged, it is of another base, or it speaks another way.
        """
        many, place = self._takes_adapters(), locate_adapter(str(path))
        alone = f"serve it alone: garage serve {place}"
        if self._base is not None:
            check_base(place, self._base)
        check_template(place, chat)
        theirs = Chat.load(place, tokenizer).hash if has_template(place) else ""
        if theirs and (chat is None or chat.hash != theirs):
            raise UserError(f"{place} has another chat template than the base; it would answer badly", remedy=alone)
        if stated(place, "tokenizer_hash") not in ("", tokenizer.hash):
            raise UserError(f"{place} was trained with another tokenizer than the base's", remedy=alone)
        return Ready(place, many.read(place))

    def put(self, name: str, ready: Ready) -> None:
        """Let requests have what was read under `name`.

        Raises:
            UserError: the name is taken, or all slots are.
        """
        if not name or name in self._loaded:
            raise UserError(f"there is an adapter {name!r} already", remedy="unload it first, or choose another name")
        slot = self._takes_adapters().add(ready.updates)
        self._loaded[name] = Adapter(name, ready.path, slot, next(self._numbers))

    def unload(self, name: str) -> None:
        """Refuse new requests for it; those it has go on.

        Raises:
            UserError: there is no such adapter.
        """
        adapter = self.named(name)
        if adapter is None:
            raise UserError("the base is no adapter", remedy="name the adapter to unload")
        del self._loaded[name]
        self._free_if_idle(adapter)

    def named(self, name: str) -> Adapter | None:
        """The adapter a request asks for; none for the empty name, the base. A UserError if there is no such adapter."""
        if name and name not in self._loaded:
            raise UserError(f"there is no adapter {name!r}", remedy=f"load it first; loaded: {', '.join(self._loaded) or 'none'}")
        return self._loaded[name] if name else None

    def take(self, adapter: Adapter | None) -> None:
        """A request holds it from now on."""
        if adapter is not None:
            adapter.num_users += 1

    def give_back(self, adapter: Adapter | None) -> None:
        """A request that held it has ended."""
        if adapter is not None:
            adapter.num_users -= 1
            self._free_if_idle(adapter)

    def check_books(self, held: Iterable[Adapter | None]) -> None:
        """Assert that every adapter has the users it counts, and that no slot is lost."""
        users = Counter(adapter for adapter in held if adapter is not None)
        known = {*users, *self._loaded.values()}
        wrong = [adapter for adapter in known if adapter.num_users != users[adapter]]
        assert not wrong, f"users of adapters are miscounted: {wrong}"
        slots = sorted(adapter.slot for adapter in known)
        assert self.many is None or slots == self.many.taken, f"slots in use are {self.many.taken}, adapters hold {slots}"

    def _free_if_idle(self, adapter: Adapter) -> None:
        if not adapter.num_users and self._loaded.get(adapter.name) is not adapter:
            self._takes_adapters().remove(adapter.slot)

    def _takes_adapters(self) -> Many:
        if self.many is None:
            raise UserError("this engine takes no adapters", remedy="start it with --enable-lora (engine.enable_lora true)")
        return self.many
