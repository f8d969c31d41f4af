"""Trying methods on a model of one's own: what they keep of its quality, and what they save."""

from .profiler import profile
from .quality import evaluate
from .results import Measure, Result, Row
from .speed import benchmark

__all__ = ["Measure", "Result", "Row", "benchmark", "evaluate", "profile"]
