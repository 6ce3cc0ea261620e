"""Shards: MMEarth tiles as Parquet files with a manifest, made from a release or from the procedural Earth."""
