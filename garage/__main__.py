"""`python -m garage` is the `garage` command."""

from garage.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
