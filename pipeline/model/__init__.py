"""Models: loading."""
