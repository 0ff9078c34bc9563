"""Evaluation: models side by side on text, in figures and reports."""
