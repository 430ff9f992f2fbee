"""Metrics and losses of installed packages."""
