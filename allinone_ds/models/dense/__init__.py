"""Decoders from the backbone's feature maps to numbers per pixel."""
