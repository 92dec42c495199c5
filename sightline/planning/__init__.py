"""Memory, traffic, waiting and arithmetic of a run on a mesh, calculated without allocating or starting anything."""
