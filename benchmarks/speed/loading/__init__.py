"""Loading at scale: start-up and memory with a million files, images per second, and decoders."""
