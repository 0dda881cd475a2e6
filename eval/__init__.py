"""Evaluation of published checkpoints, and the reports made from it."""
