"""Many natural ways to ask for one fact.

A fact is (subject, attribute, value). What a person would ask depends on what the value is: a price is asked with "how much", an
address with "where", a person with "who". `shape_of` decides that, `questions` fills the frames of the shape. Every shape has at
least eight frames, so that some can be kept for the test split and still leave several to learn from. No frame mentions "the text"
or "the passage": a question stands alone.

Limits: English only. Where nothing about the value is certain the shape is `plain`, whose frames fit any attribute: a dull question
is better than a wrong one.
"""

import re
from collections.abc import Set

MONEY = re.compile(r"(?:[$€£]\s?\d|\d[\d.,]*\s?(?:EUR|USD|GBP|CHF|euros?|dollars?|pounds?|cents?|[€$£])(?![a-z]))")
DURATION = re.compile(r"^(?:about |around |up to |at least )?(?:[\d.,]+|an?|one|two|three|four|five|six|seven|eight|nine|ten)(?: to [\d.,]+)?[ -]"
                      r"(?:second|minute|hour|day|night|week|month|year)s?(?: \w+)?$")
PERSON = re.compile(r"^(?:(?:Dr|Mr|Ms|Mrs|Prof)\.? )?[A-Z][a-z'’-]+(?: [A-Z]\.?)?(?: (?:van|de|von|da|el) )? ?[A-Z][a-z'’-]+(?: ?[A-Z][a-z'’-]+)?$")
DETERMINED = re.compile(r"^(?:the|a|an|our|your|my|its|all|each|every|any|this|that|these|those|\d)\b", re.IGNORECASE)
WEEKDAYS = re.compile(r"^(?:mon|tues|wednes|thurs|fri|satur|sun)days?\b|^weekdays$|^weekends?$|^(?:public |bank )?holidays$", re.IGNORECASE)
SINGULAR_S = ("ss", "us", "is", "ics", "news", "series", "lens", "gas")
ROLES = re.compile(r"\b(?:manager|owner|mechanic|contact|author|founder|director|head|chair|lead|leader|trainer|teacher|officer|coordinator|mayor|"
                   r"president|editor|captain|chef|curator|librarian|warden|secretary|treasurer|supervisor|person|responsible|host|keeper|guide)\b", re.IGNORECASE)

FRAMES: dict[str, tuple[str, ...]] = {
    "plain": ("What {is} the {a} {of} {s}{u}?", "Tell me the {a} {of} {s}{u}.", "Please give the {a} {of} {s}{u}.", "I need the {a} {of} {s}{u}.",
              "Do you know the {a} {of} {s}{u}?", "Could you look up the {a} {of} {s}{u}?", "{S}: what {is} the {a}{u}?", "What {is} listed as the {a} {of} {s}{u}?",
              "Can you tell me what the {a} {of} {s} {is}{u}?", "I would like to know the {a} {of} {s}{u}."),
    "price": ("How much {do} {s} cost{q}{u}?", "What {do} {s} cost{q}{u}?", "What is the price of {s}{q}{u}?", "Tell me the price of {s}{q}{u}.",
              "How much do I pay for {s}{q}{u}?", "What do you charge for {s}{q}{u}?", "How much money do I need for {s}{q}{u}?", "What will I have to pay for {s}{q}{u}?",
              "I am interested in {s}. What is the price{q}{u}?", "Can you tell me what {s} {cost}{q}{u}?"),
    "amount": ("How much is the {a} {of} {s}?", "What is the {a} {of} {s}?", "Tell me the {a} {of} {s}.", "How high is the {a} {of} {s}?",
               "What {a} do I pay {for} {s}?", "Which amount is due as the {a} {of} {s}?", "Can you tell me how much the {a} {of} {s} is?", "{S}: how much is the {a}?",
               "I would like to know the {a} {of} {s}."),
    "hours": ("When is {s} open?", "What are the opening hours of {s}?", "At what times is {s} open?", "Tell me the opening hours of {s}.",
              "When can I visit {s}?", "During which hours is {s} open?", "I want to come to {s}. When is it open?", "Can you tell me when {s} is open?"),
    "span": ("How long {do} {s} take?", "How much time {do} {s} take?", "What is the duration of {s}?", "Tell me how long {s} {take}.",
             "How long should I plan for {s}?", "How much time should I allow for {s}?", "How much time is needed for {s}?", "Can you tell me how long {s} {take}?"),
    "length": ("How long is the {a} {of} {s}?", "What is the {a} {of} {s}?", "Tell me the {a} {of} {s}.", "Can you tell me how long the {a} {of} {s} is?",
               "{S}: how long is the {a}?", "I would like to know how long the {a} {of} {s} is.", "How many days, weeks or years is the {a} {of} {s}?",
               "Please give the {a} {of} {s}."),
    "weight": ("How much {do} {s} weigh{u}?", "What is the weight of {s}{u}?", "How heavy {are} {s}{u}?", "Tell me the weight of {s}{u}.", "What {do} {s} weigh{u}?",
               "Can you tell me how heavy {s} {are}{u}?", "I need the weight of {s}{u}.", "Please give the weight of {s}{u}."),
    "place": ("Where {are} {s}?", "What is the {a} of {s}?", "Where can I find {s}?", "Tell me where {s} {are}.", "In which place {are} {s}?",
              "How do I find {s}?", "Can you tell me where to find {s}?", "I am looking for {s}. Where do I go?"),
    "phone": ("What is the phone number of {s}?", "Which number do I call to reach {s}?", "How can I reach {s} by phone?", "Tell me the phone number of {s}.",
              "Under which number can I call {s}?", "I want to call {s}. What is the number?", "Give me the telephone number of {s}.", "What number do I dial for {s}?"),
    "email": ("What is the email address of {s}?", "Where can I write an email to {s}?", "How can I reach {s} by email?", "Tell me the email address of {s}.",
              "To which address do I send an email for {s}?", "I want to write to {s}. What is the email address?", "Give me the email of {s}.", "Which email address belongs to {s}?"),
    "person": ("Who is the {a} {of} {s}?", "What is the name of the {a} {of} {s}?", "Tell me who the {a} {of} {s} is.", "Which person is the {a} {of} {s}?",
               "Do you know who the {a} {of} {s} is?", "I am looking for the {a} {of} {s}. Who is it?", "Can you name the {a} {of} {s}?", "{S}: who is the {a}?"),
    "holder": ("Who is {s}?", "What is the name of {s}?", "Tell me who {s} is.", "Which person is {s}?", "Do you know who {s} is?", "I am looking for {s}. Who is it?",
               "Can you name {s}?", "Who works as {s}?"),
    "role": ("What is the {a} of {s}?", "What does {s} do?", "Which {a} does {s} have?", "Tell me the {a} of {s}.", "What does {s} work as?", "In what {a} does {s} work?",
             "Can you tell me the {a} of {s}?", "Do you know what {s} does?"),
    "age": ("How old must a person be for {s}?", "What is the {a} {of} {s}?", "Tell me the {a} {of} {s}.", "From what age is {s} possible?", "Can you tell me the {a} {of} {s}?",
            "Which {a} applies to {s}?", "I would like to know the {a} {of} {s}.", "{S}: what is the {a}?"),
    "colour": ("What {a} {are} {s}?", "Which {a} {do} {s} have?", "What is the {a} of {s}?", "Tell me the {a} of {s}.", "In which {a} {do} {s} come?",
               "Can you tell me the {a} of {s}?", "I would like to know the {a} of {s}.", "{S}: which {a}?"),
    "year": ("When {was} {s} {a}?", "In which year {was} {s} {a}?", "Since when does {s} exist?", "Tell me when {s} {was} {a}.", "Do you know when {s} {was} {a}?",
             "What year {was} {s} {a}?", "Can you tell me the year in which {s} {was} {a}?", "From which year is {s}?"),
    "definition": ("What is {s}?", "What do you mean by {s}?", "Explain {s}.", "How would you describe {s}?", "Can you tell me what {s} is?", "Define {s}.",
                   "What does the name {n} stand for?", "I have heard of {s}. What is it?", "In one sentence, what is {s}?"),
    "deadline": ("By when must {s} {a}?", "What is the time limit for {s} to {a}?", "How quickly must {s} {a}?", "Until when can {s} {a}?", "How long may {s} wait to {a}?",
                 "Tell me by when {s} must {a}.", "What is the deadline for {s} to {a}?", "When at the latest must {s} {a}?"),
    "often": ("How often {be} {s} {a}?", "At what interval {be} {s} {a}?", "Tell me how often {s} {be} {a}.", "How frequently {be} {s} {a}?", "Do you know how often {s} {be} {a}?",
              "Can you say how often {s} {be} {a}?", "How regularly {be} {s} {a}?", "I would like to know how often {s} {be} {a}."),
    "step": ("What is {a} of {s}?", "What do I do in {a} of {s}?", "Tell me {a} of {s}.", "{S}: what is {a}?", "Which action is {a} of {s}?", "What happens in {a} of {s}?",
             "I am busy with {s}. What is {a}?", "Can you give me {a} of {s}?"),
    "list": ("What is listed under {n}?", "Which points belong to {n}?", "List what is given for {n}.", "Name the points under {n}.", "What are the points of {n}?",
             "Can you list the points of {n}?", "Give me the list of {n}.", "Tell me what belongs to {n}."),
    "faq": ("{s}", "A customer asks: {s}", "Please answer this: {s}", "I have a question. {s}", "Someone wants to know: {s}", "Hello! {s}", "{s} Please tell me.",
            "Quick question: {s}", "Can you help me? {s}"),
}

_PRICE = re.compile(r"^(?:unit |list |rental |hire |ticket )?(?:price|cost|fee|rate|charge)s?( (?:per|for|from|in) .+)?$")
_BY_NAME: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("hours", re.compile(r"^(?:opening|business|office) (?:hours|times)$|^hours$|^open$")),
    ("weight", re.compile(r"^weight$")),
    ("place", re.compile(r"^(?:address|location|place|street address|where|venue)$")),
    ("phone", re.compile(r"^(?:phone|telephone|tel|mobile)\.?(?: number)?$")),
    ("email", re.compile(r"^e-?mail(?: address)?$")),
    ("colour", re.compile(r"^colou?rs?$")),
    ("role", re.compile(r"^(?:role|job|position|job title|profession|occupation)$")),
    ("age", re.compile(r"^(?:minimum |lowest )?age$")),
    ("year", re.compile(r"^(?:founded|opened|established|built|created)$")),
)
_HOLDER = re.compile(r"^(?:name|person|contact|contact person|held by|who)$")
_SPAN = re.compile(r"^(?:duration|time|time needed|takes|working time|travel time)$")
_LENGTH = re.compile(r"\b(?:warranty|guarantee|period|life|notice|leave|break|time|contract|stay|season|lifetime|term|limit)\b")


def shape_of(subject: str, attribute: str, value: str) -> str:
    """The name of the frames that fit a fact found in a table or a key/value line."""
    name = attribute.lower()
    if _PRICE.match(name):
        return "price"
    for shape, pattern in _BY_NAME:
        if pattern.match(name) and (shape != "role" or PERSON.match(subject)):
            return shape
    if PERSON.match(value) and (_HOLDER.match(name) or ROLES.search(name)):
        return "holder" if _HOLDER.match(name) else "person"
    if DURATION.match(value) and (_SPAN.match(name) or _LENGTH.search(name)):
        return "span" if _SPAN.match(name) else "length"
    return "amount" if MONEY.search(value) and not is_plural(name) else "plain"


def questions(shape: str, subject: str, attribute: str, *, common: Set[str] = frozenset()) -> tuple[str, ...]:
    """All questions that ask for `attribute` of `subject`, in the fixed order of the shape's frames.

    Args:
        common: words seen in lower case in the corpus; a capital at the start of a subject made of them is not a name.
    """
    name, unit = _unit(attribute)
    asked = subject if shape == "faq" else named(subject, common, article=shape not in ("list", "step"))
    plural, day = is_plural(asked) and asked != subject, WEEKDAYS.match(subject)
    auxiliary, _, verb = name.partition("|")
    slots = {"s": asked, "S": asked[:1].upper() + asked[1:], "n": f'"{subject}"', "a": verb if shape == "often" else lowered(name, common), "u": unit,
             "be": auxiliary, "of": "on" if day else "of", "for": "on" if day else "for", "is": "are" if is_plural(name) else "is", "are": "are" if plural else "is",
             "do": "do" if plural else "does", "cost": "cost" if plural else "costs", "take": "take" if plural else "takes", "was": "were" if plural else "was",
             "q": (match.group(1) or "") if (match := _PRICE.match(name.lower())) else ""}
    filled = (frame.format(**slots) for frame in FRAMES[shape])
    return tuple(dict.fromkeys(text[:1].upper() + text[1:] for text in filled))


def named(subject: str, common: Set[str], *, article: bool = True) -> str:
    """A subject as it stands inside a sentence: "Basic tune-up" becomes "the basic tune-up", "Mill Lane" stays."""
    first, _, rest = subject.partition(" ")
    if DETERMINED.match(subject) or PERSON.match(subject) and first.lower() not in common or WEEKDAYS.match(subject):
        return subject if subject[:1].isdigit() or first.lower() not in common | {"the", "a", "an", "our", "your", "all", "each", "every"} else lowered(subject, common | {first.lower()})
    names = [word for word in rest.split() if word[:1].isupper() and not word.isupper() and word.lower() not in common]
    if names or (first.lower() not in common and not rest and first[:1].isupper()):
        return subject
    text = lowered(subject, common | {first.lower()})
    return text if not article or first.lower().endswith("ing") else f"the {text}"


def lowered(text: str, common: Set[str]) -> str:
    """`text` without the capital of a first word that is no name; abbreviations keep theirs."""
    first = text.partition(" ")[0]
    is_word = first[1:].islower() or len(first) == 1
    return text[:1].lower() + text[1:] if is_word and (first.lower() in common or not common or " " in text) else text


def is_plural(text: str) -> bool:
    """Whether the head noun of a phrase looks plural."""
    head = re.split(r" (?:of|for|with|in|per|on|from|to|at|by) ", text)[0].rpartition(" ")[2].lower()
    return head.endswith("s") and not head.endswith(SINGULAR_S) and len(head) > 3


def _unit(attribute: str) -> tuple[str, str]:
    """A column title like "Weight (kg)" as its name and the unit to ask for."""
    match = re.fullmatch(r"(.+?) ?[(\[]([^()\[\]]{1,12})[)\]]", attribute)
    return (match.group(1), f" in {match.group(2)}") if match else (attribute, "")
