"""Tasks whose losses come from one forward: balanced at the backbone, or at the features that the heads read."""
