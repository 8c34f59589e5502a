"""Memory, FLOPs, collectives and time of a run on devices that this machine does not need to have."""
