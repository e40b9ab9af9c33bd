"""The version, in a file that importing does nothing else with."""

__version__ = "0.1.0"
