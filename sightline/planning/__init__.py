"""Memory, communication, pipeline bubble and FLOPs of a run on a mesh, computed without allocating or launching it."""
