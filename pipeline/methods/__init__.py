"""What keeps knowledge while a model learns: one file a method (docs/methods.md)."""
