"""Engines: what shards and steps the model."""
