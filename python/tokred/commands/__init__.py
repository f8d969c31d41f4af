"""The commands of python -m tokred; each file has some, with their arguments and what they do."""
