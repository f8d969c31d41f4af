"""Grouping of tokens: components, and clusters."""

from .connected_components import connected_components

__all__ = ["connected_components"]
