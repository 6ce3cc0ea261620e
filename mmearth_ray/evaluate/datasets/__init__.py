"""Labelled data sets: one form for all, and what converts published forms to it."""
