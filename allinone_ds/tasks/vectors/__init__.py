"""Task kinds that predict one vector per image: attributes, numbers, embeddings."""
