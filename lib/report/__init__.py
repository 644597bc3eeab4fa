"""Curves, pictures and pages that show what pseudo-labels are worth."""
