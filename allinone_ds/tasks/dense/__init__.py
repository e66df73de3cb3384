"""Tasks that predict numbers per pixel: depth, surface normals, edges and saliency."""
