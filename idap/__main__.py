"""``python -m idap`` does what the command ``idap`` does."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
