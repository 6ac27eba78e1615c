"""Edits as values: what they change, how they are put on a model and taken back, how they are saved."""
