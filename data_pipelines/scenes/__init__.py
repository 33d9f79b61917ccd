"""Captioned vector scenes: sampling, drawing, and checking images against their captions."""
