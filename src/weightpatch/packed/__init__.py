"""Prompts packed into one row, and a model's single layers called by hand on such rows."""
