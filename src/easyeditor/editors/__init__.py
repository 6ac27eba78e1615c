"""Validate, measure, edit, measure, record."""
