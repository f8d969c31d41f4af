"""A call of linear_assignment."""

from ..sizes import random

CALLS = {"linear_assignment": lambda s: (random(s.b, s.n, s.m), True, False)}
