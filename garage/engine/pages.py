"""The pages of the key/value cache: who holds which, and which old ones can be used again.

A page is room for `page_size` tokens in every layer. Each page is in exactly one of three states:

    free      no reader, no content worth keeping
    used      one or more sequences hold it (`refs` counts them)
    cached    no reader, but its content is a full page of a known prefix; taken back when nothing is free, oldest first

Content is found by a chain of hashes (128 bits of BLAKE2b): the key of a page covers its own tokens and, through its parent's
key, everything before it, so equal keys mean equal prefixes and positions. Only full pages have keys. The chain starts from a root
that covers what else the content depends on, and who may know of it: the weights, the adapter, the tenant's salt.

A key may be entered when the step that writes the page is planned: every layer writes the step's keys and values before it reads
any, so a second sequence can share the page in the same step. If that step fails, `forget` must be called.
"""

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


def root(*parts: str | int) -> bytes:
    """Where the chains of all prompts begin that may share pages."""
    return hashlib.blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full page that holds `tokens` after the prefix whose last page has the key `parent` (the root at the start)."""
    return hashlib.blake2b(parent + array("i", tokens).tobytes(), digest_size=16).digest()


class PagePool:
    """Books of `num_pages` pages. With `keep` False nothing is cached."""

    def __init__(self, num_pages: int, page_size: int, *, keep: bool = True) -> None:
        self.num_pages, self.page_size, self.keep = num_pages, page_size, keep
        self._free = list(range(num_pages - 1, -1, -1))
        self._refs = [0] * num_pages
        self._key_of: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Pages that `allocate` could hand out now."""
        return len(self._free) + len(self._idle)

    @property
    def num_cached(self) -> int:
        return len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_available

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Pages of the longest known prefix of `keys`. They may vanish unless `share` takes them."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Become one more reader of pages that `find` returned."""
        for page in pages:
            if self._refs[page] == 0:
                del self._idle[page]
            self._refs[page] += 1

    def allocate(self, count: int) -> list[int]:
        """`count` pages of one's own; free ones first, then the cached ones that were used longest ago."""
        assert count <= self.num_available, f"{count} pages asked, {self.num_available} available"
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._refs[page] = 1
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Stop reading `pages`, given in the order of the sequence: later ones are evicted first, for they need the earlier."""
        for page in reversed(pages):
            assert self._refs[page] > 0, f"page {page} is released but nobody holds it"
            self._refs[page] -= 1
            if self._refs[page] == 0:
                self._put_back(page)

    def enter(self, page: int, key: bytes) -> None:
        """Make a full page findable. A second page with the same content stays private."""
        if self.keep and key not in self._page_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def forget(self) -> None:
        """Drop every key: the content of the pages is not to be trusted."""
        self._page_of.clear()
        self._key_of = [None] * self.num_pages
        self._free += self._idle
        self._idle.clear()

    def check_books(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert that free + used + cached = all and that the references are those of `tables`, the pages of every live sequence."""
        held = Counter(page for table in tables for page in table)
        wrong = {page: (refs, held[page]) for page, refs in enumerate(self._refs) if refs != held[page]}
        assert not wrong, f"references counted and held differ, page: (counted, held) {wrong}"
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free), f"a page is free twice: {sorted(self._free)}"
        assert not free & idle, f"pages both free and cached: {sorted(free & idle)}"
        assert not (free | idle) & set(held), f"pages held and given back: {sorted((free | idle) & set(held))}"
        lost = set(range(self.num_pages)) - free - idle - set(held)
        assert not lost, f"leaked pages, neither free nor used nor cached: {sorted(lost)}"
        keyed = {page: key for page, key in enumerate(self._key_of) if key is not None}
        assert {key: page for page, key in keyed.items()} == self._page_of, "keys and pages of the prefix cache differ"
        assert idle <= set(keyed), f"cached pages that nobody can find: {sorted(idle - set(keyed))}"
        assert not free & set(keyed), f"free pages with a key: {sorted(free & set(keyed))}"

    def _put_back(self, page: int) -> None:
        if self._key_of[page] is None:
            self._free.append(page)
        else:
            self._idle[page] = None

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        key = self._key_of[page]
        assert key is not None, f"cached page {page} has no key"
        del self._page_of[key]
        self._key_of[page] = None
        return page
