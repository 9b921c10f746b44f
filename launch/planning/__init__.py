"""The arithmetic of `seqengine plan`: rates, FLOPs, memory, bytes, time, and the search over meshes."""
