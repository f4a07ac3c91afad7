"""The version, alone in a module so that reading it imports nothing."""

VERSION = "0.1.0"
