"""What the tests share: backends, inputs, comparisons, models and oracles."""
