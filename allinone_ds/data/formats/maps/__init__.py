"""Targets with a value per pixel: how stored numbers become depths, normals, edges and salient pixels, and a format."""
