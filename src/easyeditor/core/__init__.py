"""The mathematics, once."""
