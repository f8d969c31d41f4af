"""Trying methods on a model of one's own: what they keep of its quality, and what they save."""

from .evaluate import evaluate
from .results import Measure, Result, Row

__all__ = ["Measure", "Result", "Row", "evaluate"]
