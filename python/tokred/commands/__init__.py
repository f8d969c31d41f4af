"""The commands of python -m tokred; a file defines the arguments of some and runs them."""
