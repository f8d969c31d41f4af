"""Grouping of tokens, in plain torch."""

from .connected_components import connected_components

__all__ = ["connected_components"]
