"""The procedural Earth: a world of latent fields that are pure functions of (seed, place, time), and the sensors that see it.

`noise` the fields' building blocks | `climate` the globe: elevation, weather, biome, ecoregion | `landscape` one tile at
10 m: terrain, rivers, parcels, towns, cover | `optics` Sentinel-2 | `radar` Sentinel-1 | `maps` ASTER, canopy, land cover.
"""
