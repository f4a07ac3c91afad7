"""``python -m ringfence``."""

from ringfence.cli import entry

entry()
