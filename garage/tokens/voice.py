"""How a model reads and speaks: its tokenizer and its chat template, which belong together and travel together."""

from dataclasses import dataclass
from pathlib import Path

from garage.tokens.chat import Chat
from garage.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class Voice:
    """A tokenizer and the chat template that is written in its control tokens."""

    tokenizer: Tokenizer
    chat: Chat

    @classmethod
    def load(cls, directory: Path) -> "Voice":
        """The voice of a Hub directory.

        Raises:
            UserError: a file is missing or damaged, or there is no chat template.
        """
        tokenizer = Tokenizer.load(directory)
        return cls(tokenizer, Chat.load(directory, tokenizer))

    def save(self, directory: Path) -> None:
        """The tokenizer's files and the template, as the Hub lays them out."""
        self.tokenizer.save(directory)
        (directory / "chat_template.jinja").write_text(self.chat.template, encoding="utf-8")

    @property
    def facts(self) -> dict[str, object]:
        """What every artifact made with this voice states in its manifest."""
        return {"template_hash": self.chat.hash, "tokenizer_hash": self.tokenizer.hash}

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end an answer or a text."""
        return tuple(dict.fromkeys((*self.chat.stop_ids, *self.tokenizer.eos_ids)))
