"""The backends that docs/write_a_backend.md writes, as a package of their own."""

__version__ = "0.1.0"
