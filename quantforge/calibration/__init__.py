"""Calibration: texts cut into windows, what a model sees on them, and the files that keep it."""
