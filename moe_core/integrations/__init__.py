"""Bridges to other libraries. Each one is imported by its user, never by the core."""
