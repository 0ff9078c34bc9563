"""Conversion: what an output holds, which tensor gets which codec, rows from the source to the output."""
