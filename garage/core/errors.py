"""The one exception meant for people.

A `UserError` says what is wrong, where, and what to do about it. It becomes exit code 2 on the command line and a 4xx answer
over HTTP. Anything else that escapes is our fault: exit code 1, HTTP 500.
"""


class UserError(Exception):
    """A mistake the person can fix.

    Args:
        message: what is wrong and where, with the offending value.
        remedy: one sentence saying what to do next.
    """

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.args[0]}\n  remedy: {self.remedy}"


def needs_extra(package: str, extra: str) -> UserError:
    """The error for an optional dependency that is not installed."""
    return UserError(f"this needs the package '{package}', which is not installed", remedy=f"pip install 'llm-garage[{extra}]'")
