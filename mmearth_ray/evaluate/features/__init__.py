"""Encoders that are judged, how data sets are fed to them, and their features, computed once."""
