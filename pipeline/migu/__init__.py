"""MIGU, magnitude-based gradient updating: the mask itself. Knows only torch and transformers.

`targets` says which linears, `magnitude` records their outputs, `mask` selects the rows to keep,
`shard` applies the selection to a slice of a gradient, `gradient_mask` puts the four together.
"""
