"""What a dataset is about, from a bounded sample."""

import pytest

from garage.core.types import Message, Row
from garage.data.describe import Sampled


def row(n: int, question: str, answer: str) -> Row:
    return Row(str(n), (Message("user", question), Message("assistant", answer)))


def described(rows, size: int = 4000):
    sampled = Sampled(size)
    for each in rows:
        sampled.see(each)
    return sampled.describe()


def test_languages_subjects_and_variety() -> None:
    english = [row(n, f"How tall is tower number {n}?", f"It is {n} metres tall, and the view from there is wide.") for n in range(80)]
    german = [row(n, f"Wie lang ist die Brücke {n}?", f"Die Brücke ist {n} Meter lang und steht über dem Fluss.") for n in range(10)]
    about = described(english + german)
    assert dict(about.languages) == {"en": pytest.approx(80 / 90), "de": pytest.approx(10 / 90)} and about.sample == 90
    assert any("brücke" in name for name, _ in about.subjects) and not any("tower" in name for name, _ in about.subjects)
    words = [f"{first}{second}" for first in ("red", "old", "long", "deep") for second in ("wood", "land", "stone", "water")]
    varied = [row(n, "Which?", " ".join(words[(n * k) % 16] for k in range(1, 12))) for n in range(16)]
    assert about.variety < 0.05 and described(varied).variety > 0.5, "rows from one mould repeat themselves"


def test_the_sample_is_bounded_and_each_row_as_likely() -> None:
    hits = 0
    for start in range(40):
        sampled = Sampled(50)
        for n in range(500):
            sampled.see(Row(str(n + start)))
        assert len(sampled._rows) == 50
        hits += sum(int(each.id) - start < 250 for each in sampled._rows)
    assert 850 <= hits <= 1150, "half of the sample is from the first half"


def test_nothing_is_described_as_nothing() -> None:
    assert described([]).variety == 1.0 and described([]).languages == ()
