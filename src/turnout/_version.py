"""The version of turnout: the one place where it is written down (the build reads this file)."""

__version__ = "0.1.0"
