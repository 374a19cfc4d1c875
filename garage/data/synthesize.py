"""The extractive teacher: facts that documents state, asked in several ways, no model needed.

A fact is a subject, an attribute and a value, found where documents state facts plainly: tables, key/value lines, JSON paths,
numbered steps and lists under headings, questions answered in place, and a few certain sentence forms ("X is a ...", "The A of B is
C", "B costs C", "B must C within D"). Each fact becomes rows in several phrasings (`phrasings`); one phrasing per fact is kept for
the test split and never trained on, so that the test asks known facts in new words. The answer is the value, quoted letter by letter.

Precision comes before recall. A value that is long, a subject that is a pronoun, a fact that the corpus states twice with different
values: all are left out and counted by reason. Limits: English sentences, one line per fact; it finds what is stated and infers nothing.
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from garage.core.seeds import derive
from garage.core.types import Message, Row
from garage.data import phrasings
from garage.store.corpus import Chunk

EVAL_EVERY = 4
MAX_VALUE, MAX_SUBJECT, MAX_ATTRIBUTE, MAX_DEFINITION = 80, 60, 40, 120

_RULE = re.compile(r"^\|?[\s:|-]*-{3,}[\s:|-]*$")
_PAIR = re.compile(r"^(?:[-*•] )?(?:\*\*)?(?P<key>[^\W\d_][^:|*\n]{0,60}?)(?:\*\*)?:(?:\*\*)?[ \t]+(?P<value>\S.*?)\.?[ \t]*$")
_PATH = re.compile(r"^(?P<parent>(?:[\w-]+(?:\[\d+\])*\.)*)(?P<key>[\w-]+)(?::| =)[ \t]+(?P<value>\S.*?)[ \t]*$")
_STEP = re.compile(r"^(?P<number>\d{1,2})[.)] +(?P<value>\S.*?)\.?[ \t]*$")
_BLOCK = re.compile(r"\d{1,2}[.)] [^\n]+(?:\n+\d{1,2}[.)] [^\n]+)+|[^\n]+(?:\n[^\n]+)*")
_BULLET = re.compile(r"^[-*•] +\S")
_HEADING = re.compile(r"^(?P<depth>#{1,6}) +(?P<title>.+?)[ \t]*#*$|^(?:\*\*)?(?:Q: ?)?(?P<question>[A-Z][^?\n*]{8,110}\?)(?:\*\*)?$")
_SENTENCE = re.compile(r"[^\s.!?](?:[^.!?\n]|\.(?=\S)|\n(?!\n))*[.!?](?=\s|$)")
_JUNK_VALUE = re.compile(
    r"^(?:[-–—.?*/ ]+|n/?a|none|null|tbd|yes|no|true|false|see .*|in (?:table|figure|section) .*)$|https?://|[{}<>\\|]|\[\^?\d+\]",
    re.IGNORECASE)
_JUNK_KEY = re.compile(
    r"^(?:notes?|examples?|tips?|warnings?|see|figure.*|table.*|sources?|https?|page.*|e\.g|i\.e|etc|version|copyright|important|remember|"
    r".*(?:\d|\. |, ).*|.* (?:that|the) .*|(?:for|and|but|if|when|the following) .*|"
    r".*\b(?:is|are|was|were|has|have|can|will|must|should|following|follows|includes?)\b.*)$", re.IGNORECASE)
_JUNK_SUBJECT = re.compile(
    r"^(?:it|this|that|these|those|there|here|he|she|they|we|you|i|one|what|which|who|such|another|some|most|many|both|its|their|his|her|"
    r"nothing|everything|everyone|no|not|but|and|so|if|when|while|then|for|in|on|at|as|however|also)\b|"
    r"[?!;:,|{}<>=]|^(?:total|sum|average|mean|references|bibliography|[\W\d]*)$", re.IGNORECASE)
_JUNK_TERM = re.compile(
    r"^(?:(?:the |our )?(?:first|second|third|main|next|last|other|only|best|same|following)\b.*|"
    r"the .*\b(?:reason|problem|result|goal|aim|idea|point|question|answer|purpose|difference|way|thing|part|example|case|fact|rest)s?)$",
    re.IGNORECASE)
_GENERAL = re.compile(
    r"^(?:[\d.]+ )?(?:contacts?|overview|details|summary|general|information|introduction|specifications?|technical data|facts|at a glance|"
    r"notes|data|contents|appendix|about|about us|key facts|key figures|profile|basics|items?|entries|values?|results?|root|faq|"
    r"frequently asked questions)$", re.IGNORECASE)
_VALUE_COLUMN = re.compile(r"^(?:value|details?|data|entry|information)$", re.IGNORECASE)
_MEANING = re.compile(r"^(?:description|meaning|definition|explanation|what it is)$", re.IGNORECASE)
_ARTICLE = re.compile(r"^(?:the|an?|our) ")
_NAME_KEYS = ("name", "title", "model", "product", "item", "service", "id")
_GLOSSARY = re.compile(r"\b(?:glossary|terms|definitions|vocabulary|abbreviations|words)\b", re.IGNORECASE)

_S = r"^(?P<subject>(?:(?:The|An?|Our|Every|Each|All) )?[A-Z0-9a-z][^,;:.?!]{1,50}?)"
_TIME = r"(?:about |around |up to |at least )?[\w.]+(?: to \w+)? (?:second|minute|hour|day|week|month|year)s?"
_WHERE = "(?:in|at|on|behind|beside|under|next to|near|opposite)"
_BEFORE = r"(?:within|before|no later than|by(?= \d| noon| [A-Z]| the))"
_SENTENCES: tuple[tuple[str, str, re.Pattern[str]], ...] = tuple((shape, attribute, re.compile(pattern)) for shape, attribute, pattern in (
    # shape ("" = by name and value), attribute ("" = the group of that name), form
    ("", "", rf"^(?:The|Our|Its) (?P<attribute>[a-z][a-z -]{{2,38}}?) (?:of|for) {_S[1:]} (?:is|are) (?P<value>[^;]{{1,80}})\.$"),
    ("price", "price", rf"{_S} costs? (?P<value>(?:(?:only|about) )?(?:[$€£] ?)?\d[^;,]{{0,40}})\.$"),
    ("weight", "weight", rf"{_S} weighs? (?P<value>[^;,]{{1,30}})\.$"),
    ("span", "duration", rf"{_S} (?:takes?|lasts?) (?P<value>{_TIME})\.$"),
    ("year", "", rf"{_S} (?:was|were) (?P<attribute>founded|built|opened|established) in (?P<value>(?:[A-Z][a-z]+ )?\d{{4}})\b.*\."),
    ("place", "location", rf"{_S} (?:is|are) (?:located|based|kept|found|stored|parked) (?P<value>{_WHERE} [^;]{{3,60}})\.$"),
    ("deadline", "", rf"{_S} must (?P<attribute>[a-z][a-z' -]{{2,60}}?) (?P<value>{_BEFORE} [^;,]{{2,40}})\.$"),
    ("often", "", rf"{_S} (?P<attribute>(?:is|are|must be) [a-z]+(?:ed|en|n)) (?P<value>(?:every|once|twice|each) [^;,]{{2,40}})\.$"),
    ("definition", "", rf"{_S} (?:is|are) (?P<value>(?:an?|the) [^;]{{8,{MAX_DEFINITION}}})\.$"),
))


@dataclass(frozen=True)
class Fact:
    """What a chunk states: `value` is `chunk.text[start:end]`, `support` the line or sentence that states it, `shape` how to ask for it."""

    subject: str
    attribute: str
    value: str
    shape: str
    support: str
    chunk: str
    document: str
    start: int
    end: int


@dataclass(frozen=True)
class Synthesis:
    """Rows made and not made. `missing` training rows were asked for and are not supported; `rejected` counts candidates by reason."""

    train: tuple[Row, ...]
    eval: tuple[Row, ...]
    test: tuple[Row, ...]
    facts: int
    missing: int
    rejected: Mapping[str, int]


def synthesize(chunks: Iterable[Chunk], *, rows: int | None, test_rows: int | None = None, seed: int) -> Synthesis:
    """Question/answer rows of all facts: `rows` for training and `test_rows` for testing (None = all that there are).

    One phrasing of each fact is kept for `test` and one of every fourth for `eval`; whatever they ask is also trained, in other words. Few
    rows take facts from every document in turn.
    """
    chunks = list(chunks)
    rejected: Counter[str] = Counter()
    kept = _unambiguous(facts(chunks, rejected=rejected), rejected)
    words, seen, asked = phrasings.Words.of(chunk.text for chunk in chunks), set[str](), []
    for fact in _in_turns(kept):
        texts = [q for q in phrasings.questions(fact.shape, fact.subject, fact.attribute, words=words) if q not in seen]
        seen.update(texts)
        random.Random(derive(seed, fact.chunk, fact.subject, fact.attribute)).shuffle(texts)
        if len(texts) < 2:
            rejected["asked already"] += 1
        else:
            asked.append((fact, texts))
    train, held, test = list[Row](), list[Row](), list[Row]()
    for number, (fact, texts) in enumerate(asked):
        made = [_row(fact, text, phrasing) for phrasing, text in enumerate(texts)]
        kept_back = 2 if number % EVAL_EVERY == 0 and len(texts) > 2 else 1
        test.extend(made[:1])
        held.extend(made[1:kept_back])
        train.extend(made[kept_back:])
    train = sorted(train, key=lambda row: int(row.meta["phrasing"]))[:rows]
    trained = {(row.meta["subject"], row.meta["attribute"]) for row in train}
    held, test = ([row for row in side if (row.meta["subject"], row.meta["attribute"]) in trained] for side in (held, test))
    missing = max(0, (rows or 0) - len(train))
    return Synthesis(tuple(train), tuple(held), tuple(test[:test_rows]), len(asked), missing, dict(sorted(rejected.items())))


def facts(chunks: Iterable[Chunk], *, rejected: Counter[str] | None = None) -> Iterator[Fact]:
    """Every fact that a chunk states in a form known here, in reading order; `rejected` counts the candidates left out."""
    lost = Counter[str]() if rejected is None else rejected
    for chunk in chunks:
        for found in _candidates(chunk):
            reason = _fault(found)
            if reason:
                lost[reason] += 1
            else:
                yield found


def _row(fact: Fact, question: str, phrasing: int) -> Row:
    meta = {"subject": fact.subject, "attribute": fact.attribute, "kind": fact.shape, "support": fact.support, "chunk": fact.chunk,
            "start": str(fact.start), "end": str(fact.end), "phrasing": str(phrasing), "teacher": "extractive"}
    messages = (Message("user", question), Message("assistant", fact.value))
    return Row(f"{fact.chunk}-{derive(0, fact.subject, fact.attribute, question):016x}", messages, source=fact.document, meta=meta)


def _unambiguous(found: Iterable[Fact], rejected: Counter[str]) -> list[Fact]:
    """One fact for each subject and attribute; none where the corpus gives two different values."""
    groups: dict[tuple[str, str], list[Fact]] = defaultdict(list)
    for fact in found:
        groups[_ARTICLE.sub("", fact.subject.lower()), fact.attribute.lower()].append(fact)
    kept = []
    for group in groups.values():
        if len({fact.value.lower() for fact in group}) > 1:
            rejected["two different values"] += len(group)
        else:
            kept.append(group[0])
            rejected["stated twice"] += len(group) - 1
    return kept


def _in_turns(found: Sequence[Fact]) -> list[Fact]:
    """One fact of every document in turn, so that a small number of rows covers all documents."""
    places: Counter[str] = Counter()
    order: list[tuple[int, int, Fact]] = []
    for fact in found:
        order.append((places[fact.document], len(order), fact))
        places[fact.document] += 1
    return [fact for _, _, fact in sorted(order, key=lambda item: item[:2])]


def _fault(fact: Fact) -> str:
    """Why a candidate is not worth asking, or nothing."""
    is_text, is_free = fact.shape in ("definition", "list", "faq", "step"), fact.shape in ("often", "deadline", "step")
    if not 1 <= len(fact.value) <= (MAX_DEFINITION if is_text else MAX_VALUE) or ("\n" in fact.value and fact.shape != "list"):
        return "value too long"
    if not any(c.isalnum() for c in fact.value) or (fact.shape not in ("faq", "list") and _JUNK_VALUE.search(fact.value)):
        return "value says nothing"
    if fact.shape == "faq":
        return ""
    if not 2 <= len(fact.subject) <= MAX_SUBJECT or len(fact.subject.split()) > 8 or _JUNK_SUBJECT.search(fact.subject):
        return "no clear subject"
    if fact.shape == "definition" and _JUNK_TERM.match(fact.subject):
        return "no clear subject"
    is_long = len(fact.attribute) > MAX_ATTRIBUTE + 20 * is_free or len(fact.attribute.split()) > 8
    if is_long or (not is_free and _JUNK_KEY.match(fact.attribute)):
        return "no clear attribute"
    return ""


@dataclass(frozen=True)
class _Place:
    """A block of lines of a chunk: where it starts, the headings above it, and whether it is the first below the last one."""

    chunk: Chunk
    start: int
    lines: Sequence[str]
    headings: Sequence[str]
    is_first: bool

    @property
    def heading(self) -> str:
        return self.headings[-1] if self.headings else ""

    @property
    def topic(self) -> str:
        """What key/value lines here are about: the nearest heading that is more than "Contact" or "Overview"."""
        return next((h for h in reversed(self.headings) if not _GENERAL.match(h)), "")

    def each(self) -> Iterator[tuple[int, str]]:
        """Offset in the chunk and text of each line."""
        offset = self.start
        for line in self.lines:
            yield offset, line
            offset += len(line) + 1

    def fact(self, subject: str, attribute: str, value: str, start: int, *, support: str, shape: str = "") -> Fact:
        subject, attribute = subject.strip(" *_`#"), attribute.strip(" *_`#")
        shape = shape or phrasings.shape_of(subject, attribute, value)
        return Fact(subject, attribute, value, shape, support.strip(), self.chunk.id, self.chunk.document, start, start + len(value))


def _candidates(chunk: Chunk) -> Iterator[Fact]:
    """Facts of one chunk, block by block: by the first line form that fits the block, else sentence by sentence."""
    for place in _places(chunk):
        for reader in (_table, _paths, _steps, _pairs, _answer, _bullets, _sentences):
            found = list(reader(place))
            if found:
                yield from found
                break


def _places(chunk: Chunk) -> Iterator[_Place]:
    """The chunk's blocks, parted by empty lines (numbered lines stay together), with the headings that hold there."""
    headings, is_first = list(chunk.headings), True
    for match in _BLOCK.finditer(chunk.text):
        start, lines = match.start(), match.group().split("\n")
        while lines and (found := _HEADING.match(lines[0])):
            headings = _below(headings, found)
            start, lines, is_first = start + len(lines[0]) + 1, lines[1:], True
        if lines:
            yield _Place(chunk, start, lines, tuple(headings), is_first)
            is_first = False


def _below(headings: Sequence[str], found: re.Match[str]) -> list[str]:
    """The path of headings once `found` is read; a heading that the chunk's own path already has is not repeated."""
    title, depth = (found["title"] or found["question"]).strip(" *"), len(found["depth"] or "#" * 6)
    above = list(headings)[: depth - 1]
    return [*above[: above.index(title)], title] if title in above else [*above, title]


def _table(place: _Place) -> Iterator[Fact]:
    """Cells of a markdown table: the first column names the subject, the header the attribute."""
    if len(place.lines) < 3 or "|" not in place.lines[0] or not _RULE.match(place.lines[1]):
        return
    header, *rows = [_cells(offset, line) for offset, line in place.each()]
    for cells, line in zip(rows[1:], place.lines[2:], strict=True):
        for (name, _), (value, start) in list(zip(header, cells, strict=False))[1:] if len(cells) == len(header) else []:
            if _VALUE_COLUMN.match(name) and len(header) == 2:
                yield place.fact(place.topic, cells[0][0], value, start, support=line)
            elif any(c.isalpha() for c in name):
                yield place.fact(cells[0][0], name, value, start, support=line, shape="definition" if _MEANING.match(name) else "")


def _cells(offset: int, line: str) -> list[tuple[str, int]]:
    """Text and offset of each cell of a table line."""
    inner = re.sub(r"^\s*\||\|\s*$", lambda m: " " * len(m.group()), line)
    return [(m.group().strip(), offset + m.start() + len(m.group()) - len(m.group().lstrip())) for m in re.finditer(r"[^|]+", inner)]


def _paths(place: _Place) -> Iterator[Fact]:
    """Leaves of a JSON document as `a.b[0].c: value`; the subject is the name beside the leaf, or else the object that holds it."""
    leaves = [(offset, line, match) for offset, line in place.each() if (match := _PATH.match(line))]
    if len(leaves) < len(place.lines) or not any(match["parent"] or "_" in match["key"] for _, _, match in leaves):
        return
    names: dict[str, str] = {}
    for key in reversed(_NAME_KEYS):
        names.update({match["parent"]: match["value"] for _, _, match in leaves if match["key"].lower() == key})
    for offset, line, match in leaves:
        holder = re.sub(r"[\[\]\d]+", "", match["parent"].rstrip(".").rpartition(".")[2]).replace("_", " ")
        subject = names.get(match["parent"], holder or place.topic)
        if match["value"] != subject:
            yield place.fact(subject, match["key"].replace("_", " "), match["value"], offset + match.start("value"), support=line)


def _pairs(place: _Place) -> Iterator[Fact]:
    """Lines "Key: value" below a heading that says what they are about."""
    for offset, line in place.each():
        match = _PAIR.match(line)
        if not match:
            continue
        key, value, start = match["key"], match["value"], offset + match.start("value")
        if phrasings.WEEKDAYS.match(key):
            yield place.fact(key, place.heading, value, start, support=line)
        elif _GLOSSARY.search(place.heading):
            yield place.fact(key, "meaning", value, start, support=line, shape="definition")
        else:
            yield place.fact(place.topic, key, value, start, support=line)


def _steps(place: _Place) -> Iterator[Fact]:
    """Numbered lines below a heading."""
    steps = [(offset, line, match) for offset, line in place.each() if (match := _STEP.match(line))]
    if len(steps) < 2 or not place.heading or place.heading.endswith("?"):
        return
    for offset, line, match in steps:
        start = offset + match.start("value")
        yield place.fact(place.heading, f"step {match['number']}", match["value"], start, support=line, shape="step")


def _bullets(place: _Place) -> Iterator[Fact]:
    """A short list below a heading, quoted whole."""
    text = "\n".join(place.lines)
    is_short = 2 <= len(place.lines) <= 6 and all(_BULLET.match(line) for line in place.lines)
    if is_short and place.heading and not place.heading.endswith("?"):
        yield place.fact(place.heading, "points", text.rstrip(), place.start, support=text, shape="list")


def _answer(place: _Place) -> Iterator[Fact]:
    """The first sentence below a heading that is a question."""
    text = re.sub(r"^A: ?", "", "\n".join(place.lines))
    match = _SENTENCE.match(text)
    if place.is_first and place.heading.endswith("?") and match and not _BULLET.match(text):
        start = place.start + len("\n".join(place.lines)) - len(text)
        yield place.fact(place.heading, "answer", match.group(), start, support=match.group(), shape="faq")


def _sentences(place: _Place) -> Iterator[Fact]:
    """Sentences of certain forms in running text."""
    text = "\n".join(place.lines)
    for sentence in _SENTENCE.finditer(text):
        for shape, attribute, pattern in _SENTENCES:
            match = pattern.match(sentence.group())
            if match:
                stated = attribute or (match.group("attribute") if "attribute" in pattern.groupindex else "meaning")
                stated = stated.replace(" ", "|", 1) if shape == "often" else stated
                start = place.start + sentence.start() + match.start("value")
                yield place.fact(match["subject"], stated, match["value"], start, support=sentence.group(), shape=shape)
                break
