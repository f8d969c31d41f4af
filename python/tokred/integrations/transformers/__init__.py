"""transformers: its attention on tokred's kernels, vision models that merge tokens, decoders that
choose keys, and what a packed cache hands to them."""
