"""A call of one op a file; cases/op_calls.py collects them."""
